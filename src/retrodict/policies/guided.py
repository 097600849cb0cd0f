"""A policy bent by a guide: q(move) proportional to base(move) psi(next state).

With a hard guide this is local masking. It is only a proposal: what the guide excludes or favours is paid for in
weights, so SMC, importance sampling and MH over it stay unbiased.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from retrodict.guides.base import seen
from retrodict.numerics import NEG_INF
from retrodict.policies.base import FiniteStepper
from retrodict.protocols import Carry, Guide, Problems, State
from retrodict.records import MUST_STOP, Menu, Rollouts


def bend(
    log_move: Float[Tensor, "b v"],
    log_stop: Float[Tensor, "b s"],
    menu: Menu,
    log_next: Float[Tensor, "#b v"] | None,
    log_end: Float[Tensor, "#b #s"] | None,
) -> tuple[Float[Tensor, "b v"], Float[Tensor, "b s"]]:
    """Multiply a policy by psi and renormalise. Dead ends keep the policy (their weight is 0)."""
    if log_next is None:
        return log_move, log_stop
    move = log_move + log_next
    stop = log_stop if log_end is None else log_stop + log_end
    norm = torch.logaddexp(move.logsumexp(-1), stop.logsumexp(-1))[:, None]
    keep = (norm == NEG_INF) | (menu.must == MUST_STOP)[:, None]
    norm = torch.where(keep, 0.0, norm)
    return torch.where(keep, log_move, move - norm), torch.where(keep, log_stop, stop - norm)


@dataclass
class GuidedCarry:
    """The base policy's carry and the guide's."""

    base: Carry
    guide: Any


class GuidedPolicy(FiniteStepper):
    """``base`` bent by ``guide``."""

    def __init__(self, base: FiniteStepper, guide: Guide) -> None:
        self.base, self.guide = base, guide
        self.space, self.problems = base.space, base.problems

    def _pair(self, base: Carry, guide: Carry) -> GuidedCarry:
        """Both carries, the guide's after it has seen the base's pass."""
        return GuidedCarry(base, seen(self.guide, self.base, guide, base))

    def on(self, problems: Problems) -> GuidedPolicy:
        """The same policy and guide on other problems."""
        base = self.base.on(problems) if hasattr(self.base, "on") else self.base  # pyright: ignore[reportAttributeAccessIssue]
        guide = self.guide.on(problems) if hasattr(self.guide, "on") else self.guide  # pyright: ignore[reportAttributeAccessIssue]
        return GuidedPolicy(base, guide)

    def start(self, problem: Int[Tensor, " b"]) -> GuidedCarry:
        """Start both."""
        return self._pair(self.base.start(problem), self.guide.start(problem))

    def start_at(self, rollouts: Rollouts, upto: Int[Tensor, " b"]) -> GuidedCarry:
        """Replay both."""
        return self._pair(self.base.start_at(rollouts, upto), self.guide.start_at(rollouts, upto))

    def log_probs(self, c: GuidedCarry, s: State, menu: Menu, raw: bool = False) -> tuple[Tensor, Tensor]:
        """The bent distribution; ``raw`` is the base's."""
        log_move, log_stop = self.base.log_probs(c.base, s, menu, raw)
        if raw:
            return log_move, log_stop
        return bend(log_move, log_stop, menu, self.guide.log_next(c.guide, s), self.guide.log_end(c.guide, s))

    def step(self, c: GuidedCarry, s: State, move: Tensor) -> GuidedCarry:
        """Step both."""
        return self._pair(self.base.step(c.base, s, move), self.guide.step(c.guide, s, move))

    def take(self, c: GuidedCarry, index: Tensor) -> GuidedCarry:
        """Rows ``index``."""
        return self._pair(self.base.take(c.base, index), self.guide.take(c.guide, index))
