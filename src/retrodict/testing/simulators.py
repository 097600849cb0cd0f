"""Simulators whose posterior is known: what amortized posterior estimation is checked on.

| model | theta | exact posterior |
|---|---|---|
| LinearGaussian | real, R^d | Gaussian |
| TwoMoons | real, a square | two crescents; p(x) by quadrature |
| NoisyOr | a set of causes | by enumeration (Pearl 1988, section 4.3) |
| NoisyGraph | a directed acyclic graph | by enumeration |

Each has ``simulate(n, seed) -> (theta, x)`` and ``log_joint(theta, x)``, nats.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.distributions import MultivariateNormal

from retrodict.latent.npe_objects import objects_of, shape_of
from retrodict.latent.npe_posterior import AmortizedPosterior
from retrodict.rng import generator
from retrodict.spaces.dags import Dags
from retrodict.spaces.sets import Subsets
from retrodict.spaces.vectors import Vectors
from retrodict.testing.oracle import enumerate_target


@dataclass(frozen=True)
class LinearGaussian:
    """theta ~ N(0, I) in R^d,   x | theta ~ N(A theta, noise^2 I) in R^c."""

    d: int = 3
    c: int = 4
    noise: float = 0.7

    @property
    def matrix(self) -> Float[Tensor, "c d"]:
        """A."""
        return torch.randn(self.c, self.d, generator=generator(1), dtype=torch.float64)

    def simulate(self, n: int, seed: int) -> tuple[Float[Tensor, "n d"], Float[Tensor, "n c"]]:
        """n pairs."""
        gen = generator(seed)
        theta = torch.randn(n, self.d, generator=gen, dtype=torch.float64)
        return theta, theta @ self.matrix.T + self.noise * torch.randn(n, self.c, generator=gen, dtype=torch.float64)

    def posterior(self, x: Float[Tensor, "b c"]) -> MultivariateNormal:
        """N((I + A'A / noise^2)^-1 A'x / noise^2, (I + A'A / noise^2)^-1)."""
        precision = torch.eye(self.d, dtype=torch.float64) + self.matrix.T @ self.matrix / self.noise**2
        cov = torch.linalg.inv(precision)
        return MultivariateNormal(x.double() @ self.matrix @ cov / self.noise**2, cov)

    def log_z(self, x: Float[Tensor, "b c"]) -> Float[Tensor, " b"]:
        """log p(x), N(0, A A' + noise^2 I)."""
        cov = self.matrix @ self.matrix.T + self.noise**2 * torch.eye(self.c, dtype=torch.float64)
        return MultivariateNormal(torch.zeros(self.c, dtype=torch.float64), cov).log_prob(x.double())

    def log_joint(self, theta: Float[Tensor, "b d"], x: Float[Tensor, "b c"]) -> Float[Tensor, " b"]:
        """log p(theta) + log p(x | theta)."""
        off = (x.double() - theta.double() @ self.matrix.T) / self.noise
        log_prior = -(theta.double().square() + math.log(2 * math.pi)).sum(1) / 2
        return log_prior - (off.square() + math.log(2 * math.pi)).sum(1) / 2 - self.c * math.log(self.noise)


@dataclass(frozen=True)
class TwoMoons:
    """theta uniform on [-1, 1]^2,   x = r (cos a, sin a) + (1/4 - |t1 + t2| / 2^.5, (t2 - t1) / 2^.5),
    a ~ N(0, angle^2),   r ~ N(0.1, width^2) given r > 0.

    After Greenberg et al. 2019 (arXiv:1905.07488), where a is uniform on a half-circle: crescents that end in hard
    edges are fitted by no continuous density, and a flow's widest regions then hold too much.
    """

    width: float = 0.03
    angle: float = 0.5

    def simulate(self, n: int, seed: int) -> tuple[Float[Tensor, "n 2"], Float[Tensor, "n 2"]]:
        """n pairs."""
        gen = generator(seed)
        theta = torch.rand(n, 2, generator=gen, dtype=torch.float64) * 2 - 1
        a = self.angle * torch.randn(n, generator=gen, dtype=torch.float64)
        r = 0.1 + self.width * torch.randn(n, generator=gen, dtype=torch.float64)
        while bool((r <= 0).any()):
            again = torch.randn(n, generator=gen, dtype=torch.float64)
            r = torch.where(r <= 0, 0.1 + self.width * again, r)
        return theta, torch.stack([r * a.cos(), r * a.sin()], 1) + self._shift(theta)

    def _shift(self, theta: Float[Tensor, "b 2"]) -> Float[Tensor, "b 2"]:
        s, d = theta.double().sum(1), (theta[:, 1] - theta[:, 0]).double()
        return torch.stack([0.25 - s.abs() / 2**0.5, d / 2**0.5], 1)

    def _log_r(self, r: Tensor) -> Tensor:
        normal = -((r - 0.1) / self.width).square() / 2 - math.log(self.width * (2 * math.pi) ** 0.5)
        return normal - torch.special.log_ndtr(torch.tensor(0.1 / self.width, dtype=torch.float64))

    def log_joint(self, theta: Float[Tensor, "b 2"], x: Float[Tensor, "b 2"]) -> Float[Tensor, " b"]:
        """log p(theta) + log p(x | theta); -inf outside the square. (P(|a| > pi) < 1e-9 is left out.)"""
        p = x.double() - self._shift(theta)
        r = p.norm(dim=1)
        value = self._log_r(r) + self._log_a(torch.atan2(p[:, 1], p[:, 0])) - r.log() - math.log(4)
        return torch.where((theta.abs() <= 1).all(1), value, -math.inf)

    def _log_a(self, a: Tensor) -> Tensor:
        return -(a / self.angle).square() / 2 - math.log(self.angle * (2 * math.pi) ** 0.5)

    def log_z(self, x: Float[Tensor, "b 2"], points: int = 200) -> Float[Tensor, " b"]:
        """log p(x): p(r) p(a) p(theta) over a grid of (r, a) and the sign of t1 + t2; theta to p keeps areas."""
        mid = (torch.arange(points, dtype=torch.float64) + 0.5) / points
        low = max(0.0, 0.1 - 6 * self.width)
        r, a = low + mid * (0.1 + 6 * self.width - low), (2 * mid - 1) * math.pi
        p = torch.stack([torch.outer(r, a.cos()), torch.outer(r, a.sin())], -1).view(-1, 2)
        weight = torch.outer(self._log_r(r).exp() * (r[1] - r[0]), self._log_a(a).exp() * (a[1] - a[0])).flatten()
        return torch.stack([self._mass(p, weight, v.double()).log() for v in x])

    def _mass(self, p: Float[Tensor, "g 2"], weight: Float[Tensor, " g"], x: Float[Tensor, "2"]) -> Tensor:
        half = 0.25 + p[:, 0] - x[0]  # |t1 + t2| / 2^.5
        d = x[1] - p[:, 1]  # (t2 - t1) / 2^.5
        total = torch.zeros((), dtype=torch.float64)
        for sign in (1.0, -1.0):
            t1, t2 = (sign * half - d) / 2**0.5, (sign * half + d) / 2**0.5
            total = total + (weight * ((half > 0) & (t1.abs() <= 1) & (t2.abs() <= 1))).sum() / 4
        return total


@dataclass(frozen=True)
class NoisyOr:
    """Causes are present with ``prior`` each; a finding is absent only if the leak and every present cause miss it.

    P(x_j = 0 | z) = (1 - leak) prod_i (1 - w_ij)^z_i
    """

    causes: int = 5
    findings: int = 6
    prior: float = 0.3
    leak: float = 0.05

    @property
    def space(self) -> Subsets:
        """Sets of causes."""
        return Subsets(self.causes)

    @property
    def log_miss(self) -> Float[Tensor, "i j"]:
        """log(1 - w_ij): about half of the findings each, of strength 0.5 to 0.95."""
        gen = generator(2)
        size = (self.causes, self.findings)
        w = 0.5 + 0.45 * torch.rand(size, generator=gen, dtype=torch.float64)
        return torch.where(torch.rand(size, generator=gen) < 0.5, (1 - w).log(), 0.0)

    def _log_absent(self, z: Bool[Tensor, "b i"]) -> Float[Tensor, "b j"]:
        return math.log1p(-self.leak) + z.double() @ self.log_miss

    def simulate(self, n: int, seed: int) -> tuple[Bool[Tensor, "n i"], Float[Tensor, "n j"]]:
        """n pairs."""
        gen = generator(seed)
        z = torch.rand(n, self.causes, generator=gen) < self.prior
        u = torch.rand(n, self.findings, generator=gen, dtype=torch.float64)
        return z, (u >= self._log_absent(z).exp()).float()

    def log_joint(self, z: Bool[Tensor, "b i"], x: Float[Tensor, "b j"]) -> Float[Tensor, " b"]:
        """log p(z) + log p(x | z)."""
        size = z.double().sum(1)
        log_prior = size * math.log(self.prior) + (self.causes - size) * math.log1p(-self.prior)
        absent = self._log_absent(z)
        return log_prior + torch.where(x > 0.5, torch.log(-torch.expm1(absent)), absent).sum(1)

    def every_x(self) -> Float[Tensor, "m j"]:
        """All 2^j findings."""
        return (torch.arange(2**self.findings)[:, None] >> torch.arange(self.findings) & 1).float()


@dataclass(frozen=True)
class NoisyGraph:
    """A graph uniform over the DAGs of d nodes; x is its adjacency matrix in noise of sd ``noise``."""

    d: int = 3
    noise: float = 0.6

    @property
    def space(self) -> Dags:
        """Graphs."""
        return Dags(self.d)

    def simulate(self, n: int, seed: int) -> tuple[Bool[Tensor, "n d d"], Float[Tensor, "n d d"]]:
        """n pairs."""
        gen, graphs = generator(seed), self.space.enumerate()
        z = graphs[torch.randint(len(graphs), (n,), generator=gen)]
        return z, z.float() + self.noise * torch.randn(z.shape, generator=gen)

    def log_joint(self, z: Bool[Tensor, "b d d"], x: Float[Tensor, "b d d"]) -> Float[Tensor, " b"]:
        """log p(z) + log p(x | z)."""
        off = (x.double() - z.double()).flatten(1) / self.noise
        normal = -(off.square() + math.log(2 * math.pi)).sum(1) / 2 - off.shape[1] * math.log(self.noise)
        return normal - math.log(len(self.space.enumerate()))


def distances(
    posterior: AmortizedPosterior, model: NoisyOr | NoisyGraph, x: Float[Tensor, "b ..."]
) -> tuple[Float[Tensor, " b"], Float[Tensor, " b"]]:
    """Total variation of q(. | x) from the enumerated posterior, and log p(x), for each x."""
    target = posterior.target(model.log_joint, x)
    exact = enumerate_target(target, posterior.at(x))
    tv = [float((e.law(e.log_q) - e.gamma / e.z).abs().sum() / 2) for e in exact]
    return torch.tensor(tv, dtype=torch.float64), torch.stack([e.z.log() for e in exact])


Draw = Callable[[AmortizedPosterior, int, Tensor, int], Tensor]


@dataclass(frozen=True)
class Bent:
    """A posterior whose draws are bent on their way out, and whose density is not: a planted bug."""

    base: AmortizedPosterior
    draw: Draw

    def sample(self, n: int, x: Any, seed: int = 0) -> Tensor:
        """n draws for each x, bent."""
        return self.draw(self.base, n, x, seed)

    def log_prob(self, theta: Any, x: Any, paths: int = 32, seed: int = 0) -> Tensor:
        """As it is."""
        return self.base.log_prob(theta, x, paths, seed)


def narrow(base: AmortizedPosterior, n: int, x: Tensor, seed: int) -> Tensor:
    """Real draws a quarter nearer to their mean than they should be; discrete ones at temperature 0.5."""
    if isinstance(base.space, Vectors):
        drawn = base.sample(n, x, seed)
        middle = drawn.mean(1, keepdim=True)
        return middle + 0.75 * (drawn - middle)
    problem = torch.arange(len(x)).repeat_interleave(n)
    rows = base.at(x).sample(problem, generator(seed), {"temperature": 0.5})
    return objects_of(base.space, rows).view(len(x), n, *shape_of(base.space))


def other_row(base: AmortizedPosterior, n: int, x: Tensor, seed: int) -> Tensor:
    """Draws given the x of the row above."""
    return base.sample(n, x.roll(1, 0), seed)
