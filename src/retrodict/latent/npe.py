"""Amortized posterior estimation: simulate, train, ask for the posterior of any x.

    minimise - E_{theta ~ p, x ~ p(x | theta)} log q(theta | x)     =  E_x KL(p(theta | x), q(theta | x)) + constant

(Papamakarios and Murray 2016, arXiv:1605.06376; Cranmer, Brehmer and Louppe 2020). The likelihood is never asked for:
a simulator is enough. Real vectors are drawn by a flow (``policies.flow``), discrete structures by a policy over their
space, trained by maximum likelihood on one path to each simulated object; both by the same loop, ``objectives.mle``.

Bias: q is right on average over simulated x where the fit is good, and nothing is known at an x that the simulator
does not make. A prior on a box (or half-line) is met exactly by a change of variables: no draw leaves it and none is
rejected (sbi rejects what leaks out of the support, which can take for ever: its issues 741 and 1287). x and theta are
standardised by the simulations that q is fitted to, not by those that decide when to stop.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Shaped
from torch import Tensor

from retrodict.errors import InputError
from retrodict.latent.npe_objects import rollouts_of
from retrodict.latent.npe_posterior import AmortizedPosterior, Scale
from retrodict.latent.npe_simulate import Simulations
from retrodict.objectives.mle import object_log_q
from retrodict.policies.flow import FlowPolicy, Support
from retrodict.policies.net import NetPolicy
from retrodict.protocols import Problems, Trainable
from retrodict.rng import child_seed, generator
from retrodict.spaces.vectors import Vectors
from retrodict.training.settings import settings
from retrodict.training.star import restore
from retrodict.training.threads import one_thread
from retrodict.training.trice import adam_of, climb


@dataclass(frozen=True)
class Plan:
    """How q is trained.

    Attributes:
        epochs: at most; a cosine takes the step size down over them. ``patience`` epochs without a better held-out
            loss end the training, and the best weights are kept.
        batch: simulations a step.
        lr: Adam's step size.
        held_out: share of the simulations that decides when to stop.
        hidden, layers: of the networks.
        seed: one seed, one result.
    """

    epochs: int = 100
    patience: int = 15
    batch: int = 256
    lr: float = 2e-3
    held_out: float = 0.1
    hidden: int = 64
    layers: int = 2
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("epochs", "patience", "batch", "hidden", "layers"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1, not {getattr(self, name)}")
        if not 0 < self.held_out < 1:
            raise InputError(f"held_out is a share of the simulations, between 0 and 1, not {self.held_out}")


def fit_posterior(
    simulations: Simulations,
    space: Any = None,
    *,
    bounds: tuple[Any, Any] | None = None,
    policy: Callable[[Problems], Trainable] | None = None,
    on_epoch: Callable[[Mapping[str, float]], None] | None = None,
    **plan: Any,
) -> AmortizedPosterior:
    """Train q(theta | x) on simulations.

    Args:
        simulations: from :func:`retrodict.latent.npe_simulate.simulate`.
        space: of theta; real vectors by default.
        bounds: (low, high) of a real theta's prior, numbers or one a coordinate; infinite ends are none.
        policy: makes a Trainable over ``space`` that reads ``row["features"]`` (x, standardised, in its own shape), in
            place of the flow or of ``NetPolicy``.
        on_epoch: called with each epoch's numbers.
        **plan: of :class:`Plan`.

    Raises:
        InputError: a theta outside the bounds or the space (how many, and which row first); too few simulations.
    """
    p, n = Plan(**plan), len(simulations)
    held = math.ceil(p.held_out * n)
    if n - held < 2:
        raise InputError(f"{n} simulations are too few to learn from and hold {p.held_out:.0%} out; simulate more")
    theta = simulations.theta
    space = space or _real(theta)
    if bounds is not None and (policy is not None or not isinstance(space, Vectors)):
        raise InputError(
            "bounds are of the flow over real vectors; a discrete space, or policy=, has a support of its own"
        )
    order = torch.randperm(n, generator=generator(p.seed, "cpu", 0))
    fitted, kept = order[held:], order[:held]
    scale = Scale.of(simulations.x[fitted])
    problems = scale.problems(simulations.x)
    seed = child_seed(p.seed, 1)
    if policy is not None:
        q: Any = policy(problems)
    elif isinstance(space, Vectors):
        support = inside(theta, space, bounds).standardised(theta[fitted])
        q = FlowPolicy(space, problems, support, hidden=p.hidden, layers=p.layers, seed=seed)
    else:
        q = NetPolicy(space, problems, hidden=p.hidden, layers=p.layers, seed=seed)
    with one_thread():
        about = _train(q, space, theta, fitted, kept, p, on_epoch)
    return AmortizedPosterior(space, q, scale, {"simulations": n, "dropped": simulations.dropped, **about})


def _real(theta: Shaped[Tensor, "n ..."]) -> Vectors:
    """The space of theta where none is given."""
    if theta.dim() != 2 or not theta.is_floating_point():
        raise InputError(f"theta is {str(theta.dtype)[6:]} of shape {list(theta.shape)}, not real [n, d]: give its "
                         "space=, such as Subsets, Assignments or Dags, or reshape it")  # fmt: skip
    return Vectors(theta.shape[1])


def inside(theta: Shaped[Tensor, "n ..."], space: Vectors, bounds: tuple[Any, Any] | None) -> Support:
    """The support that bounds describe. Raises InputError for latents outside it."""
    support = Support.of(space.dim, *(bounds or (-math.inf, math.inf)))
    if theta.shape[1:] != (space.dim,):
        raise InputError(f"real latents are rows of {space.dim} numbers, [n, {space.dim}], not {list(theta.shape)}")
    out = (~support.holds(theta)).nonzero().squeeze(1)
    if len(out):
        row = int(out[0])
        i = int(((theta[row] < support.low) | (theta[row] > support.high)).nonzero()[0])
        raise InputError(f"{len(out):,} of {len(theta):,} latents lie outside the prior's support, the first is row "
                         f"{row}: theta[{i}] = {float(theta[row, i]):g} is not in [{support.low[i]:g}, "
                         f"{support.high[i]:g}]; correct bounds=, or the prior")  # fmt: skip
    return support


def _train(
    q: Any, space: Any, theta: Tensor, fitted: Tensor, kept: Tensor, p: Plan,
    on_epoch: Callable[[Mapping[str, float]], None] | None,
) -> dict[str, Any]:  # fmt: skip
    """Epochs of maximum likelihood; q ends at the weights of the best held-out loss."""
    each = math.ceil(len(fitted) / p.batch)
    plan = settings(steps=p.epochs * each, lr=p.lr, clip=5.0, seed=p.seed)
    adam, problem = adam_of(q, plan), torch.arange(len(theta))
    rows = rollouts_of(space, theta, problem, generator(p.seed, "cpu", 2))
    several, held = bool(rows.log_pb.any()), rows.take(kept)
    best, best_at, weights, step, losses = math.inf, 0, None, 0, []
    for epoch in range(p.epochs):
        gen = generator(p.seed, "cpu", 3, epoch)
        if several and epoch:  # other paths to the same objects
            rows = rollouts_of(space, theta, problem, gen)
        for at in fitted[torch.randperm(len(fitted), generator=gen)].split(p.batch):
            equal = torch.full((len(at),), 1 / len(at), dtype=torch.float64)
            try:
                climb(q, adam, rows.take(at), equal, plan, step)
            except FloatingPointError as error:
                raise InputError(
                    f"training failed in epoch {epoch}: {error}; lower lr, or look for extreme x"
                ) from error
            step += 1
        with torch.no_grad():
            parts = [held.take(at) for at in torch.arange(len(kept)).split(4096)]
            loss = -float(torch.cat([object_log_q(q.score(r), r).double() for r in parts]).mean())
        losses.append(loss)
        if on_epoch is not None:
            on_epoch({"epoch": epoch, "held_out": loss})
        if loss < best:
            best, best_at, weights = loss, epoch, {k: w.detach().clone() for k, w in q.parameters().items()}
        elif epoch - best_at >= p.patience:
            break
    if weights is not None:
        restore(q, weights)
    return {"epochs": len(losses), "best_epoch": best_at, "held_out": best, "losses": losses}
