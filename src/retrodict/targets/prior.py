"""log p(z | X): the model's raw log-probability of the string and its stop, under the space's limit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from retrodict.numerics import at_end, prefix_values
from retrodict.protocols import Policy, Problems
from retrodict.records import Problem, Rollouts


@runtime_checkable
class Process(Policy, Protocol):
    """A policy that may be a prior: it has a fingerprint, and can be moved to other problems."""

    @property
    def version(self) -> str: ...
    def on(self, problems: Problems) -> Any: ...


@dataclass(frozen=True)
class Prior:
    """The prior as a factor. Illegal moves renormalise q only: p keeps its raw log-probabilities.

    A served model values whole objects only: give ``prefixes=False`` with it.
    """

    policy: Process
    name: str = "prior"
    noise: str = "none"
    prefixes: bool = True

    @property
    def version(self) -> str:
        """The model's fingerprint."""
        return self.policy.version

    def __call__(self, rollouts: Rollouts, every_prefix: bool = False) -> Tensor:
        """log p(z, stop | X): ``[b]``, or after every prefix ``[b, t+1, s]``."""
        scores = self.policy.score(rollouts, raw=True)
        values = prefix_values(scores.log_q, scores.log_stop)
        return values if every_prefix else at_end(values, rollouts.n, rollouts.stop)

    def on(self, problems: Sequence[Problem]) -> Prior:
        """The same model on other problems."""
        return replace(self, policy=self.policy.on(problems))
