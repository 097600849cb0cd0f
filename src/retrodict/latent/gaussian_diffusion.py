"""A diffusion prior over the plane and its posterior under a reward: 25 modes of which 9 remain, with known weights.

Prior. A mixture sum_j pi_j N(m_j, v I) noised at levels s_1 > ... > s_T = 0. Its responsibilities rho_j(x, s) at
level s are known, so the best isotropic Gaussian step from level s to level u < s needs no training (mean: Ho et al.
2020, eq. 7, in variance-exploding form; variance: Bao et al. 2022, arXiv:2201.06503, theorem 1):

    E[x_u | x_s] = x_s + (1 - u^2/s^2) (E[x_0 | x_s] - x_s)
    Var[x_u | x_s] = u^2 (s^2 - u^2)/s^2 + (1 - u^2/s^2)^2 Var[x_0 | x_s]

where low levels come one after another from s_0 = infinity, whose step draws from one Gaussian with the moments of the
mixture at s_1. The path density p(tau) is exact; its marginal is the mixture's up to the discretisation.

Posterior. With r(x) = sum_j r_j rho_j(x, 0) the mixture's posterior is the mixture of weights pi_j r_j / Z (Venkatraman
et al. 2024, arXiv:2405.20971, section 3.1, where r is posterior over prior density). r_j > 0 for every mode: ``floor``
stands for the modes that go, since a squared error takes no zeros.

q. The prior's denoiser is a layer of logits, log rho_j(x, s), a softmax and a layer of means. A small network adds to
the logits, its last layer 0 at the start, and the step's mean and variance follow; trained by relative trajectory
balance. (With the prior's variances kept the residual is larger at the same T: where a path chooses between modes, the
posterior's spread is another.) Bias: the true posterior's step is the prior's tilted by a value that is not
log-quadratic in x_u, so Gaussian steps leave a residual, which falls as T grows.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from retrodict.errors import InputError
from retrodict.policies.layers import MLP
from retrodict.policies.vectors import VectorPolicy
from retrodict.protocols import Problems
from retrodict.records import Problem, Rollouts
from retrodict.rng import generator
from retrodict.spaces.vectors import Vectors
from retrodict.targets.algebra import Target
from retrodict.targets.prior import Prior
from retrodict.training.amortize import amortize
from retrodict.training.threads import one_thread

GRID = (-10.0, -5.0, 0.0, 5.0, 10.0)
VARIANCE = 0.3
"""The mixture of Venkatraman et al. 2024: means on a grid, variance of each mode."""
KEPT: Mapping[tuple[float, float], float] = {
    (-10.0, -5.0): 4.0, (-5.0, -10.0): 10.0, (-5.0, 0.0): 4.0, (10.0, -5.0): 5.0, (0.0, 0.0): 10.0,
    (0.0, 5.0): 5.0, (5.0, -5.0): 4.0, (5.0, 0.0): 15.0, (5.0, 10.0): 4.0,
}  # fmt: skip
"""The modes that remain in the posterior, and their unnormalised weights there."""


@dataclass(frozen=True)
class Modes:
    """sum_j weights_j N(means_j, variance I)."""

    means: Float[Tensor, "k d"]
    weights: Float[Tensor, " k"]
    variance: float

    def __post_init__(self) -> None:
        if not self.variance > 0:
            raise InputError(f"the variance of a mode must be above 0, not {self.variance}")
        if not bool((self.weights > 0).all()) or abs(float(self.weights.sum()) - 1) > 1e-5:
            raise InputError("weights of modes must be above 0 and sum to 1")

    def logits(self, x: Float[Tensor, "b d"], noise: Float[Tensor, "#b"]) -> Float[Tensor, "b k"]:
        """log of the responsibility of each mode for x with noise of this variance, up to a constant a row."""
        scale = 1 / (self.variance + noise)[:, None]  # |x|^2 is common to all modes
        return scale * (x @ self.means.T - self.means.square().sum(1) / 2) + self.weights.log()

    def spread(self, rho: Float[Tensor, "b k"]) -> Float[Tensor, " b"]:
        """The variance of the mode's mean under responsibilities, averaged over the axes."""
        mean = rho @ self.means
        return ((rho @ self.means.square().sum(1) - mean.square().sum(1)) / mean.shape[1]).clamp_min(0)

    def nearest(self, x: Float[Tensor, "b d"]) -> Int[Tensor, " b"]:
        """The mode whose mean is nearest."""
        return torch.cdist(x, self.means).argmin(1)


def grid_modes() -> Modes:
    """The 25 modes, equally likely."""
    g = torch.tensor(GRID)
    return Modes(torch.cartesian_prod(g, g), torch.full((len(GRID) ** 2,), 1 / len(GRID) ** 2), VARIANCE)


