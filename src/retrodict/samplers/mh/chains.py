"""Many Markov chains in one batch: their state, where they begin, and one Metropolis-Hastings step.

Chains may stand at exponents b of a ladder from the proposal to the target,

    log gamma_b = log q + b (log gamma P_B - log q),      b = 0: q itself,  b = 1: the target

Where objects are reached by several paths the chain moves on paths, with gamma P_B as its law, so that objects keep
gamma. A state keeps the value it was accepted with: where a factor is a noisy estimate, a new one is made for each
proposal and never for the present state (pseudo-marginal, Andrieu and Roberts 2009), and the law is gamma with the
expected value of that factor.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from retrodict.errors import InputError
from retrodict.numerics import NEG_INF, at_end, prefix_values, safe_sub
from retrodict.particles import Particles
from retrodict.policies.base import FiniteStepper
from retrodict.records import Rollouts, cat_rollouts
from retrodict.samplers.common import draw, log_b_of, log_pb_of, prior_name
from retrodict.samplers.mh.kernels import Proposes, log_accept
from retrodict.targets.algebra import Target


@dataclass(frozen=True)
class Chains:
    """The state of b chains.

    Attributes:
        rows: complete objects with their terms; ``log_b`` is log q of every move and of the stop.
        log_gamma: log gamma P_B of each.
        log_q: log q of each.
    """

    rows: Rollouts
    log_gamma: Float[Tensor, " b"]
    log_q: Float[Tensor, " b"]

    @property
    def log_w(self) -> Float[Tensor, " b"]:
        """log of gamma P_B / q."""
        return safe_sub(self.log_gamma, self.log_q)

    def at(self, b: float | Tensor) -> Float[Tensor, " b"]:
        """log gamma_b."""
        return self.log_q + scaled(self.log_w, b)

    def take(self, index: Tensor) -> Chains:
        """Rows ``index``."""
        return Chains(self.rows.take(index), self.log_gamma[index], self.log_q[index])

    def where(self, yes: Bool[Tensor, " b"], new: Chains) -> Chains:
        """The new state where ``yes``, else this one."""
        count = len(yes)
        index = torch.where(yes, count, 0) + torch.arange(count, device=yes.device)
        rows = cat_rollouts([self.rows, new.rows]).take(index)
        log_gamma, log_q = torch.where(yes, new.log_gamma, self.log_gamma), torch.where(yes, new.log_q, self.log_q)
        return Chains(rows, log_gamma, log_q)


def joined(parts: list[Chains]) -> Chains:
    """Chains side by side."""
    rows = cat_rollouts([c.rows for c in parts])
    return Chains(rows, torch.cat([c.log_gamma for c in parts]), torch.cat([c.log_q for c in parts]))


def scaled(log_w: Float[Tensor, " b"], b: float | Tensor) -> Float[Tensor, " b"]:
    """b log w, with 0 at b = 0 also for a zero weight."""
    b = torch.as_tensor(b, dtype=log_w.dtype, device=log_w.device)
    return torch.where(b == 0, 0.0, b * log_w)


def weighed(target: Target, rows: Rollouts) -> Chains:
    """The state that a record under the policy makes."""
    rows = target.terms(rows)
    return Chains(rows, target.log_gamma(rows) + log_pb_of(target, rows), log_b_of(rows))


def step(
    target: Target,
    policy: FiniteStepper,
    kernel: Proposes,
    now: Chains,
    gen: torch.Generator,
    b: float | Tensor = 1.0,
) -> tuple[Chains, Bool[Tensor, " b"]]:
    """One step of every chain at its exponent; and which were accepted."""
    rows, log_back = kernel.propose(target, policy, now.rows, gen)
    new = weighed(target, rows)
    ratio = log_accept(now.at(b), new.at(b), log_back)
    yes = torch.rand(len(ratio), generator=gen, device=ratio.device, dtype=torch.float64).log() < ratio
    return now.where(yes, new), yes


# -- where chains begin -------------------------------------------------------------------------------------------


def begin(
    target: Target, policy: FiniteStepper, problem: Int[Tensor, " b"], gen: torch.Generator,
    start: Rollouts | Particles | None,
) -> Chains:  # fmt: skip
    """Draws of the policy; or given objects, scored anew under the policy, whoever drew them."""
    if start is None:
        return weighed(target, draw(target, policy, problem, gen))
    rows = picked(start, problem, gen) if isinstance(start, Particles) else start
    rows = rows.to(problem.device)
    if not torch.equal(rows.problem, problem):
        raise InputError(
            f"start needs one row a chain, problem by problem: {len(problem)} rows, not {len(rows)} in another order; "
            "Particles of any size are resampled to that"
        )
    return weighed(target, under(target, policy, rows))


def picked(start: Particles, problem: Int[Tensor, " b"], gen: torch.Generator) -> Rollouts:
    """Objects of a weighted sample, drawn in proportion to their weights: as many of each problem as it has chains."""
    dead = (start.weights.sum(1) == 0).nonzero().flatten().tolist()
    if dead:
        raise InputError(f"cannot start from problem {dead[0]}: every weight is zero; leave start out, or draw more")
    if start.m != int(problem.max()) + 1:
        raise InputError(f"start holds {start.m} problems and the target {int(problem.max()) + 1}; use the same target")
    weights = start.weights.to(problem.device)[problem]
    pick = torch.multinomial(weights, 1, generator=gen).squeeze(1)
    return start.objects.to(problem.device).take(problem * start.k + pick)


def under(target: Target, policy: FiniteStepper, rows: Rollouts) -> Rollouts:
    """A record as if the policy had drawn it: its log q, and no terms but the prior where the policy's model is that.

    Raises InputError for an object that the policy cannot draw.
    """
    scores = policy.score(rows)
    inside = torch.arange(rows.moves.shape[1], device=rows.n.device) < rows.n[:, None]
    log_q = torch.where(inside, scores.log_q, 0.0)
    log_b = torch.cat([log_q, log_q.new_zeros(len(rows), 1)], 1)
    log_b[torch.arange(len(rows), device=rows.n.device), rows.n] = at_end(scores.log_stop, rows.n, rows.stop)
    if bool((log_b == NEG_INF).any()):
        bad = int((log_b == NEG_INF).any(1).nonzero()[0])
        raise InputError(f"start: row {bad}, {target.space.show(rows.take(torch.tensor([bad])))[0]!r}, cannot be drawn "
                         "by the policy; start from objects of this target's space")  # fmt: skip
    found = Rollouts(rows.problem, rows.moves, rows.kind, rows.n, rows.stop, rows.can_stop, log_q, scores.log_stop,
                     log_b, rows.log_pb)  # fmt: skip
    name = prior_name(target, policy)
    if name is None or target.prior is None:
        return found
    raw = target.prior.score(rows, raw=True)
    moves = torch.where(inside, raw.log_q, 0.0)
    path = torch.cat([moves.new_zeros(len(rows), 1), moves.cumsum(1)], 1)
    terms = {name: prefix_values(moves, raw.log_stop), f"{name}.path": path}
    return found.with_terms(terms, {name: target.factors[name].version})
