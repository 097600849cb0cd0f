"""Structure MCMC: a chain over graphs that adds, deletes or reverses one edge a step (Madigan and York 1995, "MC3").

From G a neighbour G' is proposed uniformly among the n(G) graphs that one legal change gives, and accepted with

    min(1, p(G') n(G) / (p(G) n(G')))

which leaves p invariant (detailed balance). Chains are independent and move together as tensors. Legal are: adding
i -> j where j is no ancestor of i; deleting any edge; reversing i -> j where no other path leads from i to j.

Bias: that of a chain not yet at its law. It is the baseline that mixes badly: between graphs of equal skeleton it walks
edge by edge. Intervals over chains that are all stuck in one place are too narrow; ``rhat`` says where they disagree.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from retrodict.diagnostics.chains import split_rhat
from retrodict.errors import InputError
from retrodict.rng import generator
from retrodict.spaces.dags import closure, mask_to_adjacency, parent_masks
from retrodict.structures.modular import Modular
from retrodict.structures.posterior import GraphPosterior, log_scores, sampled

ADD, DELETE, REVERSE = 0, 1, 2


def neighbours(graph: Bool[Tensor, "c d d"]) -> Bool[Tensor, "c 3 d d"]:
    """Which edges i -> j may be added, deleted and reversed in each graph."""
    above = closure(graph)
    longer = (graph.float() @ above.transpose(1, 2).float()) > 1  # edges i -> k with k above j; k = j is one of them
    return torch.stack([~(graph | above), graph, graph & ~longer], 1)


def apply(graph: Bool[Tensor, "c d d"], move: Int[Tensor, " c"]) -> Bool[Tensor, "c d d"]:
    """Each graph after one move, the index into its flat ``neighbours``."""
    c, d = graph.shape[:2]
    kind, edge = move // (d * d), move % (d * d)
    out, row = graph.clone(), torch.arange(c)
    i, j = edge // d, edge % d
    out[row, i, j] = kind == ADD
    back = kind == REVERSE
    out[row[back], j[back], i[back]] = True
    return out


def log_ratio(
    old: Float[Tensor, " c"], new: Float[Tensor, " c"], n_old: Int[Tensor, " c"], n_new: Int[Tensor, " c"]
) -> Float[Tensor, " c"]:
    """log of p(G') n(G) / (p(G) n(G'))."""
    return new - old + n_old.double().log() - n_new.double().log()


def structure_mcmc(
    score: Modular,
    names: Sequence[str] = (),
    chains: int = 16,
    steps: int = 20_000,
    burn_in: int = 5_000,
    thin: int = 10,
    start: Bool[Tensor, "d d"] | None = None,
    seed: int = 0,
) -> GraphPosterior:
    """Edge probabilities and graphs from independent chains.

    Args:
        score: log p(G) up to a constant.
        names: of the nodes.
        chains: independent runs, which the intervals are taken over.
        steps: of each chain after ``burn_in``; every ``thin``-th graph is kept.
        start: where chains begin; the graph without edges by default. A graph of density zero is refused.
        seed: of all chains.
    """
    check_chains(chains, steps, burn_in, thin)
    d, gen, began = score.d, generator(seed), time.perf_counter()
    graph = torch.zeros(d, d, dtype=torch.bool) if start is None else start
    graph = graph.expand(chains, d, d)
    value = log_scores(score, parent_masks(graph))
    if not bool(value.isfinite().all()):
        raise InputError("the chains' first graph has density zero; give start=, a graph of the required edges")
    open_now = neighbours(graph)
    kept, trace, accepted = [], [], 0
    for step in range(burn_in + steps):
        move = torch.multinomial(open_now.flatten(1).float(), 1, generator=gen)[:, 0]
        there = apply(graph, move)
        open_there = neighbours(there)
        new = log_scores(score, parent_masks(there))
        odds = log_ratio(value, new, open_now.flatten(1).sum(1), open_there.flatten(1).sum(1))
        take = torch.rand(chains, generator=gen, dtype=torch.float64).log() < odds
        graph = torch.where(take[:, None, None], there, graph)
        open_now = torch.where(take[:, None, None, None], open_there, open_now)
        value = torch.where(take, new, value)
        if step >= burn_in:
            accepted += int(take.sum())
            if (step - burn_in) % thin == 0:
                kept.append(parent_masks(graph))
                trace.append(value)
    masks, values = torch.stack(kept), torch.stack(trace)
    cost = {"steps": float(steps), "chains": float(chains), "acceptance": accepted / (steps * chains),
            "rhat": split_rhat(values.T), "seconds": time.perf_counter() - began}  # fmt: skip
    run = torch.arange(chains).repeat(len(masks))
    weight = torch.zeros(len(run), dtype=torch.float64)
    return sampled(
        names, "structure", mask_to_adjacency(masks.flatten(0, 1)), weight, run, cost, disagree(cost["rhat"])
    )


def check_chains(chains: int, steps: int, burn_in: int, thin: int) -> None:
    """Refuse counts that give no draw."""
    if chains < 1 or steps < 1 or burn_in < 0 or thin < 1:
        told = f"chains {chains}, steps {steps}, thin {thin}, burn_in {burn_in}"
        raise InputError(f"chains, steps and thin must be 1 or more and burn_in 0 or more; given {told}")


def disagree(rhat: float, most: float = 1.05) -> tuple[str, ...]:
    """A note where chains have not reached the same place."""
    return (
        () if not rhat > most else (f"the chains disagree (split R-hat of the log score {rhat:.2f}): take more steps",)
    )