class GaussianSteps(VectorPolicy):
    """Base of chains whose steps are isotropic Gaussians: a subclass gives their means and variances."""

    def law(
        self, problem: Int[Tensor, " b"], at: Float[Tensor, "b d"], i: Int[Tensor, " b"]
    ) -> tuple[Float[Tensor, "b d"], Float[Tensor, " b"]]:
        """Mean and variance of the vector that comes after ``at`` as move number i."""
        raise NotImplementedError  # abstract

    def draw(
        self, problem: Int[Tensor, " b"], at: Float[Tensor, "b d"], i: int, gen: torch.Generator, temperature: float
    ) -> tuple[Float[Tensor, "b d"], Float[Tensor, " b"], Float[Tensor, " b"]]:
        """A temperature multiplies the variance. One look at the law, for the draw and both densities."""
        mean, variance = self.law(problem, at, torch.full_like(problem, i))
        to = mean + (variance * temperature).sqrt()[:, None] * torch.randn(at.shape, generator=gen)
        return to, log_normal(to, mean, variance), log_normal(to, mean, variance * temperature)

    def log_move(
        self,
        problem: Int[Tensor, " b"],
        at: Float[Tensor, "b d"],
        i: Int[Tensor, " b"],
        move: Float[Tensor, "b d"],
        temperature: float = 1.0,
    ) -> Float[Tensor, " b"]:
        """The Gaussian's log density (nats)."""
        mean, variance = self.law(problem, at, i)
        return log_normal(move, mean, variance * temperature)


def log_normal(
    x: Float[Tensor, "b d"], mean: Float[Tensor, "b d"], variance: Float[Tensor, " b"]
) -> Float[Tensor, " b"]:
    """log density of an isotropic Gaussian (nats)."""
    return -0.5 * ((x - mean).square().sum(1) / variance + x.shape[1] * (2 * math.pi * variance).log())


class Chain(GaussianSteps):
    """The prior: reverse diffusion of a mixture with its own score.

    Args:
        modes: the mixture.
        steps: moves of a path, T.
        most, least: the largest noise level, and the last before 0; the levels between are a geometric sequence.
    """

    def __init__(self, modes: Modes, steps: int = 40, most: float = 15.0, least: float = 0.3) -> None:
        if steps < 3 or not 0 < least < most:
            raise InputError(f"a chain needs 3 steps and levels 0 < least < most, not {steps}, {least} and {most}")
        self.modes, self.space = modes, Vectors(modes.means.shape[1], steps)
        self.problems: Problems = [Problem((), name="points")]
        middle = torch.linspace(math.log(most), math.log(least), steps - 1).exp()
        self.levels = torch.cat([torch.tensor([math.inf]), middle, torch.zeros(1)])

    def on(self, problems: Problems) -> Chain:
        """A chain reads no problem."""
        return self

    def law(
        self, problem: Int[Tensor, " b"], at: Float[Tensor, "b d"], i: Int[Tensor, " b"]
    ) -> tuple[Float[Tensor, "b d"], Float[Tensor, " b"]]:
        """The first move from a Gaussian, each later one a step down in noise."""
        return self.tilted(at, i, None)

    def tilted(
        self, at: Float[Tensor, "b d"], i: Int[Tensor, " b"], tilt: Float[Tensor, "b k"] | None
    ) -> tuple[Float[Tensor, "b d"], Float[Tensor, " b"]]:
        """The step with ``tilt`` added to the logits of the modes."""
        high, low = self.levels[i].square(), self.levels[i + 1].square()
        logits = self.modes.logits(at, high)
        rho = (logits if tilt is None else logits + tilt).softmax(1)
        kept = self.modes.variance / (self.modes.variance + high)  # of x in E[x_0 | x]: 0 where the noise is infinite
        share = 1 - low / high  # 1 there
        between = (1 - kept).square() * self.modes.spread(rho)
        variance = low * share + share.square() * (between + self.modes.variance * (1 - kept))
        return torch.lerp(at, torch.lerp(rho @ self.modes.means, at, kept[:, None]), share[:, None]), variance


class Tuned(GaussianSteps):
    """The posterior's chain: the prior's steps with a network's tilt of the modes. Trainable."""

    def __init__(self, prior: Chain, hidden: int = 64, layers: int = 2, seed: int = 0) -> None:
        self.prior, self.space, self.problems = prior, prior.space, prior.problems
        modes = prior.modes
        self.net = MLP(self.space.dim + self.space.steps, len(modes.weights), hidden, layers, seed, gain=0.0)
        self.wide = (modes.spread(modes.weights[None]) + modes.variance + prior.levels.square()).sqrt()
        self.about: dict[str, Any] = {}

    def parameters(self) -> Mapping[str, Tensor]:
        """The network's."""
        return self.net.parameters

    def on(self, problems: Problems) -> Tuned:
        """A chain reads no problem."""
        return self

    def law(
        self, problem: Int[Tensor, " b"], at: Float[Tensor, "b d"], i: Int[Tensor, " b"]
    ) -> tuple[Float[Tensor, "b d"], Float[Tensor, " b"]]:
        """The prior's step under tilted modes."""
        code = torch.cat([at / self.wide[i][:, None], F.one_hot(i, self.space.steps).float()], 1)
        return self.prior.tilted(at, i, self.net(code))


