"""Modular functions of a graph: log p(G) = sum_j f(j, Pa(j)), a sum of local terms over the nodes.

Scores of data (BGe, BDeu, BIC), structure priors and a language model's edge prior all have this form, so the change
that one edge i -> j makes is f(j, Pa + i) - f(j, Pa): two look-ups. Parents are a bit mask, sum_i A[i, j] 2^i. Values
are float64 nats; -inf forbids a parent set, and no log-value is NaN or +inf.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from retrodict.errors import InputError
from retrodict.numerics import NEG_INF
from retrodict.targets.algebra import temper

MOST_TABLE = 14
"""Nodes up to which every parent set of every node is tabulated (14 * 2^14 numbers, 1.8 MB)."""
FRESH = 4096
"""New entries a cache holds apart before it sorts them in."""
MOST_MASK = 57
"""Nodes up to which a child and its parents' mask fit one 64-bit key."""

Local = Callable[[Int[Tensor, " n"], Int[Tensor, " n"]], Float[Tensor, " n"]]
"""A batched local term: children and parent masks to float64 nats."""


@runtime_checkable
class Modular(Protocol):
    """A sum of local terms over d nodes."""

    @property
    def d(self) -> int: ...
    @property
    def version(self) -> str: ...

    def gather(self, child: Int[Tensor, " n"], parents: Int[Tensor, " n"]) -> Float[Tensor, " n"]: ...


class LocalTable:
    """Every local term, in a table: ``table[j, mask]``; entries whose mask holds j itself are -inf and never asked."""

    def __init__(self, table: Float[Tensor, "d masks"], version: str) -> None:
        if table.shape[1] != 2 ** table.shape[0]:
            raise InputError(f"a local table of {table.shape[0]} nodes has {2 ** table.shape[0]} parent sets a node, "
                             f"not {table.shape[1]}")  # fmt: skip
        table = table.double()
        if bool(table.isnan().any()) or bool((table == torch.inf).any()):
            raise InputError("a local score is NaN or +inf; scores are finite nats, or -inf where forbidden")
        self.table, self.version, self.d = _without_self(table), version, len(table)

    def gather(self, child: Int[Tensor, " n"], parents: Int[Tensor, " n"]) -> Float[Tensor, " n"]:
        """One look-up a row."""
        return self.table[child, parents]


class LocalCache:
    """Local terms computed when first asked, in batches, and kept: for graphs too large for a table."""

    def __init__(self, d: int, local: Local, version: str) -> None:
        if d > MOST_MASK:
            raise InputError(f"{d} variables; at most {MOST_MASK} fit a parent mask")
        self.d, self.version, self.local = d, version, local
        self.old, self.fresh = Known.none(), Known.none()  # few are fresh, so that adding to them is cheap

    def gather(self, child: Int[Tensor, " n"], parents: Int[Tensor, " n"]) -> Float[Tensor, " n"]:
        """Look-ups; what is missing is computed once for all rows that ask for it."""
        key, back = torch.unique(child * 2**self.d + parents, return_inverse=True)
        value = torch.where(self.old.has(key), self.old.look(key), self.fresh.look(key))
        lost = ~(self.old.has(key) | self.fresh.has(key))
        if bool(lost.any()):
            new = key[lost]
            value[lost] = self.local(new // 2**self.d, new % 2**self.d).double()
            self.fresh = self.fresh.joined(new, value[lost])
            if len(self.fresh.keys) > FRESH + len(self.old.keys) // 8:
                self.old, self.fresh = self.old.joined(self.fresh.keys, self.fresh.values), Known.none()
        return value[back]


@dataclass(frozen=True)
class Known:
    """Sorted keys and their values."""

    keys: Int[Tensor, " k"]
    values: Float[Tensor, " k"]

    @staticmethod
    def none() -> Known:
        """Nothing but a key that is never asked."""
        return Known(torch.tensor([-1]), torch.zeros(1, dtype=torch.float64))

    def has(self, key: Int[Tensor, " n"]) -> Bool[Tensor, " n"]:
        """Whether each key is here."""
        return self.keys[self._at(key)] == key

    def look(self, key: Int[Tensor, " n"]) -> Float[Tensor, " n"]:
        """The values; those of keys that are not here mean nothing."""
        return self.values[self._at(key)]

    def joined(self, keys: Int[Tensor, " m"], values: Float[Tensor, " m"]) -> Known:
        """With more keys, none of which is here."""
        both, order = torch.cat([self.keys, keys]).sort(stable=True)
        both, count = torch.unique_consecutive(both, return_counts=True)
        return Known(both, torch.cat([self.values, values])[order][count.cumsum(0) - 1])

    def _at(self, key: Int[Tensor, " n"]) -> Int[Tensor, " n"]:
        return torch.searchsorted(self.keys, key).clamp_max(len(self.keys) - 1)


def tabulate(score: Modular) -> Float[Tensor, "d masks"]:
    """The full table of a modular function (d <= ``MOST_TABLE``)."""
    if isinstance(score, LocalTable):
        return score.table
    d = score.d
    if d > MOST_TABLE:
        raise InputError(f"{d} variables have too many parent sets to tabulate (at most {MOST_TABLE} variables); "
                         "use a method that asks one by one, such as structure")  # fmt: skip
    child, mask = torch.meshgrid(torch.arange(d), torch.arange(2**d), indexing="ij")
    table = torch.full((d, 2**d), NEG_INF, dtype=torch.float64)
    proper = (mask >> child) & 1 == 0
    table[proper] = score.gather(child[proper], mask[proper])
    return table


def modular(d: int, local: Local, version: str) -> Modular:
    """A modular function from its batched local term: a table while one fits, else a cache filled when asked."""
    cache = LocalCache(d, local, version)
    return LocalTable(tabulate(cache), version) if d <= MOST_TABLE else cache


def combined(factors: Mapping[str, Modular], betas: Mapping[str, float] | None = None) -> Modular:
    """sum_f beta_f log f(G) as one modular function; what a factor forbids stays forbidden unless its beta is 0."""
    if not factors:
        raise InputError("a density over graphs needs at least one factor, such as a score or a prior")
    betas = betas or {}
    sizes = {f.d for f in factors.values()}
    if len(sizes) > 1:
        raise InputError(f"factors over different numbers of variables: {', '.join(map(str, sorted(sizes)))}")

    def local(child: Int[Tensor, " n"], parents: Int[Tensor, " n"]) -> Float[Tensor, " n"]:
        total = torch.zeros(len(child), dtype=torch.float64)
        for name, f in factors.items():
            total = total + temper(f.gather(child, parents), betas.get(name, 1.0))
        return total

    version = "+".join(f"{betas.get(n, 1.0):g}*{f.version}" for n, f in factors.items())
    return modular(next(iter(sizes)), local, version)


def _without_self(table: Float[Tensor, "d masks"]) -> Float[Tensor, "d masks"]:
    child, mask = torch.arange(len(table))[:, None], torch.arange(table.shape[1])
    return table.masked_fill((mask >> child) & 1 == 1, NEG_INF)
