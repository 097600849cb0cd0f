"""Binary trees over n leaves in a fixed order, built by shift and reduce; the tree is whole after 2n - 1 moves.

SHIFT puts the next leaf on a stack, REDUCE joins the two topmost subtrees. Each tree has exactly one such sequence (its
nodes in post-order; Aho and Ullman 1972), so log P_B = 0, and there are as many as Catalan numbers count: 1, 1, 2, 5,
14, 42, ... Only whole trees are objects: no state before the last may stop.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from retrodict.errors import InputError
from retrodict.records import CHOOSE, MUST_STOP, Menu, Rollouts
from retrodict.spaces.enumerate import enumerate_objects

SHIFT, REDUCE = 0, 1


@dataclass(frozen=True)
class TreeState:
    """b trees under construction.

    Attributes:
        problem: index of each row's problem.
        starts: the first leaf of each subtree on the stack, bottom first (0 above the top).
        depth: subtrees on the stack.
        shifted: leaves taken so far.
    """

    problem: Int[Tensor, " b"]
    starts: Int[Tensor, "b leaves"]
    depth: Int[Tensor, " b"]
    shifted: Int[Tensor, " b"]


@dataclass(frozen=True)
class Trees:
    """Binary trees over ``leaves`` leaves. Their words, where given, are for people."""

    leaves: int
    words: tuple[str, ...] = ()
    n_stops: int = 1

    def __post_init__(self) -> None:
        if self.leaves < 1:
            raise InputError(f"a tree needs at least one leaf, not {self.leaves}")
        if self.words and len(self.words) != self.leaves:
            raise InputError(f"{len(self.words)} words for {self.leaves} leaves; give one each")

    @property
    def max_moves(self) -> int:
        """n shifts and n - 1 reduces."""
        return 2 * self.leaves - 1

    def start(self, problem: Int[Tensor, " b"]) -> TreeState:
        """b empty stacks."""
        zero = torch.zeros_like(problem)
        return TreeState(problem, zero[:, None].repeat(1, self.leaves), zero, zero)

    def menu(self, s: TreeState) -> Menu:
        """Shift while there are leaves, reduce where two subtrees lie on the stack, stop when all is one tree."""
        whole = (s.shifted == self.leaves) & (s.depth == 1)
        return Menu(self._legal(s), whole, torch.where(whole, MUST_STOP, CHOOSE))

    def _legal(self, s: TreeState) -> Bool[Tensor, "b 2"]:
        return torch.stack([s.shifted < self.leaves, s.depth >= 2], 1)

    def step(self, s: TreeState, move: Int[Tensor, " b"]) -> TreeState:
        """Shift or reduce, a row."""
        shift = move == SHIFT
        at = s.depth.clamp_max(self.leaves - 1)[:, None]
        pushed = s.starts.scatter(1, at, s.shifted[:, None])
        popped = s.starts.scatter(
            1, (s.depth - 1).clamp_min(0)[:, None], 0
        )  # the joined subtree begins where the lower did
        starts = torch.where(shift[:, None], pushed, popped)
        return TreeState(s.problem, starts, s.depth + torch.where(shift, 1, -1), s.shifted + shift.long())

    def take(self, s: TreeState, index: Tensor) -> TreeState:
        """Rows ``index``."""
        return TreeState(s.problem[index], s.starts[index], s.depth[index], s.shifted[index])

    def replay(self, rollouts: Rollouts, upto: Int[Tensor, " b"]) -> TreeState:
        """The stacks after the first ``upto`` moves."""
        s = self.start(rollouts.problem)
        for i in range(int(upto.max()) if len(upto) else 0):
            new, on = self.step(s, rollouts.moves[:, i]), i < upto
            s = TreeState(s.problem, torch.where(on[:, None], new.starts, s.starts),
                          torch.where(on, new.depth, s.depth), torch.where(on, new.shifted, s.shifted))  # fmt: skip
        return s

    def log_pb(self, s: TreeState) -> Float[Tensor, " b"]:
        """One path a tree: 0."""
        return torch.zeros(len(s.depth), dtype=torch.float64, device=s.depth.device)

    def spans(self, rollouts: Rollouts) -> Int[Tensor, "b inner 3"]:
        """The (first leaf, first leaf of the right child, leaf after the last) of every inner node, in post-order.

        What a score of trees is a sum over: PCFG rules, say, or scores of constituents.
        """
        s = self.start(rollouts.problem)
        out = torch.zeros(len(rollouts), self.leaves - 1, 3, dtype=torch.long, device=rollouts.n.device)
        row = torch.arange(len(rollouts), device=rollouts.n.device)
        for i in range(self.max_moves):
            at = (rollouts.moves[:, i] == REDUCE).nonzero().squeeze(1)
            node = i - s.shifted[at]  # moves so far that were no shifts
            left, right = s.starts[at, s.depth[at] - 2], s.starts[at, s.depth[at] - 1]
            out[row[at], node] = torch.stack([left, right, s.shifted[at]], 1)
            s = self.step(s, rollouts.moves[:, i])
        return out

    def keys(self, rollouts: Rollouts) -> list[tuple[int, ...]]:
        """The moves, which only this tree has, then the stop."""
        return [(*z[:n], -1) for z, n in zip(rollouts.moves.tolist(), rollouts.n.tolist(), strict=True)]

    def show(self, rollouts: Rollouts) -> list[str]:
        """Each tree in brackets, ((a b) c)."""
        return [self._words(k[:-1]) for k in self.keys(rollouts)]

    def name(self, leaf: int) -> str:
        """How people call a leaf."""
        return self.words[leaf] if self.words else str(leaf)

    def _words(self, moves: tuple[int, ...]) -> str:
        stack: list[str] = []
        leaf = 0
        for move in moves:
            if move == SHIFT:
                stack.append(self.name(leaf))
                leaf += 1
            else:
                right = stack.pop()
                stack[-1] = f"({stack[-1]} {right})"
        return " ".join(stack)

    def enumerate(self) -> Rollouts:
        """Every tree once, as its only path. Raises InputError where there are over two million."""
        return enumerate_objects(self, 0)
