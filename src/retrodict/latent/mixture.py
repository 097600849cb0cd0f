"""Mixtures of Gaussians with additive means: one latent vector z of categorical variables for each point.

    z_f ~ pi_f,      x | z ~ N(sum_f mu_f[z_f], sd^2 I),      f = 1..F

With F = 1 it is the ordinary mixture with a shared spherical variance. With F = 2 the means are super-means plus
offsets ("petals"), and the posterior of (z_1, z_2) is entangled: the mixture on which Hu et al. 2023
(arXiv:2302.06576, section 5.1) show that mean-field EM fails; additive as in Ghahramani and Jordan 1997.

    log p(x, z) = sum_f log pi_f[z_f] - d log sd - d/2 log 2 pi - |x - sum_f mu_f[z_f]|^2 / (2 sd^2)

The M-step is closed for any posterior r [m, k] over the k = prod_f K_f values of z: pi_f are its marginals, the means
solve the normal equations (D' R D) mu = D' r' x with D the one-hot design of the z, and sd^2 = E_r |x - mean|^2 / d.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from retrodict.errors import InputError
from retrodict.latent.data import data_of, data_problems
from retrodict.numerics import sample_categorical
from retrodict.particles import Particles
from retrodict.protocols import Problems
from retrodict.records import Rollouts, whole_rollouts
from retrodict.rng import generator
from retrodict.spaces.vectors import Assignments
from retrodict.targets.algebra import Target

LEAST_WEIGHT, LEAST_SD = 1e-8, 1e-3
"""Below these no M-step goes: a weight of zero is never left again, and a variance of zero has no density."""


@dataclass(frozen=True)
class Parameters:
    """theta of a mixture.

    Attributes:
        means: mu_f, one table of vectors for each variable.
        log_weights: log pi_f.
        sd: the standard deviation of the noise, in each direction.
    """

    means: tuple[Float[Tensor, "_ d"], ...]
    log_weights: tuple[Float[Tensor, " _"], ...]
    sd: float

    @property
    def sizes(self) -> tuple[int, ...]:
        """How many values each variable has."""
        return tuple(len(mu) for mu in self.means)

    def centres(self) -> Float[Tensor, "k d"]:
        """sum_f mu_f[z_f] of each z; the last variable moves fastest."""
        return design(self.sizes) @ torch.cat(self.means)

    def log_prior(self) -> Float[Tensor, " k"]:
        """log p(z) of each z."""
        return design(self.sizes) @ torch.cat(self.log_weights)

    def log_joint(self, x: Float[Tensor, "m d"]) -> Float[Tensor, "m k"]:
        """log p(x, z) of each point and each z, in nats."""
        d = x.shape[1]
        square = (x[:, None] - self.centres()).square().sum(2)
        density = -square / (2 * self.sd**2) - d * math.log(self.sd) - d / 2 * math.log(2 * math.pi)
        return density + self.log_prior()

    def log_evidence(self, x: Float[Tensor, "m d"]) -> Float[Tensor, " m"]:
        """log p(x) of each point."""
        return self.log_joint(x).logsumexp(1)

    def sample(self, n: int, gen: torch.Generator) -> tuple[Int[Tensor, "n f"], Float[Tensor, "n d"]]:
        """z and x of n points."""
        z = torch.stack([sample_categorical(w.expand(n, -1), gen) for w in self.log_weights], 1)
        noise = torch.randn(n, self.means[0].shape[1], generator=gen, dtype=torch.float64)
        return z, sum(mu[z[:, f]] for f, mu in enumerate(self.means)) + self.sd * noise


def design(sizes: Sequence[int]) -> Float[Tensor, "k s"]:
    """The one-hot code of each z, variables side by side."""
    every = torch.cartesian_prod(*(torch.arange(s) for s in sizes)).view(math.prod(sizes), len(sizes))
    return torch.cat([torch.eye(s, dtype=torch.float64)[every[:, f]] for f, s in enumerate(sizes)], 1)


@dataclass(frozen=True)
class JointTerm:
    """log p(x_m, z) of whole assignments, looked up in a table of all z."""

    theta: Parameters
    x: Float[Tensor, "m d"]
    version: str
    name: str = "joint"
    noise: str = "none"
    prefixes: bool = False
    table: Float[Tensor, "m k"] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "table", self.theta.log_joint(self.x))

    def on(self, problems: Problems) -> JointTerm:
        """The same mixture on other points."""
        return replace(self, x=data_of(problems, self.x.shape[1], "coordinates"))

    def __call__(self, rollouts: Rollouts, every_prefix: bool = False) -> Float[Tensor, " b"]:
        """``[b]``; a prefix of an assignment is no object."""
        return self.table[rollouts.problem, codes(rollouts, self.theta.sizes)]


def codes(rollouts: Rollouts, sizes: Sequence[int]) -> Int[Tensor, " b"]:
    """The number of each row's z among all: the last variable moves fastest."""
    places = torch.tensor([math.prod(sizes[f + 1 :]) for f in range(len(sizes))])
    return (rollouts.moves * places).sum(1)


