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

    def start_at(self, rollouts: Rollouts, upto: Int[Tensor, " b"]) -> Int[Tensor, " b"]:
        """Stateless but for rows that already broke the mask; those are dead by ``score``."""
        return rollouts.problem

    def log_next(self, c: Int[Tensor, " b"], s: StringState) -> Float[Tensor, "1 v"]:
        """The mask, the same in every state."""
        return self.log[None]

    def log_end(self, c: Int[Tensor, " b"], s: StringState) -> Float[Tensor, "1 1"]:
        """Stopping is always allowed."""
        return self.log.new_zeros(1, 1)

    def score(self, rollouts: Rollouts) -> Float[Tensor, " b"]:
        """0 / -inf of complete strings."""
        inside = torch.arange(rollouts.moves.shape[1], device=rollouts.n.device) < rollouts.n[:, None]
        return torch.where(inside, self.log[rollouts.moves], 0.0).sum(1)
