"""Sets of atoms (facts, rules, features), built by adding one at a time; every state may stop.

A move is the number of an atom. A set of n atoms is reached by n! paths, and any member may have been the last:
log P_B = -log n. Without it a set of n atoms counts n! times.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from retrodict.errors import InputError
from retrodict.records import CHOOSE, MUST_STOP, Menu, Rollouts

MOST_LISTED = 20
"""Atoms up to which all sets are listed."""


@dataclass(frozen=True)
class SetState:
    """b subsets under construction."""

    problem: Int[Tensor, " b"]
    members: Bool[Tensor, "b a"]
    n: Int[Tensor, " b"]


@dataclass(frozen=True)
class Subsets:
    """Subsets of ``atoms`` atoms. A move adds an atom; one may stop at any time, and must when no more may be added.

    Attributes:
        atoms: how many there are.
        names: of the atoms, for people; their numbers by default.
        max_size: most members; all atoms by default.
    """

    atoms: int = 3
    names: tuple[str, ...] = ()
    max_size: int | None = None
    n_stops: int = 1

    def __post_init__(self) -> None:
        if self.names and len(set(self.names)) != self.atoms:
            raise InputError(f"names must be {self.atoms} different words, one an atom, not {', '.join(self.names)}")
        if self.max_size is not None and self.max_size < 0:
            raise InputError(f"max_size must be 0 or more, not {self.max_size}")

    @property
    def max_moves(self) -> int:
        """Members of the largest set."""
        return self.atoms if self.max_size is None else min(self.atoms, self.max_size)

    @property
    def n_moves(self) -> int:
        """The atoms."""
        return self.atoms

    @property
    def n_features(self) -> int:
        """One an atom."""
        return self.atoms

    def features(self, s: SetState) -> Float[Tensor, "b f"]:
        """1 for each member."""
        return s.members.float()

    def start(self, problem: Int[Tensor, " b"]) -> SetState:
        """b empty sets."""
        members = torch.zeros(len(problem), self.atoms, dtype=torch.bool, device=problem.device)
        return SetState(problem, members, torch.zeros_like(problem))

    def menu(self, s: SetState) -> Menu:
        """Any atom that is not in, or the stop."""
        must = torch.where(s.n >= self.max_moves, MUST_STOP, CHOOSE)
        return Menu(~s.members & (must == CHOOSE)[:, None], torch.ones_like(s.n, dtype=torch.bool), must)

    def step(self, s: SetState, move: Int[Tensor, " b"]) -> SetState:
        """Add one atom a row."""
        return SetState(s.problem, s.members.scatter(1, move[:, None], True), s.n + 1)

    def take(self, s: SetState, index: Tensor) -> SetState:
        """Rows ``index``."""
        return SetState(s.problem[index], s.members[index], s.n[index])

    def replay(self, rollouts: Rollouts, upto: Int[Tensor, " b"]) -> SetState:
        """The sets after the first ``upto`` moves."""
        s = self.start(rollouts.problem)
        inside = torch.arange(rollouts.moves.shape[1], device=upto.device) < upto[:, None]
        row, at = inside.nonzero().unbind(1)
        s.members[row, rollouts.moves[row, at]] = True
        return SetState(s.problem, s.members, upto)

    def log_pb(self, s: SetState) -> Float[Tensor, " b"]:
        """Any member may have been the last: -log n."""
        return -s.n.clamp_min(1).double().log()

    def members(self, rollouts: Rollouts) -> Bool[Tensor, "b a"]:
        """Which atoms each finished set holds."""
        return self.replay(rollouts, rollouts.n).members

    def keys(self, rollouts: Rollouts) -> list[tuple[int, ...]]:
        """The sorted atoms."""
        return [(*sorted(z[:k]), -1) for z, k in zip(rollouts.moves.tolist(), rollouts.n.tolist(), strict=True)]

    def show(self, rollouts: Rollouts) -> list[str]:
        """As a person writes a set."""
        return ["{" + ", ".join(self.name(a) for a in k[:-1]) + "}" for k in self.keys(rollouts)]

    def name(self, atom: int) -> str:
        """How people call an atom."""
        return self.names[atom] if self.names else str(atom)

    def enumerate(self) -> Bool[Tensor, "n a"]:
        """Every set once, by its members read as a binary number. Raises InputError for more than 20 atoms."""
        if self.atoms > MOST_LISTED:
            raise InputError(f"the sets of {self.atoms} atoms are too many to list (at most {MOST_LISTED} atoms): "
                             "use a sampler")  # fmt: skip
        sets = (torch.arange(2**self.atoms)[:, None] >> torch.arange(self.atoms) & 1).bool()
        return sets[sets.sum(1) <= self.max_moves]
