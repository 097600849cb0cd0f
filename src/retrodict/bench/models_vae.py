"""``bench models``, variational autoencoders: discrete codes against exact EM, a plane of latents against quadrature.

2,000 images of 4 x 4 bars and 1,000 of 5 x 5 blobs, as many held out; log p(x) is exact (all codes) or by quadrature,
so every gap is one of learning and not of its estimate. All runs of a model take the same number of steps of Adam in
theta, and begin with the same rounds of exact EM: from random weights EM ends on hills of different heights, whatever
its E-step, and the height of the hill is not what is compared. A run of the codes from random weights has no bar.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from typing import TypeVar

from jaxtyping import Float
from torch import Tensor

from retrodict.bench.rows import Row, at_least, at_most, show_only
from retrodict.diagnostics.bounds import elbo, iwae_lower
from retrodict.latent.data import data_problems
from retrodict.latent.discrete_vae import DiscreteVAE, encoder
from retrodict.latent.enumerated import distances, factorised
from retrodict.latent.images import bars, blobs
from retrodict.latent.vae import VAE, Encoder, fit_elbo
from retrodict.policies.net import NetPolicy
from retrodict.records import Rollouts, Scores
from retrodict.rng import child_seed
from retrodict.samplers.importance import importance
from retrodict.training.amortize import amortize
from retrodict.training.learn import learn

SUITE, BAR = "models", 0.02
CODES, PLANE = "discrete VAE, 4 x 4 bars, 64 codes", "VAE, 5 x 5 blobs, z in the plane"
METRIC, GAP = "held-out log p(x), nats an image", "nats an image below exact EM"
ROUNDS, WARM = 60, 30
E_STEP = {
    "rounds": ROUNDS, "e_steps": 20, "draws": 8, "objective": "vargrad", "samples": 8, "per_step": 64, "clip": 5.0,
    "sleep": 0.5, "dreams": 512,
}  # fmt: skip
SHOWN = 200
"""Held-out images on which posteriors are compared."""


def rows(seed: int = 0) -> Iterator[list[Row]]:
    """Codes first, then the plane."""
    yield from codes(seed)
    yield from plane(seed)


# -- codes ----------------------------------------------------------------------------------------------------------


def codes(seed: int) -> Iterator[list[Row]]:
    """Exact EM, q autoregressive and factorised, mean field, and the planted bug on the model that was learned."""
    train, test = bars(2000, seed=child_seed(seed, 1)), bars(2000, seed=child_seed(seed, 2))
    exact = started(DiscreteVAE(train, seed=seed), ROUNDS)
    best = float(exact.log_evidence(test).mean())
    yield [show_only(SUITE, CODES, "exact EM", METRIC, best, f"the first {WARM} of {ROUNDS} rounds are every method's")]
    for method, kind, weighted, warm, bar in (
        ("VarGrad and sleep, autoregressive q", "autoregressive", True, WARM, True),
        ("VarGrad and sleep, factorised q", "factorised", False, WARM, False),
        ("VarGrad and sleep, autoregressive q, from random weights", "autoregressive", True, 0, False),
    ):
        began, model = time.process_time(), started(DiscreteVAE(train, seed=seed), warm)
        q = encoder(model, kind, hidden=128, layers=1, seed=seed)
        how = {**E_STEP, "rounds": ROUNDS - warm}
        if warm:  # q meets the posterior before theta moves
            amortize(model.target, q, objective="vargrad", steps=200, samples=8, per_step=64, lr=1e-2, evaluate=1)
        learn(model, q, weighted=weighted, seed=seed, lr=1e-2, **how)
        value, fresh = float(model.log_evidence(test).mean()), model.of(data_problems(test[:SHOWN]))
        away = float(distances(fresh, q.on(fresh.problems)).mean())
        note = f"{time.process_time() - began:.0f} processor seconds" + (
            "; draws weighted by gamma / q" if weighted else ""
        )
        yield [*_gap(CODES, method, value, best, bar, note),
               show_only(SUITE, CODES, method, "total variation to p(z | x), new images", away, "mean")]  # fmt: skip
    model = started(DiscreteVAE(train, seed=seed), WARM)
    for _ in range(ROUNDS - WARM):
        r = factorised(model.target, sweeps=3).exp().float()
        model.climb(model.embed(model.codes), r.mean(0), r.T @ train / len(train))
    yield _gap(CODES, "mean field, coordinate ascent", float(model.log_evidence(test).mean()), best, False, "3 sweeps")
    yield planted(exact, test[:8], seed)


M = TypeVar("M", DiscreteVAE, VAE)


def started(model: M, rounds: int) -> M:
    """A model after so many rounds of exact EM."""
    if rounds:
        learn(model, rounds=rounds)
    return model


class PerStep(NetPolicy):
    """Planted: log q divided by the number of moves, as in the code released with GFlowNet-EM's discrete VAE."""

    def score(self, rollouts: Rollouts, raw: bool = False, grad: bool = False) -> Scores:
        """A mean over moves where a sum belongs."""
        scores = super().score(rollouts, raw, grad)
        return replace(scores, log_q=scores.log_q / rollouts.n[:, None])


