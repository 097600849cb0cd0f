"""A variational autoencoder with a plane of latents, small enough that log p(x) is known by quadrature.

    z ~ N(0, I_2),     x_d | z ~ Bernoulli(sigmoid(f_theta(z)_d)),     q_phi(z | x) = N(mu_phi(x), diag sigma_phi(x)^2)

    ELBO(x) = E_q[log p(x | z)] - KL(q, p(z)) <= log p(x)                     (Kingma and Welling 2014, arXiv:1312.6114)

The textbook trains both by the pathwise gradient (z = mu + sigma eps, :func:`fit_elbo`). The same models are learned by
``training.learn``: q by VarGrad, whose on-policy gradient is that of KL(q, posterior) by score function, of higher
variance, zero in the posterior's family; theta by M-steps on q's draws, plain (the same bound) or weighted by gamma / q
(reweighted wake-sleep, Bornschein and Bengio 2015; the bound is IWAE's). A Gaussian q leaves KL(q, posterior) > 0, so
the theta of the bound is not that of log p(x); the gap to the exact E-step is what a bound costs.

Quadrature: log p(x) = log sum_g h^2 N(z_g; 0, I) p(x | z_g) on a square grid of spacing h over [-6, 6]^2. The prior's
mass outside is 4e-9; inside the error falls faster than any power of h once h is below the posterior's width.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from retrodict.errors import InputError
from retrodict.latent.data import data_of
from retrodict.latent.images import ImageModel
from retrodict.policies.layers import MLP
from retrodict.policies.vectors import VectorPolicy
from retrodict.protocols import Problems
from retrodict.records import Problem, Rollouts
from retrodict.rng import generator
from retrodict.spaces.vectors import Vectors

REACH = 6.0
"""Half the side of the grid."""


class Gaussian(VectorPolicy):
    """Base of policies that draw one vector from a Gaussian with independent coordinates."""

    def law(self, problem: Int[Tensor, " b"]) -> tuple[Float[Tensor, "b z"], Float[Tensor, "b z"]]:
        """Mean and log standard deviation."""
        raise NotImplementedError  # abstract

    def propose(
        self, problem: Int[Tensor, " b"], at: Float[Tensor, "b z"], i: int, gen: torch.Generator, temperature: float
    ) -> Float[Tensor, "b z"]:
        """See ``policies.vectors``; a temperature multiplies the variance."""
        mean, log_sd = self.law(problem)
        return mean + log_sd.exp() * temperature**0.5 * torch.randn(mean.shape, generator=gen)

    def log_move(
        self, problem: Int[Tensor, " b"], at: Float[Tensor, "b z"], i: Int[Tensor, " b"], move: Float[Tensor, "b z"],
        temperature: float = 1.0,
    ) -> Float[Tensor, " b"]:  # fmt: skip
        """The Gaussian's log density (nats)."""
        mean, log_sd = self.law(problem)
        log_sd = log_sd + math.log(temperature) / 2
        return -(0.5 * ((move - mean) / log_sd.exp()).square() + log_sd + 0.5 * math.log(2 * math.pi)).sum(1)


class StandardNormal(Gaussian):
    """p(z) = N(0, I)."""

    def __init__(self, space: Vectors) -> None:
        self.space, self.problems = space, [Problem((), name="prior")]

    def on(self, problems: Problems) -> StandardNormal:
        """It reads none."""
        return self

    def law(self, problem: Int[Tensor, " b"]) -> tuple[Float[Tensor, "b z"], Float[Tensor, "b z"]]:
        """Zeros."""
        zero = torch.zeros(len(problem), self.space.dim)
        return zero, zero


class Encoder(Gaussian):
    """q(z | x): mean and log standard deviation by a network that reads the image."""

    def __init__(
        self, space: Vectors, problems: Problems, pixels: int, net: MLP | None = None, *,
        hidden: int = 64, layers: int = 2, seed: int = 0,
    ) -> None:  # fmt: skip
        self.space, self.problems, self.pixels = space, problems, pixels
        self.x = data_of(problems, pixels, "pixels", torch.float32)
        self.net = net or MLP(pixels, 2 * space.dim, hidden, layers, seed)
        self.about: dict[str, object] = {}

    def on(self, problems: Problems) -> Encoder:
        """The same network on other images."""
        new = Encoder(self.space, problems, self.pixels, self.net)
        new.updates = self.updates
        return new

    def parameters(self) -> dict[str, Tensor]:
        """The network's."""
        return self.net.parameters

    def law(self, problem: Int[Tensor, " b"]) -> tuple[Float[Tensor, "b z"], Float[Tensor, "b z"]]:
        """Of each row's image."""
        mean, log_sd = self.net(self.x[problem]).chunk(2, 1)
        return mean, log_sd


