"""A Bayesian neural network for regression on one input: a posterior over the weights w of a small net.

    f(x; w) = c + sum_j a_j tanh(u_j x + b_j),      y ~ N(f(x; w), noise^2)
    u_j, b_j ~ N(0, input_sd^2),   a_j ~ N(0, output_sd^2 / H),   c ~ N(0, output_sd^2)
    log gamma(w) = log p(w) + sum_i log p(y_i | x_i, w)

(Neal 1996, Bayesian Learning for Neural Networks, chapter 2.) w is a point of ``Vectors(3 H + 1)``, in the order u, b,
a, c. The reference is Hamiltonian Monte Carlo (``latent.hmc``); q is a flow trained by VarGrad through ``amortize``.

Relabelling the H units, or turning the signs of u_j, b_j and a_j together, changes nothing: the posterior has H! 2^H
copies of each mode, and a q that is fitted from its own draws finds one of them. Predictions are the same in all, but
bounds are not: log Z by importance sampling would miss log H! 2^H nats. :class:`Symmetric` spreads q over all copies,
and its density is an exact sum over them.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from retrodict.errors import InputError
from retrodict.latent.hmc import density_of
from retrodict.latent.npe_posterior import JointTerm
from retrodict.numerics import log_mean_exp
from retrodict.policies.flow import FlowPolicy, Support
from retrodict.policies.vectors import VectorPolicy
from retrodict.records import Problem
from retrodict.rng import generator
from retrodict.spaces.vectors import Vectors
from retrodict.targets.algebra import Target
from retrodict.training.amortize import amortize
from retrodict.training.threads import one_thread

MOST_COPIES = 5000
PLAN: dict[str, Any] = {
    "objective": "vargrad", "steps": 600, "samples": 128, "lr": 3e-3, "clip": 10.0, "tempered": 0.5,
    "temperatures": (1.0, 2.0), "evaluate": 512,
}  # fmt: skip
"""Of :func:`fit_weights`: half of the draws are wider than q, so that q learns of the tails that it lacks."""


@dataclass(frozen=True)
class BayesNet:
    """The model. Sizes are those of the formula above."""

    hidden: int = 3
    noise: float = 0.1
    input_sd: float = 2.0
    output_sd: float = 1.5

    @property
    def dim(self) -> int:
        """Numbers in w."""
        return 3 * self.hidden + 1

    @property
    def sd(self) -> Float[Tensor, " d"]:
        """Of each weight under the prior."""
        h = self.hidden
        each = [self.input_sd] * (2 * h) + [self.output_sd / math.sqrt(h)] * h + [self.output_sd]
        return torch.tensor(each, dtype=torch.float64)

    def outputs(self, w: Float[Tensor, "b d"], x: Float[Tensor, " g"]) -> Float[Tensor, "b g"]:
        """f(x; w) of every w at every x."""
        u, bias, a = w[:, :-1].double().view(len(w), 3, self.hidden).unbind(1)
        units = torch.tanh(u[:, :, None] * x.double() + bias[:, :, None])
        return w[:, -1:].double() + (a[:, :, None] * units).sum(1)

    def log_prior(self, w: Float[Tensor, "b d"]) -> Float[Tensor, " b"]:
        """log p(w), nats."""
        return -((w.double() / self.sd).square() + math.log(2 * math.pi)).sum(1) / 2 - self.sd.log().sum()

    def log_p(self, w: Float[Tensor, "b d"], x: Float[Tensor, " g"], y: Float[Tensor, " g"]) -> Float[Tensor, "b g"]:
        """log p(y_i | x_i, w) of every w and datum, nats."""
        off = (y.double() - self.outputs(w, x)) / self.noise
        return -(off.square() + math.log(2 * math.pi)) / 2 - math.log(self.noise)

    def target(self, x: Float[Tensor, " n"], y: Float[Tensor, " n"]) -> Target:
        """The posterior over the weights given n data, factors "prior" and "likelihood".

        Raises InputError for numbers that are not finite.
        """
        if not bool((x.isfinite() & y.isfinite()).all()):
            i = int((~(x.isfinite() & y.isfinite())).nonzero()[0])
            raise InputError(f"data are pairs of finite numbers, and pair {i} is ({float(x[i])}, {float(y[i])})")
        space, problems = Vectors(self.dim), [Problem((), row={"x": torch.stack([x, y])}, name="weights")]

        def likelihood(w: Tensor, data: Tensor) -> Tensor:
            return self.log_p(w, data[0, 0], data[0, 1]).sum(1)

        factors = {"prior": JointTerm(space, problems, lambda w, _: self.log_prior(w), "prior"),
                   "likelihood": JointTerm(space, problems, likelihood, "likelihood")}  # fmt: skip
        return Target(space, problems, factors)


def fit_weights(net: BayesNet, target: Target, seed: int = 0, **given: Any) -> FlowPolicy:
    """A flow over the weights of one data set: ``retrodict.amortize`` under :data:`PLAN` (``given`` replaces it).

    It starts at :func:`laplace`: from the prior, VarGrad would meet differences of 10^4 nats before it meets a mode.
    """
    support = Support.of(net.dim).moved(*laplace(net, target, seed))
    policy = FlowPolicy(Vectors(net.dim), target.problems, support, hidden=32, splines=1, seed=seed)
    with one_thread():
        return amortize(target, policy, **{**PLAN, "seed": seed, **given})


def laplace(
    net: BayesNet, target: Target, seed: int = 0, tries: int = 64, steps: int = 300
) -> tuple[Float[Tensor, " d"], Float[Tensor, "d d"]]:
    """The best mode that ascent from ``tries`` draws of the prior finds, and the inverse curvature there.

    (MacKay 1992, Neural Computation 4:448.) Directions flatter than the prior count as wide as the prior.
    """
    log_gamma, w = density_of(target), starts(net, tries, seed).requires_grad_()
    adam = torch.optim.Adam([w], lr=0.05)
    for _ in range(steps):
        adam.zero_grad()
        (-log_gamma(w).sum()).backward()
        adam.step()
    mode = w.detach()[log_gamma(w).argmax()]
    curvature = -torch.autograd.functional.hessian(lambda v: log_gamma(v[None])[0], mode)
    value, vector = torch.linalg.eigh(curvature)
    return mode, vector @ torch.diag(1 / value.clamp_min(float(net.sd.square().reciprocal().min()))) @ vector.T


class Symmetric(VectorPolicy):
    """A policy over weights spread evenly over all relabellings and sign changes of the hidden units.

    q'(w) = 1/|G| sum over g in G of q(g w);   a g keeps volumes, so that there is no Jacobian.
    """

    def __init__(self, base: VectorPolicy, net: BayesNet) -> None:
        h = net.hidden
        if math.factorial(h) * 2**h > MOST_COPIES:
            raise InputError(f"{h} hidden units have {math.factorial(h) * 2**h:,} copies; at most {MOST_COPIES:,} are "
                             "summed: take fewer units")  # fmt: skip
        self.base, self.space, self.problems = base, base.space, base.problems
        signs = torch.tensor(list(itertools.product((1.0, -1.0), repeat=h)), dtype=torch.float64)
        orders = torch.tensor(list(itertools.permutations(range(h))))
        units = torch.cat([orders, orders + h, orders + 2 * h], 1)
        last = torch.full((len(orders), 1), 3 * h)
        self.index = torch.cat([units, last], 1).repeat_interleave(len(signs), 0)
        flips = torch.cat([signs, signs, signs, torch.ones(len(signs), 1, dtype=torch.float64)], 1)
        self.flip = flips.repeat(len(orders), 1)

    def parameters(self) -> Mapping[str, Tensor]:
        """Those of what is spread."""
        return self.base.parameters()

    def propose(
        self, problem: Int[Tensor, " b"], at: Float[Tensor, "b d"], i: int, gen: torch.Generator, temperature: float
    ) -> Float[Tensor, "b d"]:
        """A draw of the base, carried by a random g."""
        w = self.base.propose(problem, at, i, gen, temperature)
        g = torch.randint(len(self.index), (len(w),), generator=gen)
        return w.gather(1, self.index[g]) * self.flip[g]

    def log_move(
        self,
        problem: Int[Tensor, " b"],
        at: Float[Tensor, "b d"],
        i: Int[Tensor, " b"],
        move: Float[Tensor, "b d"],
        temperature: float = 1.0,
    ) -> Float[Tensor, " b"]:
        """log of the mean over G, nats. G is a group, so that g and its inverse run over the same maps."""
        size = len(self.index)
        every = move[:, self.index] * self.flip  # [b, |G|, d]
        row = torch.arange(len(move)).repeat_interleave(size)
        log_q = self.base.log_move(problem[row], at[row], i[row], every.flatten(0, 1), temperature)
        return log_mean_exp(log_q.view(len(move), size))


@dataclass(frozen=True)
class Prediction:
    """What weighted weights say at some inputs: mean and sd of f, and log p(y) of data there, nats each."""

    mean: Float[Tensor, " g"]
    sd: Float[Tensor, " g"]
    log_p: Float[Tensor, " g"] | None = None


def predict(
    net: BayesNet,
    w: Float[Tensor, "k d"],
    x: Float[Tensor, " g"],
    y: Float[Tensor, " g"] | None = None,
    log_w: Float[Tensor, " k"] | None = None,
) -> Prediction:
    """The posterior predictive from draws of the weights, equally weighted by default."""
    share = (torch.zeros(len(w), dtype=torch.float64) if log_w is None else log_w.double()).softmax(0)
    f = net.outputs(w, x)
    mean = share @ f
    sd = (share @ (f - mean).square()).sqrt()
    log_p = None if y is None else torch.logsumexp(net.log_p(w, x, y) + share.log()[:, None], 0)
    return Prediction(mean, sd, log_p)


def starts(net: BayesNet, chains: int, seed: int) -> Float[Tensor, "c d"]:
    """Draws of the prior, for chains to begin at."""
    return net.sd * torch.randn(chains, net.dim, generator=generator(seed), dtype=torch.float64)
