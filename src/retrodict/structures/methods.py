"""The methods over graphs by name: each takes a modular log p(G) and gives a GraphPosterior.

    exact       every graph, up to 5 nodes                  no sampling error
    subsets     sums over subsets of nodes, up to 12        no sampling error; probabilities of edges only
    order       chains over orders, up to 14                intervals over chains
    structure   chains over graphs, any size                intervals over chains
    amortized   a policy trained on the density             intervals over batches of draws

The policy's draws are weighed by w = p(G) P_B / q (self-normalised, biased O(1/n)). Where it is so far off that a few
draws would carry all weight, they stand unweighed, and a note says so: the answer is then the policy's own law. What
a policy never draws is missed, and no interval shows it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from retrodict.errors import InputError, nearest
from retrodict.numerics import at_end, ess
from retrodict.rng import generator
from retrodict.spaces.dags import MAX_LISTED, Dags, adjacency, edges_to_graph
from retrodict.structures.exact import enumerated
from retrodict.structures.mcmc_order import order_mcmc
from retrodict.structures.mcmc_structure import structure_mcmc
from retrodict.structures.modular import MOST_TABLE, Modular
from retrodict.structures.posterior import GraphPosterior, named, sampled
from retrodict.structures.subsets import MOST, subset_marginals
from retrodict.structures.target import graph_target
from retrodict.structures.train import amortize_graphs
from retrodict.training.threads import one_thread

METHODS = ("exact", "subsets", "order", "structure", "amortized")
LIMITS = {"exact": MAX_LISTED, "subsets": MOST, "order": MOST_TABLE}
"""Most nodes of a method."""
BATCHES, DRAWS, FEW = 16, 1024, 0.02
"""Of an amortized policy: batches of draws, draws in each, and the share of ESS below which draws stay unweighed."""


def choose(d: int, method: str = "auto") -> str:
    """The method for d nodes: exact while graphs can be listed, then the chain that mixes better while it fits.

    Raises InputError for a name that is no method, and for a method that d is too many for.
    """
    if method == "auto":
        return "exact" if d <= MAX_LISTED else "order" if d <= MOST_TABLE else "structure"
    if method not in METHODS:
        raise InputError(f"unknown method {method!r}{nearest(method, [*METHODS, 'auto'])}")
    if d > LIMITS.get(method, d):
        fit = [f"{m} (up to {LIMITS[m]})" if m in LIMITS else m for m in METHODS if d <= LIMITS.get(m, d)]
        raise InputError(f"{d} variables are too many for the method {method} (at most {LIMITS[method]}): "
                         f"use the method {', '.join(fit[:-1])} or {fit[-1]}")  # fmt: skip
    return method


def graph_posterior(
    score: Modular,
    names: Sequence[str] = (),
    method: str = "auto",
    space: Dags | None = None,
    chains: int = 16,
    steps: int | None = None,
    seed: int = 0,
) -> GraphPosterior:
    """The posterior p(G) in proportion to exp(score), by one of ``METHODS``.

    Args:
        score: log p(G) up to a constant: data, priors and constraints (``priors.hard``) combined.
        names: of the nodes.
        method: a name, or auto (``choose``).
        space: the constraints again, so that a chain can begin at the required edges.
        chains, steps: of the chains; ``steps`` None for each method's default, a fifth as many are dropped first. Of
            a policy ``steps`` are gradient steps.
        seed: of the chains.
    """
    method = choose(score.d, method)
    length: dict[str, int] = {} if steps is None else {"steps": steps, "burn_in": steps // 5}
    start = edges_to_graph(space.required, score.d)[0] if space is not None else None
    calls: dict[str, Callable[[], GraphPosterior]] = {
        "exact": lambda: enumerated(score, names),
        "subsets": lambda: subset_marginals(score, names),
        "order": lambda: order_mcmc(score, names, chains=chains, seed=seed, **length),
        "structure": lambda: structure_mcmc(score, names, chains=chains, start=start, seed=seed, **length),
        "amortized": lambda: amortized(score, names, space, steps, seed),
    }
    return calls[method]()


def amortized(
    score: Modular, names: Sequence[str] = (), space: Dags | None = None, steps: int | None = None, seed: int = 0
) -> GraphPosterior:
    """Train a policy (``train.amortize_graphs``) and weigh its draws."""
    began = time.perf_counter()
    target = graph_target(space or Dags(score.d, names=named(names, score.d)), {"score": score})
    length: dict[str, Any] = {} if steps is None else {"steps": steps}
    policy = amortize_graphs(target, seed=seed, **length)
    trained = time.perf_counter() - began
    with one_thread():
        rows = policy.sample(torch.zeros(BATCHES * DRAWS, dtype=torch.int64), generator(seed, "cpu", 1))
    log_q = rows.log_q.sum(1) + at_end(rows.log_stop, rows.n, rows.stop)
    log_w = target.log_gamma(rows) + rows.log_pb.sum(1) - log_q.double()
    size = float(ess(log_w))
    cost = {
        "ess": size,
        "draws": float(len(log_w)),
        "training seconds": trained,
        "seconds": time.perf_counter() - began,
    }
    few = size < FEW * len(log_w)
    note = (f"the policy's draws stand unweighed: their effective size would be {size:.0f} of {len(log_w)}; train it "
            "for more steps",) if few else ()  # fmt: skip
    log_w = torch.zeros_like(log_w) if few else log_w
    run = torch.arange(BATCHES).repeat_interleave(DRAWS)
    graphs = adjacency(rows, score.d, () if space is None else space.required)
    return sampled(names, "amortized", graphs, log_w, run, cost, note)
