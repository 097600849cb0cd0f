"""Hamiltonian Monte Carlo over real vectors: the reference that variational answers are held to.

    H(w, r) = - log gamma(w) + |r|^2 / 2,   r ~ N(0, I),   L leapfrog steps of size eps, accept with min(1, e^-dH)

(Neal 2011, arXiv:1206.1901, section 5.3.2.) The leapfrog is reversible and keeps volume, so gamma is invariant whatever
eps is. Each chain has its own step size, found while warming up by dual averaging (Hoffman and Gelman 2014,
arXiv:1111.4246, section 3.2) and then held: with a common one a chain that starts where gamma is steep stays there. L
varies at random, since a fixed one can lie on a period. Exact in the limit of long chains only: look at R-hat and ESS
(``diagnostics.chains``) of what is to be averaged.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from retrodict.errors import InputError
from retrodict.rng import child_seed, generator
from retrodict.spaces.vectors import Vectors
from retrodict.targets.algebra import Target

Density = Callable[[Tensor], Tensor]
"""Vectors ``[c, d]`` to log gamma ``[c]``, nats, differentiable."""


@dataclass(frozen=True)
class Chains:
    """c chains of n draws each, after the warm-up.

    Attributes:
        draws: in the order they were made.
        accepted: share of the proposals.
        step: the step size that the warm-up of each chain found.
        divergent: share of the proposals whose energy rose by more than 1000: the step size is too large somewhere.
    """

    draws: Float[Tensor, "c n d"]
    accepted: float
    step: Float[Tensor, " c"]
    divergent: float


def density_of(target: Target, problem: int = 0) -> Density:
    """log gamma of a target over ``Vectors(dim)`` as a function of the vector, for one problem."""
    space = target.space
    if not isinstance(space, Vectors) or space.steps != 1:
        raise InputError(f"HMC walks in Vectors(dim), not in {space}")

    def log_gamma(w: Float[Tensor, "c d"]) -> Float[Tensor, " c"]:
        rows = space.record(torch.full((len(w),), problem), w[:, None], torch.zeros(len(w), 1))
        return target.log_gamma(rows)

    return log_gamma


def with_grad(log_gamma: Density, w: Float[Tensor, "c d"]) -> tuple[Float[Tensor, " c"], Float[Tensor, "c d"]]:
    """log gamma and its gradient, each chain's own."""
    w = w.detach().requires_grad_()
    value = log_gamma(w)
    (slope,) = torch.autograd.grad(value.sum(), w)
    return value.detach(), slope


def leapfrog(
    log_gamma: Density, w: Float[Tensor, "c d"], r: Float[Tensor, "c d"], slope: Float[Tensor, "c d"],
    step: Float[Tensor, " c"], steps: int,
) -> tuple[Float[Tensor, "c d"], Float[Tensor, "c d"], Float[Tensor, " c"], Float[Tensor, "c d"]]:  # fmt: skip
    """(w, r) after L steps, with log gamma and its gradient there. Run with -r it goes back."""
    value, eps = torch.zeros(len(w), dtype=w.dtype), step[:, None]
    for _ in range(steps):
        r = r + eps / 2 * slope
        w = w + eps * r
        value, slope = with_grad(log_gamma, w)
        r = r + eps / 2 * slope
    return w, r, value, slope


class DualAveraging:
    """Step sizes whose acceptance tends to ``goal``: Hoffman and Gelman 2014, eq. 6, with their constants."""

    def __init__(self, chains: int, step: float = 0.1, goal: float = 0.8) -> None:
        self.step = torch.full((chains,), step, dtype=torch.float64)
        self.goal, self.count, self.centre = goal, 0, math.log(10 * step)
        self.off, self.log_mean = torch.zeros_like(self.step), torch.zeros_like(self.step)

    def update(self, accept: Float[Tensor, " c"]) -> None:
        """After proposals that were accepted with these probabilities."""
        self.count += 1
        m = self.count
        self.off = self.off + (self.goal - accept - self.off) / (m + 10)
        log_step = self.centre - math.sqrt(m) / 0.05 * self.off
        self.log_mean = self.log_mean + m**-0.75 * (log_step - self.log_mean)
        self.step = log_step.exp()


def hmc(
    log_gamma: Density,
    start: Float[Tensor, "c d"],
    *,
    n: int,
    warmup: int = 500,
    length: float = 1.5,
    most: int = 64,
    seed: int = 0,
) -> Chains:
    """n draws of each chain.

    Args:
        log_gamma: the density, from :func:`density_of` or by hand.
        start: where the chains begin; apart from each other, so that R-hat can tell.
        n: draws kept, every one.
        warmup: draws before them, which tune the step size.
        length: of a trajectory, L times the step size; L is uniform on 1 to twice what that takes at the median of
            the step sizes, at most ``most``.
        seed: one seed, one result.
    """
    if n < 1 or warmup < 1:
        raise InputError(f"n and warmup must be at least 1, not {n} and {warmup}")
    gen, w = generator(seed), start.double()
    value, slope = with_grad(log_gamma, w)
    if not bool(value.isfinite().all()):
        raise InputError("log gamma is not finite where a chain starts; start inside the support")
    tune, kept, accepted, divergent = DualAveraging(len(w)), [], 0.0, 0.0
    for i in range(warmup + n):
        if i == warmup:
            tune.step = tune.log_mean.exp()
        longest = max(1, min(most, round(2 * length / float(tune.step.median()))))
        steps = 1 + int(torch.randint(longest, (), generator=gen))
        r = torch.randn(w.shape, generator=gen, dtype=w.dtype)
        new, end, new_value, new_slope = leapfrog(log_gamma, w, r, slope, tune.step, steps)
        rise = (value - r.square().sum(1) / 2) - (new_value - end.square().sum(1) / 2)
        chance = torch.where(rise.isfinite(), (-rise).clamp_max(0).exp(), 0.0)
        take = torch.rand(len(w), generator=gen, dtype=w.dtype) < chance
        w, slope = torch.where(take[:, None], new, w), torch.where(take[:, None], new_slope, slope)
        value = torch.where(take, new_value, value)
        if i < warmup:
            tune.update(chance)
        else:
            kept.append(w)
            accepted += float(chance.mean()) / n
            divergent += float((~(rise < 1000)).double().mean()) / n
    return Chains(torch.stack(kept, 1), accepted, tune.step, divergent)


def annealed(
    log_gamma: Density, start: Float[Tensor, "c d"], chains: int,
    betas: Sequence[float] = (0.01, 0.03, 0.1, 0.2, 0.4, 0.7, 1.0), *, moves: int = 40, seed: int = 0,
) -> Float[Tensor, "k d"]:  # fmt: skip
    """Starts for ``chains`` chains, by an SMC sampler on gamma^beta (Del Moral et al. 2006). Give more points.

    Before each beta the points are resampled by gamma^(step of beta), then walk by HMC. A walk alone ends in modes by
    their basins, and a poor one keeps its chain for ever; resampling leaves modes about by their mass.
    """
    w, last = start.double(), 0.0
    for i, beta in enumerate(betas):
        share = ((beta - last) * log_gamma(w).detach()).softmax(0)
        w = w[torch.multinomial(share, len(w), replacement=True, generator=generator(seed, "cpu", 2, i))]
        w = hmc(lambda v, b=beta: b * log_gamma(v), w, n=1, warmup=moves, seed=child_seed(seed, i)).draws[:, -1]
        last = beta
    return w[:chains]
