"""Priors over graphs, up to a constant (acyclicity changes it, and no method here needs it); modular all of them.

uniform       every DAG alike: 1
edges         beta^|E|
erdos_renyi   p^|E| (1 - p)^(pairs - |E|) over the d(d-1)/2 pairs: edges with beta = p/(1-p)
fair          product over j of 1/C(d-1, |Pa_j|): every number of parents alike (d - 1 nodes may be parents;
              Friedman and Koller 2003; C(d, |Pa_j|), found in released code, is not that)
hard          0 for the graphs of a space, -inf for all others: required and forbidden edges, most parents
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from retrodict.errors import InputError
from retrodict.numerics import NEG_INF
from retrodict.spaces.dags import Dags
from retrodict.structures.modular import Modular, modular


def uniform(d: int) -> Modular:
    """Every DAG alike."""
    return _by_count(d, torch.zeros(d, dtype=torch.float64), "uniform")


def edges(d: int, beta: float) -> Modular:
    """A factor ``beta`` an edge; below 1 it favours few."""
    if beta <= 0:
        raise InputError(f"the factor of an edge must be positive, not {beta:g}; forbid edges in the space instead")
    return _by_count(d, torch.arange(d).double() * math.log(beta), f"edges({beta:g})")


def erdos_renyi(d: int, edges_per_node: float = 1.0) -> Modular:
    """Each pair is joined with p = edges_per_node d / (d(d-1)/2)."""
    p = 2 * edges_per_node / (d - 1) if d > 1 else 0.5
    if not 0 < p < 1:
        raise InputError(f"{edges_per_node:g} edges a node among {d} nodes is a probability of {p:g}; give less than "
                         f"{(d - 1) / 2:g}")  # fmt: skip
    k = torch.arange(d).double()
    return _by_count(d, k * math.log(p) + ((d - 1) / 2 - k) * math.log1p(-p), f"erdos_renyi({edges_per_node:g})")


def fair(d: int) -> Modular:
    """Every number of parents of a node alike."""
    value = torch.tensor([-math.log(math.comb(d - 1, k)) for k in range(d)], dtype=torch.float64)
    return _by_count(d, value, "fair")


PRIORS: dict[str, Callable[[int], Modular]] = {"uniform": uniform, "erdos_renyi": erdos_renyi, "fair": fair}
"""Priors without an argument, by the name the command line gives them."""


def hard(space: Dags) -> Modular:
    """The space's constraints. A limit on all edges together is not modular and is refused."""
    if space.max_edges is not None:
        raise InputError("max_edges is not a sum over nodes; limit max_parents, or sample with a policy")
    d, most = space.d, space.d if space.max_parents is None else space.max_parents
    must, never = _masks(space.required, d), _masks(space.forbidden, d)

    def local(child: Int[Tensor, " n"], parents: Int[Tensor, " n"]) -> Float[Tensor, " n"]:
        wrong = (must[child] & ~parents != 0) | (never[child] & parents != 0) | (count_bits(parents, d) > most)
        return torch.where(wrong, NEG_INF, 0.0).double()

    named = f"hard(required={space.required}, forbidden={space.forbidden}, max_parents={space.max_parents})"
    return modular(d, local, named)


def count_bits(masks: Int[Tensor, "*n"], d: int) -> Int[Tensor, "*n"]:
    """Number of members of each mask."""
    return ((masks[..., None] >> torch.arange(d)) & 1).sum(-1)


def _by_count(d: int, value: Float[Tensor, " d"], version: str) -> Modular:
    return modular(d, lambda child, parents: value[count_bits(parents, d)], f"{version} on {d} nodes")


def _masks(pairs: tuple[tuple[int, int], ...], d: int) -> Int[Tensor, " d"]:
    told = torch.zeros(d, dtype=torch.int64)
    for i, j in set(pairs):
        told[j] += 2**i
    return told
