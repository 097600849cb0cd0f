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
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from retrodict.errors import InputError, nearest
from retrodict.numerics import NEG_INF, at_end, invert_cdf
from retrodict.particles_io import read_tensors, write_tensors
from retrodict.policies.guided import GuidedPolicy
from retrodict.protocols import Policy, Space
from retrodict.records import FORCED, FREE, MUST_MOVE, MUST_STOP, PAD, Menu, Rollouts
from retrodict.training.distance import DISTANCES, Distance, edit_distance
from retrodict.training.shelf import Key, Shelf, joined, no_rows, pack, trimmed, unpack

Priority = str
"""One of PRIORITIES; checked where a buffer is made, so that a recipe's typo gets a sentence."""

PRIORITIES: tuple[str, ...] = ("uniform", "reward", "recency")

Rescore = Callable[[Rollouts], tuple[Rollouts, Tensor]]
"""Rows to the same rows with the terms of now, and their log gamma ``[b]``."""


class _Entry(NamedTuple):
    """An object on its way into a buffer: which pooled row its path comes from, and which its term values."""

    path: int
    terms: int
    log_gamma: float
    step: int


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
        self._shelves: dict[int, Shelf] = {}

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
        values = _finite(log_gamma)
        if not len(rollouts) == len(values) == len(keys):
            raise InputError(f"{len(rollouts)} rows, {len(values)} log gammas and {len(keys)} keys; give one of each")
        rows, taken = rollouts.to("cpu"), 0
        for p in dict.fromkeys(rows.problem.tolist()):
            index = (rows.problem == p).nonzero().squeeze(1)
            at = index.tolist()
            taken += self._put(p, rows.take(index), [keys[i] for i in at], [values[i] for i in at], [step] * len(at))
        return taken

    def rescore(self, score: Rescore) -> None:
        """Give every row the terms and the log gamma of now, after betas or a factor changed.

        ``score`` gets the rows of one problem, on the CPU. ``Target.terms`` scores again only the terms whose version
        changed, so that after a change of betas this costs sums.
        """
        scored = [(p, shelf, *score(shelf.rows)) for p, shelf in self._shelves.items()]
        made = [(p, shelf, rows.to("cpu"), _finite(value)) for p, shelf, rows, value in scored]
        self._shelves = {}  # only now that nothing can fail
        for p, shelf, rows, values in made:
            self._put(p, rows, shelf.keys, values, shelf.steps)

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
        which, order = torch.cat(served or [torch.zeros(0, dtype=torch.long)]).sort()
        rows = trimmed(joined(parts).take(order)) if parts else no_rows()
        return replace(rows, behaviour={"source": "replay"}).to(problem.device), which.to(problem.device)

    def _weights(self, shelf: Shelf) -> Float[Tensor, " k"]:
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
        tensors, meta = pack([self._shelves[p] for p in sorted(self._shelves)])
        named = next((name for name, d in DISTANCES.items() if d is self.distance), None)
        meta |= {"model": self.model, "target": self.target, "capacity": self.capacity, "distance": named}
        meta |= {"priority": self.priority, "alpha": self.alpha, "tolerance": self.tolerance}
        return write_tensors(path, "replay buffer", tensors, meta)

    @staticmethod
    def load(path: str | os.PathLike[str], *, model: str, target: str, distance: Distance | None = None) -> Replay:
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
        if meta.get("tolerance") and meta.get("distance") is None and distance is None:
            raise InputError(f"{path} was made with a distance of its own; give it as distance=")
        try:
            settings = {k: meta[k] for k in ("capacity", "priority", "alpha", "tolerance")}
            named = DISTANCES[meta["distance"]] if meta["distance"] else distance
            out = Replay(**settings, distance=named if settings["tolerance"] else None, model=model, target=target)
            out._shelves = unpack(tensors, meta)
        except (KeyError, IndexError, TypeError, ValueError, RuntimeError) as e:
            raise InputError(f"{path} does not hold a consistent replay buffer ({e}); save it again") from None
        return out


def _finite(log_gamma: Tensor) -> list[float]:
    values = log_gamma.detach().double().tolist()
    bad = [i for i, v in enumerate(values) if math.isnan(v) or v == math.inf]
    if bad:
        raise InputError(f"log gamma of row {bad[0]} is {values[bad[0]]}; replay takes finite values and -inf")
    return values


def _path(rows: Rollouts, i: int) -> list[Any]:
    return rows.moves[i, : int(rows.n[i])].tolist()


def _shelf(pool: Rollouts, entries: Mapping[Key, _Entry]) -> Shelf:
    kept = list(entries.values())
    terms = torch.tensor([e.terms for e in kept])
    rows = pool.take(torch.tensor([e.path for e in kept]))
    rows = replace(rows, terms={f: v[terms] for f, v in pool.terms.items()}, behaviour={})
    return Shelf(trimmed(rows), tuple(entries), tuple(e.log_gamma for e in kept), tuple(e.step for e in kept))


# -- what people wrote ------------------------------------------------------------------------------------------------


