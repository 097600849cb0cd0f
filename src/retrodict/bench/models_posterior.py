"""``bench models``, posterior estimation: q(theta | x) learned from simulations, against exact posteriors.

Calibration is over 500 simulations that q was not fitted to. A coverage holds where it is within 3 binomial standard
errors, a set of rank tests where no p-value is below 0.001 after Bonferroni; planted bugs must be seen by both.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from retrodict.bench.rows import Row, at_least, at_most, show_only
from retrodict.diagnostics.calibration import sbc_pit, uniformity
from retrodict.latent.npe import fit_posterior
from retrodict.latent.npe_check import Calibration, Statistic, calibrate
from retrodict.latent.npe_posterior import AmortizedPosterior
from retrodict.latent.npe_simulate import Simulations, simulate
from retrodict.rng import child_seed, generator
from retrodict.testing.simulators import (
    Bent,
    LinearGaussian,
    NoisyGraph,
    NoisyOr,
    TwoMoons,
    distances,
    narrow,
    other_row,
)

SUITE = "models"
CHECKED, DRAWS = 500, 99
PLAN: dict[str, Any] = {"epochs": 25, "patience": 25, "batch": 512, "lr": 2e-3}
FLOW, POLICY = "flow, maximum likelihood", "policy over the space, maximum likelihood"


def rows(seed: int = 0) -> Iterator[list[Row]]:
    """All rows, model by model."""
    yield gaussian(seed)
    yield moons(seed)
    yield causes(seed)
    yield graphs(seed)


def gaussian(seed: int) -> list[Row]:
    """A linear-Gaussian model: the posterior is a Gaussian in closed form."""
    model, name = LinearGaussian(), "linear-Gaussian, theta in R^3"
    q, seconds = _fit(model, 20_000, seed, hidden=32)
    fresh = simulate(model.simulate, 5000, child_seed(seed, 1))
    exact = model.posterior(fresh.x)
    gap = exact.log_prob(fresh.theta) - q.log_prob(fresh.theta[:, None], fresh.x)[:, 0]
    drawn, of = q.sample(2000, fresh.x[:50], seed), model.posterior(fresh.x[:50])
    sd = of.covariance_matrix.diagonal(dim1=1, dim2=2).sqrt()
    checked = _check(q, _fresh(model, seed), None, seed)
    return [
        at_most(SUITE, name, FLOW, "mean KL(posterior, q) (nats)", float(gap.mean()), 0.02,
                f"s.e. {float(gap.std()) / 5000**0.5:.4f}; 20,000 simulations, {seconds:.0f} processor seconds"),
        show_only(SUITE, name, FLOW, "mean |mean of q - exact| / sd",
                  float(((drawn.mean(1) - of.mean) / sd).abs().mean()), "50 x"),
        show_only(SUITE, name, FLOW, "mean sd of q / exact", float((drawn.std(1) / sd).mean()), "50 x"),
        _evidence(name, FLOW, q, model, fresh.x[:50], model.log_z(fresh.x[:50]), seed),
        *_calibrated(name, FLOW, checked),
        *_planted(name, q, _fresh(model, seed), None, seed),
    ]  # fmt: skip


def moons(seed: int) -> list[Row]:
    """Two crescents, under a prior on a box: the flow, and its draws weighted by p / q."""
    model, name = TwoMoons(), "two moons, theta in [-1, 1]^2"
    q, seconds = _fit(model, 40_000, seed, bounds=(-1, 1), epochs=40)
    fresh = _fresh(model, seed)
    log_z = model.log_z(fresh.x)
    gap = model.log_joint(fresh.theta, fresh.x) - log_z - q.log_prob(fresh.theta[:, None], fresh.x)[:, 0]
    drawn = q.sample(DRAWS, fresh.x, seed)
    weighted = "flow, weighted by p / q"
    return [
        show_only(SUITE, name, FLOW, "mean KL(posterior, q) (nats)", float(gap.mean()),
                  f"s.e. {float(gap.std()) / CHECKED**0.5:.3f}; 40,000 simulations, {seconds:.0f} processor seconds"),
        at_most(SUITE, name, FLOW, "share of draws outside the prior's box",
                float((drawn.abs() > 1).any(-1).double().mean()), 0.0, "exact by a change of variables"),
        _evidence(name, weighted, q, model, fresh.x[:50], log_z[:50], seed),
        *_calibrated(name, FLOW, _check(q, fresh, None, seed)),
        _weighted_ranks(name, weighted, q, model, fresh, seed),
    ]  # fmt: skip


def causes(seed: int) -> list[Row]:
    """Sets of causes behind findings: the posterior by enumeration, for all x there are."""
    model, name = NoisyOr(), "noisy-or, sets of 5 causes"
    q, seconds = _fit(model, 40_000, seed, space=model.space)
    x = model.every_x()
    tv, log_z = distances(q, model, x)
    size = {"size of the set": lambda z, _: z.sum(1), "causes 1 and 2": lambda z, _: z[:, :2].sum(1)}
    fresh = _fresh(model, seed)
    return [
        at_most(SUITE, name, POLICY, "mean total variation to the posterior", float(tv @ log_z.exp()), 0.05,
                f"all {len(x)} x, weighted by p(x); worst {float(tv.max()):.3f}; 40,000 simulations, "
                f"{seconds:.0f} processor seconds"),
        _evidence(name, POLICY, q, model, x, log_z, seed),
        *_calibrated(name, POLICY, _check(q, fresh, size, seed)),
        *_planted(name, q, fresh, size, seed),
    ]  # fmt: skip


def graphs(seed: int) -> list[Row]:
    """Acyclic graphs behind a noisy adjacency matrix: the posterior by enumeration at 100 x."""
    model, name = NoisyGraph(), "graphs of 3 nodes in noise"
    q, seconds = _fit(model, 40_000, seed, space=model.space)
    fresh = _fresh(model, seed)
    tv, log_z = distances(q, model, fresh.x[:100])
    edges = {"edges": lambda z, _: z.flatten(1).sum(1)}
    return [
        at_most(SUITE, name, POLICY, "mean total variation to the posterior", float(tv.mean()), 0.1,
                f"100 x; worst {float(tv.max()):.3f}; 40,000 simulations, {seconds:.0f} processor seconds"),
        _evidence(name, POLICY, q, model, fresh.x[:50], log_z[:50], seed),
        *_calibrated(name, POLICY, _check(q, fresh, edges, seed)),
    ]  # fmt: skip


def _fit(model: Any, n: int, seed: int, **more: Any) -> tuple[AmortizedPosterior, float]:
    """A posterior from n simulations, and the processor seconds it took."""
    began = time.process_time()
    q = fit_posterior(simulate(model.simulate, n, child_seed(seed, 0)), seed=seed, **{**PLAN, **more})
    return q, time.process_time() - began


def _fresh(model: Any, seed: int) -> Simulations:
    return simulate(model.simulate, CHECKED, child_seed(seed, 2))


def _check(q: Any, fresh: Simulations, statistics: Mapping[str, Statistic] | None, seed: int) -> Calibration:
    return calibrate(q, fresh, draws=DRAWS, statistics=statistics, seed=child_seed(seed, 3))


def _calibrated(name: str, method: str, found: Calibration) -> list[Row]:
    """Coverage of each region, and the rank tests."""
    out = [
        at_most(SUITE, name, method, f"coverage of {c.level:.0%} regions: distance in binomial s.e.", abs(c.z), 3.0,
                f"{c.share:.1%} of {c.n}")
        for c in found.coverage
    ]  # fmt: skip
    each = ", ".join(f"{k} {u.p_value:.3f}" for k, u in found.uniformity.items())
    return [*out, at_least(SUITE, name, method, "ranks: smallest p-value (Bonferroni)", found.p_value, 1e-3, each)]


def _planted(
    name: str, q: AmortizedPosterior, fresh: Simulations, statistics: Mapping[str, Statistic] | None, seed: int
) -> list[Row]:
    """Draws too narrow, and draws given another row's x."""
    out = []
    for bug, bent in (("too narrow", narrow), ("x of another row", other_row)):
        found = _check(Bent(q, bent), fresh, statistics, seed)
        method = f"{bug} (planted)"
        out += [
            at_least(SUITE, name, method, "coverage: largest distance in binomial s.e.",
                     max(abs(c.z) for c in found.coverage), 5.0, "the bug must be seen"),
            at_most(SUITE, name, method, "ranks: smallest p-value (Bonferroni)", found.p_value, 1e-6,
                    "the bug must be seen"),
        ]  # fmt: skip
    return out


