"""The growing objects of a population: their states, and the carries of the policy, the prior and the guides."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from retrodict.errors import InputError
from retrodict.guides.base import seen
from retrodict.policies.base import Drawn, FiniteStepper, choose, drawn
from retrodict.policies.guided import GuidedCarry, GuidedPolicy, bend
from retrodict.policies.vectors import VectorPolicy
from retrodict.protocols import Guide
from retrodict.records import Menu
from retrodict.samplers.common import base_of, prior_name
from retrodict.targets.algebra import Target

Held = tuple[Int[Tensor, " a"], Int[Tensor, " a"]]
"""(move, stop) that rows must take: (k, -1), (-1, s), or (-1, -1) for a free row."""


@dataclass(frozen=True)
class Look:
    """What may happen in each state, what was drawn, and the prior's raw log-probabilities of moves and stops."""

    menu: Menu
    drawn: Drawn
    raw: tuple[Float[Tensor, "a v"], Float[Tensor, "a s"]] | None


class Walk:
    """Objects grown move by move. The prior is stepped on its own only where the policy has another model."""

    def __init__(self, target: Target, policy: FiniteStepper | VectorPolicy, gen: torch.Generator) -> None:
        prior = target.prior
        if isinstance(policy, VectorPolicy) or isinstance(prior, VectorPolicy):
            raise InputError("this sampler lists moves, and those of real vectors cannot be: use rd.importance")
        self.target, self.policy, self.gen = target, policy, gen
        self.base, self.guide = base_of(policy), target.guide
        self.bends: Guide | None = policy.guide if isinstance(policy, GuidedPolicy) else None
        self.name = prior_name(target, policy)
        self.prior = prior if self.name is None else None

    def start(self, problem: Int[Tensor, " a"]) -> None:
        """Empty objects."""
        movers = {"base": self.base, "prior": self.prior, "guide": self.guide}
        movers["bends"] = self.bends if self.bends is not self.guide else None
        self.movers: dict[str, Any] = {k: m for k, m in movers.items() if m is not None}
        self.c: dict[str, Any] = {k: m.start(problem) for k, m in self.movers.items()}
        self.s = self.target.space.start(problem)
        self._see()

    def take(self, index: Int[Tensor, " a2"]) -> None:
        """Rows ``index``."""
        self.c = {k: self.movers[k].take(c, index) for k, c in self.c.items()}
        self.s = self.target.space.take(self.s, index)
        self._see()

    def advance(self, move: Int[Tensor, " a"]) -> None:
        """One move a row."""
        self.c = {k: self.movers[k].step(c, self.s, move) for k, c in self.c.items()}
        self.s = self.target.space.step(self.s, move)
        self._see()

    def _see(self) -> None:
        """Guides that share a policy's model read its pass."""
        for guide in self.c.keys() & {"guide", "bends"}:
            for model in self.c.keys() & {"base", "prior"}:
                self.c[guide] = seen(self.movers[guide], self.movers[model], self.c[guide], self.c[model])

    def log_psi(self) -> Float[Tensor, " a"] | float:
        """log psi of the target's guide; 0 without one."""
        return 0.0 if self.guide is None else self.guide.log_psi(self.c["guide"], self.s).double()

    def look(self, held: Held | None = None) -> Look:
        """Draw a move or a stop in each state."""
        menu, base, raw = self.target.space.menu(self.s), self.c["base"], None
        if self.name is not None:
            raw = self.base.log_probs(base, self.s, menu, raw=True)
        elif self.prior is not None:
            raw = self.prior.log_probs(self.c["prior"], self.s, menu, raw=True)
        bends = self.c["guide" if self.bends is self.guide else "bends"] if self.bends is not None else None
        if hasattr(self.policy, "propose"):
            c = base if self.bends is None else GuidedCarry(base, bends)
            return Look(menu, self.policy.propose(c, self.s, menu, self.gen, held), raw)  # pyright: ignore[reportAttributeAccessIssue]
        log_move, log_stop = self.base.log_probs(base, self.s, menu)
        if self.bends is not None:
            log_move, log_stop = bend(
                log_move, log_stop, menu, self.bends.log_next(bends, self.s), self.bends.log_end(bends, self.s)
            )
        move, stop = choose(log_move, log_stop, self.gen)
        if held is not None:
            free = (held[0] < 0) & (held[1] < 0)
            move, stop = torch.where(held[0] < 0, move, held[0]), torch.where(free, stop, held[1])
        return Look(menu, drawn(log_move, log_stop, move, stop), raw)
