"""Every graph, one by one: the oracle for up to five nodes (29,281 graphs). No sampling error.

p(G | D) = exp(score(G)) / sum over DAGs of exp(score)
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch

from retrodict.errors import InputError
from retrodict.spaces.dags import MAX_LISTED, all_dags, parent_masks
from retrodict.structures.modular import Modular
from retrodict.structures.posterior import GraphPosterior, log_scores, named


def enumerated(score: Modular, names: Sequence[str] = ()) -> GraphPosterior:
    """The exact posterior over all DAGs of at most ``MAX_LISTED`` nodes."""
    if score.d > MAX_LISTED:
        raise InputError(f"{score.d} variables have too many graphs to list (at most {MAX_LISTED} variables): use the "
                         "method subsets (up to 12), order or structure")  # fmt: skip
    began, graphs = time.perf_counter(), all_dags(score.d)
    value = log_scores(score, parent_masks(graphs))
    log_z = torch.logsumexp(value, 0)
    if not bool(log_z.isfinite()):
        raise InputError("every graph has density zero: the constraints exclude each other")
    p = (value - log_z).exp()
    marginals = (p @ graphs.flatten(1).double()).view(score.d, score.d)
    cost = {"graphs": float(len(graphs)), "seconds": time.perf_counter() - began}
    return GraphPosterior(named(names, score.d), "exact", marginals, graphs, p, None, float(log_z), True, cost)
