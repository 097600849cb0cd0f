"""Policies over real vectors: subclasses give the density of one move, this base samples paths and scores records.

    log q(path | x) = sum_i log q(z_i | z_{i-1}, i, x)

Scoring is one call for all moves of all rows. The behaviour's temperature is the subclass's to apply (a Gaussian's
variance times T); it enters ``log_b`` only.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from retrodict.errors import InputError
from retrodict.policies.base import behaviour_of
from retrodict.protocols import Problems
from retrodict.records import Rollouts, Scores
from retrodict.spaces.vectors import Vectors


class VectorPolicy:
    """Base of policies over ``Vectors``. Trainable, once a subclass has ``parameters``."""

    space: Vectors
    problems: Problems
    updates: int = 0

    def propose(
        self, problem: Int[Tensor, " b"], at: Float[Tensor, "b d"], i: int, gen: torch.Generator, temperature: float
    ) -> Float[Tensor, "b d"]:
        """Draw the next vector of each row, which is at ``at`` after i moves."""
        raise NotImplementedError  # abstract

    def draw(
        self, problem: Int[Tensor, " b"], at: Float[Tensor, "b d"], i: int, gen: torch.Generator, temperature: float
    ) -> tuple[Float[Tensor, "b d"], Float[Tensor, " b"], Float[Tensor, " b"]]:
        """The next vector, its log density under q, and under the behaviour at this temperature."""
        to, k = self.propose(problem, at, i, gen, temperature), torch.full_like(problem, i)
        log_q = self.log_move(problem, at, k, to)
        return to, log_q, log_q if temperature == 1.0 else self.log_move(problem, at, k, to, temperature)

    def log_move(
        self,
        problem: Int[Tensor, " b"],
        at: Float[Tensor, "b d"],
        i: Int[Tensor, " b"],
        move: Float[Tensor, "b d"],
        temperature: float = 1.0,
    ) -> Float[Tensor, " b"]:
        """log density (nats) of going from ``at`` to ``move``, as move number i of its row. Differentiable."""
        raise NotImplementedError  # abstract

    def parameters(self) -> Mapping[str, Tensor]:
        """None, unless a subclass has some."""
        return {}

    @property
    def version(self) -> str:
        """Moves with every update."""
        return f"{type(self).__name__}@{self.updates}"

    def settle(self) -> None:
        """Gradients are where they belong."""

    def refresh(self) -> None:
        """The version moves."""
        self.updates += 1

    @torch.no_grad()
    def sample(
        self, problem: Int[Tensor, " b"], gen: torch.Generator, behaviour: Mapping[str, Any] | None = None
    ) -> Rollouts:
        """One path a row. Raises InputError for ``epsilon``: there is no uniform move."""
        temperature, epsilon = behaviour_of(behaviour)
        if epsilon:
            raise InputError("real vectors have no uniform move to explore with; leave out epsilon, raise temperatures")
        at, moves, log_q, log_b = self.space.start(problem).at, [], [], []
        for i in range(self.space.steps):
            at, q, b = self.draw(problem, at, i, gen, temperature)
            moves.append(at)
            log_q.append(q)
            log_b.append(b)
        stacked = torch.stack(log_q, 1)
        drawn = self.space.record(problem, torch.stack(moves, 1), stacked, torch.stack(log_b, 1))
        return drawn if not behaviour else Rollouts(**{**vars(drawn), "behaviour": dict(behaviour)})

    def score(self, rollouts: Rollouts, raw: bool = False, grad: bool = False) -> Scores:
        """log q of every move, in one call; the stop is forced."""
        b, t = rollouts.moves.shape[:2]
        before = torch.cat([torch.zeros_like(rollouts.moves[:, :1]), rollouts.moves[:, :-1]], 1)
        i = torch.arange(t).repeat(b)
        with torch.set_grad_enabled(grad):
            flat = self.log_move(rollouts.problem.repeat_interleave(t), before.flatten(0, 1), i,
                                 rollouts.moves.flatten(0, 1))  # fmt: skip
        log_q = flat.view(b, t)
        return Scores(log_q, rollouts.log_stop.to(log_q.dtype))
