"""Block moves for infilling: redo a stretch in the middle of a string, keep both sides.

A block [i, i+a) of a string of n moves, 0 <= a <= W, is drawn uniformly from the N(n) there are. It is replaced by one
of a' moves, a' uniform over what keeps the length legal and a' <= W, drawn from q given the left part alone and given
that it does not stop there:

    q(block | left) = prod over k of q(z_k | z_<k) / (1 - q(stop | z_<k))
    accept with  min(1, gamma'/gamma * q(block | left) / q(block' | left) * N(n) / N(n'))
    N(n) = (w+1)(n+1) - w(w+1)/2,  w = min(W, n)

The range of a' depends on n - a = n' - a' alone, so its probability cancels. The right part is never drawn: gamma
rescores it. A block that reaches the end redraws the stop uniformly over the stop ids, which is symmetric. What the
space or q does not allow is refused, and a block of no moves that becomes one of no moves leaves the string alone.

A Metropolis-within-Gibbs step with the block as the coordinate: the stationary law is gamma exactly. Where a hard
constraint leaves islands further apart than W moves, this kernel alone does not join them; the suffix kernel does.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from retrodict.errors import InputError
from retrodict.numerics import NEG_INF, invert_cdf, sample_categorical
from retrodict.policies.awrs import AWRS
from retrodict.policies.base import FiniteStepper, Tape, _keep
from retrodict.records import FORCED, FREE, Rollouts, cat_rollouts
from retrodict.samplers.common import prior_name
from retrodict.targets.algebra import Target


@dataclass(frozen=True)
class Plan:
    """Which block goes (``start``, ``gone`` moves), how many moves come in its place, and the stop there will be."""

    start: Int[Tensor, " b"]
    gone: Int[Tensor, " b"]
    come: Int[Tensor, " b"]
    stop: Int[Tensor, " b"]


@dataclass(frozen=True)
class Block:
    """Redo at most ``width`` moves in the middle of a string."""

    width: int = 4

    def log_count(self, n: Int[Tensor, " b"]) -> Float[Tensor, " b"]:
        """log N(n), the number of blocks of a string of n moves."""
        w = n.clamp_max(self.width)
        return ((w + 1) * (n + 1) - w * (w + 1) // 2).double().log()

    def sizes(self, space: Any, rest: Int[Tensor, " b"]) -> tuple[Int[Tensor, " b"], Int[Tensor, " b"]]:
        """Fewest and most moves that a block may have where ``rest`` moves stand around it."""
        high = space.max_moves
        low = high if getattr(space, "limit", "").startswith("exact") else getattr(space, "min_moves", 0)
        return (low - rest).clamp_min(0), (high - rest).clamp_max(self.width)

    def propose(
        self, target: Target, policy: FiniteStepper, now: Rollouts, gen: torch.Generator
    ) -> tuple[Rollouts, Float[Tensor, " b"]]:
        """See the module. Raises InputError for a policy that estimates its density, and for what a tool wrote."""
        if isinstance(policy, AWRS):
            raise InputError("the block kernel needs the density of each move, and a constraint that is only a test "
                             "estimates it; use kernel='suffix'")  # fmt: skip
        if bool((now.kind == FORCED).any()):
            raise InputError("the block kernel cannot move what a tool wrote into the text; use kernel='suffix'")
        plan = self._plan(policy.space, now, gen)
        new, legal = rewritten(policy, prior_name(target, policy), now, plan, gen)
        b = len(now)
        rows = torch.arange(b, device=now.n.device)
        new = cat_rollouts([now, new]).take(torch.where(legal, rows + b, rows))
        back = log_block(now, plan.start, plan.gone) - log_block(new, plan.start, plan.come)
        back = back + self.log_count(now.n) - self.log_count(new.n)
        return new, torch.where(legal, back, NEG_INF)

    def _plan(self, space: Any, now: Rollouts, gen: torch.Generator) -> Plan:
        n = now.n
        u = torch.rand(4, len(n), generator=gen, device=n.device, dtype=torch.float64)
        lengths = torch.arange(self.width + 1, device=n.device)
        places = (n[:, None] + 1 - lengths).clamp_min(0).double()  # how many blocks of each length
        gone = invert_cdf(places, u[0, :, None]).squeeze(1)
        start = _floor(u[1], n - gone + 1)
        low, high = self.sizes(space, n - gone)
        come = low + _floor(u[2], high - low + 1)
        stop = now.stop
        if space.n_stops > 1:
            stop = torch.where(start + gone == n, _floor(u[3], torch.full_like(n, space.n_stops)), stop)
        return Plan(start, gone, come, stop)


def _floor(u: Float[Tensor, " b"], k: Int[Tensor, " b"]) -> Int[Tensor, " b"]:
    """Uniform over 0..k-1 from a uniform number."""
    return torch.minimum((u * k).long(), k - 1)


def log_block(rows: Rollouts, start: Int[Tensor, " b"], length: Int[Tensor, " b"]) -> Float[Tensor, " b"]:
    """log q(block | left, no stop inside) of each string's moves from ``start`` on, off the record."""
    t = rows.moves.shape[1]
    at = torch.arange(t, device=rows.n.device)
    inside = (at >= start[:, None]) & (at < (start + length)[:, None])
    stop = rows.log_stop[:, :t].double().logsumexp(-1).clamp_max(-1e-7)  # the moves have some mass where one was drawn
    each = rows.log_b[:, :t].double() - torch.log(-torch.expm1(stop))
    return torch.where(inside, each, 0.0).sum(1)


