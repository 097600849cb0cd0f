"""Models of small binary images with a latent behind each: what the two variational autoencoders share.

    z ~ p(z),      x_d | z ~ Bernoulli(sigmoid(f_theta(z)_d)),      d over pixels

    log p(x, z) = log p(z) + sum_d [x_d f_d(z) - log(1 + exp f_d(z))]

A weighted sample enters the M-step only through the mass N_c = sum w and the sum of images S_c = sum w x at each z_c,
since the log-density is linear in them. A model also gives a list of latents with log-weights (all codes, or a
grid with its cell sizes), over which log p(x) = log sum_c exp(log-weight_c) p(x | z_c) and EM is exact.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from retrodict.errors import InputError
from retrodict.latent.data import data_of, data_problems
from retrodict.particles import Particles
from retrodict.policies.base import FiniteStepper
from retrodict.policies.layers import MLP
from retrodict.policies.vectors import VectorPolicy
from retrodict.protocols import Problems, Space
from retrodict.records import Rollouts
from retrodict.rng import generator
from retrodict.targets.algebra import Target
from retrodict.targets.prior import Prior
from retrodict.training.learn import weighted_rows

Images = Float[Tensor, "m d"]
HOT = 300
"""Steps of Adam at the full rate; then it falls, so that the noise of draws averages out (Robbins and Monro 1951)."""
CHUNK = 250
"""Images at once where each is weighed against every latent."""


def bars(n: int, size: int = 4, seed: int = 0, on: float = 0.3, flip: float = 0.1) -> Images:
    """Images of size x size pixels: each row and each column is lit with chance ``on``, then pixels flip.

    The bars problem (Foldiak 1990): what lit a pixel, its row or its column, is not told, so causes compete.
    """
    gen = generator(seed)
    rows, columns = (torch.rand(2, n, size, generator=gen) < on).unbind(0)
    clean = (rows[:, :, None] | columns[:, None, :]).flatten(1)
    return (clean ^ (torch.rand(clean.shape, generator=gen) < flip)).float()


def blobs(n: int, size: int = 5, seed: int = 0, width: float = 0.9, flip: float = 0.03) -> Images:
    """Images of size x size pixels: one round blob at a random place of the picture, then pixels flip.

    A pixel is lit where the blob's height there, exp(-distance^2 / (2 width^2)), exceeds 1/2. Two numbers, the place,
    make the picture.
    """
    gen = generator(seed)
    centre = torch.rand(n, 2, generator=gen) * (size - 1)
    side = torch.arange(size, dtype=torch.float32)
    square = (side - centre[:, :1]).square()[:, :, None] + (side - centre[:, 1:]).square()[:, None, :]
    clean = (-square / (2 * width**2)).exp().flatten(1) > 0.5
    return (clean ^ (torch.rand(clean.shape, generator=gen) < flip)).float()


def checked(images: Tensor, pixels: int | None = None) -> Images:
    """Images as float32 rows. Raises InputError for another size, and for pixels that are not 0 or 1."""
    x = images.flatten(1).float()
    if pixels is not None and x.shape[1] != pixels:
        raise InputError(f"these images have {x.shape[1]} pixels, and the model's {pixels}; crop or scale them first")
    bad = (~((x == 0) | (x == 1)).all(1)).nonzero().flatten().tolist()
    if bad:
        raise InputError(f"{len(bad)} of {len(x)} images hold pixels other than 0 and 1, first image {bad[0]}; "
                         "write (x > 0.5)")  # fmt: skip
    return x


class Decoder:
    """f_theta: from a code of z to the log-odds of each pixel. ``version`` moves with every M-step."""

    def __init__(self, inputs: int, pixels: int, hidden: int, layers: int, seed: int) -> None:
        self.net = MLP(inputs, pixels, hidden, layers, seed, gain=1.0)
        self.pixels, self.updates = pixels, 0

    @property
    def version(self) -> str:
        """Moves with every M-step."""
        return f"decoder@{self.updates}"

    def log_odds(self, z: Float[Tensor, "c i"]) -> Float[Tensor, "c d"]:
        """Of each pixel being lit."""
        return self.net(z)

    def log_p(self, x: Images, z: Float[Tensor, "m i"]) -> Float[Tensor, " m"]:
        """log p(x | z) of each pair, nats."""
        f = self.log_odds(z)
        return (x * f - F.softplus(f)).sum(1)

    def log_p_of_all(self, x: Images, z: Float[Tensor, "c i"]) -> Float[Tensor, "m c"]:
        """log p(x | z) of every image under every latent."""
        f = self.log_odds(z)
        return x @ f.T - F.softplus(f).sum(1)


@dataclass(frozen=True, eq=False)
class ImageTerm:
    """log p(x_m | z) as a factor. ``embed`` gives what the decoder reads of finished objects."""

    decoder: Decoder
    embed: Callable[[Rollouts], Tensor]
    problems: Problems
    name: str = "likelihood"
    noise: str = "none"
    prefixes: bool = False
    images: Images = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "images", data_of(self.problems, self.decoder.pixels, "pixels", torch.float32))

    @property
    def version(self) -> str:
        """The decoder's."""
        return self.decoder.version

    def on(self, problems: Problems) -> ImageTerm:
        """The same decoder on other images."""
        return replace(self, problems=problems)

    @torch.no_grad()
    def __call__(self, rollouts: Rollouts, every_prefix: bool = False) -> Float[Tensor, " b"]:
        """``[b]``; a prefix of a latent is no object."""
        return self.decoder.log_p(self.images[rollouts.problem], self.embed(rollouts)).double()


