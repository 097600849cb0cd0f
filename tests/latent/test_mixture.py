"""Mixtures: constants, closed M-steps, whole assignments, mean field, and the bad input."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch.distributions import MultivariateNormal

import retrodict as rd
from retrodict.errors import InputError
from retrodict.latent.clusters import cluster_target, simulate_clusters
from retrodict.latent.enumerated import (
    distances,
    every_assignment,
    factorised,
    log_gamma_table,
    log_law,
    mean_field,
    mean_field_bound,
)
from retrodict.latent.mixture import Mixture, Parameters, petals, start
from retrodict.policies.net import NetPolicy
from retrodict.rng import generator
from retrodict.training.learn import learn
from retrodict.training.threads import one_thread


def random_theta(sizes: tuple[int, ...] = (3, 2), d: int = 2, seed: int = 0) -> Parameters:
    """Uneven weights, random means."""
    gen = generator(seed)
    means = tuple(torch.randn(s, d, generator=gen, dtype=torch.float64) for s in sizes)
    weights = tuple(torch.randn(s, generator=gen, dtype=torch.float64).log_softmax(0) for s in sizes)
    return Parameters(means, weights, 0.7)


def test_the_density_is_the_normals_and_its_integral_one() -> None:
    theta = random_theta()
    x = torch.randn(5, 2, generator=generator(1), dtype=torch.float64)
    rows = every_assignment(Mixture(x, theta).target)
    want = []
    for p, z in zip(rows.problem.tolist(), rows.moves.tolist(), strict=True):
        normal = MultivariateNormal(theta.means[0][z[0]] + theta.means[1][z[1]], 0.49 * torch.eye(2).double())
        want.append(normal.log_prob(x[p]) + theta.log_weights[0][z[0]] + theta.log_weights[1][z[1]])
    assert torch.allclose(Mixture(x, theta).target.log_gamma(rows), torch.stack(want), atol=1e-12)
    line = torch.linspace(-8, 8, 161, dtype=torch.float64)
    grid = torch.cartesian_prod(line, line)
    mass = float(theta.log_evidence(grid).exp().sum()) * 0.1**2
    assert mass == pytest.approx(1.0, abs=1e-6)
    wrong = theta.log_evidence(grid) + 2 * (2 * math.log(0.7) + math.log(2 * math.pi))  # the constant's sign turned
    assert float(wrong.exp().sum()) * 0.1**2 > 5


def test_the_m_step_is_at_a_maximum_and_keeps_what_has_no_data() -> None:
    theta, gen = random_theta((3, 2)), generator(2)
    _, x = theta.sample(40, gen)
    model = Mixture(x, theta)
    r = torch.rand(40, 6, generator=gen, dtype=torch.float64).softmax(1)
    best = model.maximise(x, r)

    def value(t: Parameters) -> float:
        return float((r * t.log_joint(x)).sum() / len(x))

    assert value(model.theta) == pytest.approx(best)
    for f in range(2):
        for way in (0.01, -0.01):
            means = tuple(mu + way * (i == f) * torch.eye(len(mu), 2) for i, mu in enumerate(model.theta.means))
            assert value(replace(model.theta, means=means)) < best
            bent = (model.theta.log_weights[f] + way * torch.arange(len(means[f]))).log_softmax(0)
            weights = tuple(bent if i == f else w for i, w in enumerate(model.theta.log_weights))
            assert value(replace(model.theta, log_weights=weights)) < best
    assert (
        value(replace(model.theta, sd=model.theta.sd * 1.01))
        < best
        > value(replace(model.theta, sd=model.theta.sd * 0.99))
    )
    only = Mixture(x, random_theta((2,)))
    before = only.theta.means[0][1].clone()
    only.maximise(x, torch.tensor([[1.0, 0.0]]).double().expand(40, 2))
    assert torch.allclose(only.theta.means[0][1], before) and torch.allclose(only.theta.means[0][0], x.mean(0))


def test_an_ordinary_mixture_learns_by_every_e_step() -> None:
    truth = Parameters((torch.tensor([[-2.0, 0.0], [2.0, 0.0], [0.0, 3.0]]).double(),),
                       (torch.tensor([0.5, 0.3, 0.2]).double().log(),), 0.6)  # fmt: skip
    _, x = truth.sample(100, generator(0))
    _, test = truth.sample(500, generator(1))
    found = {}
    for name in ("exact", "importance", "amortized"):
        model = Mixture(x, start(x, (3,), 4))
        if name == "exact":
            learn(model, rounds=10)
        elif name == "importance":
            q = NetPolicy(model.space, model.problems, hidden=4)  # untrained, near uniform
            learn(model, rounds=10, e_step=lambda t, s, q=q: rd.importance(t, q, n=12, seed=s, runs=1))
        else:
            q = NetPolicy(model.space, model.problems, hidden=16)
            with one_thread():
                learn(model, q, rounds=10, e_steps=8, draws=8, weighted=True, samples=6, per_step=16, lr=2e-2,
                      objective="vargrad")  # fmt: skip
        found[name] = float(model.theta.log_evidence(test).mean())
    assert found["exact"] > float(truth.log_evidence(test).mean()) - 0.05
    assert all(abs(v - found["exact"]) < 0.02 for v in found.values())


def test_mean_field_ascends_its_bound_and_is_exact_where_the_posterior_factorises() -> None:
    _, x = petals().sample(30, generator(3))
    entangled = Mixture(x, start(x, (4, 4), 7, sd=0.55)).target
    exact = log_gamma_table(entangled).logsumexp(1)
    bounds = torch.stack([mean_field_bound(entangled, sweeps) for sweeps in (1, 2, 5, 20, 60)])
    assert bool((bounds[1:] >= bounds[:-1] - 1e-10).all()) and bool((bounds <= exact + 1e-10).all())
    assert float((exact - bounds[-1]).mean()) > 0.02
    told = mean_field(entangled, sweeps=60)
    assert torch.allclose(told.weights, factorised(entangled, 60).exp(), atol=1e-12)
    apart = random_theta((3, 2))
    apart = replace(
        apart, means=(torch.tensor([[0.0, 0], [1, 0], [2, 0]]).double(), torch.tensor([[0.0, 0], [0, 1]]).double())
    )
    free = Mixture(x, apart).target  # one variable moves x, the other y
    assert torch.allclose(mean_field_bound(free, 2), log_gamma_table(free).logsumexp(1), atol=1e-10)


def test_where_mean_field_fails_exact_em_does_not() -> None:
    _, x = petals().sample(200, generator(0))
    _, test = petals().sample(400, generator(1))
    models = [Mixture(x, start(x, (4, 4), 7, sd=0.55)) for _ in range(2)]
    for _ in range(35):
        models[0].exact_step()
        models[1].maximise(x, factorised(models[1].target, 15).exp())
    exact, field = (float(m.theta.log_evidence(test).mean()) for m in models)
    assert exact > float(petals().log_evidence(test).mean()) - 0.15 and field < exact - 0.4


def test_whole_assignments_have_the_marginal_of_integrated_means() -> None:
    empty = cluster_target(torch.zeros(1, 5, 2, dtype=torch.float64), 3, 0.5, 1.5)
    t, z = simulate_clusters(empty, 3, generator(3))
    term, rows = t.factors["joint"], every_assignment(t)
    value = t.log_gamma(rows)
    for i in (0, 100, 300, 485):
        x, labels = term.x[rows.problem[i]], rows.moves[i]  # pyright: ignore[reportAttributeAccessIssue]
        want = -5 * math.log(3)
        for k in range(3):
            own = x[labels == k]
            cov = 0.25 * torch.eye(len(own)).double() + 2.25 * torch.ones(len(own), len(own)).double()
            for j in range(2 if len(own) else 0):
                want += float(MultivariateNormal(torch.zeros(len(own)).double(), cov).log_prob(own[:, j]))
        assert float(value[i]) == pytest.approx(want, abs=1e-10)
    swapped = replace(rows, moves=torch.tensor([1, 2, 0])[rows.moves])
    assert torch.allclose(value, t.log_gamma(swapped), atol=1e-10)  # names of clusters mean nothing
    far = t.log_gamma(replace(z, terms={})).mean() - value.view(3, -1).mean(1).mean()
    assert float(far) > 1.0  # what made the data explains them
    assert torch.allclose(log_gamma_table(t).logsumexp(1), rd.exact(t).evidence[0], atol=1e-10)  # pyright: ignore[reportOptionalSubscript]


def test_samplers_and_the_exact_law_of_a_policy_on_whole_assignments() -> None:
    empty = cluster_target(torch.zeros(1, 4, 1, dtype=torch.float64), 2, 0.5, 1.5)
    t, _ = simulate_clusters(empty, 2, generator(3))
    q = NetPolicy(t.space, t.problems, hidden=16)  # pyright: ignore[reportArgumentType]
    truth = log_gamma_table(t).logsumexp(1)
    assert torch.allclose(log_law(t, q).exp().sum(1), torch.ones(2).double(), atol=1e-5)
    far = (log_gamma_table(t).softmax(1) - log_law(t, q).exp()).abs().sum(1) / 2
    assert torch.allclose(distances(t, q), far) and float(far.min()) > 0.2  # untrained
    value, error = rd.importance(t, q, n=500, seed=0, runs=8).evidence  # pyright: ignore[reportGeneralTypeIssues]
    assert bool(((value - truth).abs() < 4.5 * error).all()) and float(error.max()) < 0.1


def test_bad_input_is_one_clear_line() -> None:
    theta = random_theta()
    x = torch.zeros(4, 2).double()
    x[2, 1] = math.nan
    with pytest.raises(InputError, match="1 of 4 points are not finite, first point 2"):
        Mixture(x, theta)
    good = Mixture(torch.zeros(4, 2).double(), theta)
    with pytest.raises(InputError, match="has 1 coordinates in row"):
        good.target.on([rd.Problem((), row={"features": (1.0,)})])
    with pytest.raises(InputError, match="no more than points"):
        start(torch.zeros(4, 2).double(), (5,))
    with pytest.raises(InputError, match="sd and tau above 0"):
        cluster_target(torch.zeros(1, 3, 1).double(), 2, 0.0, 1.0)
    with pytest.raises(InputError, match="lists Assignments"):
        every_assignment(replace(good.target, space=rd.Strings(3, rd.Stops(), 2)))