class VAE(ImageModel):
    """A point of the plane behind each image: a model for ``training.learn``. Its exact E-step is by quadrature.

    Args:
        images: the data [m, d], pixels 0 or 1.
        hidden, layers: of the decoder.
        m_steps: steps of Adam in an M-step.
        lr: their size, see ``images.ImageModel``.
        cells: points along a side of the grid that exact EM learns on.
        seed: of the decoder's weights.
    """

    def __init__(
        self, images: Tensor, *, hidden: int = 32, layers: int = 1, m_steps: int = 16, lr: float = 2e-2,
        cells: int = 40, seed: int = 0,
    ) -> None:  # fmt: skip
        if cells < 2:
            raise InputError(f"a grid needs 2 points or more along a side, not {cells}")
        space = Vectors(2)
        self.cells = cells
        super().__init__(images, space, StandardNormal(space), 2, hidden=hidden, layers=layers, m_steps=m_steps, lr=lr,
                         seed=seed)  # fmt: skip

    def embed(self, rollouts: Rollouts) -> Float[Tensor, "b z"]:
        """The point."""
        return self.space.points(rollouts)

    def listed(self) -> tuple[Float[Tensor, "c z"], Float[Tensor, " c"]]:
        """The grid, and log of N(z; 0, I) times the area of a cell."""
        return grid(self.cells)

    @torch.no_grad()
    def quadrature(self, images: Tensor, cells: int = 200) -> Float[Tensor, " m"]:
        """log p(x), nats, on a grid of cells x cells points."""
        kept, self.cells = self.cells, cells
        try:
            return self.log_evidence(images)
        finally:
            self.cells = kept

    def encoder(self, *, hidden: int = 64, layers: int = 2, seed: int = 0) -> Encoder:
        """An untrained q(z | x)."""
        return Encoder(self.space, self.problems, self.decoder.pixels, hidden=hidden, layers=layers, seed=seed)


def grid(cells: int) -> tuple[Float[Tensor, "c z"], Float[Tensor, " c"]]:
    """cells x cells points of [-6, 6]^2 at the middle of their cells, and log (N(z; 0, I) h^2)."""
    h = 2 * REACH / cells
    side = -REACH + h * (torch.arange(cells) + 0.5)
    z = torch.cartesian_prod(side, side)
    return z, -z.square().sum(1) / 2 - math.log(2 * math.pi) + 2 * math.log(h)


def bound(
    model: VAE, q: Encoder, problem: Int[Tensor, " b"], gen: torch.Generator, samples: int = 1
) -> Float[Tensor, " b"]:
    """The ELBO of images by reparameterised draws, with gradient in theta and phi; its KL is in closed form."""
    mean, log_sd = q.law(problem)
    kl = 0.5 * (mean.square() + (2 * log_sd).exp() - 1 - 2 * log_sd).sum(1)
    noise = torch.randn(samples, *mean.shape, generator=gen)
    f = model.decoder.log_odds((mean + log_sd.exp() * noise).flatten(0, 1)).view(samples, len(problem), -1)
    return (q.x[problem] * f - F.softplus(f)).sum(2).mean(0) - kl


def fit_elbo(
    model: VAE, q: Encoder, *, steps: int = 600, batch: int = 256, samples: int = 4, lr: float = 3e-3, seed: int = 0
) -> list[float]:
    """The textbook: one Adam up the ELBO in theta and phi, by the pathwise gradient; gives each step's bound."""
    gen = generator(seed)
    adam = torch.optim.Adam([*model.parameters().values(), *q.parameters().values()], lr=lr)
    seen = []
    for _ in range(steps):
        problem = torch.randint(len(q.problems), (batch,), generator=gen)
        value = bound(model, q, problem, gen, samples).mean()
        adam.zero_grad(set_to_none=True)
        (-value).backward()
        adam.step()
        seen.append(float(value.detach()))
    model.decoder.updates += 1
    q.refresh()
    return seen
