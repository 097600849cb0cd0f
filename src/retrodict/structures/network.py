"""Bayesian networks with tables, from BIF files (.bif or .bif.gz): known graphs to draw data from.

Reads the part of the Bayesian Interchange Format that the bnlearn repository uses: discrete variables, ``table`` and
one row a parent configuration, ``default`` rows. Properties are skipped.
"""

from __future__ import annotations

import gzip
import os
import re
import zlib
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from retrodict.errors import InputError
from retrodict.numerics import invert_cdf
from retrodict.rng import generator
from retrodict.structures.data import Table

VARIABLE = re.compile(r"variable\s+([^\s{]+)\s*\{[^}]*?type\s+discrete\s*\[\s*\d+\s*\]\s*\{([^}]*)\}[^}]*\}")
PROBABILITY = re.compile(r"probability\s*\(([^)]*)\)\s*\{([^}]*)\}")
ENTRY = re.compile(r"(?:\(([^)]*)\)|(table|default))\s*([^;]*);")
OFF = 1e-3
"""A row of probabilities may sum to 1 up to this (files round); it is normalised."""


@dataclass(frozen=True)
class Network:
    """Variables, their levels, parents (in the file's order) and tables ``[parents' states..., levels]``."""

    names: tuple[str, ...]
    levels: tuple[tuple[str, ...], ...]
    parents: tuple[tuple[int, ...], ...]
    tables: tuple[Tensor, ...]

    @cached_property
    def graph(self) -> Bool[Tensor, "d d"]:
        """Adjacency: [i, j] is i -> j."""
        a = torch.zeros(len(self.names), len(self.names), dtype=torch.bool)
        for j, pa in enumerate(self.parents):
            a[list(pa), j] = True
        return a

    @property
    def edges(self) -> tuple[tuple[str, str], ...]:
        """(cause, effect) pairs."""
        return tuple((self.names[i], self.names[j]) for j, pa in enumerate(self.parents) for i in pa)

    @cached_property
    def order(self) -> tuple[int, ...]:
        """Parents before children."""
        found: list[int] = []
        while len(found) < len(self.names):
            ready = [j for j, pa in enumerate(self.parents) if j not in found and set(pa) <= set(found)]
            if not ready:
                raise InputError("the network has a cycle")
            found += ready
        return tuple(found)

    def sample(self, n: int, seed: int) -> Table:
        """n independent rows, parents first."""
        gen = generator(seed)
        values = torch.zeros(n, len(self.names), dtype=torch.int64)
        for j in self.order:
            p = self.tables[j][tuple(values[:, i] for i in self.parents[j])].expand(n, -1)
            values[:, j] = invert_cdf(p, torch.rand(n, 1, generator=gen, dtype=torch.float64))[:, 0]
        return Table(values, self.names, self.levels)


def read_bif(path: str | os.PathLike[str]) -> Network:
    """A network from a .bif or .bif.gz file."""
    path = Path(path)
    try:
        raw = path.read_bytes()
        text = (gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw).decode()
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise InputError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from None
    text = re.sub(r"property[^;]*;", "", re.sub(r"//[^\n]*", "", text))
    found = VARIABLE.findall(text)
    if not found:
        raise InputError(
            f"{path.name}: no variables found; a BIF file has 'variable NAME {{ type discrete [k] {{...}}; }}'"
        )
    names = tuple(name for name, _ in found)
    levels = tuple(tuple(x.strip() for x in told.split(",")) for _, told in found)
    parents: dict[int, tuple[int, ...]] = {}
    tables: dict[int, Tensor] = {}
    for head, body in PROBABILITY.findall(text):
        words = [w for w in re.split(r"[\s|,]+", head.strip()) if w]
        if not words:
            raise InputError(f"{path.name}: a probability of nothing; write 'probability ( NAME ) {{ table ...; }}'")
        unknown = [w for w in words if w not in names]
        if unknown:
            raise InputError(f"{path.name}: a probability of {unknown[0]!r}, which is no variable")
        j, *pa = map(names.index, words)
        parents[j], tables[j] = tuple(pa), _table(path.name, names[j], body, [levels[i] for i in pa], len(levels[j]))
    lost = [name for j, name in enumerate(names) if j not in tables]
    if lost:
        raise InputError(f"{path.name}: no probability for {lost[0]!r}")
    every = range(len(names))
    return Network(names, levels, tuple(parents[j] for j in every), tuple(tables[j] for j in every))


def _table(file: str, name: str, body: str, given: list[tuple[str, ...]], k: int) -> Float[Tensor, "..."]:
    """One conditional table; every configuration of the parents must have a row."""
    table = torch.full((*map(len, given), k), torch.nan, dtype=torch.float64)
    for states, word, numbers in ENTRY.findall(body):
        try:
            row = torch.tensor([float(x) for x in re.split(r"[\s,]+", numbers.strip()) if x], dtype=torch.float64)
        except ValueError:
            raise InputError(f"{file}: {name!r} has probabilities that are no numbers: {numbers.strip()}") from None
        if word != "table" and row.numel() != k:
            raise InputError(f"{file}: a row of {name!r} has {row.numel()} numbers, not {k}")
        if word == "table":
            if row.numel() != table.numel():
                raise InputError(f"{file}: the table of {name!r} has {row.numel()} numbers, not {table.numel()}")
            table = row.view(table.shape) if not given else row.view(k, *map(len, given)).movedim(0, -1)
        elif word == "default":
            table = torch.where(table.isnan(), row.expand(table.shape), table)
        else:
            at = [x.strip() for x in states.split(",")]
            table[_index(file, name, at, given)] = row
    total = table.sum(-1, keepdim=True)
    if bool(table.isnan().any()) or bool(((total - 1).abs() > OFF).any()):
        raise InputError(f"{file}: the probabilities of {name!r} do not cover every state of its parents, summing to 1")
    return table / total


def _index(file: str, name: str, at: list[str], given: list[tuple[str, ...]]) -> tuple[int, ...]:
    if len(at) != len(given) or any(x not in known for x, known in zip(at, given, strict=False)):
        raise InputError(f"{file}: {name!r} has a row for ({', '.join(at)}), which is no state of its parents")
    return tuple(known.index(x) for x, known in zip(at, given, strict=True))
