"""Vectors: of categorical variables (``Assignments``) and of real numbers (``Vectors``), one path to each object.

An assignment picks z_1, ..., z_n in this order, then stops: labels of mixtures, paths of hidden states, discrete codes.
A real vector is one move; with ``steps`` moves it is the end of a path, such as a diffusion's, whose objects *as a
process* are whole paths. Stops are forced, so log q(stop) = 0; log P_B = 0.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from retrodict.errors import InputError
from retrodict.records import CHOOSE, MUST_STOP, Menu, Rollouts, whole_rollouts


@dataclass(frozen=True)
class AssignmentState:
    """b assignments of which the first n variables are set; the others hold -1."""

    problem: Int[Tensor, " b"]
    values: Int[Tensor, "b n"]
    n: Int[Tensor, " b"]


@dataclass(frozen=True)
class Assignments:
    """z_1 in 0..sizes[0]-1, ..., z_n in 0..sizes[n-1]-1. Move i is the value of z_i.

    Attributes:
        sizes: how many values each variable has.
        names: of the variables, for people.
    """

    sizes: tuple[int, ...]
    names: tuple[str, ...] = ()
    n_stops: int = 1

    def __post_init__(self) -> None:
        if not self.sizes or min(self.sizes) < 1:
            raise InputError(f"sizes must name at least one variable, of one value or more each, not {self.sizes}")
        if self.names and len(self.names) != len(self.sizes):
            raise InputError(f"{len(self.names)} names for {len(self.sizes)} variables; give one each")
        starts = torch.tensor([0, *self.sizes]).cumsum(0)
        object.__setattr__(self, "_starts", starts)
        object.__setattr__(self, "_legal", torch.arange(max(self.sizes)) < torch.tensor([*self.sizes, 0])[:, None])

    @property
    def max_moves(self) -> int:
        """One for each variable."""
        return len(self.sizes)

    @property
    def n_moves(self) -> int:
        """Values of the variable that has most."""
        return max(self.sizes)

    @property
    def n_features(self) -> int:
        """One-hots of the values, and of how many are set."""
        return sum(self.sizes) + len(self.sizes)

    def features(self, s: AssignmentState) -> Float[Tensor, "b f"]:
        """A one-hot of each set variable (zeros where unset), and one of the variable that is next."""
        starts: Tensor = self._starts  # pyright: ignore[reportAttributeAccessIssue]
        code = torch.zeros(len(s.n), self.n_features + 2)  # two spare columns: of unset variables, and past the last
        spare = self.n_features
        code.scatter_(1, torch.where(s.values >= 0, s.values + starts[:-1], spare), 1.0)
        code.scatter_(1, torch.where(s.n < self.max_moves, starts[-1] + s.n, spare + 1)[:, None], 1.0)
        return code[:, :spare]

    def start(self, problem: Int[Tensor, " b"]) -> AssignmentState:
        """b assignments with nothing set."""
        values = torch.full((len(problem), len(self.sizes)), -1)
        return AssignmentState(problem, values, torch.zeros_like(problem))

    def menu(self, s: AssignmentState) -> Menu:
        """The values of the next variable; the stop after the last."""
        whole = s.n == self.max_moves
        legal: Tensor = self._legal  # pyright: ignore[reportAttributeAccessIssue]
        return Menu(legal[s.n], whole, torch.where(whole, MUST_STOP, CHOOSE))

    def step(self, s: AssignmentState, move: Int[Tensor, " b"]) -> AssignmentState:
        """Set the next variable of each row."""
        return AssignmentState(s.problem, s.values.scatter(1, s.n[:, None], move[:, None]), s.n + 1)

    def take(self, s: AssignmentState, index: Tensor) -> AssignmentState:
        """Rows ``index``."""
        return AssignmentState(s.problem[index], s.values[index], s.n[index])

    def replay(self, rollouts: Rollouts, upto: Int[Tensor, " b"]) -> AssignmentState:
        """The assignments after the first ``upto`` moves."""
        s = self.start(rollouts.problem)
        t = rollouts.moves.shape[1]
        set_ = torch.arange(t) < upto[:, None]
        s.values[:, :t] = torch.where(set_, rollouts.moves, -1)
        return AssignmentState(s.problem, s.values, upto)

    def log_pb(self, s: AssignmentState) -> Float[Tensor, " b"]:
        """One path an assignment: 0."""
        return torch.zeros(len(s.n), dtype=torch.float64)

    def keys(self, rollouts: Rollouts) -> list[tuple[int, ...]]:
        """The values, then the stop."""
        return [(*z[:n], -1) for z, n in zip(rollouts.moves.tolist(), rollouts.n.tolist(), strict=True)]

    def show(self, rollouts: Rollouts) -> list[str]:
        """As a person writes them."""
        names = self.names or tuple(f"z{i + 1}" for i in range(len(self.sizes)))
        return [", ".join(f"{a}={v}" for a, v in zip(names, k, strict=False)) for k in self.keys(rollouts)]


@dataclass(frozen=True)
class VectorState:
    """b paths after n moves: where each is (0 before the first move)."""

    problem: Int[Tensor, " b"]
    at: Float[Tensor, "b d"]
    n: Int[Tensor, " b"]


@dataclass(frozen=True)
class Vectors:
    """Real vectors of ``dim`` numbers, the ends of paths of ``steps`` moves; a move is the next vector, whole.

    Its moves cannot be listed: policies over it sample and score (``policies.vectors``).
    """

    dim: int
    steps: int = 1
    n_stops: int = 1

    def __post_init__(self) -> None:
        if self.dim < 1 or self.steps < 1:
            raise InputError(f"a path of vectors needs dim and steps of at least 1, not {self.dim} and {self.steps}")

    @property
    def max_moves(self) -> int:
        """Vectors of a path."""
        return self.steps

    def start(self, problem: Int[Tensor, " b"]) -> VectorState:
        """b paths at 0."""
        return VectorState(problem, torch.zeros(len(problem), self.dim), torch.zeros_like(problem))

    def menu(self, s: VectorState) -> Menu:
        """Any vector; the stop after the last step."""
        whole = s.n == self.steps
        return Menu(None, whole, torch.where(whole, MUST_STOP, CHOOSE))

    def step(self, s: VectorState, move: Float[Tensor, "b d"]) -> VectorState:
        """Go there."""
        return VectorState(s.problem, move, s.n + 1)

    def take(self, s: VectorState, index: Tensor) -> VectorState:
        """Rows ``index``."""
        return VectorState(s.problem[index], s.at[index], s.n[index])

    def replay(self, rollouts: Rollouts, upto: Int[Tensor, " b"]) -> VectorState:
        """Where paths are after the first ``upto`` moves."""
        path = torch.cat([torch.zeros_like(rollouts.moves[:, :1]), rollouts.moves], 1)
        return VectorState(rollouts.problem, path[torch.arange(len(upto)), upto], upto)

    def log_pb(self, s: VectorState) -> Float[Tensor, " b"]:
        """0: a density over paths, see the head of this file."""
        return torch.zeros(len(s.n), dtype=torch.float64)

    def points(self, rollouts: Rollouts) -> Float[Tensor, "b d"]:
        """The last vector of each path."""
        return rollouts.moves[:, -1]

    def record(
        self,
        problem: Int[Tensor, " b"],
        moves: Float[Tensor, "b t d"],
        log_q: Float[Tensor, "b t"],
        log_b: Float[Tensor, "b t"] | None = None,
    ) -> Rollouts:
        """Rollouts of whole paths with the log density of each move (nats)."""
        return whole_rollouts(problem, moves, log_q=log_q, log_b=log_b)

    def keys(self, rollouts: Rollouts) -> list[tuple[int, ...]]:
        """The last vector, to its last bit."""
        bits = self.points(rollouts).float().contiguous().view(torch.int32)
        return [(*k, -1) for k in bits.tolist()]

    def show(self, rollouts: Rollouts) -> list[str]:
        """As a person writes them."""
        return [f"({', '.join(f'{x:.3g}' for x in row)})" for row in self.points(rollouts).tolist()]
