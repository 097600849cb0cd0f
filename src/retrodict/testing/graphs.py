"""Oracles and a planted bug for posteriors over graphs: random modular targets, and the policy that is the answer.

The exact flows of a target, by backward dynamic programming over all graphs of the space (Bengio et al. 2021,
arXiv:2111.09266; P_B uniform over the edges that may have been the last):

    F(G) = R(G) + sum over G' = G + edge of P_B(G | G') F(G')
    q(stop | G) = R(G) / F(G),    q(G -> G') = P_B(G | G') F(G') / F(G),    log F(start) = log Z
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from retrodict.numerics import NEG_INF
from retrodict.policies.base import FiniteStepper
from retrodict.records import Menu, Rollouts
from retrodict.rng import generator
from retrodict.spaces.dags import Dags, DagState, graph_codes, rollouts_of
from retrodict.structures.modular import LocalTable
from retrodict.structures.target import graph_target
from retrodict.targets.algebra import Target


def graph_toy(d: int = 3, seed: int = 0, scale: float = 1.0, space: Dags | None = None) -> Target:
    """A random modular density over the graphs of d nodes."""
    table = scale * torch.randn(d, 2**d, generator=generator(seed), dtype=torch.float64)
    return graph_target(space or Dags(d), {"table": LocalTable(table, f"toy {seed}")})


@dataclass(frozen=True)
class NoBackward(Dags):
    """Planted bug: P_B ignored. What is learned is gamma(G) times the number of orders in which G can be built."""

    def log_pb(self, s: DagState) -> Float[Tensor, " b"]:
        """Wrong: as if a graph were reached by one path."""
        return torch.zeros(len(s.n), dtype=torch.float64)


class Flows(FiniteStepper):
    """The policy whose residual is 0 everywhere: the exact flows of a small target (one problem)."""

    def __init__(self, target: Target) -> None:
        space = target.space
        assert isinstance(space, Dags)
        self.space, self.problems = space, target.problems
        graphs = space.enumerate()
        value = target.log_gamma(rollouts_of(space, graphs)).double()
        self.code, order = graph_codes(graphs).sort()
        size, legal, flow = graphs.flatten(1).sum(1), space.menu(self._state(graphs)).legal, value.clone()
        assert legal is not None
        self.edges = torch.full(legal.shape, NEG_INF, dtype=torch.float64)
        for k in range(int(size[-1]) - 1, int(size[0]) - 1, -1):
            row, move = (legal & (size == k)[:, None]).nonzero().unbind(1)
            child = order[torch.searchsorted(self.code, graph_codes(graphs)[row] + 2**move)]
            self.edges[row, move] = flow[child] - (size[child] - size[0]).double().log()
            at = size == k
            flow[at] = torch.logaddexp(value[at], self.edges[at].logsumexp(1))
        self.log_z = float(flow[0])
        self.edges = (self.edges - flow[:, None])[order]
        self.stop = (value - flow)[order]

    def _state(self, graphs: Tensor) -> DagState:
        rows = rollouts_of(self.space, graphs)
        return self.space.replay(rows, rows.n)

    def start(self, problem: Int[Tensor, " b"]) -> Int[Tensor, " b"]:
        """It carries nothing."""
        return problem

    def start_at(self, rollouts: Rollouts, upto: Int[Tensor, " b"]) -> Int[Tensor, " b"]:
        """It carries nothing."""
        return rollouts.problem

    def step(self, c: Tensor, s: DagState, move: Tensor) -> Tensor:
        """It carries nothing."""
        return c

    def take(self, c: Tensor, index: Tensor) -> Tensor:
        """Rows ``index``."""
        return c[index]

    def log_probs(
        self, c: Tensor, s: DagState, menu: Menu, raw: bool = False
    ) -> tuple[Float[Tensor, "b v"], Float[Tensor, "b s"]]:
        """Read off the list."""
        at = torch.searchsorted(self.code, graph_codes(s.graph))
        return self.edges[at], self.stop[at][:, None]