class ImageModel:
    """Images and a decoder that learns from them, a model for ``training.learn``. Subclasses say what z is.

    Args:
        images: the data, pixels 0 or 1.
        space: of z.
        prior: p(z).
        inputs: numbers that the decoder reads of z.
        hidden, layers: of the decoder; with 0 layers the log-odds are linear in the code of z.
        m_steps: steps of Adam in an M-step.
        lr: their size; after ``HOT`` steps in all it falls as HOT / step.
        seed: of the weights.
    """

    def __init__(
        self, images: Tensor, space: Space, prior: FiniteStepper | VectorPolicy, inputs: int, *,
        hidden: int, layers: int, m_steps: int, lr: float, seed: int,
    ) -> None:  # fmt: skip
        if m_steps < 1 or not lr > 0:
            raise InputError(f"an M-step needs m_steps of at least 1 and lr above 0, not {m_steps} and {lr:g}")
        self.images, self.m_steps, self.lr, self.steps = checked(images), m_steps, lr, 0
        self.space: Any = space
        self.prior: Any = prior
        self.decoder = Decoder(inputs, self.images.shape[1], hidden, layers, seed)
        self.problems = data_problems(self.images)
        self.adam = torch.optim.Adam(list(self.parameters().values()), lr=lr)
        self._target: Target | None = None

    # -- what subclasses say --------------------------------------------------------------------------------------

    def embed(self, rollouts: Rollouts) -> Float[Tensor, "b i"]:
        """What the decoder reads of each latent."""
        raise NotImplementedError  # abstract

    def listed(self) -> tuple[Float[Tensor, "c i"], Float[Tensor, " c"]]:
        """Latents as the decoder reads them, and their log-weights: sums over them stand for sums over z."""
        raise NotImplementedError  # abstract

    def parameters(self) -> Mapping[str, Tensor]:
        """theta; a learned prior has more."""
        return self.decoder.net.parameters

    def log_prior(self, z: Float[Tensor, "c i"]) -> Float[Tensor, " c"]:
        """log p(z) where theta enters it, with gradient; 0 where it does not."""
        return z.new_zeros(len(z))

    # -- the model --------------------------------------------------------------------------------------------------

    @property
    def target(self) -> Target:
        """log gamma = log p(z) + log p(x_m | z)."""
        if self._target is None:
            self._target = self.of(self.problems)
        return self._target

    def of(self, problems: Problems) -> Target:
        """The target of other images, under the same (present and future) theta."""
        term = ImageTerm(self.decoder, self.embed, problems)
        return Target(self.space, problems, {"prior": Prior(self.prior, prefixes=False), "likelihood": term},
                      prior=self.prior)  # fmt: skip

    @torch.no_grad()
    def log_joint(self, images: Tensor) -> Float[Tensor, "m c"]:
        """log p(x, z_c) of each image and each listed latent (with the latent's weight)."""
        z, weight = self.listed()
        return self.decoder.log_p_of_all(checked(images, self.decoder.pixels), z) + weight

    def log_evidence(self, images: Tensor | None = None) -> Float[Tensor, " m"]:
        """log p(x), nats, of the model's own images by default: the sum over listed latents."""
        parts = (self.images if images is None else images).split(CHUNK)
        return torch.cat([self.log_joint(x).double().logsumexp(1) for x in parts])

    def posterior(self, images: Tensor) -> Float[Tensor, "m c"]:
        """p(z_c | x) over the listed latents."""
        return self.log_joint(images).softmax(1)

    def exact_step(self) -> float:
        """One round of EM on the exact posterior; gives the mean of log p(x) before it."""
        z, _ = self.listed()
        mass, lit, total = z.new_zeros(len(z)), z.new_zeros(len(z), self.decoder.pixels), 0.0
        for x in self.images.split(CHUNK):
            joint = self.log_joint(x)
            r = joint.softmax(1)
            mass, lit, total = mass + r.sum(0), lit + r.T @ x, total + float(joint.logsumexp(1).double().sum())
        self.climb(z, mass / len(self.images), lit / len(self.images))
        return total / len(self.images)

    def m_step(self, particles: Particles, seed: int = 0) -> float:
        """Adam on a weighted sample; gives sum_k w_k log p(x, z_k), a mean over images (see ``climb``)."""
        rows, w = weighted_rows(particles)
        w = w.float()
        return self.climb(self.embed(rows), w, w[:, None] * self.images[rows.problem])

    def climb(self, z: Float[Tensor, "c i"], mass: Float[Tensor, " c"], lit: Float[Tensor, "c d"]) -> float:
        """Steps of Adam up sum_c [S_c f(z_c) - N_c sum_d log(1 + exp f_d(z_c)) + N_c log p(z_c)].

        Args:
            z: latents as the decoder reads them.
            mass: N_c, the weight of each; they sum to one.
            lit: S_c, the sum of weight times image at each.

        Returns:
            The value before the last step; a prior that theta does not enter is left out.
        """
        value = 0.0
        for _ in range(self.m_steps):
            f = self.decoder.log_odds(z)
            up = (lit * f).sum() - mass @ F.softplus(f).sum(1) + mass @ self.log_prior(z)
            self.adam.zero_grad(set_to_none=True)
            (-up).backward()
            self.steps += 1
            self.adam.param_groups[0]["lr"] = self.lr * min(1.0, HOT / self.steps)
            self.adam.step()
            value = float(up.detach())
        self.decoder.updates += 1
        return value

    @torch.no_grad()
    def simulate(self, n: int, gen: torch.Generator) -> tuple[Target, Rollouts]:
        """n latents of the prior, and the target of the images that they made."""
        rows = self.prior.sample(torch.arange(n), gen)
        lit = self.decoder.log_odds(self.embed(rows)).sigmoid()
        return self.of(data_problems((torch.rand(lit.shape, generator=gen) < lit).float())), rows
