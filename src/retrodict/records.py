"""The records that travel between the rooms. They carry tensors and no behaviour beyond slicing and joining.

Letters: b rows (any mix of problems), t time, s stop ids, m problems, k particles. Log-densities are in nats.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Float, Int, Int8
from torch import Tensor

PAD, FREE, FORCED = 0, 1, 2
"""Kinds of a move in :class:`Rollouts`: padding, chosen by the policy, put there by the space (tool, template)."""

CHOOSE, MUST_MOVE, MUST_STOP = 0, 1, 2
"""Values of :attr:`Menu.must`."""


@dataclass(frozen=True)
class Problem:
    """One question, as token ids.

    Attributes:
        context: what p reads before the latent (X).
        evidence: what p must explain after the latent (Y); empty where there is none.
        q_prompt: what q reads; ``None`` means the same as ``context``.
        row: the data row it was made from; verifiers receive it.
        name: how tables call it.
    """

    context: tuple[int, ...]
    evidence: tuple[int, ...] = ()
    q_prompt: tuple[int, ...] | None = None
    row: Mapping[str, Any] = field(default_factory=dict)
    name: str = ""


Problems = Sequence[Problem]


@dataclass(frozen=True)
class Menu:
    """What may happen next in a batch of states.

    Attributes:
        legal: moves that may be taken, or ``None`` where all may.
        can_stop: whether the object may end here.
        must: CHOOSE, MUST_MOVE (the move is ``forced``) or MUST_STOP.
        forced: the forced move, where ``must`` is MUST_MOVE.
    """

    legal: Bool[Tensor, "b v"] | None
    can_stop: Bool[Tensor, " b"]
    must: Int[Tensor, " b"]
    forced: Tensor | None = None


@dataclass(frozen=True)
class Rollouts:
    """Trajectories exactly as they were drawn: n moves, then one stop.

    Attributes:
        problem: index of each row's problem.
        moves: the moves, padded; their meaning is the space's.
        kind: PAD, FREE or FORCED, for each move.
        n: number of moves.
        stop: index of the stop taken (0 for a forced one).
        can_stop: whether prefix i could have ended there.
        log_q: log q(move) at temperature one; 0 where forced.
        log_stop: log q(stop id | prefix i); -inf where it may not stop; 0 for the first id where the stop is forced.
        log_b: log density, under the behaviour that drew them, of move i (i < n) and of the stop (i = n).
        log_pb: log backward probability of each move; 0 where objects have one path.
        terms: untempered log-values of named terms, per object ``[b]`` or per prefix and stop id ``[b, t+1, s]``.
        versions: version of the factor each term came from.
        behaviour: how the rows were drawn (temperature, mask, epsilon, adapter).
    """

    problem: Int[Tensor, " b"]
    moves: Tensor
    kind: Int8[Tensor, "b t"]
    n: Int[Tensor, " b"]
    stop: Int[Tensor, " b"]
    can_stop: Bool[Tensor, "b t1"]
    log_q: Float[Tensor, "b t"]
    log_stop: Float[Tensor, "b t1 s"]
    log_b: Float[Tensor, "b t1"]
    log_pb: Float[Tensor, "b t"]
    terms: Mapping[str, Tensor] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)
    behaviour: Mapping[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.problem)

    def take(self, index: Tensor) -> Rollouts:
        """Rows ``index``, in that order."""
        rows = {f: getattr(self, f)[index] for f in _ROWS}
        return dataclasses.replace(self, **rows, terms={k: v[index] for k, v in self.terms.items()})

    def with_terms(self, terms: Mapping[str, Tensor], versions: Mapping[str, str] | None = None) -> Rollouts:
        """The same rows with more (or replaced) term values."""
        return dataclasses.replace(self, terms={**self.terms, **terms}, versions={**self.versions, **(versions or {})})

    def to(self, device: torch.device | str) -> Rollouts:
        """The same rows on another device."""
        rows = {f: getattr(self, f).to(device) for f in _ROWS}
        return dataclasses.replace(self, **rows, terms={k: v.to(device) for k, v in self.terms.items()})


_ROWS = ("problem", "moves", "kind", "n", "stop", "can_stop", "log_q", "log_stop", "log_b", "log_pb")
_FILL = {"log_stop": float("-inf"), "can_stop": False}


def _widen(x: Tensor, width: int, fill: float | bool) -> Tensor:
    if x.dim() < 2 or x.shape[1] >= width:
        return x
    pad = x.new_full((x.shape[0], width - x.shape[1], *x.shape[2:]), fill)
    return torch.cat([x, pad], 1)


def trim(rollouts: Rollouts) -> Rollouts:
    """The same rows without columns that all of them pad."""
    t = int(rollouts.n.max()) if len(rollouts) else 0
    if t == rollouts.moves.shape[1]:
        return rollouts
    rows = {f: getattr(rollouts, f)[:, :t] for f in ("moves", "kind", "log_q", "log_pb")}
    rows |= {f: getattr(rollouts, f)[:, : t + 1] for f in ("can_stop", "log_stop", "log_b")}
    terms = {k: v[:, : t + 1] if v.dim() > 1 else v for k, v in rollouts.terms.items()}
    return dataclasses.replace(rollouts, **rows, terms=terms)


def cat_rollouts(parts: Sequence[Rollouts]) -> Rollouts:
    """Join rows; shorter ones are padded. Terms that not every part has are dropped."""
    if len(parts) == 1:
        return parts[0]
    t = max(p.moves.shape[1] for p in parts)
    rows = {}
    for f in _ROWS:
        width = t + 1 if f in ("can_stop", "log_stop", "log_b") else t
        rows[f] = torch.cat([_widen(getattr(p, f), width, _FILL.get(f, 0)) for p in parts])
    shared = set.intersection(*(set(p.terms) for p in parts))
    terms = {k: torch.cat([_widen(p.terms[k], t + 1, float("-inf")) for p in parts]) for k in sorted(shared)}
    return dataclasses.replace(parts[0], **rows, terms=terms)


def whole_rollouts(
    problem: Int[Tensor, " b"],
    moves: Tensor,
    n: Int[Tensor, " b"] | None = None,
    *,
    log_q: Float[Tensor, "b t"] | None = None,
    log_b: Float[Tensor, "b t"] | None = None,
    log_pb: Float[Tensor, "b t"] | None = None,
) -> Rollouts:
    """Objects given by their moves, of a space that stops them only after their last (so log q(stop) = 0).

    What is not said is 0: log q of objects that no policy drew, log_b = log_q, log_pb of one path an object. ``n`` is
    the width of ``moves`` by default; moves past it are padding.
    """
    b, t = moves.shape[:2]
    n = torch.full((b,), t, device=moves.device) if n is None else n
    zeros = torch.zeros(b, t, dtype=torch.float64, device=moves.device) if log_q is None else torch.zeros_like(log_q)
    inside, ends = (torch.arange(t, device=n.device) < n[:, None]), torch.arange(t + 1, device=n.device) == n[:, None]
    log_q = zeros if log_q is None else log_q
    log_b = torch.cat([log_q if log_b is None else log_b, zeros.new_zeros(b, 1)], 1)
    moves = moves if moves.dim() > 2 else torch.where(inside, moves, 0)
    return Rollouts(problem, moves, inside.to(torch.int8) * FREE, n, torch.zeros_like(n), ends, log_q,
                    torch.where(ends, 0.0, float("-inf")).to(log_q.dtype)[:, :, None], log_b,
                    zeros if log_pb is None else log_pb)  # fmt: skip


@dataclass(frozen=True)
class Scores:
    """Teacher-forced log-probabilities of recorded trajectories, with gradient.

    Optional: ``log_norm`` is a learned log Z per row. A twist has ``log_psi`` of each symbol taken (move i, or at i = n
    the stop; with log p of the prefix it is a log-flow) and ``log_ahead``, the log of the sum of p psi over all moves
    and stops after prefix i, without gradient.
    """

    log_q: Float[Tensor, "b t"]
    log_stop: Float[Tensor, "b t1 s"]
    log_psi: Float[Tensor, "b t1"] | None = None
    log_ahead: Float[Tensor, "b t1"] | None = None
    value: Float[Tensor, "b t"] | None = None
    log_norm: Float[Tensor, " b"] | None = None


@dataclass(frozen=True)
class Trace:
    """What a sampler did, for diagnostics and the report.

    Attributes:
        method: the sampler's name, and ``settings`` what it was called with (seed included).
        ess: ESS just before each step's resampling decision, one column a population (problem x run).
        resampled: whether that population was then resampled.
        roots: how many of the first particles still have descendants, one number a population.
        ancestors: for each step, the index (within its population) of each particle's parent.
        alive: how many particles were still growing at each step, per population.
        counts: tokens, forwards, proposals, accepted, seconds, ...
        notes: what a reader of the result should know (a cause of zero weights, a floor, an interruption).
    """

    method: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    ess: Float[Tensor, "step pop"] | None = None
    resampled: Bool[Tensor, "step pop"] | None = None
    roots: Int[Tensor, " pop"] | None = None
    ancestors: Int[Tensor, "step pop k"] | None = None
    alive: Int[Tensor, "step pop"] | None = None
    counts: Mapping[str, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
