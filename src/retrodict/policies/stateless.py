"""Base of small networks as policies: they read states whole, so they carry no more than the problem.

Subclasses give ``net`` (with ``parameters``), ``log_probs``, ``on``, and a ``score`` of all prefixes at once.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxtyping import Int
from torch import Tensor

from retrodict.policies.base import FiniteStepper
from retrodict.protocols import State
from retrodict.records import Rollouts


class StatelessPolicy(FiniteStepper):
    """What every such policy shares: the trainable side (``protocols.Trainable``), and a carry that is the problem."""

    net: Any

    def __init__(self) -> None:
        self.about: dict[str, Any] = {}
        self.updates = 0

    @property
    def version(self) -> str:
        """Moves with every update."""
        return f"{type(self.net).__name__}@{self.updates}"

    def parameters(self) -> Mapping[str, Tensor]:
        """The network's."""
        return self.net.parameters

    def settle(self) -> None:
        """Gradients are where they belong."""

    def refresh(self) -> None:
        """Nothing is copied; the version moves."""
        self.updates += 1

    def start(self, problem: Int[Tensor, " b"]) -> Int[Tensor, " b"]:
        """The problems."""
        return problem

    def start_at(self, rollouts: Rollouts, upto: Int[Tensor, " b"]) -> Int[Tensor, " b"]:
        """The problems."""
        return rollouts.problem

    def step(self, c: Int[Tensor, " b"], s: State, move: Tensor) -> Int[Tensor, " b"]:
        """The problems."""
        return c

    def take(self, c: Int[Tensor, " b"], index: Int[Tensor, " k"]) -> Int[Tensor, " k"]:
        """Rows ``index``."""
        return c[index]
