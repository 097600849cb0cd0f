"""Train a policy on a posterior over graphs with the settings that work, through the loop that trains everything else.

Any objective of ``objectives.table`` fits: a graph is reached by several orders, so all of them carry P_B (``Dags``).
Modified detailed balance (``"db"``; Deleu et al. 2022, arXiv:2202.13903) credits single edges and is the default; TB,
SubTB, VarGrad and pooled are the same call. Small nets run on one torch thread: with two they are slower.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from retrodict.errors import InputError
from retrodict.policies.graph import GraphAttention, GraphMLP, GraphPolicy, features_of
from retrodict.rng import generator
from retrodict.spaces.dags import Dags
from retrodict.structures.data import Table
from retrodict.targets.algebra import Target
from retrodict.training.amortize import amortize
from retrodict.training.threads import one_thread

PLAN: dict[str, Any] = {
    "objective": "db", "steps": 1000, "samples": 256, "lr": 5e-3, "lr_end": 0.01, "tempered": 1.0,
    "temperatures": (1.0, 1.0), "epsilon": 0.1, "evaluate": 256,
}  # fmt: skip
"""The defaults: every row drawn with one uniform move in ten, Adam from 5e-3 along a cosine to a hundredth of it."""


def graph_policy(target: Target, net: str = "mlp", seed: int = 0, **sizes: int) -> GraphPolicy:
    """An untrained policy for a target over graphs.

    Args:
        target: from ``graph_target``; where its problems have ``features`` the network reads them.
        net: "mlp" (small d) or "attention" (over edges, for larger d).
        seed: of the weights.
        sizes: ``hidden`` and ``layers`` of the one, ``width``, ``layers`` and ``heads`` of the other.
    """
    space = target.space
    if not isinstance(space, Dags):
        raise InputError(f"a graph policy draws from Dags, not from {type(space).__name__}")
    kinds = {"mlp": GraphMLP, "attention": GraphAttention}
    if net not in kinds:
        raise InputError(f"unknown net {net!r}; choose one of {', '.join(kinds)}")
    told = features_of(space, target.problems)
    made = kinds[net](space.d, 0 if told is None else told.shape[-1], seed=seed, **sizes)
    return GraphPolicy(space, target.problems, made)


def amortize_graphs(target: Target, policy: GraphPolicy | None = None, **given: Any) -> GraphPolicy:
    """A policy that draws graphs from a posterior: ``retrodict.amortize`` under :data:`PLAN`.

    ``given`` are its arguments (objective, steps, samples, folder, on_metrics, ...); they replace those of the plan.
    """
    policy = policy or graph_policy(target, seed=int(given.get("seed", 0)))
    with one_thread():
        return amortize(target, policy, **{**PLAN, **given})


def sample_graphs(policy: GraphPolicy, n: int, seed: int = 0, problem: int = 0) -> Bool[Tensor, "n d d"]:
    """n graphs of a policy."""
    with one_thread():
        return policy.space.graphs(policy.sample(torch.full((n,), problem), generator(seed)))


def data_features(table: Table) -> Float[Tensor, "d d 3"]:
    """What a policy may read of a data set: correlations, partial correlations, and the log of the number of rows.

    A summary, not the data: two sets with the same one have the same amortized posterior, whatever their scores say.
    """
    x = table.values.double()
    cov = torch.cov(x.T).reshape(x.shape[1], -1)
    sd = cov.diagonal().sqrt().clamp_min(1e-12)
    correlation = cov / sd[:, None] / sd
    precision = torch.linalg.pinv(correlation + 1e-3 * torch.eye(len(sd), dtype=torch.float64))
    scale = precision.diagonal().sqrt()
    rows = torch.full_like(cov, len(x)).log() / 10
    return torch.stack([correlation, -precision / scale[:, None] / scale, rows], -1).float()
