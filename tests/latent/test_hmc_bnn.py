"""HMC against known moments and its own reversibility; weights of a small net by VarGrad, weighted, against HMC."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from retrodict.diagnostics.bounds import elbo, eubo
from retrodict.diagnostics.chains import chain_ess, split_rhat
from retrodict.errors import InputError
from retrodict.latent.bnn import BayesNet, Symmetric, fit_weights, predict, starts
from retrodict.latent.hmc import annealed, density_of, hmc, leapfrog, with_grad
from retrodict.policies.flow import FlowPolicy, Support
from retrodict.records import Problem
from retrodict.rng import generator
from retrodict.samplers.importance import importance
from retrodict.spaces.vectors import Assignments, Vectors
from retrodict.targets.algebra import Target

COV = torch.tensor([[1.0, 0.8], [0.8, 2.0]], dtype=torch.float64)
MEAN = torch.tensor([1.0, -2.0], dtype=torch.float64)


def normal(w: Tensor) -> Tensor:
    return -((w - MEAN) @ torch.linalg.inv(COV) * (w - MEAN)).sum(1) / 2


def double_well(w: Tensor) -> Tensor:
    return -(w.square() - 1).square().sum(1)


# -- HMC --------------------------------------------------------------------------------------------------------------


def test_moments_of_a_gaussian() -> None:
    chains = hmc(normal, 3 * torch.randn(16, 2, generator=generator(1), dtype=torch.float64), n=250, warmup=100)
    assert 0.6 < chains.accepted < 0.97 and chains.divergent == 0
    flat = chains.draws.flatten(0, 1)
    for i in range(2):
        x = chains.draws[:, :, i]
        se = float(x.std()) / chain_ess(x) ** 0.5
        assert split_rhat(x) < 1.02 and abs(float(x.mean() - MEAN[i])) < 4.5 * se
        second = (x - MEAN[i]).square()
        assert abs(float(second.mean() - COV[i, i])) < 4.5 * float(second.std()) / chain_ess(second) ** 0.5
    cross = ((flat - MEAN)[:, 0] * (flat - MEAN)[:, 1]).view(16, 250)
    assert abs(float(cross.mean() - COV[0, 1])) < 4.5 * float(cross.std()) / chain_ess(cross) ** 0.5


def test_the_leapfrog_goes_back_and_keeps_volume() -> None:
    gen = generator(0)
    w, r = torch.randn(2, 5, 2, generator=gen, dtype=torch.float64).unbind(0)
    _, slope = with_grad(double_well, w)
    eps = torch.linspace(0.05, 0.15, 5, dtype=torch.float64)
    new, end, _, new_slope = leapfrog(double_well, w, r, slope, eps, 7)
    back, start, _, _ = leapfrog(double_well, new, -end, new_slope, eps, 7)
    assert float((back - w).abs().max()) < 1e-12 and float((start + r).abs().max()) < 1e-12

    def flow(z: Tensor) -> Tensor:
        at = z[None, :2]
        return torch.cat(leapfrog(double_well, at, z[None, 2:], with_grad(double_well, at)[1], eps[:1], 3)[:2], 1)[0]

    z, h = torch.cat([w[0], r[0]]), 1e-6
    columns = [(flow(z + h * e) - flow(z - h * e)) / (2 * h) for e in torch.eye(4, dtype=torch.float64)]
    assert abs(float(torch.linalg.det(torch.stack(columns, 1))) - 1) < 1e-7


def stationary(biased: bool) -> float:
    """How far the density of w^2 moves in one long run that starts in the target: the double well on a line."""
    grid = torch.linspace(-3, 3, 4001, dtype=torch.float64)
    p = double_well(grid[:, None]).softmax(0)
    truth = float(p @ grid.square())
    start = grid[torch.multinomial(p, 800, replacement=True, generator=generator(2))][:, None]

    def log_gamma(w: Tensor) -> Tensor:  # the planted bug: an energy that is not the target's
        return double_well(w) + 0.3 * w.square().sum(1) * biased

    chains = hmc(log_gamma, start, n=30, warmup=5)
    mean = chains.draws[:, :, 0].square().mean(1)
    return abs(float(mean.mean()) - truth) / (float(mean.std()) / 800**0.5)


def test_what_starts_in_the_target_stays_there_and_an_energy_that_is_off_is_seen() -> None:
    assert stationary(biased=False) < 4.5
    assert stationary(biased=True) > 8


def test_bad_starts_and_spaces() -> None:
    with pytest.raises(InputError, match="not finite where a chain starts"):
        hmc(lambda w: w[:, 0].log(), -torch.ones(2, 1), n=1, warmup=1)
    with pytest.raises(InputError, match="HMC walks in Vectors"):
        density_of(Target(Assignments((2,)), [Problem(())], {}))


def test_annealed_starts_leave_a_poor_mode() -> None:
    """Two wells, one 30 nats deeper: all start in the poor one, and few chains pass the barrier."""

    def wells(w: Tensor) -> Tensor:
        return -8 * (w.square() - 4).square().sum(1) / 4 + 7.5 * w.sum(1)

    poor = -2 + 0.2 * torch.randn(64, 1, generator=generator(0), dtype=torch.float64)
    assert float((hmc(wells, poor, n=5, warmup=40).draws < 0).double().mean()) > 0.8
    assert bool((annealed(wells, poor, 16, moves=20) > 0).all())


# -- a Bayesian network -----------------------------------------------------------------------------------------------

NET = BayesNet(hidden=1, noise=0.1)


@pytest.fixture(scope="module")
def data() -> tuple[Tensor, Tensor]:
    gen = generator(3)
    x = torch.rand(20, generator=gen, dtype=torch.float64) * 2 - 1
    return x, torch.tanh(3 * x) + 0.1 * torch.randn(20, generator=gen, dtype=torch.float64)


def test_the_target_is_the_formula(data: tuple[Tensor, Tensor]) -> None:
    net, (x, y) = BayesNet(hidden=2), data
    w, target = starts(net, 3, 0), net.target(x, y)
    for k in range(3):
        u, b, a, c = w[k, :2], w[k, 2:4], w[k, 4:6], w[k, 6]
        f = sum(a[j] * torch.tanh(u[j] * x + b[j]) for j in range(2)) + c
        value = torch.distributions.Normal(f, net.noise).log_prob(y).sum()
        sd = [2.0] * 4 + [1.5 / math.sqrt(2)] * 2 + [1.5]
        value = value + torch.distributions.Normal(0.0, torch.tensor(sd, dtype=torch.float64)).log_prob(w[k]).sum()
        assert abs(float(density_of(target)(w)[k] - value)) < 1e-9
    moved = target.on([Problem((), row={"x": torch.stack([x, -y])})])
    assert [t.name for t in moved.factors.values()] == ["prior", "likelihood"]
    assert torch.allclose(density_of(moved)(w), density_of(net.target(x, -y))(w))


def test_copies_of_a_mode_are_alike_and_their_policy_is_normalised() -> None:
    net = BayesNet(hidden=2)
    x = torch.linspace(-1, 1, 5, dtype=torch.float64)
    base = FlowPolicy(Vectors(net.dim), [Problem(())], Support.of(net.dim), hidden=8, splines=0)
    for p in base.parameters().values():
        p.data += 0.2 * torch.randn(p.shape, generator=generator(3))
    spread = Symmetric(base, net)
    assert len(spread.index) == 8 and len({tuple(r) for r in (spread.index * spread.flip).tolist()}) == 8
    w = starts(net, 4, 0)
    copies = w[:, spread.index] * spread.flip
    assert float((net.outputs(copies.flatten(0, 1), x).view(4, 8, 5) - net.outputs(w, x)[:, None]).abs().max()) < 1e-12
    zero = torch.zeros(32, dtype=torch.long)
    log_q = spread.log_move(zero, copies.flatten(0, 1), zero, copies.flatten(0, 1)).view(4, 8)
    assert float((log_q - log_q[:, :1]).detach().abs().max()) < 1e-5
    rows = spread.sample(torch.zeros(4000, dtype=torch.long), generator(0))
    ratio = (base.score(rows).log_q - rows.log_q).exp()  # E over q' of q / q'
    assert abs(float(ratio.mean()) - 1) < 4.5 * float(ratio.std()) / 4000**0.5


def test_vargrad_over_weights_against_hmc(data: tuple[Tensor, Tensor]) -> None:
    x, y = data
    target = NET.target(x, y)
    log_gamma = density_of(target)
    begin = annealed(log_gamma, starts(NET, 64, 0), 32, betas=(0.03, 0.3, 1.0), moves=10)
    chains = hmc(log_gamma, begin, n=80, warmup=40, most=12)
    policy = fit_weights(NET, target, steps=70, samples=64, lr=5e-3, evaluate=64)
    spread = Symmetric(policy, NET)
    particles = importance(target, spread, n=500, seed=0)
    assert particles.log_z is not None and float(particles.ess) > 300  # of 2,000
    grid, truth = torch.linspace(-1, 1, 9, dtype=torch.float64), torch.tanh(3 * torch.linspace(-1, 1, 9).double())
    of = predict(NET, chains.draws.flatten(0, 1), grid, truth)
    found = predict(NET, particles.objects.moves[:, 0], grid, truth, particles.log_w[0])
    assert of.log_p is not None and found.log_p is not None
    assert float((found.log_p - of.log_p).mean().abs()) < 0.02
    assert float((found.mean - of.mean).abs().max()) < 0.08 and float((found.sd / of.sd - 1).abs().max()) < 0.3
    some = chains.draws[:, ::5].flatten(0, 1)
    rows = target.space.record(torch.zeros(len(some), dtype=torch.long), some[:, None], torch.zeros(len(some), 1))  # pyright: ignore[reportAttributeAccessIssue]
    lower, upper = elbo(particles.log_w[0]), eubo(target.log_gamma(rows) - spread.score(rows).log_q[:, 0])
    assert (
        lower.value < float(particles.log_z.mean()) < upper.value + 4.5 * upper.se and upper.value - lower.value < 2.0
    )


def test_too_many_units_and_bad_data() -> None:
    net: Any = BayesNet(hidden=6)
    with pytest.raises(InputError, match="6 hidden units have 46,080 copies"):
        Symmetric(FlowPolicy(Vectors(net.dim), [Problem(())], hidden=4, splines=0), net)
    with pytest.raises(InputError, match=r"pair 1 is \(nan, 0.0\)"):
        net.target(torch.tensor([0.0, math.nan]), torch.zeros(2))