def planted(model: DiscreteVAE, images: Float[Tensor, "m d"], seed: int) -> list[Row]:
    """TB on a few images with the right log q and with the wrong one."""
    target, found = model.of(data_problems(images)), []
    for kind in (NetPolicy, PerStep):
        policy = kind(model.space, target.problems, hidden=64, layers=1, seed=seed)
        amortize(target, policy, objective="tb", steps=300, samples=16, lr=2e-2, lr_log_z=0.3, clip=10.0, tempered=0.5,
                 temperatures=(1.0, 1.0), epsilon=0.3, evaluate=1, seed=seed)  # fmt: skip
        found.append(float(distances(target, NetPolicy(model.space, target.problems, policy.net)).mean()))
    metric = f"total variation to p(z | x), {len(images)} images"
    return [
        at_most(SUITE, CODES, "TB", metric, found[0], 0.05),
        at_least(SUITE, CODES, "TB, log q divided by the number of moves (planted)", metric, found[1], 0.1,
                 "aims at gamma to the power 3"),
    ]  # fmt: skip


def _gap(name: str, method: str, value: float, best: float, bar: bool, note: str) -> list[Row]:
    """The held-out log-likelihood, and how far it is below exact EM's."""
    told, gap = (SUITE, name, method), best - value
    return [show_only(*told, METRIC, value, note), at_most(*told, GAP, gap, BAR) if bar else show_only(*told, GAP, gap)]


# -- the plane ------------------------------------------------------------------------------------------------------


def plane(seed: int) -> Iterator[list[Row]]:
    """Exact EM by quadrature, VarGrad with plain and weighted draws, and the textbook's pathwise bound."""
    train, test = blobs(1000, seed=child_seed(seed, 3)), blobs(1000, seed=child_seed(seed, 4))
    exact = started(VAE(train, seed=seed), ROUNDS)
    fine = exact.quadrature(test)
    best, error = float(fine.mean()), float((fine - exact.quadrature(test, 400)).mean().abs())
    yield [show_only(SUITE, PLANE, "exact EM on a grid", METRIC, best, "40 x 40 points to learn, 200 x 200 to judge"),
           at_most(SUITE, PLANE, "quadrature", "nats between 200 x 200 and 400 x 400 points", error, 1e-3)]  # fmt: skip
    for method, weighted in (("VarGrad and sleep, draws weighted by gamma / q", True), ("VarGrad and sleep", False)):
        began, model = time.process_time(), started(VAE(train, seed=seed), WARM)
        q = first_encoder(model, seed)
        learn(model, q, weighted=weighted, seed=seed, lr=3e-3, **{**E_STEP, "rounds": ROUNDS - WARM})
        note = f"{time.process_time() - began:.0f} processor seconds"
        yield [*_gap(PLANE, method, float(model.quadrature(test).mean()), best, weighted, note),
               *bounds(model, q, test, method)]  # fmt: skip
    began, model = time.process_time(), started(VAE(train, seed=seed), WARM)
    q, method = first_encoder(model, seed), "pathwise ELBO (textbook)"
    fit_elbo(model, q, steps=(ROUNDS - WARM) * model.m_steps, lr=5e-3, seed=seed)
    note = f"{time.process_time() - began:.0f} processor seconds; as many steps, of 256 images"
    yield [*_gap(PLANE, method, float(model.quadrature(test).mean()), best, False, note),
           *bounds(model, q, test, method)]  # fmt: skip


def first_encoder(model: VAE, seed: int) -> Encoder:
    """q, trained on the posterior that it starts with before theta moves."""
    q = model.encoder(seed=seed)
    amortize(model.target, q, objective="vargrad", steps=300, samples=8, per_step=64, lr=1e-2, clip=5.0, evaluate=1)
    return q


def bounds(model: VAE, q: Encoder, images: Float[Tensor, "m d"], method: str) -> list[Row]:
    """What q's own draws say of log p(x), below the exact value: by one draw and by 64."""
    target = model.of(data_problems(images[:SHOWN]))
    log_w = importance(target, q.on(target.problems), n=640, runs=1, seed=0).log_w
    truth = float(model.quadrature(images[:SHOWN]).mean())
    many = log_w.view(SHOWN, -1, 64)
    return [
        show_only(SUITE, PLANE, method, "nats that the ELBO lies below log p(x)", truth - elbo(log_w).value),
        show_only(SUITE, PLANE, method, "nats that the bound of 64 draws lies below", truth - iwae_lower(many).value),
    ]  # fmt: skip
