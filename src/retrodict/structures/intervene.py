"""Which variable to set next: what an experiment on it would tell about the graph.

Data without interventions tell graphs apart only up to their Markov class. Setting v by hand cuts the edges into v, and
with enough rows tells the class of what is left (Hauser and Buehlmann 2012: same class, and same class after the cut).
With C the class of G and C_v that of the pair, the gain of an ideal experiment on v beyond ideal observation is

    H(C_v) - H(C)     in nats, under the posterior over graphs

Bias: none for an exact posterior. Over sampled graphs entropies come out low (at most the log of their number), and the
ranking is what to read. Real experiments have finitely many rows: they tell less of this, and something of C as well.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from retrodict.errors import InputError
from retrodict.spaces.dags import markov_classes
from retrodict.structures.posterior import GraphPosterior


def expected_gain(found: GraphPosterior, most: int = 30_000, seed: int = 0) -> Float[Tensor, " d"]:
    """Expected information, in nats, of setting each variable; 0 where it tells no graph from another.

    Of a posterior with more than ``most`` different graphs, so many are drawn and stand for it.
    """
    graphs, weights = found.graphs, found.weights
    if graphs is None or weights is None:
        raise InputError(f"{found.method} has no graphs to tell apart; use exact, order or structure")
    if len(graphs) > most:
        graphs, weights = found.sample(most, seed), torch.full((most,), 1 / most, dtype=torch.float64)
    whole = markov_classes(graphs)
    pairs = [_pair(whole, cut(graphs, v)) for v in range(len(found.names))]
    return torch.stack([entropy(c, weights) for c in pairs]).sub(entropy(whole, weights)).clamp_min(0.0)


def cut(graphs: Bool[Tensor, "n d d"], v: int) -> Int[Tensor, " n"]:
    """The class of each graph without the edges into v."""
    out = graphs.clone()
    out[:, :, v] = False
    return markov_classes(out)


def entropy(classes: Int[Tensor, " n"], weights: Float[Tensor, " n"]) -> Float[Tensor, ""]:
    """Entropy of the classes' weights."""
    p = torch.zeros(int(classes.max()) + 1, dtype=torch.float64).index_add_(0, classes, weights.double())
    return -torch.special.xlogy(p, p).sum()


def _pair(a: Int[Tensor, " n"], b: Int[Tensor, " n"]) -> Int[Tensor, " n"]:
    return torch.unique(a * (int(b.max()) + 1) + b, return_inverse=True)[1]
