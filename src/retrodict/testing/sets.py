"""A toy space whose objects are reached by several paths: subsets of a few atoms, built in any order.

The smallest latent that needs a backward probability: without ``log_pb`` a set of k atoms counts k! times.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from retrodict.policies.base import FiniteStepper, over_menu
from retrodict.protocols import Problems
from retrodict.records import CHOOSE, MUST_STOP, Menu, Problem, Rollouts
from retrodict.rng import generator
from retrodict.targets.algebra import Target


@dataclass(frozen=True)
class SetState:
    """b subsets under construction."""

    problem: Int[Tensor, " b"]
    members: Bool[Tensor, "b a"]
    n: Int[Tensor, " b"]


@dataclass(frozen=True)
class Subsets:
    """Subsets of ``atoms`` atoms. A move adds an atom; one may stop at any time, and must when all are in."""

    atoms: int = 3
    n_stops: int = 1

    @property
    def max_moves(self) -> int:
        """All atoms."""
        return self.atoms

    def start(self, problem: Int[Tensor, " b"]) -> SetState:
        """b empty sets."""
        return SetState(problem, torch.zeros(len(problem), self.atoms, dtype=torch.bool), torch.zeros_like(problem))

    def menu(self, s: SetState) -> Menu:
        """Any atom that is not in, or the stop."""
        must = torch.where(s.n >= self.atoms, MUST_STOP, CHOOSE)
        return Menu(~s.members, torch.ones_like(s.n, dtype=torch.bool), must)

    def step(self, s: SetState, move: Int[Tensor, " b"]) -> SetState:
        """Add one atom a row."""
        return SetState(s.problem, s.members.scatter(1, move[:, None], True), s.n + 1)

    def take(self, s: SetState, index: Tensor) -> SetState:
        """Rows ``index``."""
        return SetState(s.problem[index], s.members[index], s.n[index])

    def replay(self, rollouts: Rollouts, upto: Int[Tensor, " b"]) -> SetState:
        """The sets after the first ``upto`` moves."""
        s = self.start(rollouts.problem)
        inside = torch.arange(rollouts.moves.shape[1]) < upto[:, None]
        row, at = inside.nonzero().unbind(1)
        s.members[row, rollouts.moves[row, at]] = True
        return SetState(s.problem, s.members, upto)

    def log_pb(self, s: SetState) -> Float[Tensor, " b"]:
        """Any member may have been the last: -log n."""
        return -s.n.clamp_min(1).double().log()

    def keys(self, rollouts: Rollouts) -> list[tuple[int, ...]]:
        """The sorted atoms."""
        return [(*sorted(z[:k]), -1) for z, k in zip(rollouts.moves.tolist(), rollouts.n.tolist(), strict=True)]

    def show(self, rollouts: Rollouts) -> list[str]:
        """As a person writes a set."""
        return ["{" + ", ".join(map(str, k[:-1])) + "}" for k in self.keys(rollouts)]


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
