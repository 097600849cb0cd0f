"""A variational autoencoder with discrete codes, where EM, mean field and an amortized joint q meet exact sums.

    z = (z_1, ..., z_n) ~ p_theta(z),     x_d | z ~ Bernoulli(sigmoid(f_theta(z)_d))

f reads the one-hots of z. With no hidden layer its log-odds are a sum over variables, so given x these compete (they
explain each other away) and the posterior is entangled. A factorised q(z | x) = prod_i q(z_i | x) cannot hold it, and
the theta it learns gives up some of log p(x) for a posterior that factorises. An autoregressive q(z | x) =
prod_i q(z_i | z_<i, x) can hold it. The prior p_theta(z) is autoregressive as well, and uniform at the start.

Sums over z run over all prod sizes codes: log p(x), the posterior and the law of q are exact. After Hu et al. 2023
(GFlowNet-EM, arXiv:2302.06576, section 5.3), where z has 4 x 4 codes and the evidence is an estimate.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from jaxtyping import Float
from torch import Tensor

from retrodict.errors import InputError
from retrodict.latent.images import ImageModel
from retrodict.objectives.mle import object_log_q
from retrodict.policies.layers import MLP
from retrodict.policies.net import NetPolicy
from retrodict.protocols import Problems
from retrodict.records import Problem, Rollouts
from retrodict.spaces.enumerate import enumerate_objects
from retrodict.spaces.vectors import Assignments

MOST_CODES = 4096
"""Codes up to which sums run over all of them."""


class CodePrior(NetPolicy):
    """p(z) = prod_i p(z_i | z_<i): a policy that reads no datum. Its linear layer starts at 0, the uniform law."""

    def __init__(self, space: Assignments) -> None:
        moves = space.n_moves + space.n_stops
        super().__init__(space, [Problem((), name="prior")], MLP(space.n_features, moves, layers=0, gain=0.0))

    def on(self, problems: Problems) -> CodePrior:
        """It reads none."""
        return self


class DiscreteVAE(ImageModel):
    """Codes behind images: a model for ``training.learn``.

    Args:
        images: the data [m, d], pixels 0 or 1.
        sizes: how many values each code has; 4,096 codes at most in all.
        hidden, layers: of the decoder; by default its log-odds are linear in the one-hots.
        m_steps: steps of Adam in an M-step.
        lr: their size, see ``images.ImageModel``.
        seed: of the decoder's weights.
    """

    def __init__(
        self, images: Tensor, sizes: Sequence[int] = (4, 4, 4), *,
        hidden: int = 32, layers: int = 0, m_steps: int = 10, lr: float = 0.1, seed: int = 0,
    ) -> None:  # fmt: skip
        space = Assignments(tuple(sizes))
        self.codes = enumerate_objects(space, 0, MOST_CODES)
        super().__init__(images, space, CodePrior(space), sum(sizes), hidden=hidden, layers=layers, m_steps=m_steps,
                         lr=lr, seed=seed)  # fmt: skip

    def embed(self, rollouts: Rollouts) -> Float[Tensor, "b i"]:
        """The one-hots of z."""
        return self.space.features(self.space.replay(rollouts, rollouts.n))[:, : sum(self.space.sizes)]

    def listed(self) -> tuple[Float[Tensor, "c i"], Float[Tensor, " c"]]:
        """All codes, and log p(z)."""
        z = self.embed(self.codes)
        return z, self.log_prior(z)

    def log_prior(self, z: Float[Tensor, "c i"]) -> Float[Tensor, " c"]:
        """log p(z) of all codes, with gradient."""
        return object_log_q(self.prior.score(self.codes, grad=True), self.codes)

    def parameters(self) -> Mapping[str, Tensor]:
        """The decoder's and the prior's."""
        own = {f"decoder.{k}": v for k, v in super().parameters().items()}
        return own | {f"prior.{k}": v for k, v in self.prior.parameters().items()}

    def climb(self, z: Float[Tensor, "c i"], mass: Float[Tensor, " c"], lit: Float[Tensor, "c d"]) -> float:
        """Steps up the mass and images gathered at each code, see ``images.ImageModel``."""
        every = self.embed(self.codes)
        if len(z) != len(every) or not bool((z == every).all()):
            at = (z @ every.T).argmax(1)  # equal one-hots agree in all variables
            mass = mass.new_zeros(len(every)).index_add(0, at, mass)
            lit = lit.new_zeros(len(every), lit.shape[1]).index_add(0, at, lit)
        value = super().climb(every, mass, lit)
        self.prior.refresh()
        return value


class Factorised:
    """A net for ``NetPolicy`` that does not see the values chosen so far: q(z | x) = prod_i q(z_i | x), mean field."""

    def __init__(self, space: Assignments, features: int, hidden: int = 64, layers: int = 2, seed: int = 0) -> None:
        self.chosen = sum(space.sizes)
        read = space.n_features - self.chosen + features
        self.net = MLP(read, space.n_moves + space.n_stops, hidden, layers, seed)
        self.parameters = self.net.parameters

    def __call__(self, x: Float[Tensor, "b i"]) -> Float[Tensor, "b o"]:
        """Logits from the number of the next variable and the image."""
        return self.net(x[:, self.chosen :])


def encoder(
    model: DiscreteVAE, kind: str = "autoregressive", *, hidden: int = 64, layers: int = 2, seed: int = 0
) -> NetPolicy:
    """q(z | x), untrained.

    Args:
        model: whose images it reads.
        kind: "autoregressive" (any joint of the codes) or "factorised" (mean field).
        hidden, layers, seed: of its network.
    """
    if kind not in ("autoregressive", "factorised"):
        raise InputError(f"unknown encoder {kind!r}; write 'autoregressive' or 'factorised'")
    net = None
    if kind == "factorised":
        net = Factorised(model.space, model.decoder.pixels, hidden, layers, seed)
    return NetPolicy(model.space, model.problems, net, hidden=hidden, layers=layers, seed=seed)
