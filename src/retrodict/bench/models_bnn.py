"""``bench models``, Bayesian neural network: a flow over 7 weights trained by VarGrad, weighted, against HMC.

40 points of a step up and a step down on [-1, 1], 1,000 held out; the predictive is compared where there are data.
"""

from __future__ import annotations

import time
from collections.abc import Iterator

import torch
from jaxtyping import Float
from torch import Tensor

from retrodict.bench.rows import Row, at_least, at_most, show_only
from retrodict.diagnostics.bounds import eubo, iwae_lower
from retrodict.diagnostics.chains import chain_ess, split_rhat
from retrodict.latent.bnn import BayesNet, Prediction, Symmetric, fit_weights, predict, starts
from retrodict.latent.hmc import Chains, annealed, density_of, hmc
from retrodict.rng import child_seed, generator
from retrodict.samplers.importance import importance
from retrodict.targets.algebra import Target

SUITE, NAME = "models", "Bayesian neural network, 7 weights"
NET = BayesNet(hidden=2, noise=0.1)
CHAINS, KEPT, WARMUP = 16, 800, 200
WIDER = 1.5
"""Variance of what the weighted draws are made from: q's own tails are thin, and one draw beyond them outweighs all."""
GRID = torch.linspace(-1.0, 1.0, 41, dtype=torch.float64)


def curve(x: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
    """The truth behind the data."""
    return torch.tanh(3 * (x + 0.5)) - torch.tanh(3 * (x - 0.4)) - 1


def data(n: int, seed: int) -> tuple[Float[Tensor, " n"], Float[Tensor, " n"]]:
    """n noisy points of the curve on [-1, 1]."""
    gen = generator(seed)
    x = torch.rand(n, generator=gen, dtype=torch.float64) * 2 - 1
    return x, curve(x) + NET.noise * torch.randn(n, generator=gen, dtype=torch.float64)


def rows(seed: int = 0) -> Iterator[list[Row]]:
    """The reference first, then q against it."""
    target, (x, y) = NET.target(*data(40, 5)), data(1000, 6)
    began = time.process_time()
    log_gamma = density_of(target)
    start = annealed(log_gamma, starts(NET, 128, child_seed(seed, 0)), CHAINS, seed=child_seed(seed, 1))
    chains = hmc(log_gamma, start, n=KEPT, warmup=WARMUP, seed=child_seed(seed, 2))
    reference = chains.draws.flatten(0, 1)
    yield _chains(chains, time.process_time() - began)
    yield _q(target, reference, x, y, seed)


def _chains(chains: Chains, seconds: float) -> list[Row]:
    f = NET.outputs(chains.draws.flatten(0, 1), GRID).view(CHAINS, KEPT, -1)
    rhat = max(split_rhat(f[:, :, i]) for i in range(len(GRID)))
    least = min(chain_ess(f[:, :, i]) for i in range(len(GRID)))
    note = (f"{CHAINS} chains of {KEPT}, median step {float(chains.step.median()):.3f}, accepted "
            f"{chains.accepted:.0%}, divergent {chains.divergent:.2%}")  # fmt: skip
    return [
        at_most(SUITE, NAME, "HMC", "largest R-hat of f on the grid", rhat, 1.02, note),
        show_only(SUITE, NAME, "HMC", "least ESS of f on the grid", least, f"{seconds:.0f} processor seconds"),
    ]


def _q(target: Target, reference: Tensor, x: Tensor, y: Tensor, seed: int) -> list[Row]:
    began = time.process_time()
    q = Symmetric(fit_weights(NET, target, seed=seed), NET)
    seconds = time.process_time() - began
    plain = importance(target, q, n=1000, seed=child_seed(seed, 3), runs=4)
    particles = importance(target, q, n=1000, seed=child_seed(seed, 4), runs=4, temperature=WIDER)
    w, log_w = particles.objects.moves[:, 0], particles.log_w[0]
    method, weighted = "vargrad, flow", f"vargrad, flow at T = {WIDER}, weighted"
    out = [
        show_only(SUITE, NAME, weighted, "ESS share", float(particles.ess) / particles.k, f"{particles.k} draws"),
        *_against(method, predict(NET, plain.objects.moves[:, 0], x, y), predict(NET, reference, x, y)),
        *_against(weighted, predict(NET, w, x, y, log_w), predict(NET, reference, x, y)),
    ]
    space, some = target.space, reference[:: max(1, len(reference) // 1000)]
    drawn = space.record(torch.zeros(len(some), dtype=torch.long), some[:, None], torch.zeros(len(some), 1))  # pyright: ignore[reportAttributeAccessIssue]
    upper = eubo(target.log_gamma(drawn) - q.score(drawn).log_q[:, 0])
    lower = iwae_lower(log_w.view(4, 1000))
    return [
        *out,
        show_only(SUITE, NAME, method, "ELBO (nats)", float(plain.log_w.mean()), f"{seconds:.0f} processor seconds"),
        show_only(SUITE, NAME, weighted, "log Z, lower bound (nats)", lower.value, f"s.e. {lower.se:.3f}, K = 1,000"),
        show_only(SUITE, NAME, "EUBO on HMC's draws", "log Z, upper bound (nats)", upper.value, f"s.e. {upper.se:.3f}"),
        at_least(SUITE, NAME, weighted, "upper - lower bound (nats)", upper.value - lower.value, -3 * upper.se,
                 "below 0 the two answers contradict each other"),
    ]  # fmt: skip


def _against(method: str, found: Prediction, reference: Prediction) -> list[Row]:
    """Predictions at the held-out inputs, against HMC's."""
    assert found.log_p is not None and reference.log_p is not None
    off = abs(float((found.log_p - reference.log_p).mean()))
    return [
        at_most(SUITE, NAME, method, "held-out log p, distance from HMC (nats a datum)", off, 0.02,
                f"{float(found.log_p.mean()):.4f}, HMC {float(reference.log_p.mean()):.4f}"),
        at_most(SUITE, NAME, method, "largest distance of the predictive mean, in sd of f",
                float(((found.mean - reference.mean) / reference.sd).abs().max()), 0.5, "1,000 held-out x"),
        at_most(SUITE, NAME, method, "largest |sd of f / HMC's - 1|",
                float((found.sd / reference.sd - 1).abs().max()), 0.3, "1,000 held-out x"),
    ]  # fmt: skip
