"""Replay: good trajectories kept for each problem, to be learned from again without paying for their rewards.

Rows carry the untempered values of the target's terms, so betas and temperatures may change between draws:

    log gamma(z) = sum_f beta_f log f(z)   is a sum over what is stored.

A buffer of a problem holds each object once. Drawn with replacement, row i with probability proportional to

    uniform   1
    reward    exp(alpha log gamma_i)
    recency   1 / (1 + number of the problem's rows that came at a later step)

Source: Hu et al. 2024 (gfn-lm-tuning): a heap a prompt, near duplicates by edit distance. Bias: off-policy objectives
have the same optimum from any samples, but a buffer of the best rows shows few lengths and few modes, so replay is a
part of a batch and never all of it.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from retrodict.errors import InputError, nearest
from retrodict.numerics import NEG_INF, at_end, invert_cdf
from retrodict.particles_io import pack_keys, read_tensors, unpack_keys, write_tensors
from retrodict.records import Rollouts, cat_rollouts
from retrodict.records import _ROWS as ROWS
from retrodict.training.distance import DISTANCES, Distance, edit_distance

Priority = str
"""One of PRIORITIES; checked where a buffer is made, so that a recipe's typo gets a sentence."""

PRIORITIES: tuple[str, ...] = ("uniform", "reward", "recency")

Key = tuple[int, ...]
Rescore = Callable[[Rollouts], tuple[Rollouts, Tensor]]
"""Rows to the same rows with the terms of now, and their log gamma ``[b]``."""


class _Entry(NamedTuple):
    """An object on its way into a buffer: which pooled row its path comes from, and which its term values."""

    path: int
    terms: int
    log_gamma: float
    step: int


@dataclass(frozen=True)
class _Shelf:
    """The rows of one problem, in the order they came, on the CPU."""

    rows: Rollouts
    keys: tuple[Key, ...]
    log_gamma: tuple[float, ...]
    steps: tuple[int, ...]