def _evidence(
    name: str, method: str, q: AmortizedPosterior, model: Any, x: torch.Tensor, truth: torch.Tensor, seed: int
) -> Row:
    """log p(x) by importance sampling from q, against its exact value."""
    particles = q.refine(model.log_joint, x, n=500, seed=seed)
    assert particles.evidence is not None
    off = (particles.evidence[0] - truth).abs()
    return at_most(SUITE, name, method, "mean |log Z-hat - log Z| (nats)", float(off.mean()), 0.02,
                   f"{len(x)} x, 2,000 draws each; worst {float(off.max()):.3f}; mean ESS "
                   f"{float(particles.ess.mean()) / 20:.0f}%")  # fmt: skip


def _weighted_ranks(
    name: str, method: str, q: AmortizedPosterior, model: TwoMoons, fresh: Simulations, seed: int
) -> Row:
    """Rank tests of each coordinate under weights: what is left of q's bias."""
    particles = q.refine(model.log_joint, fresh.x, n=100, seed=child_seed(seed, 4))
    theta = particles.objects.moves[:, 0].view(len(fresh), -1, 2)
    p = [uniformity(sbc_pit(fresh.theta[:, i], theta[:, :, i], particles.log_w, generator(seed, "cpu", i))).p_value
         for i in range(2)]  # fmt: skip
    return at_least(SUITE, name, method, "ranks: smallest p-value (Bonferroni)", min(1.0, 2 * min(p)), 1e-3,
                    ", ".join(f"theta[{i}] {v:.3f}" for i, v in enumerate(p)))  # fmt: skip
