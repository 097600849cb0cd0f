"""A static mask on tokens: the simplest hard guide."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from retrodict.guides.base import BaseGuide
from retrodict.numerics import NEG_INF
from retrodict.records import Rollouts
from retrodict.spaces.strings import StringState


class TokenMask(BaseGuide):
    """Only tokens of ``allowed`` may occur (stops are not tokens here)."""

    hard = True

    def __init__(self, allowed: Iterable[int], vocab_size: int, label: str = "token mask", device: str = "cpu") -> None:
        self.label = label
        self.log = torch.full((vocab_size,), NEG_INF, device=device)
        self.log[list(allowed)] = 0.0

    def start(self, problem: Int[Tensor, " b"]) -> Float[Tensor, " b"]:
        """log psi = 0; the carry is log psi itself."""
        return self.log.new_zeros(len(problem))

    def start_at(self, rollouts: Rollouts, upto: Int[Tensor, " b"]) -> Float[Tensor, " b"]:
        """-inf for rows that already broke the mask."""
        inside = torch.arange(rollouts.moves.shape[1], device=upto.device) < upto[:, None]
        return torch.where(inside, self.log[rollouts.moves], 0.0).sum(1)

    def step(self, c: Float[Tensor, " b"], s: StringState, move: Int[Tensor, " b"]) -> Float[Tensor, " b"]:
        """-inf for good once a move breaks the mask."""
        return c + self.log[move]

    def log_psi(self, c: Float[Tensor, " b"], s: StringState) -> Float[Tensor, " b"]:
        """0 / -inf."""
        return c

    def log_next(self, c: Float[Tensor, " b"], s: StringState) -> Float[Tensor, "b v"]:
        """The mask, of states that have not broken it."""
        return c[:, None] + self.log

    def log_end(self, c: Float[Tensor, " b"], s: StringState) -> Float[Tensor, "b 1"]:
        """Stopping is always allowed to states that have not broken the mask."""
        return c[:, None]

    def score(self, rollouts: Rollouts) -> Float[Tensor, " b"]:
        """0 / -inf of complete strings."""
        return self.start_at(rollouts, rollouts.n)