class Mixture:
    """Points and a mixture that learns from them: a model for ``training.learn``.

    Args:
        x: the points. Raises InputError for a number that is not finite.
        theta: where learning starts, :func:`start`.
        learn_sd: whether M moves the standard deviation.
        learn_weights: whether M moves pi.
    """

    def __init__(
        self, x: Float[Tensor, "m d"], theta: Parameters, *, learn_sd: bool = True, learn_weights: bool = True
    ) -> None:
        bad = (~x.isfinite().all(1)).nonzero().flatten().tolist()
        if bad:
            raise InputError(f"{len(bad)} of {len(x)} points are not finite, first point {bad[0]}; leave them out")
        self.x, self.theta, self.learn_sd, self.learn_weights = x.double(), theta, learn_sd, learn_weights
        self.problems, self.space, self.updates = data_problems(self.x), Assignments(theta.sizes), 0
        self._target: Target | None = None

    @property
    def target(self) -> Target:
        """log gamma = log p(x_m, z)."""
        if self._target is None:
            self._target = self.of(self.problems)
        return self._target

    def of(self, problems: Problems) -> Target:
        """The target of other points, under the present theta."""
        x = data_of(problems, self.x.shape[1], "coordinates")
        return Target(self.space, problems, {"joint": JointTerm(self.theta, x, f"mixture@{self.updates}")})

    def log_evidence(self) -> Float[Tensor, " m"]:
        """log p(x) of each point."""
        return self.theta.log_evidence(self.x)

    def exact_step(self) -> float:
        """EM with responsibilities; gives the mean of log p(x) before it."""
        joint = self.theta.log_joint(self.x)
        self.maximise(self.x, joint.softmax(1))
        return float(joint.logsumexp(1).mean())

    def m_step(self, particles: Particles, seed: int = 0) -> float:
        """The closed form on a weighted sample; gives E_r log p(x, z) at the new theta, a mean over points."""
        k = particles.k
        at = particles.objects.problem[::k]
        r = torch.zeros(particles.m, math.prod(self.theta.sizes), dtype=torch.float64)
        r.scatter_add_(1, codes(particles.objects, self.theta.sizes).view(-1, k), particles.weights)
        alive = r.sum(1) > 0
        if not bool(alive.any()):
            raise InputError("every particle has weight zero, so there is nothing to learn from; draw more")
        return self.maximise(self.x[at[alive]], r[alive])

    def maximise(self, x: Float[Tensor, "m d"], r: Float[Tensor, "m k"]) -> float:
        """theta to the maximum of sum_m sum_z r_mz log p(x_m, z), of which it gives the mean over m."""
        old, one_hot, mass = self.theta, design(self.theta.sizes), r.sum(0)
        weights = [w.exp() for w in old.log_weights]
        if self.learn_weights:
            share = (mass @ one_hot / len(x)).split(list(old.sizes))
            weights = [(s.clamp_min(LEAST_WEIGHT) / s.clamp_min(LEAST_WEIGHT).sum()) for s in share]
        normal, before = one_hot.T @ (mass[:, None] * one_hot), torch.cat(old.means)
        change = torch.linalg.pinv(normal, rcond=1e-10) @ (one_hot.T @ (r.T @ x) - normal @ before)
        means = (before + change).split(list(old.sizes))  # directions without data stay where they were
        new = Parameters(tuple(means), tuple(w.log() for w in weights), old.sd)
        if self.learn_sd:
            square = (x[:, None] - new.centres()).square().sum(2)
            new = replace(new, sd=max(LEAST_SD, float((r * square).sum() / x.numel()) ** 0.5))
        self.theta, self._target, self.updates = new, None, self.updates + 1
        return float((r * new.log_joint(x)).sum() / len(x))

    def simulate(self, n: int, gen: torch.Generator) -> tuple[Target, Rollouts]:
        """n points of the mixture itself, and the z of each."""
        z, x = self.theta.sample(n, gen)
        return self.of(data_problems(x)), whole_rollouts(torch.arange(n), z)


def start(x: Float[Tensor, "m d"], sizes: Sequence[int], seed: int = 0, sd: float | None = None) -> Parameters:
    """Where learning may start: even weights, the first variable's means spread over the points, the others' random.

    The first means are points drawn by their squared distance to those before (k-means++, Arthur and Vassilvitskii
    2007), the others normal with a quarter of the data's spread.

    Args:
        x: the points.
        sizes: how many values each variable has.
        seed: of the start.
        sd: of the noise; by default the data's own spread.
    """
    if not sizes or min(sizes) < 1 or sizes[0] > len(x):
        raise InputError(f"sizes must be one value or more for each variable, and no more than points: {tuple(sizes)}")
    gen, x = generator(seed), x.double()
    spread = float((x - x.mean(0)).square().mean() ** 0.5)
    at = [int(torch.randint(len(x), (), generator=gen))]
    while len(at) < sizes[0]:
        near = (x[:, None] - x[at]).square().sum(2).amin(1)
        at.append(int(torch.multinomial(near + 1e-12, 1, generator=gen)))
    means = [x[at]]
    means += [spread / 4 * torch.randn(s, x.shape[1], generator=gen, dtype=torch.float64) for s in sizes[1:]]
    even = tuple(torch.full((s,), -math.log(s), dtype=torch.float64) for s in sizes)
    return Parameters(tuple(means), even, spread if sd is None else sd)


def petals(sd: float = 0.25, radius: float = 1.0) -> Parameters:
    """Four super-means at (+-sqrt 2, +-sqrt 2) and four offsets of the given radius along the axes, even weights."""
    corner = 2**0.5 * torch.tensor([[1, 1], [1, -1], [-1, 1], [-1, -1]], dtype=torch.float64)
    offset = radius * torch.tensor([[1, 0], [0, 1], [-1, 0], [0, -1]], dtype=torch.float64)
    even = torch.full((4,), -math.log(4), dtype=torch.float64)
    return Parameters((corner, offset), (even, even), sd)
