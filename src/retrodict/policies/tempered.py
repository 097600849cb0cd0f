"""A policy at another temperature, as a policy of its own.

    q_T(move | prefix) = q(move | prefix)^(1/T) / sum over moves and stops of q^(1/T)

Each token is renormalised by itself, so this is *not* q(string)^(1/T): the product of the normalisers is missing. It is
a proposal for that law; the missing factor is paid in weights or in an acceptance ratio. Unlike a behaviour temperature
(``Rollouts.behaviour``), which leaves ``log_q`` at T = 1, the density of this policy is the tempered one.
At T = 1/alpha it is the prefix-wise proposal of least weight variance for p^alpha (Power-SMC, arXiv 2602.10273).
"""

from __future__ import annotations

import math

from jaxtyping import Int
from torch import Tensor

from retrodict.errors import InputError
from retrodict.policies.base import FiniteStepper, tempered
from retrodict.protocols import Carry, Problems, State
from retrodict.records import Menu, Rollouts


class TemperedPolicy(FiniteStepper):
    """``base`` with every token, and every stop, drawn at ``temperature``.

    Raises InputError for a temperature that is not positive and finite.
    """

    def __init__(self, base: FiniteStepper, temperature: float) -> None:
        if not 0 < temperature < math.inf:
            raise InputError(f"temperature must be positive, not {temperature:g}; p^4 is proposed for at 0.25")
        self.base, self.temperature = base, temperature
        self.space, self.problems = base.space, base.problems

    @property
    def version(self) -> str:
        """The base's, and the temperature."""
        return f"{getattr(self.base, 'version', '?')}@T={self.temperature:g}"

    def on(self, problems: Problems) -> TemperedPolicy:
        """The same policy on other problems."""
        base = self.base.on(problems) if hasattr(self.base, "on") else self.base  # pyright: ignore[reportAttributeAccessIssue]
        return TemperedPolicy(base, self.temperature)

    def start(self, problem: Int[Tensor, " b"]) -> Carry:
        """The base's carry."""
        return self.base.start(problem)

    def start_at(self, rollouts: Rollouts, upto: Int[Tensor, " b"]) -> Carry:
        """The base's carry."""
        return self.base.start_at(rollouts, upto)

    def log_probs(self, c: Carry, s: State, menu: Menu, raw: bool = False) -> tuple[Tensor, Tensor]:
        """The tempered distribution; ``raw`` is the base's."""
        log_move, log_stop = self.base.log_probs(c, s, menu, raw)
        return (log_move, log_stop) if raw else tempered(log_move, log_stop, self.temperature)

    def step(self, c: Carry, s: State, move: Tensor) -> Carry:
        """Step the base."""
        return self.base.step(c, s, move)

    def take(self, c: Carry, index: Tensor) -> Carry:
        """Rows ``index``."""
        return self.base.take(c, index)
