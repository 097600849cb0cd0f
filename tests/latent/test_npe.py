"""Amortized posteriors against exact ones, their calibration, planted bugs, and what a simulator can get wrong."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from retrodict.diagnostics.calibration import coverage, sbc_ranks
from retrodict.errors import InputError, MissingExtra
from retrodict.latent.npe import fit_posterior, inside
from retrodict.latent.npe_check import Calibration, calibrate
from retrodict.latent.npe_objects import objects_of, rollouts_of
from retrodict.latent.npe_posterior import AmortizedPosterior
from retrodict.latent.npe_simulate import simulate
from retrodict.policies.flow import FlowPolicy, Support
from retrodict.policies.graph import GraphMLP, GraphPolicy
from retrodict.records import Problem
from retrodict.rng import generator
from retrodict.spaces.dags import Dags
from retrodict.spaces.sets import Subsets
from retrodict.spaces.trees import Trees
from retrodict.spaces.vectors import Assignments, Vectors
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

GAUSS = LinearGaussian(d=2, c=3)
CAUSES = NoisyOr(causes=4, findings=4)
QUICK: dict[str, Any] = {"epochs": 10, "patience": 10, "batch": 256, "lr": 8e-3, "hidden": 32}


@pytest.fixture(scope="module")
def gauss() -> AmortizedPosterior:
    return fit_posterior(simulate(GAUSS.simulate, 4000, 0), **QUICK)


@pytest.fixture(scope="module")
def causes() -> AmortizedPosterior:
    return fit_posterior(simulate(CAUSES.simulate, 4000, 0), CAUSES.space, **{**QUICK, "lr": 2e-2})


# -- the flow ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("low", "high"), [(0.0, 2.0), (1.0, math.inf), (-math.inf, 3.0), (-math.inf, math.inf)])
def test_the_density_has_mass_one_on_the_support_and_draws_stay_there(low: float, high: float) -> None:
    policy = FlowPolicy(
        Vectors(1), [Problem(())], Support.of(1, low, high).moved(torch.zeros(1), 0.5 * torch.eye(1)), hidden=8
    )
    for p in policy.parameters().values():  # far from the identity
        p.data += 0.3 * torch.randn(p.shape, generator=generator(3))
    u = torch.linspace(-40, 40, 40001, dtype=torch.float64)[:, None]
    theta = policy.support.place(u)
    at, zero = policy.space.start(torch.zeros(len(u), dtype=torch.long)).at, torch.zeros(len(u), dtype=torch.long)
    for temperature in (1.0, 2.0):
        q = policy.log_move(zero, at, zero, theta, temperature).exp().detach()
        mass = float(((q[1:] + q[:-1]) / 2 * theta.diff(dim=0)[:, 0]).sum())
        assert abs(mass - 1) < 2e-3
    rows = policy.sample(zero[:500], generator(0), {"temperature": 2.0})
    assert bool(policy.support.holds(rows.moves[:, 0]).all())
    assert float((policy.score(rows).log_q - rows.log_q).abs().max()) < 1e-5
    ratio = (rows.log_q - rows.log_b[:, :1]).exp()
    assert abs(float(ratio.mean()) - 1) < 4.5 * float(ratio.std()) / 500**0.5


def test_the_change_of_variables_goes_both_ways() -> None:
    support = Support.of(3, (0.0, -1.0, -math.inf), (1.0, math.inf, math.inf))
    theta = torch.tensor([[0.2, 3.0, -2.0], [0.999, -0.5, 5.0]], dtype=torch.float64)
    support = support.standardised(theta)
    v, slope = support.code(theta)
    assert float((support.place(v) - theta).abs().max()) < 1e-9
    for i in range(2):
        jacobian = torch.autograd.functional.jacobian(lambda z: support.code(z[None])[0][0], theta[i])
        assert abs(float(torch.linalg.slogdet(jacobian)[1] - slope[i])) < 1e-9


def test_one_seed_one_flow_and_no_global_state() -> None:
    before = torch.random.get_rng_state()
    a, b, c = (FlowPolicy(Vectors(2), [Problem(())], seed=s, hidden=8).parameters() for s in (0, 0, 1))
    assert bool((torch.random.get_rng_state() == before).all())
    assert all(bool((a[k] == b[k]).all()) for k in a) and any(bool((a[k] != c[k]).any()) for k in a)


def test_a_missing_package_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "zuko.flows", None)
    with pytest.raises(MissingExtra, match=r"^zuko is not installed; run: pip install 'retrodict\[flows\]'$"):
        FlowPolicy(Vectors(2), [Problem(())])


# -- against exact posteriors -----------------------------------------------------------------------------------------


def test_linear_gaussian_against_the_exact_posterior(gauss: AmortizedPosterior) -> None:
    fresh = simulate(GAUSS.simulate, 2000, 5)
    exact = GAUSS.posterior(fresh.x)
    gap = exact.log_prob(fresh.theta) - gauss.log_prob(fresh.theta[:, None], fresh.x)[:, 0]
    assert float(gap.mean()) < 0.05  # E_x KL(p, q)
    x = fresh.x[:2]
    draws = gauss.sample(2000, x, seed=1)
    assert float((draws.mean(1) - GAUSS.posterior(x).mean).abs().max()) < 0.15
    truth = GAUSS.posterior(x[:1]).covariance_matrix[0]
    assert float((torch.cov(draws[0].T) - truth).abs().max()) < 0.1


def test_refined_evidence_and_moments_are_exact(gauss: AmortizedPosterior) -> None:
    x = simulate(GAUSS.simulate, 3, 6).x
    for bound, truth in zip(gauss.log_z(GAUSS.log_joint, x, n=125, runs=16), GAUSS.log_z(x).tolist(), strict=True):
        assert abs(bound.value - truth) < 4.5 * bound.se + 1e-3 and bound.se < 0.03
    particles = gauss.refine(GAUSS.log_joint, x, n=500)
    assert bool((particles.ess > 1600).all())  # of 2,000
    mean = (particles.weights[:, :, None] * particles.objects.moves[:, 0].view(3, 2000, 2)).sum(1)
    assert float((mean - GAUSS.posterior(x).mean).abs().max()) < 0.06


def test_two_moons_evidence_by_quadrature_and_by_the_flow() -> None:
    """A wide pair of crescents: the quadrature, brute force over the square and a weighted flow agree on p(x)."""
    moons = TwoMoons()
    posterior = fit_posterior(simulate(moons.simulate, 2000, 0), bounds=(-1, 1), **QUICK)
    x = simulate(moons.simulate, 2, 4).x
    truth = moons.log_z(x)
    mid = (torch.arange(600, dtype=torch.float64) + 0.5) / 300 - 1
    theta = torch.cartesian_prod(mid, mid)
    for i in range(2):
        brute = moons.log_joint(theta, x[i].expand(len(theta), 2)).logsumexp(0) - 2 * math.log(300)
        assert abs(float(brute - truth[i])) < 0.01
    for bound, z in zip(posterior.log_z(moons.log_joint, x, n=250, runs=16), truth.tolist(), strict=True):
        assert abs(bound.value - z) < 4.5 * bound.se and bound.se < 0.2


def test_causes_against_enumeration(causes: AmortizedPosterior) -> None:
    tv, log_z = distances(causes, CAUSES, CAUSES.every_x())
    assert abs(float(log_z.exp().sum()) - 1) < 1e-9  # p(x) over all x
    assert float((tv * log_z.exp()).sum()) < 0.12
    x = CAUSES.every_x()[[5, 14]]
    for bound, truth in zip(causes.log_z(CAUSES.log_joint, x, n=125, runs=16), log_z[[5, 14]].tolist(), strict=True):
        assert abs(bound.value - truth) < 4.5 * bound.se


def test_log_prob_of_a_set_is_the_sum_over_its_orders(causes: AmortizedPosterior) -> None:
    x, space = CAUSES.every_x()[7], CAUSES.space
    every = space.enumerate()
    exact = causes.log_prob(every, x, paths=100)
    assert abs(float(exact.exp().sum()) - 1) < 0.02
    few = torch.stack([causes.log_prob(every, x, paths=1, seed=s).exp() for s in range(30)])
    off = (few.mean(0) - exact.exp()).abs() / (few.std(0) / 30**0.5 + 1e-3)
    assert float(off.max()) < 4.5  # one path is unbiased for it


def test_graphs_by_the_small_net_and_by_a_policy_of_ones_own() -> None:
    model = NoisyGraph(noise=0.4)
    simulations, x = simulate(model.simulate, 1500, 0), simulate(model.simulate, 10, 3).x
    posterior = fit_posterior(simulations, model.space, **{**QUICK, "lr": 2e-2})
    own = fit_posterior(
        simulate(lambda n, seed: (lambda z, v: (z, v[..., None]))(*model.simulate(n, seed)), 200, 0), model.space,
        policy=lambda problems: GraphPolicy(model.space, problems, GraphMLP(3, 1, hidden=16)), epochs=1,
    )  # fmt: skip
    tv, _ = distances(posterior, model, x)
    assert float(tv.mean()) < 0.25
    assert own.sample(4, x[0, :, :, None]).shape == (4, 3, 3)
    size = {"edges": lambda z, _: z.flatten(1).sum(1)}
    assert posterior.diagnose(simulate(model.simulate, 300, 9), draws=49, statistics=size).p_value > 1e-3


# -- calibration, and planted bugs ------------------------------------------------------------------------------------


SIZE = {"size": lambda z, x: z.sum(1), "explained": lambda z, x: (z[:, :2] & (x[:, :2] > 0.5)).sum(1)}


def worst(found: Calibration) -> float:
    return max(abs(c.z) for c in found.coverage)


def test_a_right_posterior_passes_and_planted_bugs_fail(gauss: AmortizedPosterior) -> None:
    fresh = simulate(GAUSS.simulate, 500, 11)
    right = gauss.diagnose(fresh, draws=49)
    assert right.p_value > 1e-3 and worst(right) < 3.5 and "of 500 truths" in str(right)
    narrowed = calibrate(Bent(gauss, narrow), fresh, draws=49)
    assert narrowed.p_value < 1e-6 and narrowed.coverage[0].z < -4
    displaced = calibrate(Bent(gauss, other_row), fresh, draws=49)
    assert displaced.p_value < 1e-6 and worst(displaced) > 8


def test_the_same_of_sets(causes: AmortizedPosterior) -> None:
    fresh = simulate(CAUSES.simulate, 500, 11)
    right = causes.diagnose(fresh, draws=49, statistics=SIZE)
    assert right.p_value > 1e-3 and worst(right) < 3.5
    for bug in (narrow, other_row):
        found = calibrate(Bent(causes, bug), fresh, draws=49, statistics=SIZE)
        assert found.p_value < 1e-5 and worst(found) > 5, bug


def test_the_prior_itself_is_calibrated_but_for_what_reads_x() -> None:
    """Uniform ranks are necessary, not sufficient: the prior passes on theta, and has its coverage too."""
    gen = generator(0)
    truth, draws = torch.randn(500, generator=gen), torch.randn(500, 49, generator=gen)
    found = coverage(sbc_ranks(-truth.square(), -draws.square(), gen), 49, (0.5, 0.9), gen)
    assert all(abs(c.z) < 3.5 for c in found)


# -- objects of spaces ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("space", [Assignments((2, 3)), Subsets(4), Dags(3, required=((0, 1),)), Trees(4)])
def test_objects_and_paths_go_both_ways(space: Any) -> None:
    from retrodict.testing.laws import random_rollouts

    rows = random_rollouts(space, torch.zeros(40, dtype=torch.long), generator(0))
    again = rollouts_of(space, objects_of(space, rows), rows.problem, generator(1))
    assert space.keys(again) == space.keys(rows)
    assert torch.allclose(again.log_pb.sum(1), rows.log_pb.double().sum(1))


def test_objects_outside_their_space_are_refused() -> None:
    gen, zero = generator(0), torch.zeros(2, dtype=torch.long)
    with pytest.raises(InputError, match=r"1 latents are no objects of Assignments, the first is row 1"):
        rollouts_of(Assignments((2, 2)), torch.tensor([[0, 1], [2, 0]]), zero, gen)
    cycle = torch.tensor([[[0, 1], [1, 0]], [[0, 0], [0, 0]]]).bool()
    with pytest.raises(InputError, match="no objects of Dags, the first is row 0"):
        rollouts_of(Dags(2), cycle, zero, gen)
    with pytest.raises(InputError, match="row 1 lacks a required edge"):
        rollouts_of(Dags(2, required=((0, 1),)), torch.tensor([[[0, 1], [0, 0]], [[0, 0], [0, 0]]]).bool(), zero, gen)
    with pytest.raises(InputError, match=r"has shape \[3\], and these have \[2\]"):
        rollouts_of(Subsets(3), torch.ones(2, 2), zero, gen)


# -- bad input --------------------------------------------------------------------------------------------------------


def broken(rows: list[int], of: int = 100, what: str = "x") -> Callable[[int, int], tuple[Tensor, Tensor]]:
    def simulator(n: int, seed: int) -> tuple[Tensor, Tensor]:
        theta, x = torch.rand(n, 1, generator=generator(seed)), torch.rand(n, 2, generator=generator(seed, "cpu", 1))
        (x if what == "x" else theta)[rows] = math.nan if what == "x" else math.inf
        return theta, x

    return simulator


def test_simulations_that_are_not_finite() -> None:
    with pytest.raises(InputError, match=r"^2 of 100 simulations hold NaN or .* the first is row 7 \(in x\)"):
        simulate(broken([7, 30]), 100)
    with pytest.raises(InputError, match=r"row 3 \(in theta\); .*drop_invalid=True"):
        simulate(broken([3], what="theta"), 100)
    kept = simulate(broken([7, 30]), 100, drop_invalid=True)
    assert len(kept) == 98 and kept.dropped == 2 and bool(kept.x.isfinite().all())
    for drop in (False, True):
        with pytest.raises(InputError, match="100 of 100 .* nothing to learn from"):
            simulate(broken(list(range(100))), 100, drop_invalid=drop)


def test_simulators_of_another_shape() -> None:
    with pytest.raises(InputError, match=r"must give 10 of theta and of x, not arrays of shape \[10, 1\] and \[9, 2\]"):
        simulate(lambda n, seed: (torch.zeros(n, 1), torch.zeros(n - 1, 2)), 10)
    with pytest.raises(InputError, match="needs prior= beside it"):
        simulate(lambda n, seed: torch.zeros(n, 1), 10)
    made = simulate(lambda theta, seed: theta[:, 0] * 2, 10, prior=lambda n, seed: torch.rand(n, 1))
    assert made.x.shape == (10, 1) and torch.equal(made.x, made.theta * 2)


def test_x_of_another_shape_names_both(gauss: AmortizedPosterior) -> None:
    with pytest.raises(InputError, match=r"x has shape \[2\], and q was trained on x of shape \[3\]"):
        gauss.sample(3, torch.zeros(2))
    with pytest.raises(InputError, match="x holds NaN"):
        gauss.sample(3, torch.tensor([0.0, math.nan, 0.0]))
    with pytest.raises(InputError, match=r"theta has shape \[4, 3\]; give \[n, 2\]"):
        gauss.log_prob(torch.zeros(4, 3), torch.zeros(3))


def test_latents_outside_the_support() -> None:
    theta = torch.tensor([[0.5, 0.0], [0.2, 3.2], [0.1, -1.0]])
    with pytest.raises(InputError, match=r"2 of 3 latents lie outside .*row 1: theta\[1\] = 3.2 is not in \[0, 1\]"):
        inside(theta, Vectors(2), (0, 1))
    with pytest.raises(InputError, match="low end first"):
        Support.of(2, 0.0, (1.0, 0.0))
    with pytest.raises(InputError, match="real latents are rows"):
        fit_posterior(simulate(lambda n, seed: (torch.zeros(n, 2, 2), torch.zeros(n, 1)), 10), Vectors(2))
    with pytest.raises(InputError, match=r"theta is bool of shape \[10, 4\], not real .* give its space="):
        fit_posterior(simulate(CAUSES.simulate, 10))
    with pytest.raises(InputError, match="bounds are of the flow"):
        fit_posterior(simulate(CAUSES.simulate, 10), CAUSES.space, bounds=(0, 1))
    with pytest.raises(InputError, match="too few to learn from"):
        fit_posterior(simulate(broken([]), 2))


def test_training_is_reproducible_and_stops_early() -> None:
    simulations = simulate(GAUSS.simulate, 300, 0)
    a, b = (fit_posterior(simulations, epochs=3, hidden=8, seed=4) for _ in range(2))
    assert a.about == b.about and torch.equal(a.sample(5, torch.zeros(3)), b.sample(5, torch.zeros(3)))
    told: list[Any] = []
    c = fit_posterior(simulations, epochs=60, patience=2, lr=0.05, hidden=32, on_epoch=told.append)
    assert len(told) == c.about["epochs"] < 60 and c.about["held_out"] == min(e["held_out"] for e in told)


def test_standardisation_reads_nothing_that_is_held_out() -> None:
    """Moving the held-out rows far away moves neither the scale of x nor that of theta."""
    simulations = simulate(GAUSS.simulate, 100, 0)
    held = torch.randperm(100, generator=generator(0, "cpu", 0))[:10]
    a = fit_posterior(simulations, epochs=1, hidden=8)
    simulations.x[held] += 1e3
    simulations.theta[held] += 1e3
    b = fit_posterior(simulations, epochs=1, hidden=8)
    assert torch.equal(a.scale.mean, b.scale.mean) and torch.equal(a.policy.support.loc, b.policy.support.loc)