@torch.no_grad()
def rewritten(
    policy: FiniteStepper, record_raw: str | None, now: Rollouts, plan: Plan, gen: torch.Generator
) -> tuple[Rollouts, Bool[Tensor, " b"]]:
    """The strings with their blocks redrawn, scored along the way; and which of them can be (the others are junk)."""
    space, at = policy.space, plan.start
    rows = torch.arange(len(now), device=at.device)
    end = now.n - plan.gone + plan.come
    legal = (plan.gone + plan.come > 0) | (plan.stop != now.stop)
    c, s = policy.start_at(now, at), space.replay(now, at)
    tape: Tape | None = None
    while len(rows):
        menu = space.menu(s)
        log_move, log_stop = policy.log_probs(c, s, menu)
        raw = policy.log_probs(c, s, menu, raw=True) if record_raw else None
        if tape is None:
            tape = Tape(now.problem, log_stop.shape[1], space.max_moves, log_stop.dtype)
            _keep(tape, now, plan.start, record_raw)
            tape.n, tape.stop = end, plan.stop
        tape.at_state(rows, at, menu, log_stop, raw[1] if raw else None)
        ends = at == end[rows]
        move = torch.where(at < (plan.start + plan.come)[rows], sample_categorical(log_move, gen),
                           _old(now, plan, rows, at))  # fmt: skip
        log_stop = log_stop.gather(1, plan.stop[rows, None]).squeeze(1)
        log_q = torch.where(ends, log_stop, log_move.gather(1, move[:, None]).squeeze(1))
        tape.log_b[rows, at] = log_q
        legal[rows] &= log_q > NEG_INF
        on = (~ends & legal[rows]).nonzero().squeeze(1)
        rows, at, move = rows[on], at[on], move[on]
        if not len(rows):
            break
        tape.moves[rows, at], tape.kind[rows, at], tape.log_q[rows, at] = move, FREE, log_q[on]
        if raw is not None:
            tape.log_p[rows, at] = raw[0][on, move]
        if len(on) < len(menu.must):
            c, s = policy.take(c, on), space.take(s, on)
        c, s = policy.step(c, s, move), space.step(s, move)
        tape.log_pb[rows, at] = space.log_pb(s).to(tape.log_pb.dtype)
        at = at + 1
    assert tape is not None
    return tape.rollouts(record_raw), legal


def _old(now: Rollouts, plan: Plan, rows: Tensor, at: Tensor) -> Int[Tensor, " a"]:
    """The kept move that belongs at each position of the new string (any move where none does)."""
    if not now.moves.shape[1]:
        return torch.zeros_like(at)
    source = at + (plan.gone - plan.come)[rows]
    return now.moves[rows, source.clamp(0, now.moves.shape[1] - 1)]
