"""Order MCMC: a chain over orders of the nodes, each with the sum of all graphs it allows (Friedman and Koller 2003).

With B_j(P) = exp f(j, P), an order has the weight of all DAGs whose parents come before their children,

    w(order) = prod over j of A_j(before j),      A_j(U) = sum over P in U of B_j(P)

and two nodes swap places with probability min(1, w'/w). Graphs are then drawn from the order, parents node by node in
proportion to B_j. A graph comes in proportion to p(G) times its number of linear extensions (the orders it fits), which
is the order-modular prior, not the uniform one; each drawn graph therefore weighs 1/#extensions (Ellis and Wong 2008):

    P(G) = p(G) / sum p        with the weights; p(G) #ext(G) / sum p #ext without them

Bias: of the chain until it mixes, and O(1/n) of self-normalised weights. Few-edged graphs fit many orders, so where the
posterior holds dense graphs a few draws carry the weight: ``ess`` says how many count.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from retrodict.diagnostics.chains import split_rhat
from retrodict.errors import InputError
from retrodict.numerics import NEG_INF, ess, safe_sub
from retrodict.rng import generator
from retrodict.spaces.dags import mask_to_adjacency
from retrodict.structures.mcmc_structure import check_chains, disagree
from retrodict.structures.modular import Modular, tabulate
from retrodict.structures.posterior import GraphPosterior, sampled

CHUNK = 4_000_000
"""Numbers held at once while graphs are drawn or their orders counted."""


def order_mcmc(
    score: Modular,
    names: Sequence[str] = (),
    chains: int = 16,
    steps: int = 10_000,
    burn_in: int = 2_000,
    thin: int = 10,
    graphs: int = 2,
    seed: int = 0,
) -> GraphPosterior:
    """Edge probabilities and graphs from independent chains over orders (up to 14 nodes).

    Args:
        score: log p(G) up to a constant, the prior over DAGs included.
        names: of the nodes.
        chains: independent runs, which the intervals are taken over.
        steps: of each chain after ``burn_in``; every ``thin``-th order is kept.
        graphs: drawn from each kept order.
        seed: of all chains.
    """
    check_chains(chains, steps, burn_in, thin)
    began, gen, table = time.perf_counter(), generator(seed), tabulate(score)
    orders, trace, acceptance = _walk(log_zeta(table), chains, steps, burn_in, thin, gen)
    run = torch.arange(chains).repeat(len(trace)).repeat_interleave(graphs)
    masks = draw_graphs(table, orders.flatten(0, 1).repeat_interleave(graphs, 0), gen)
    log_w = -extensions(masks).log()
    by_chain = log_w.view(-1, chains, graphs).transpose(0, 1).flatten(1)
    cost = {"steps": float(steps), "chains": float(chains), "acceptance": acceptance, "rhat": split_rhat(trace.T)}
    cost |= {"ess": float(ess(by_chain).sum()), "draws": float(len(masks)), "seconds": time.perf_counter() - began}
    return sampled(names, "order", mask_to_adjacency(masks), log_w, run, cost, disagree(cost["rhat"]))


def log_zeta(table: Float[Tensor, "d masks"]) -> Float[Tensor, "d masks"]:
    """log A_j(U) = log of the sum over subsets P of U of exp table[j, P]."""
    out, d = table.clone(), len(table)
    for k in range(d):
        half = out.view(d, -1, 2, 2**k)  # whether node k is in
        half[:, :, 1] = torch.logaddexp(half[:, :, 1], half[:, :, 0])
    return out


def _walk(
    ahead: Float[Tensor, "d masks"], chains: int, steps: int, burn_in: int, thin: int, gen: torch.Generator
) -> tuple[Int64[Tensor, "k c d"], Float[Tensor, "k c"], float]:
    """Kept orders (node at each place), their log w, and the acceptance rate."""
    d = len(ahead)
    order = torch.rand(chains, d, generator=gen).argsort(1)
    value = log_order(ahead, order)
    row, kept, trace, accepted = torch.arange(chains), [], [], 0
    for step in range(burn_in + steps):
        pair = torch.rand(chains, d, generator=gen).argsort(1)[:, :2]
        there = order.clone()
        there[row, pair[:, 0]], there[row, pair[:, 1]] = order[row, pair[:, 1]], order[row, pair[:, 0]]
        new = log_order(ahead, there)
        take = torch.rand(chains, generator=gen, dtype=torch.float64).log() < safe_sub(new, value)
        take |= value == NEG_INF  # from an order that the constraints exclude anything is better
        order, value = torch.where(take[:, None], there, order), torch.where(take, new, value)
        if step >= burn_in:
            accepted += int(take.sum())
            if (step - burn_in) % thin == 0:
                kept.append(order)
                trace.append(value)
    if bool((value == NEG_INF).any()):
        raise InputError("no order was found that the constraints allow; give more burn_in, or fewer required edges")
    return torch.stack(kept), torch.stack(trace), accepted / (steps * chains)


def before(order: Int64[Tensor, "c d"]) -> Int64[Tensor, "c d"]:
    """For each node, the mask of those that come earlier."""
    bits = 2**order
    return torch.zeros_like(order).scatter(1, order, bits.cumsum(1) - bits)


def log_order(ahead: Float[Tensor, "d masks"], order: Int64[Tensor, "c d"]) -> Float[Tensor, " c"]:
    """log w(order)."""
    d = len(ahead)
    return ahead[torch.arange(d).expand(len(order), -1), before(order)].sum(1)


def draw_graphs(
    table: Float[Tensor, "d masks"], order: Int64[Tensor, "n d"], gen: torch.Generator
) -> Int64[Tensor, "n d"]:
    """One graph an order: each node's parents in proportion to exp table[j, P] among sets that come before it."""
    ahead, parents = before(order), torch.empty_like(order)
    u = torch.rand(order.shape, generator=gen, dtype=torch.float64)
    for j in range(len(table)):
        allowed, back = torch.unique(ahead[:, j], return_inverse=True)
        by_set = back.argsort(stable=True)
        for rows in by_set.split(max(1, len(back) // max(1, len(allowed) * table.shape[1] // CHUNK))):
            parents[rows, j] = _draw_parents(table[j], allowed[back[rows]], u[rows, j])
    return parents


def _draw_parents(
    row: Float[Tensor, " masks"], allowed: Int64[Tensor, " n"], u: Float[Tensor, " n"]
) -> Int64[Tensor, " n"]:
    """Parent sets inside ``allowed`` in proportion to exp(row), by inverting one distribution function a distinct set.

    The functions are laid end to end, each one longer by 1, so that one search serves all rows.
    """
    distinct, back = torch.unique(allowed, return_inverse=True)
    inside = torch.arange(len(row)) & ~distinct[:, None] == 0
    cdf = row.masked_fill(~inside, NEG_INF).softmax(1).cumsum(1) + torch.arange(len(distinct))[:, None]
    at = torch.searchsorted(cdf.flatten(), back + u * (1 - 1e-9), right=True)
    return at - back * len(row)


def extensions(masks: Int64[Tensor, "n d"]) -> Float[Tensor, " n"]:
    """Number of linear extensions of each DAG (parent masks): the orders in which parents come before children.

    e(S) = sum over j in S whose parents are in S - j of e(S - j), e(empty) = 1; exact in float64 to 18 nodes.
    """
    d = masks.shape[1]
    distinct, back = torch.unique(masks, dim=0, return_inverse=True)
    out = []
    for part in distinct.split(max(1, CHUNK // 2**d)):
        count = torch.zeros(2**d, len(part), dtype=torch.float64)
        count[0] = 1
        for sets in _by_size(d):
            for j in range(d):
                s = sets[(sets >> j) & 1 == 1]
                ready = part[:, j] & ~(s[:, None] ^ 2**j) == 0
                count[s] += torch.where(ready, count[s ^ 2**j], 0.0)
        out.append(count[-1])
    return torch.cat(out)[back]


def _by_size(d: int) -> list[Int64[Tensor, " s"]]:
    """Nonempty subsets of d nodes, by their size."""
    mask = torch.arange(2**d)
    size = ((mask[:, None] >> torch.arange(d)) & 1).sum(1)
    return [mask[size == k] for k in range(1, d + 1)]
