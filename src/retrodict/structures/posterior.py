"""The answer of every method over graphs: edge probabilities, and graphs where the method has them.

Exact by enumeration (all graphs), a weighted sample (MCMC, a policy, a bootstrap), or marginals only (dynamic
programming). Quality against a true graph needs the edge marginals alone: a pair of nodes is in one of three states
(no edge, ->, <-), which exclude each other in a DAG, and the structural Hamming distance, a reversal counted once, is
the number of pairs whose state differs, so

    E[SHD] = sum over pairs of 1 - P(the true state)
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from retrodict.diagnostics.bounds import t_quantile
from retrodict.diagnostics.calibration import auroc, brier, calibration_error
from retrodict.errors import InputError
from retrodict.numerics import normalise
from retrodict.rng import generator
from retrodict.spaces.dags import mask_to_adjacency, parent_masks
from retrodict.structures.modular import Modular


@dataclass(frozen=True)
class GraphPosterior:
    """A distribution over graphs of named nodes, as well as a method knows it.

    Attributes:
        names: of the nodes.
        method: what made it.
        marginals: P(i -> j).
        graphs: distinct graphs, or None where the method has marginals only; ``weights`` sum to one.
        runs: marginals of each independent run, where it is a sample.
        log_z: log of the sum over graphs of exp(score), where the method has it.
        exact: whether the marginals are without sampling error.
        counts: what it cost (steps, seconds, ...) and its acceptance, agreement of chains and the like.
        notes: what a reader should know.
    """

    names: tuple[str, ...]
    method: str
    marginals: Float[Tensor, "d d"]
    graphs: Bool[Tensor, "n d d"] | None = None
    weights: Float[Tensor, " n"] | None = None
    runs: Float[Tensor, "r d d"] | None = None
    log_z: float | None = None
    exact: bool = False
    counts: Mapping[str, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def edge_marginals(self) -> Float[Tensor, "d d"]:
        """P(i -> j | data)."""
        return self.marginals

    def interval(self, level: float = 0.95) -> tuple[Float[Tensor, "d d"], Float[Tensor, "d d"]]:
        """Student's interval of every edge's probability over independent runs; a point where it is exact.

        Fewer than two runs say nothing: [0, 1]. Runs that are stuck in the same place agree, and are too narrow.
        """
        if self.exact:
            return self.marginals, self.marginals
        if self.runs is None or len(self.runs) < 2:
            return torch.zeros_like(self.marginals), torch.ones_like(self.marginals)
        half = t_quantile(len(self.runs) - 1, level) * self.runs.std(0) / math.sqrt(len(self.runs))
        return (self.marginals - half).clamp_min(0.0), (self.marginals + half).clamp_max(1.0)

    def expected_edges(self) -> float:
        """E[number of edges]."""
        return float(self.marginals.sum())

    def top(self, k: int = 10) -> list[tuple[Bool[Tensor, "d d"], float]]:
        """The k graphs of most weight; empty where the method has marginals only."""
        if self.graphs is None or self.weights is None:
            return []
        best = self.weights.argsort(descending=True, stable=True)[:k]
        return [(self.graphs[i], float(self.weights[i])) for i in best.tolist()]

    def sample(self, n: int, seed: int) -> Bool[Tensor, "n d d"]:
        """n graphs drawn from the answer."""
        if self.graphs is None or self.weights is None:
            raise InputError(f"{self.method} knows edge probabilities and no graphs; use order or structure for graphs")
        return self.graphs[torch.multinomial(self.weights, n, replacement=True, generator=generator(seed))]

    def metrics(self, truth: Bool[Tensor, "d d"]) -> dict[str, float]:
        """Quality against a known graph; over all ordered pairs but for the distance. Ties of AUROC are to 1e-9."""
        off = ~torch.eye(len(truth), dtype=torch.bool)
        p, hit = self.marginals[off].clamp(0.0, 1.0), truth[off]
        return {"e_shd": expected_shd(self.marginals, truth), "auroc": auroc(p.round(decimals=9), hit),
                "brier": brier(p, hit), "ece": calibration_error(p, hit), "edges": self.expected_edges()}  # fmt: skip

    def words(self, graph: Bool[Tensor, "d d"]) -> str:
        """A graph as its edges."""
        return ", ".join(f"{self.names[i]} -> {self.names[j]}" for i, j in graph.nonzero().tolist()) or "no edges"


def sampled(
    names: Sequence[str],
    method: str,
    graphs: Bool[Tensor, "n d d"],
    log_w: Float[Tensor, " n"],
    run: Int[Tensor, " n"],
    counts: Mapping[str, float] | None = None,
    notes: tuple[str, ...] = (),
) -> GraphPosterior:
    """The posterior of a weighted sample; ``run`` numbers the independent run that each graph came from, from 0.

    Weights are normalised over all runs for the answer and within each run for the interval; both are self-normalised
    averages, biased O(1/n).
    """
    marks, back = torch.unique(parent_masks(graphs), dim=0, return_inverse=True)
    w = normalise(log_w.double())
    weights = torch.zeros(len(marks), dtype=torch.float64).index_add_(0, back, w)
    r = int(run.max()) + 1
    inside = torch.stack([normalise(torch.where(run == k, log_w.double(), -math.inf)) for k in range(r)])
    flat = graphs.flatten(1).double()
    shape = graphs.shape[1:]
    return GraphPosterior(
        named(names, len(graphs[0])), method, (w @ flat).view(shape), mask_to_adjacency(marks), weights,
        (inside @ flat).view(r, *shape), counts=dict(counts or {}), notes=notes,
    )  # fmt: skip


def named(names: Sequence[str], d: int) -> tuple[str, ...]:
    """The given names, or numbers."""
    if names and len(names) != d:
        raise InputError(f"{len(names)} names for {d} nodes")
    return tuple(names) or tuple(map(str, range(d)))


def log_scores(score: Modular, masks: Int[Tensor, "b d"]) -> Float[Tensor, " b"]:
    """log p(G) = sum_j f(j, Pa_j) of whole graphs, given by their parent masks."""
    return score.gather(torch.arange(score.d).repeat(len(masks)), masks.flatten()).view(-1, score.d).sum(1)


def expected_shd(marginals: Float[Tensor, "d d"], truth: Bool[Tensor, "d d"]) -> float:
    """Expected structural Hamming distance, a reversal counted once."""
    forward, upper = truth.double(), torch.triu(torch.ones_like(marginals), 1)
    none = (1 - marginals - marginals.T) * (1 - forward) * (1 - forward.T)
    right = (marginals * forward + marginals.T * forward.T + none) * upper
    return float(upper.sum() - right.sum())


def difference(a: GraphPosterior, b: GraphPosterior) -> tuple[float, float]:
    """Mean and largest absolute difference of the edge probabilities, over ordered pairs."""
    off = ~torch.eye(len(a.marginals), dtype=torch.bool)
    gap = (a.marginals - b.marginals)[off].abs()
    return float(gap.mean()), float(gap.max())
