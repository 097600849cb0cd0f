"""Bootstrap hill climbing: the best graph found on each of many resampled tables (Friedman, Goldszmidt, Wyner 1999).

Each replicate draws N rows with replacement, scores them, and climbs from the empty graph by the best single addition,
deletion or reversal until none improves; ties (score-equivalent reversals) are broken at random. The share of
replicates with an edge is the usual measure of confidence in it.

Bias: it is not a posterior. It measures how the best graph varies with the data, uses each row's information about
twice over (resampled tables have fewer distinct rows), and climbs to local optima. It stands here as a baseline.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from retrodict.errors import InputError
from retrodict.rng import generator
from retrodict.spaces.dags import parent_masks
from retrodict.structures.data import Table
from retrodict.structures.mcmc_structure import apply, neighbours
from retrodict.structures.modular import Modular
from retrodict.structures.posterior import GraphPosterior, log_scores, sampled

EQUAL = 1e-8
"""Nats within which two improvements count as a tie."""


def bootstrap_graphs(
    table: Table, score: Callable[[Table], Modular], replicates: int = 100, seed: int = 0
) -> GraphPosterior:
    """Share of replicates whose best graph has each edge; intervals over replicates, each a run of one graph.

    Args:
        table: the data.
        score: makes the score of a table (with its priors), such as ``scores.bge``.
        replicates: resampled tables.
        seed: of the resampling and of ties.
    """
    if replicates < 2:
        raise InputError(f"a bootstrap needs at least 2 replicates, not {replicates}")
    began, found = time.perf_counter(), []
    for k in range(replicates):
        gen = generator(seed, "cpu", k)
        rows = torch.randint(len(table), (len(table),), generator=gen)
        found.append(climb(score(table.rows(rows)), gen)[0])
    graphs, weight = torch.stack(found), torch.zeros(replicates, dtype=torch.float64)
    cost = {"replicates": float(replicates), "seconds": time.perf_counter() - began}
    note = ("a bootstrap of the best graph, not a posterior",)
    return sampled(table.names, "bootstrap", graphs, weight, torch.arange(replicates), cost, note)


def climb(
    score: Modular, gen: torch.Generator, start: Bool[Tensor, "d d"] | None = None
) -> tuple[Bool[Tensor, "d d"], float]:
    """Greedy ascent to a graph that no single change improves, and its score."""
    d = score.d
    graph = torch.zeros(d, d, dtype=torch.bool) if start is None else start
    while True:
        gain = gains(score, graph).masked_fill(~neighbours(graph[None])[0], -torch.inf).flatten()
        best = gain.max()
        if not float(best) > EQUAL:
            return graph, float(log_scores(score, parent_masks(graph[None])))
        ties = (gain >= best - EQUAL).nonzero()[:, 0]
        pick = ties[torch.randint(len(ties), (1,), generator=gen)]
        graph = apply(graph[None], pick)[0]


def gains(score: Modular, graph: Bool[Tensor, "d d"]) -> Float[Tensor, "3 d d"]:
    """What adding, deleting or reversing i -> j changes in the log score: the change of a child's term, or of two."""
    d = len(graph)
    parents = parent_masks(graph[None])[0]
    now = score.gather(torch.arange(d), parents)
    i, j = (~torch.eye(d, dtype=torch.bool)).nonzero().unbind(1)
    change = torch.zeros(d, d, dtype=torch.float64)  # of child j where i becomes, or stops being, its parent
    change[i, j] = score.gather(j, parents[j] ^ 2**i) - now[j]
    return torch.stack([change, change, change + change.T])
