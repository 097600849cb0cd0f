"""The rows that a replay buffer holds of one problem: joined, trimmed, and as tensors of a file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from retrodict.numerics import at_end
from retrodict.particles_io import pack_keys, unpack_keys
from retrodict.records import Rollouts, cat_rollouts

Key = tuple[int, ...]
ROWS = tuple(f.name for f in fields(Rollouts) if f.name not in ("terms", "versions", "behaviour"))
MOVES, STATES = ("moves", "kind", "log_q", "log_pb"), ("can_stop", "log_stop", "log_b")
"""What has a column for each move, and what for each state."""


@dataclass(frozen=True)
class Shelf:
    """The rows of one problem in the order they came, on the CPU: identity, log gamma and step of each."""

    rows: Rollouts
    keys: tuple[Key, ...]
    log_gamma: tuple[float, ...]
    steps: tuple[int, ...]


def joined(parts: Sequence[Rollouts]) -> Rollouts:
    """Rows of any origin in one record, with the terms that every part has.

    A term that is whole ``[b]`` in one part and per prefix ``[b, t+1, s]`` in another becomes whole. One whose version
    differs is left out: the target then scores it again.
    """
    first = parts[0]
    versions = {f: v for f, v in first.versions.items() if all(p.versions.get(f) == v for p in parts)}
    same = [f for f in first.terms if all(f in p.terms and _version(p, f) == _version(first, f) for p in parts)]
    whole = {f for f in same if len({p.terms[f].dim() for p in parts}) > 1}

    def alike(p: Rollouts) -> Rollouts:
        terms = {f: p.terms[f] for f in same}
        terms |= {f: at_end(terms[f], p.n, p.stop) for f in whole if terms[f].dim() == 3}
        return replace(p, terms=terms, versions=versions)

    return cat_rollouts([alike(p) for p in parts])


def _version(rows: Rollouts, term: str) -> str | None:
    """Version of a term; that of ``prior.path`` is the prior's."""
    return rows.versions.get(term, rows.versions.get(term.removesuffix(".path")))


def trimmed(rows: Rollouts) -> Rollouts:
    """The rows, no wider than the longest of them."""
    t = int(rows.n.max()) if len(rows) else 0
    cut = {f: getattr(rows, f)[:, :t] for f in MOVES} | {f: getattr(rows, f)[:, : t + 1] for f in STATES}
    terms = {f: v[:, : t + 1] if v.dim() > 1 else v for f, v in rows.terms.items()}
    return replace(rows, **cut, terms=terms)


def no_rows() -> Rollouts:
    """Zero rows, where nothing is known of their shape."""
    none, real = torch.zeros(0, dtype=torch.long), torch.zeros(0, 0)
    return Rollouts(
        problem=none, moves=real.long(), kind=real.to(torch.int8), n=none, stop=none,
        can_stop=torch.zeros(0, 1, dtype=torch.bool), log_q=real, log_stop=torch.zeros(0, 1, 1),
        log_b=torch.zeros(0, 1), log_pb=real,
    )  # fmt: skip


def pack(shelves: Sequence[Shelf]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and JSON of all shelves; those of one layout lie end to end, so that nothing is dropped or cast."""
    groups: dict[str, list[Shelf]] = {}
    for shelf in shelves:
        groups.setdefault(_layout(shelf.rows), []).append(shelf)
    tensors: dict[str, Tensor] = {}
    meta: dict[str, Any] = {"versions": []}
    for g, members in enumerate(groups.values()):
        rows = cat_rollouts([s.rows for s in members])
        tensors |= {f"{g}.rows.{f}": getattr(rows, f) for f in ROWS}
        tensors |= {f"{g}.terms.{f}": v for f, v in rows.terms.items()}
        tensors[f"{g}.log_gamma"] = torch.tensor([v for s in members for v in s.log_gamma], dtype=torch.float64)
        tensors[f"{g}.steps"] = torch.tensor([x for s in members for x in s.steps])
        meta["versions"].append(dict(rows.versions))
    pack_keys([key for members in groups.values() for s in members for key in s.keys], tensors, meta)
    return tensors, meta


def _layout(rows: Rollouts) -> str:
    """What must agree for rows to share tensors."""
    every = {f: getattr(rows, f) for f in ROWS} | {f"term {f}": v for f, v in rows.terms.items()}
    sizes = sorted((f, v.dim(), str(v.dtype), tuple(v.shape[2:])) for f, v in every.items())
    return repr((sizes, sorted(rows.versions.items())))


def unpack(tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> dict[int, Shelf]:
    """The shelves that :func:`pack` took, by problem. Raises ValueError (or KeyError, ...) where they do not fit."""
    keys = unpack_keys(tensors, meta)
    out: dict[int, Shelf] = {}
    for g, versions in enumerate(meta["versions"]):
        terms = _under(tensors, f"{g}.terms.")
        rows = Rollouts(**_under(tensors, f"{g}.rows."), terms=terms, versions=versions, behaviour={})
        _check(rows)
        mine, keys = keys[: len(rows)], keys[len(rows) :]
        values, steps = (tensors[f"{g}.{x}"].tolist() for x in ("log_gamma", "steps"))
        held = list(zip(mine, values, steps, strict=True))
        for p in dict.fromkeys(rows.problem.tolist()):
            index = (rows.problem == p).nonzero().squeeze(1)
            columns = zip(*(held[i] for i in index.tolist()), strict=True)
            out[p] = Shelf(trimmed(rows.take(index)), *columns)
    if keys:
        raise ValueError(f"{len(keys)} keys too many")
    return out


def _under(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}


def _check(rows: Rollouts) -> None:
    b, t = rows.moves.shape[:2]
    wrong = [f for f in ROWS if len(getattr(rows, f)) != b] + [f for f, v in rows.terms.items() if len(v) != b]
    wrong += [f for f in MOVES if getattr(rows, f).shape[1] != t]
    wrong += [f for f in STATES if getattr(rows, f).shape[1] != t + 1]
    if wrong or (b and not 0 <= int(rows.n.min()) <= int(rows.n.max()) <= t):
        raise ValueError(f"{', '.join(wrong) or 'n'} does not fit the other tensors")
