"""Clustering a whole data set at once: one latent assignment of N points to K clusters, the means integrated out.

    z_i ~ Uniform(K),   mu_k ~ N(0, tau^2 I),   x_i | z, mu ~ N(mu_{z_i}, sd^2 I)

    log p(x, z) = -N log K + sum_k log p(x_{i: z_i = k}),      a cluster of n points with sum s and sum of squares S, in
    each direction:   -n/2 log(2 pi sd^2) - 1/2 log(1 + n r) - (S - r / (1 + n r) s^2) / (2 sd^2),      r = tau^2 / sd^2

Integrating the means ties the labels of all points together: the posterior is a joint over K^N assignments, of which
no factor is a point's own, and it is the same for every permutation of the clusters' names. Exact by enumeration for
K^N up to about a million (Murphy 2012, section 4.6.1 for the Gaussian with a Gaussian mean).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import one_hot

from retrodict.errors import InputError
from retrodict.latent.data import data_of, data_problems
from retrodict.protocols import Problems
from retrodict.records import Rollouts, whole_rollouts
from retrodict.spaces.vectors import Assignments
from retrodict.targets.algebra import Target


@dataclass(frozen=True)
class ClusterTerm:
    """log p(x, z) of whole assignments, the means integrated out."""

    x: Float[Tensor, "m n d"]
    k: int
    sd: float
    tau: float
    name: str = "joint"
    noise: str = "none"
    prefixes: bool = False

    @property
    def version(self) -> str:
        """The constants of the model."""
        return f"clusters {self.k} {self.sd:g} {self.tau:g}"

    def on(self, problems: Problems) -> ClusterTerm:
        """The same model of other data sets of this size."""
        n, d = self.x.shape[1:]
        return replace(self, x=data_of(problems, n * d, "numbers").view(-1, n, d))

    def __call__(self, rollouts: Rollouts, every_prefix: bool = False) -> Float[Tensor, " b"]:
        """``[b]``; a prefix of an assignment is no object."""
        x = self.x[rollouts.problem]
        own = one_hot(rollouts.moves, self.k).double()  # b n k
        size, total = own.sum(1), own.transpose(1, 2) @ x
        square, r, (n, d) = own.transpose(1, 2) @ x.square(), (self.tau / self.sd) ** 2, x.shape[1:]
        shrunk = (r / (1 + size * r))[:, :, None] * total.square()
        fit = -(square - shrunk).sum((1, 2)) / (2 * self.sd**2) - d / 2 * (size * r).log1p().sum(1)
        return fit - n * d / 2 * math.log(2 * math.pi * self.sd**2) - n * math.log(self.k)


def cluster_target(x: Float[Tensor, "m n d"], k: int, sd: float, tau: float) -> Target:
    """The posterior over assignments of each of m data sets of n points in d dimensions to k clusters.

    Args:
        x: the data sets; policies read them as ``row["features"]``.
        k: clusters, of which some may stay empty.
        sd: of points about their cluster's mean.
        tau: of the means about 0.
    """
    if k < 1 or not sd > 0 or not tau > 0 or not bool(x.isfinite().all()):
        raise InputError(f"clusters need k >= 1, sd and tau above 0 and finite points: {k}, {sd:g}, {tau:g}")
    problems = data_problems(x.flatten(1))
    return Target(Assignments((k,) * x.shape[1]), problems, {"joint": ClusterTerm(x.double(), k, sd, tau)})


def simulate_clusters(target: Target, m: int, gen: torch.Generator) -> tuple[Target, Rollouts]:
    """m data sets of a target's model, and the assignment behind each."""
    term = target.factors["joint"]
    assert isinstance(term, ClusterTerm)
    n, d = term.x.shape[1:]
    z = torch.randint(term.k, (m, n), generator=gen)
    mu = term.tau * torch.randn(m, term.k, d, generator=gen, dtype=torch.float64)
    noise = term.sd * torch.randn(m, n, d, generator=gen, dtype=torch.float64)
    x = mu.gather(1, z[:, :, None].expand(-1, -1, d)) + noise
    return cluster_target(x, term.k, term.sd, term.tau), whole_rollouts(torch.arange(m), z)