@torch.no_grad()
def written(policy: Policy, problem: int, ids: Sequence[Sequence[int]], stop: int = 0) -> Rollouts:
    """Latents that somebody wrote, as rows of the policy's space: what a buffer may start from.

    Each is replayed move by move against the space's menus; ``log_q`` and ``log_b`` are the policy's score of it.

    Args:
        policy: whose space and log q.
        problem: the problem they answer.
        ids: the moves of each latent, without the stop (with what a tool puts in, where the space has one).
        stop: which stop follows; 0 for a forced one.

    Raises:
        InputError: the first move that is not legal, a latent over the length limit, or one that may not stop there.
    """
    space, base = policy.space, policy.base if isinstance(policy, GuidedPolicy) else policy
    if not ids:
        raise InputError("no latents to replay; give at least one sequence of token ids")
    lm = getattr(base, "lm", None)
    device = torch.device("cpu") if lm is None else lm.device
    b, t = len(ids), max(map(len, ids))
    if t > space.max_moves:
        i = next(i for i, z in enumerate(ids) if len(z) > space.max_moves)
        raise InputError(f"latent {i} has {len(ids[i])} moves, over the limit of {space.max_moves}; shorten it, or "
                         "raise max_tokens")  # fmt: skip
    n = torch.tensor([len(z) for z in ids], device=device)
    moves = torch.tensor([[*z, *[0] * (t - len(z))] for z in ids], dtype=torch.long, device=device).view(b, t)
    inside = torch.arange(t, device=device) < n[:, None]
    kind = torch.where(inside, FREE, PAD).to(torch.int8)
    can_stop = torch.zeros(b, t + 1, dtype=torch.bool, device=device)
    log_pb = torch.zeros(b, t, device=device)
    rows, s = torch.arange(b, device=device), space.start(torch.full((b,), problem, device=device))
    for i in range(t + 1):
        menu = space.menu(s)
        can_stop[rows, i] = menu.can_stop
        for j, row in enumerate(rows.tolist()):
            ends = len(ids[row]) == i
            fault = _cannot_stop(space, menu, j, i, stop) if ends else _cannot_go(space, menu, j, i, ids[row][i])
            if fault:
                raise InputError(f"latent {row} {fault}")
        on = (n[rows] > i).nonzero().squeeze(1)
        rows, s = rows[on], space.take(s, on)
        if not len(rows):
            break
        kind[rows, i] = torch.where(menu.must[on] == MUST_MOVE, FORCED, FREE).to(torch.int8)
        s = space.step(s, moves[rows, i])
        log_pb[rows, i] = space.log_pb(s).to(log_pb.dtype)
    return _scored(policy, Rollouts(
        problem=torch.full((b,), problem, device=device), moves=moves, kind=kind, n=n, stop=torch.full_like(n, stop),
        can_stop=can_stop, log_q=log_pb, log_stop=log_pb.new_zeros(b, t + 1, space.n_stops),
        log_b=log_pb.new_zeros(b, t + 1), log_pb=log_pb, behaviour={"source": "written"},
    ))  # fmt: skip


def _scored(policy: Policy, rows: Rollouts) -> Rollouts:
    """The rows with the policy's log q, which is also taken for the density they came from."""
    scores, t = policy.score(rows), rows.moves.shape[1]
    inside = torch.arange(t, device=rows.n.device) < rows.n[:, None]
    log_q = torch.where(inside, scores.log_q, 0.0)
    end = at_end(scores.log_stop, rows.n, rows.stop)
    log_b = torch.cat([log_q, log_q.new_zeros(len(rows), 1)], 1).scatter(1, rows.n[:, None], end[:, None])
    return replace(rows, log_q=log_q, log_stop=scores.log_stop, log_b=log_b, log_pb=rows.log_pb.to(log_q.dtype))


def _cannot_stop(space: Space, menu: Menu, j: int, i: int, stop: int) -> str:
    """Why row j may not end with this stop after i moves, or nothing."""
    if not menu.can_stop[j]:
        return f"may not stop after {i} moves: it is too short for its space, or its stop condition does not hold"
    if not 0 <= stop < space.n_stops:
        return f"ends with stop {stop}; give one from 0 to {space.n_stops - 1}"
    if stop and menu.must[j] == MUST_STOP:
        return f"is stopped by its space after {i} moves, which is stop 0 and not {stop}"
    return ""


def _cannot_go(space: Space, menu: Menu, j: int, i: int, move: int) -> str:
    """Why row j may not make this move after i moves, or nothing."""
    if menu.must[j] == MUST_STOP:
        return f"is over after {i} moves, at its limit or stop condition; leave out what follows"
    if menu.must[j] == MUST_MOVE and menu.forced is not None:
        put = int(menu.forced[j])
        return "" if move == put else f"has {move} as move {i}, where the space puts {put} in"
    known = menu.legal is None or 0 <= move < menu.legal.shape[1]
    if menu.legal is None or (known and bool(menu.legal[j, move])):
        return ""
    tokenizer = getattr(space, "tokenizer", None)
    name = f"{move} ({tokenizer.decode([move])!r})" if tokenizer is not None and known else str(move)
    return f"has {name} as move {i}, which is not legal; a stop is no move: leave it out and say which with stop="
