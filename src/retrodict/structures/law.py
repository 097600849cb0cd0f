"""The exact law of a policy over all graphs of a space, by forward dynamic programming: no Monte Carlo.

    reach(G') = sum over parents G of reach(G) q(G -> G'),        q(G) = reach(G) q(stop | G)

from the empty graph on, by number of edges. The probabilities sum to one (checked), so the distance to the posterior
is exact: total variation 1/2 sum |q - p| and the Jensen-Shannon divergence in nats. For d up to 5 (29,281 graphs).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from retrodict import numerics
from retrodict.errors import InputError
from retrodict.numerics import NEG_INF
from retrodict.policies.base import FiniteStepper
from retrodict.spaces.dags import Dags, graph_codes, rollouts_of
from retrodict.targets.algebra import Target

CHUNK = 4096
"""States a pass."""


@dataclass(frozen=True)
class Law:
    """A distribution over all graphs of a space, in the order of ``space.enumerate()``."""

    graphs: Bool[Tensor, "n d d"]
    log_p: Float[Tensor, " n"]

    @property
    def edge_marginals(self) -> Float[Tensor, "d d"]:
        """The probability of each edge."""
        return (self.log_p.exp()[:, None, None] * self.graphs).sum(0)


@torch.no_grad()
def graph_law(policy: FiniteStepper, problem: int = 0) -> Law:
    """Where a policy ends, exactly. Raises InputError where its probabilities do not sum to one."""
    space: Dags = policy.space
    graphs = space.enumerate()
    code, size = graph_codes(graphs), graphs.flatten(1).sum(1)
    order = code.argsort()
    reach = torch.zeros(len(graphs), dtype=torch.float64)
    reach[0] = 1.0
    log_p = torch.full_like(reach, NEG_INF)
    for k in range(int(size[0]), int(size[-1]) + 1):
        for at in (size == k).nonzero().squeeze(1).split(CHUNK):
            rows = rollouts_of(space, graphs[at], problem)
            s = space.replay(rows, rows.n)
            edges, stop = policy.log_probs(policy.start_at(rows, rows.n), s, space.menu(s))
            log_p[at] = reach[at].log() + stop.double().logsumexp(1)
            row, move = (edges > NEG_INF).nonzero().unbind(1)
            child = order[torch.searchsorted(code[order], code[at][row] + 2**move)]
            reach.index_add_(0, child, reach[at][row] * edges[row, move].double().exp())
    total = float(log_p.exp().sum())
    if abs(total - 1.0) > 1e-4:
        raise InputError(f"the policy's probabilities sum to {total:.6f}; log_probs must be normalised over the menu")
    return Law(graphs, log_p - log_p.logsumexp(0))


@torch.no_grad()
def posterior_law(target: Target, problem: int = 0) -> Law:
    """The target's own law, normalised over all graphs of its space."""
    space = target.space
    assert isinstance(space, Dags)
    graphs = space.enumerate()
    value = target.log_gamma(rollouts_of(space, graphs, problem)).double()
    return Law(graphs, value - value.logsumexp(0))


def log_evidence(target: Target, problem: int = 0) -> float:
    """log sum over G of gamma(G)."""
    assert isinstance(target.space, Dags)
    return float(target.log_gamma(rollouts_of(target.space, target.space.enumerate(), problem)).double().logsumexp(0))


def total_variation(a: Law, b: Law) -> float:
    """1/2 sum |a - b|."""
    return numerics.total_variation(a.log_p, b.log_p)


def jensen_shannon(a: Law, b: Law) -> float:
    """1/2 KL(a, m) + 1/2 KL(b, m) with m = (a + b) / 2, in nats; at most log 2."""
    middle = torch.logaddexp(a.log_p, b.log_p) - torch.tensor(2.0, dtype=torch.float64).log()

    def kl(x: Tensor) -> Tensor:
        return torch.where(x > NEG_INF, x.exp() * (x - middle), 0.0).sum()

    return float(kl(a.log_p) + kl(b.log_p)) / 2
