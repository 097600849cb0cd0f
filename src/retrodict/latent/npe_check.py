"""Is an amortized posterior right on average? Ranks and coverage over fresh simulations, continuous or discrete.

Draw theta* from the prior and x from the simulator, then k draws from q(. | x). If q is the posterior, theta* and the
draws are exchangeable: the rank of any statistic f(theta*, x) among the f(theta_i, x) is uniform on 0..k (Talts et al.
2018), ties broken at random, so that counts (edges of a graph, members of a set) are statistics too. The rank of log q
gives the expected coverage of highest-density regions (Hermans et al. 2022). Both are necessary, not sufficient: the
prior passes, unless a statistic reads x; log q does.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Int
from torch import Tensor

from retrodict.diagnostics.calibration import Coverage, Uniformity, coverage, sbc_ranks, uniformity
from retrodict.errors import InputError
from retrodict.latent.npe_simulate import Simulations
from retrodict.rng import child_seed, generator

LEVELS = (0.5, 0.8, 0.9, 0.95)
DENSITY = "log q"
"""The statistic that every check has."""

Statistic = Callable[[Tensor, Tensor], Tensor]
"""(latents ``[b, ...]``, x ``[b, ...]``) to one number each ``[b]``."""


@runtime_checkable
class Posterior(Protocol):
    """Anything that draws theta for each of b data and values it."""

    def sample(self, n: int, x: Any, seed: int = 0) -> Tensor: ...
    def log_prob(self, theta: Any, x: Any, paths: int = 32, seed: int = 0) -> Tensor: ...


@dataclass(frozen=True)
class Calibration:
    """What n simulations say.

    Attributes:
        ranks: of each simulation's truth among its draws, by statistic.
        draws: k, so that ranks lie in 0..k.
        coverage: of highest-density regions.
    """

    ranks: Mapping[str, Int[Tensor, " n"]]
    draws: int
    coverage: tuple[Coverage, ...]

    @property
    def uniformity(self) -> dict[str, Uniformity]:
        """Chi-square test of each statistic's ranks."""
        return {name: uniformity(r, self.draws) for name, r in self.ranks.items()}

    @property
    def p_value(self) -> float:
        """The smallest p-value times the number of statistics (Bonferroni), at most 1."""
        each = [u.p_value for u in self.uniformity.values()]
        return min(1.0, min(each) * len(each))

    def __str__(self) -> str:
        lines = [f"{c.level:.0%} regions hold {c.share:.1%} of {c.n} truths ({c.z:+.1f} s.e.)" for c in self.coverage]
        return "\n".join([*lines, *(f"ranks of {n}: p = {u.p_value:.3f}" for n, u in self.uniformity.items())])


def calibrate(
    posterior: Posterior,
    simulations: Simulations,
    *,
    draws: int = 99,
    statistics: Mapping[str, Statistic] | None = None,
    levels: Sequence[float] = LEVELS,
    seed: int = 0,
) -> Calibration:
    """Ranks and coverage of a posterior over simulations that it was not fitted to.

    Args:
        posterior: what is checked.
        simulations: fresh ones; 500 give a standard error of 2.2 points at 50% and 1 at 95%.
        draws: from the posterior of each x.
        statistics: by name; each coordinate of a real vector by default. ``log q`` is always added.
        levels: of the regions whose coverage is counted.
        seed: one seed, one result.
    """
    n, k, theta, x = len(simulations), draws, simulations.theta, simulations.x
    if n < 20 or k < 1:
        raise InputError(f"ranks of {n} simulations among {k} draws say nothing; give at least 20 and 1")
    drawn = posterior.sample(k, x, child_seed(seed, 0))
    told = dict(statistics) if statistics is not None else coordinates(theta)
    if DENSITY in told:
        raise InputError(f"a statistic is called {DENSITY!r}, which every check has; give it another name")
    flat, again = drawn.flatten(0, 1), x.repeat_interleave(k, 0)
    ranks = {}
    for i, (name, f) in enumerate(told.items()):
        ranks[name] = sbc_ranks(f(theta, x), f(flat, again).view(n, k), generator(seed, "cpu", 1, i))
    both = posterior.log_prob(torch.cat([theta[:, None], drawn.to(theta.dtype)], 1), x, 4, child_seed(seed, 2))
    ranks[DENSITY] = sbc_ranks(both[:, 0], both[:, 1:], generator(seed, "cpu", 3))
    return Calibration(ranks, k, tuple(coverage(ranks[DENSITY], k, levels, generator(seed, "cpu", 4))))


def coordinates(theta: Tensor) -> dict[str, Statistic]:
    """Each coordinate of a real vector; none of a discrete object."""
    if not theta.is_floating_point():
        return {}
    return {f"theta[{i}]": lambda z, _, i=i: z[:, i] for i in range(theta.shape[1])}