class Replay:
    """A buffer of trajectories for each problem.

    Args:
        capacity: rows a problem. Over it the smallest log gamma leaves, or the oldest under ``recency``.
        priority: ``uniform | reward | recency``, see above.
        alpha: sharpness of ``reward``.
        distance: for near duplicates, between the keys of two objects; edit distance where a tolerance is given.
        tolerance: of two objects with distance < tolerance * (len a + len b), only the one of larger log gamma
            stays; 0 compares nothing.
        model: whose trajectories these are, and ``target`` what their terms are of; a file remembers both.
    """

    def __init__(
        self,
        capacity: int = 50,
        *,
        priority: Priority = "uniform",
        alpha: float = 1.0,
        distance: Distance | None = None,
        tolerance: float = 0.0,
        model: str = "",
        target: str = "",
    ) -> None:
        if capacity < 1:
            raise InputError(f"a replay buffer needs a capacity of at least 1 row a problem, not {capacity}")
        if priority not in PRIORITIES:
            raise InputError(f"unknown priority {priority!r}{nearest(priority, PRIORITIES)}")
        if not 0 <= alpha < math.inf:
            raise InputError(f"alpha must be 0 or more, not {alpha:g}")
        if alpha != 1.0 and priority != "reward":
            raise InputError(f"alpha sharpens priority 'reward'; under {priority!r} leave it out")
        if not 0 <= tolerance < 1:
            raise InputError(f"tolerance is a share of two lengths, at least 0 and below 1, not {tolerance:g}")
        if distance is not None and not tolerance:
            raise InputError("a distance does nothing at tolerance 0; give tolerance=0.25, or no distance")
        self.capacity, self.priority, self.alpha, self.tolerance = capacity, priority, alpha, tolerance
        self.distance = distance or edit_distance
        self.model, self.target = model, target
        self._shelves: dict[int, _Shelf] = {}

    def __len__(self) -> int:
        return sum(len(s.keys) for s in self._shelves.values())

    def sizes(self) -> dict[int, int]:
        """Rows of each problem that has any."""
        return {p: len(self._shelves[p].keys) for p in sorted(self._shelves)}

    def staleness(self, step: int) -> float:
        """Mean number of steps since a row was last added; 0 for an empty buffer."""
        return sum(step - x for s in self._shelves.values() for x in s.steps) / max(len(self), 1)

    # -- in -------------------------------------------------------------------------------------------------------

    def add(self, rollouts: Rollouts, log_gamma: Float[Tensor, " b"], keys: Sequence[Key], step: int = 0) -> int:
        """Put rows with their terms into their problems' buffers; gives the number of objects that are new there.

        An object that is there already gets the new terms, log gamma and step. Its path stays with the ``log_b`` it was
        first drawn with, unless it was reached by another path, which then replaces it. Rows with log gamma = -inf are
        left out (one that was there leaves).

        Args:
            rollouts: rows of any mix of problems, with the untempered terms that a replay is to give back.
            log_gamma: of each object in nats, P_B included: what priorities go by.
            keys: identity of each object, ``space.keys(rollouts)``.
            step: the training step, for ``recency`` and ``staleness``.

        Raises:
            InputError: log gamma is NaN or +inf, or the lengths differ.
        """
        values = log_gamma.detach().double().tolist()
        if not len(rollouts) == len(values) == len(keys):
            raise InputError(f"{len(rollouts)} rows, {len(values)} log gammas and {len(keys)} keys; give one of each")
        bad = [i for i, v in enumerate(values) if math.isnan(v) or v == math.inf]
        if bad:
            raise InputError(f"log gamma of row {bad[0]} is {values[bad[0]]}; replay takes finite values and -inf")
        rows, taken = rollouts.to("cpu"), 0
        for p in dict.fromkeys(rows.problem.tolist()):
            index = (rows.problem == p).nonzero().squeeze(1)
            at = index.tolist()
            taken += self._put(p, rows.take(index), [keys[i] for i in at], [values[i] for i in at], [step] * len(at))
        return taken

    def rescore(self, score: Rescore) -> None:
        """Give every row the terms and the log gamma of now, after betas or a factor changed.

        ``score`` is ``lambda rows: (rows := target.terms(rows), target.log_gamma(rows))``, or with ``every_prefix``:
        a target scores again only the terms whose version changed.
        """
        shelves, self._shelves = self._shelves, {}
        for p, shelf in shelves.items():
            rows, log_gamma = score(shelf.rows)
            values = log_gamma.detach().double().tolist()
            if any(math.isnan(v) for v in values):
                self._shelves = shelves
                raise InputError(f"log gamma of a replayed row of problem {p} is NaN")
            self._put(p, rows.to("cpu"), shelf.keys, values, shelf.steps)

    def _put(self, p: int, new: Rollouts, keys: Sequence[Key], values: Sequence[float], steps: Sequence[int]) -> int:
        old = self._shelves.get(p)
        pool = new if old is None else joined([old.rows, new])
        held = () if old is None else zip(old.keys, old.log_gamma, old.steps, strict=True)
        entries = {key: _Entry(i, i, value, step) for i, (key, value, step) in enumerate(held)}
        known, first = set(entries), len(entries)
        for i, (key, value, step) in enumerate(zip(keys, values, steps, strict=True), start=first):
            self._enter(entries, pool, key, _Entry(i, i, value, step))
        for key in self._surplus(entries):
            del entries[key]
        self._shelves.pop(p, None)
        if entries:
            self._shelves[p] = _shelf(pool, entries)
        return len(entries.keys() - known)

    def _enter(self, entries: dict[Key, _Entry], pool: Rollouts, key: Key, e: _Entry) -> None:
        was = entries.get(key)
        if e.log_gamma == NEG_INF:
            entries.pop(key, None)
        elif was is not None:
            entries[key] = e._replace(path=was.path) if _path(pool, was.path) == _path(pool, e.path) else e
        else:
            near = [k for k in entries if self._near(k, key)] if self.tolerance else []
            if all(entries[k].log_gamma < e.log_gamma for k in near):
                for k in near:
                    del entries[k]
                entries[key] = e

    def _near(self, a: Key, b: Key) -> bool:
        return self.distance(a, b) < self.tolerance * (len(a) + len(b))

    def _surplus(self, entries: Mapping[Key, _Entry]) -> list[Key]:
        """What must leave: the smallest log gamma (the older of equals), or the oldest (the smaller of equals)."""

        def rank(key: Key) -> tuple[float, float, int]:
            e = entries[key]
            return (e.step, e.log_gamma, e.path) if self.priority == "recency" else (e.log_gamma, e.step, e.path)

        return sorted(entries, key=rank)[: max(0, len(entries) - self.capacity)]

    # -- out ------------------------------------------------------------------------------------------------------

    def draw(self, problem: Int[Tensor, " b"], gen: torch.Generator) -> tuple[Rollouts, Int[Tensor, " r"]]:
        """One row for each entry of ``problem`` whose buffer has any, with replacement; and which entries they serve.

        Rows come in the order of ``problem``, with ``behaviour={"source": "replay"}`` and the ``log_q`` and ``log_b``
        of when they were first drawn: score them again before an objective sees them. They may be none at all.
        """
        u = torch.rand(len(problem), generator=gen, dtype=torch.float64, device=gen.device).cpu()
        wanted = problem.cpu()
        parts, served = [], []
        for p in dict.fromkeys(wanted.tolist()):
            if p in self._shelves:
                at = (wanted == p).nonzero().squeeze(1)
                pick = invert_cdf(self._weights(self._shelves[p])[None], u[at][None]).squeeze(0)
                parts.append(self._shelves[p].rows.take(pick))
                served.append(at)
        if not parts:
            return _no_rows().to(problem.device), torch.zeros(0, dtype=torch.long, device=problem.device)
        which, order = torch.cat(served).sort()
        rows = _trimmed(joined(parts).take(order))
        return replace(rows, behaviour={"source": "replay"}).to(problem.device), which.to(problem.device)

    def _weights(self, shelf: _Shelf) -> Float[Tensor, " k"]:
        """Unnormalised probabilities of a problem's rows."""
        if self.priority == "reward":
            value = torch.tensor(shelf.log_gamma, dtype=torch.float64)
            return (self.alpha * (value - value.max())).exp()
        if self.priority == "recency":
            steps = torch.tensor(shelf.steps)
            return 1 / (1 + (steps > steps[:, None]).sum(1)).double()
        return torch.ones(len(shelf.keys), dtype=torch.float64)

    # -- on disk --------------------------------------------------------------------------------------------------

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the buffer to one safetensors file, whole or not at all. Draws go on as if it had never been saved."""
        groups: dict[str, list[_Shelf]] = {}
        for p in sorted(self._shelves):
            groups.setdefault(_layout(self._shelves[p].rows), []).append(self._shelves[p])
        tensors: dict[str, Tensor] = {}
        for g, shelves in enumerate(groups.values()):
            rows = cat_rollouts([s.rows for s in shelves])  # of one layout, so that nothing is dropped
            tensors |= {f"{g}.rows.{f}": getattr(rows, f) for f in ROWS}
            tensors |= {f"{g}.terms.{k}": v for k, v in rows.terms.items()}
            tensors[f"{g}.log_gamma"] = torch.tensor([v for s in shelves for v in s.log_gamma], dtype=torch.float64)
            tensors[f"{g}.steps"] = torch.tensor([x for s in shelves for x in s.steps])
        named = next((name for name, d in DISTANCES.items() if d is self.distance), None)
        meta: dict[str, Any] = {"model": self.model, "target": self.target, "capacity": self.capacity}
        meta |= {"priority": self.priority, "alpha": self.alpha, "tolerance": self.tolerance, "distance": named}
        meta["versions"] = [dict(shelves[0].rows.versions) for shelves in groups.values()]
        pack_keys([key for shelves in groups.values() for s in shelves for key in s.keys], tensors, meta)
        return write_tensors(path, "replay buffer", tensors, meta)

    @staticmethod
    def load(
        path: str | os.PathLike[str], *, model: str, target: str, distance: Distance | None = None
    ) -> Replay:  # fmt: skip
        """Read what :meth:`save` wrote.

        ``distance`` is only for a buffer that had one of the caller's own.

        Raises:
            InputError: not such a file, a damaged one, or one of another model or target (both are named).
        """
        tensors, meta = read_tensors(path, "replay buffer", "Replay.save")
        for what, mine in (("model", model), ("target", target)):
            if meta.get(what) != mine:
                raise InputError(f"{path} holds rows of {what} {meta.get(what)!r}, and this run's {what} is {mine!r}; "
                                 "give the file of this run, or start with an empty buffer")  # fmt: skip
        if meta.get("tolerance") and meta.get("distance") not in DISTANCES and distance is None:
            raise InputError(f"{path} was made with a distance of its own; give it as distance=")
        try:
            made = DISTANCES.get(meta["distance"], distance) if meta["tolerance"] else None
            out = Replay(meta["capacity"], priority=meta["priority"], alpha=meta["alpha"], distance=made,
                         tolerance=meta["tolerance"], model=model, target=target)  # fmt: skip
            out._shelves = _shelves_of(tensors, meta)
        except (KeyError, IndexError, TypeError, ValueError, RuntimeError) as e:
            raise InputError(f"{path} does not hold a consistent replay buffer ({e}); save it again") from None
        return out


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


def _path(rows: Rollouts, i: int) -> list[Any]:
    return rows.moves[i, : int(rows.n[i])].tolist()


def _shelf(pool: Rollouts, entries: Mapping[Key, _Entry]) -> _Shelf:
    kept = list(entries.values())
    terms = torch.tensor([e.terms for e in kept])
    rows = pool.take(torch.tensor([e.path for e in kept]))
    rows = replace(rows, terms={f: v[terms] for f, v in pool.terms.items()}, behaviour={})
    return _Shelf(_trimmed(rows), tuple(entries), tuple(e.log_gamma for e in kept), tuple(e.step for e in kept))


def _trimmed(rows: Rollouts) -> Rollouts:
    """The rows, no wider than the longest of them."""
    t = int(rows.n.max()) if len(rows) else 0
    width = {f: t + 1 if f in ("can_stop", "log_stop", "log_b") else t for f in ROWS if getattr(rows, f).dim() > 1}
    terms = {f: v[:, : t + 1] if v.dim() > 1 else v for f, v in rows.terms.items()}
    return replace(rows, **{f: getattr(rows, f)[:, :w] for f, w in width.items()}, terms=terms)


def _no_rows() -> Rollouts:
    long, real = torch.zeros(0, dtype=torch.long), torch.zeros(0, 1)
    return Rollouts(problem=long, moves=long[:, None][:, :0], kind=torch.zeros(0, 0, dtype=torch.int8), n=long, stop=long,
                    can_stop=real.bool(), log_q=real[:, :0], log_stop=real[:, :, None], log_b=real,
                    log_pb=real[:, :0], behaviour={"source": "replay"})  # fmt: skip


def _layout(rows: Rollouts) -> str:
    """What must agree for rows to share tensors in a file."""
    sizes = {f: (v.dim(), str(v.dtype), tuple(v.shape[2:])) for f, v in sorted(rows.terms.items())}
    sizes |= {f" {f}": (str(getattr(rows, f).dtype), tuple(getattr(rows, f).shape[2:])) for f in ROWS}
    return repr((sizes, sorted(rows.versions.items())))


def _shelves_of(tensors: Mapping[str, Tensor], meta: Mapping[str, Any]) -> dict[int, _Shelf]:
    keys, out = unpack_keys(tensors, meta), {}
    for g, versions in enumerate(meta["versions"]):

        def under(prefix: str, g: int = g) -> dict[str, Tensor]:
            head = f"{g}.{prefix}."
            return {k.removeprefix(head): v for k, v in tensors.items() if k.startswith(head)}

        rows = Rollouts(**under("rows"), terms=under("terms"), versions=versions)
        _check(rows)
        values, steps = (tensors[f"{g}.{x}"].tolist() for x in ("log_gamma", "steps"))
        mine, keys = keys[: len(rows)], keys[len(rows) :]
        held = list(zip(mine, values, steps, strict=True))
        for p in dict.fromkeys(rows.problem.tolist()):
            index = (rows.problem == p).nonzero().squeeze(1)
            out[p] = _Shelf(_trimmed(rows.take(index)), *zip(*(held[i] for i in index.tolist()), strict=True))
    if keys:
        raise ValueError(f"{len(keys)} keys too many")
    return out


def _check(rows: Rollouts) -> None:
    b, t = rows.moves.shape[:2]
    wide = {"kind": t, "log_q": t, "log_pb": t, "can_stop": t + 1, "log_stop": t + 1, "log_b": t + 1}
    wrong = [f for f in ROWS if len(getattr(rows, f)) != b] + [f for f, v in rows.terms.items() if len(v) != b]
    wrong += [f for f, w in wide.items() if getattr(rows, f).shape[1] != w]
    if wrong or (b and not 0 <= int(rows.n.min()) <= int(rows.n.max()) <= t):
        raise ValueError(f"{', '.join(wrong) or 'n'} does not fit the other tensors")