@dataclass(frozen=True)
class Reward:
    """log r(x) of a path's end, r = sum_j r_j rho_j(x, 0)."""

    modes: Modes
    log_r: Float[Tensor, " k"]
    name: str = "reward"
    noise: str = "none"
    prefixes: bool = False
    version: str = "1"

    def __call__(self, rollouts: Rollouts, every_prefix: bool = False) -> Tensor:
        """``[b]``."""
        logits = self.modes.logits(rollouts.moves[:, -1], torch.zeros(1)).double()
        return (logits.log_softmax(1) + self.log_r).logsumexp(1)


def reward_of(modes: Modes, kept: Mapping[tuple[float, float], float] = KEPT, floor: float = 1e-4) -> Reward:
    """The reward that gives each kept mode its weight. The others keep ``floor`` of the mean kept weight, not 0."""
    if not 0 < floor < 1:
        raise InputError(f"floor is what dropped modes keep, above 0 and below 1, not {floor}: RTB takes no zeros")
    index = [modes.nearest(torch.tensor([place])) for place in kept]
    weight = torch.tensor(list(kept.values()), dtype=torch.float64)
    r = torch.full((len(modes.means),), floor, dtype=torch.float64)
    r[torch.cat(index)] = weight / weight.mean()
    return Reward(modes, (r / modes.weights / len(r)).log())


def mode_target(chain: Chain, reward: Reward) -> Target:
    """p(tau) r(x) over the paths of a chain."""
    return Target(chain.space, chain.problems, {"prior": Prior(chain, prefixes=False), "reward": reward}, prior=chain)  # pyright: ignore[reportArgumentType]


def mixture_weights(reward: Reward) -> Float[Tensor, " k"]:
    """The posterior weight of each mode of the mixture itself: exact."""
    return (reward.modes.weights.double().log() + reward.log_r).softmax(0)


PLAN: dict[str, Any] = {
    "objective": "rtb", "steps": 500, "samples": 256, "lr": 5e-3, "lr_end": 0.01, "evaluate": 2,
}  # fmt: skip
"""Settings that work on the 25 modes."""


def tune(target: Target, policy: Tuned | None = None, *, seed: int = 0, **given: Any) -> Tuned:
    """A chain that draws from the posterior: ``retrodict.amortize`` with ``rtb`` under :data:`PLAN`."""
    prior = target.prior
    if policy is None:
        assert isinstance(prior, Chain)
        policy = Tuned(prior, seed=seed)
    with one_thread():
        return amortize(target, policy, seed=seed, **{**PLAN, **given})


@torch.no_grad()
def draw_points(policy: VectorPolicy, n: int, seed: int = 0) -> Float[Tensor, "n d"]:
    """Ends of n fresh paths."""
    with one_thread():
        return policy.space.points(policy.sample(torch.zeros(n, dtype=torch.long), generator(seed)))


def mode_weights(modes: Modes, x: Float[Tensor, "n d"]) -> Float[Tensor, " k"]:
    """The share of points that are nearest to each mode."""
    return torch.bincount(modes.nearest(x), minlength=len(modes.means)).double() / len(x)


@torch.no_grad()
def chain_weights(target: Target, n: int = 200_000, seed: int = 0) -> tuple[Float[Tensor, " k"], Float[Tensor, " k"]]:
    """The posterior weight of each mode for the chain itself, from n prior draws weighted by r; and standard errors.

    Errors by the delta method of the ratio sum_i r_i 1[i in mode] / sum_i r_i.
    """
    chain, reward = target.prior, target.factors["reward"]
    assert isinstance(chain, Chain)
    with one_thread():
        parts = [chain.sample(torch.zeros(len(at), dtype=torch.long), generator(seed, "cpu", k))
                 for k, at in enumerate(torch.arange(n).split(20_000))]  # fmt: skip
    r = torch.cat([reward(rows) for rows in parts]).exp()
    mode = chain.modes.nearest(torch.cat([chain.space.points(rows) for rows in parts]))
    total, k = r.sum(), len(chain.modes.means)
    weight = torch.zeros(k, dtype=r.dtype).index_add(0, mode, r) / total
    square = torch.zeros(k, dtype=r.dtype).index_add(0, mode, r.square())
    rest = r.square().sum() - square
    return weight, (square * (1 - weight).square() + rest * weight.square()).sqrt() / total
