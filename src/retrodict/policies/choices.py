"""The prior of a grammar whose every choice is even: description length as a probability.

    p(move | s) = (1 - p_stop) / number of legal moves,      p(stop | s) = p_stop where the object may end or go on

so that -log p(object) is the length of its description in nats, log(options) for each choice, and the sum over all
objects of a finite space is one (a probabilistic grammar with uniform rules; cf. Ellis et al. 2018, arXiv:1707.09627).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from retrodict.errors import InputError
from retrodict.policies.base import FiniteStepper, over_menu
from retrodict.protocols import Problems, State
from retrodict.records import Menu, Rollouts


@dataclass(frozen=True, eq=False)
class EvenChoices(FiniteStepper):
    """Even odds over the legal moves of any space that lists them; it stops with probability ``stop`` where it may."""

    space: Any
    problems: Problems
    stop: float = 0.5

    def __post_init__(self) -> None:
        if not 0 < self.stop < 1:
            raise InputError(f"the chance of a stop lies between 0 and 1, not {self.stop:g}")

    @property
    def version(self) -> str:
        """The chance of a stop; the rest is the space's."""
        return f"even choices, stop {self.stop:g}"

    def on(self, problems: Problems) -> EvenChoices:
        """The same for other problems: it reads none."""
        return EvenChoices(self.space, problems, self.stop)

    def start(self, problem: Int[Tensor, " b"]) -> Int[Tensor, " b"]:
        """It carries nothing."""
        return problem

    def start_at(self, rollouts: Rollouts, upto: Int[Tensor, " b"]) -> Int[Tensor, " b"]:
        """It carries nothing."""
        return rollouts.problem

    def step(self, c: Tensor, s: State, move: Tensor) -> Tensor:
        """It carries nothing."""
        return c

    def take(self, c: Tensor, index: Tensor) -> Tensor:
        """Rows ``index``."""
        return c[index]

    def log_probs(
        self, c: Tensor, s: State, menu: Menu, raw: bool = False
    ) -> tuple[Float[Tensor, "b v"], Float[Tensor, "b s"]]:
        """Even over the menu; a menu loses no mass, so ``raw`` is the same."""
        assert menu.legal is not None
        some = menu.legal.sum(1, dtype=torch.float64)
        stop = some.log() + math.log(self.stop / (1 - self.stop))  # against ``some`` moves of log-weight 0
        return over_menu(torch.zeros(menu.legal.shape, dtype=torch.float64), stop[:, None], menu)
