"""A policy and a target over subsets of a few atoms (``spaces.sets``), the smallest latent with several paths."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from retrodict.policies.base import FiniteStepper, over_menu
from retrodict.protocols import Problems
from retrodict.records import Menu, Problem, Rollouts
from retrodict.rng import generator
from retrodict.spaces.sets import SetState, Subsets
from retrodict.targets.algebra import Target


class SetPolicy(FiniteStepper):
    """Adds atoms, or stops, with probabilities proportional to exp(logits) over what the menu allows."""

    def __init__(self, space: Subsets, problems: Problems, logits: Float[Tensor, " a1"] | None = None) -> None:
        self.space, self.problems = space, problems
        self.logits = torch.zeros(space.atoms + 1, dtype=torch.float64) if logits is None else logits.double()

    def start(self, problem: Int[Tensor, " b"]) -> Int[Tensor, " b"]:
        """It carries nothing."""
        return problem

    def start_at(self, rollouts: Rollouts, upto: Int[Tensor, " b"]) -> Int[Tensor, " b"]:
        """It carries nothing."""
        return rollouts.problem

    def step(self, c: Tensor, s: SetState, move: Tensor) -> Tensor:
        """It carries nothing."""
        return c

    def take(self, c: Tensor, index: Tensor) -> Tensor:
        """Rows ``index``."""
        return c[index]

    def log_probs(self, c: Tensor, s: SetState, menu: Menu, raw: bool = False) -> tuple[Tensor, Tensor]:
        """The same logits in every state, renormalised over the menu (``raw`` too: it is no prior)."""
        logits = self.logits.expand(len(s.n), -1)
        return over_menu(logits[:, :-1], logits[:, -1:], menu)


@dataclass(frozen=True)
class SetTerm:
    """log f(set) read off a table with one entry a subset (bit i of the index: atom i is in)."""

    table: Float[Tensor, " subsets"]
    name: str = "table"
    noise: str = "none"
    prefixes: bool = True
    version: str = "1"

    def __call__(self, rollouts: Rollouts, every_prefix: bool = False) -> Tensor:
        """``[b]``, or of every prefix ``[b, t+1, 1]`` (-inf past the end)."""
        t = rollouts.moves.shape[1]
        inside = torch.arange(t) < rollouts.n[:, None]
        bits = torch.where(inside, 2**rollouts.moves, 0).cumsum(1)
        bits = torch.cat([bits.new_zeros(len(bits), 1), bits], 1)
        value = self.table[bits].masked_fill(torch.arange(t + 1) > rollouts.n[:, None], float("-inf"))
        return value[:, :, None] if every_prefix else value[torch.arange(len(bits)), rollouts.n]


def set_target(atoms: int = 3, seed: int = 0, scale: float = 1.0, space: Subsets | None = None) -> Target:
    """A random density over subsets; it has no prior, so samplers need a :class:`SetPolicy`."""
    table = scale * torch.randn(2**atoms, generator=generator(seed), dtype=torch.float64)
    problems: Sequence[Problem] = [Problem((), name="sets")]
    return Target(space or Subsets(atoms), problems, {"table": SetTerm(table)})
