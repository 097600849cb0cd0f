"""A diffusion chain with a known marginal: its density, its posterior by RTB, and the samplers on it."""

import math

import pytest
import torch

import retrodict as rd
from retrodict.errors import InputError
from retrodict.latent.gaussian_diffusion import (
    KEPT,
    Chain,
    Modes,
    Tuned,
    chain_weights,
    draw_points,
    grid_modes,
    mixture_weights,
    mode_target,
    mode_weights,
    reward_of,
    tune,
)
from retrodict.rng import generator
from retrodict.training.collect import Mixture, collect
from retrodict.training.replay import Replay

FOUR = Modes(torch.tensor([[-4.0, -4.0], [-4.0, 4.0], [4.0, -4.0], [4.0, 4.0]]), torch.full((4,), 0.25), 0.5)
KEEP = {(-4.0, 4.0): 3.0, (4.0, 4.0): 1.0}


@pytest.fixture(scope="module")
def target():
    return mode_target(Chain(FOUR, steps=12), reward_of(FOUR, KEEP))


def test_one_gaussian_stays_one():
    """With a single mode every step is exact, so the end is the mode itself."""
    one = Modes(torch.tensor([[1.0, -2.0]]), torch.ones(1), 0.5)
    x = draw_points(Chain(one, steps=5), 20000)
    assert torch.allclose(x.mean(0), one.means[0], atol=0.03)
    assert torch.allclose(x.var(0), torch.full((2,), 0.5), atol=0.03)


def test_a_step_has_the_moments_of_the_true_reverse_step():
    """By weights: x_0 from the mixture, noised to the level of x; then E and Var of x_u given x_s near a point."""
    chain = Chain(FOUR, steps=10)
    i, at = 4, torch.tensor([[0.7, -1.2]])
    s2, u2 = float(chain.levels[i]) ** 2, float(chain.levels[i + 1]) ** 2
    gen = generator(0)
    x0 = FOUR.means[torch.randint(4, (400000,), generator=gen)] + FOUR.variance**0.5 * torch.randn(
        400000, 2, generator=gen
    )
    w = (-(at - x0).square().sum(1) / (2 * s2)).softmax(0)
    step = x0 + (at - x0) * (u2 / s2) + (u2 * (s2 - u2) / s2) ** 0.5 * torch.randn(400000, 2, generator=gen)
    mean = (w[:, None] * step).sum(0)
    variance = (w[:, None] * (step - mean).square()).sum(0).mean()
    found = chain.law(torch.zeros(1, dtype=torch.long), at, torch.tensor([i]))
    assert torch.allclose(found[0][0], mean, atol=0.03) and float(found[1]) == pytest.approx(float(variance), rel=0.03)


def test_the_recorded_density_is_the_rescored_one(target):
    chain = target.prior
    rows = chain.sample(torch.zeros(50, dtype=torch.long), generator(0), {"temperature": 2.0})
    assert torch.allclose(chain.score(rows).log_q, rows.log_q, atol=1e-4)
    assert not torch.allclose(rows.log_b[:, :-1], rows.log_q)
    assert Tuned(chain).score(rows).log_q.sum() == pytest.approx(float(chain.score(rows).log_q.sum()), rel=1e-5)
    at, variance = chain.law(rows.problem, rows.moves[:, 2], torch.full((50,), 3))
    by_hand = torch.distributions.Normal(at, variance.sqrt()[:, None]).log_prob(rows.moves[:, 3]).sum(1)
    assert torch.allclose(by_hand, rows.log_q[:, 3], atol=1e-4)


def test_rtb_finds_the_weights(target):
    policy = tune(target, steps=60, samples=128, lr=1e-2)
    exact, (truth, error) = mixture_weights(target.factors["reward"]), chain_weights(target, n=20000)
    assert torch.allclose(exact, torch.tensor([0.0, 0.75, 0.0, 0.25], dtype=truth.dtype), atol=1e-3)
    assert ((truth - exact).abs() < 4.5 * error + 0.02).all() and error.max() < 0.01
    before, after = (mode_weights(FOUR, draw_points(p, 8000)) for p in (target.prior, policy))
    assert (before - truth).abs().max() > 0.4
    assert (after - truth).abs().max() < 0.03
    found = rd.importance(target, policy, n=2000, seed=0)
    plain = rd.importance(target, n=2000, seed=0)
    assert float(found.ess) > float(plain.ess)
    for answer in (found, plain):
        value, error = answer.evidence
        assert abs(float(value) - math.log(0.5)) < 4.5 * float(error) + 0.03  # E r = (3 + 1) / 2 / 4 over kept modes


def test_samplers_take_vectors(target):
    drawn = rd.ancestral(target, n=100, seed=0)
    assert drawn.objects.moves.shape == (100, 12, 2) and drawn.shown[0].startswith("(")
    kept = rd.rejection(target, n=200, seed=0, log_bound=1.0)
    assert 0 < kept.trace.counts["accepted"] < 800


def test_replay_keeps_vectors(target, tmp_path):
    policy, mixture, replay = Tuned(target.prior), Mixture(replay=0.5, from_prior=0.25), Replay(capacity=30)
    for step in range(3):
        batch = collect(target, policy, [0], 16, generator(0, "cpu", step), mixture, replay, False)
        new = batch.rollouts.take(batch.new)
        replay.add(new, target.log_gamma(new), target.space.keys(new), step)
    assert len(batch.rollouts) == 16 and len(batch.new) == 8 and len(replay) == 30
    replay.save(tmp_path / "rows.safetensors")
    back = Replay.load(tmp_path / "rows.safetensors", model="", target="")
    problem = torch.zeros(5, dtype=torch.long)
    assert torch.equal(back.draw(problem, generator(1))[0].moves, replay.draw(problem, generator(1))[0].moves)


def test_the_published_modes():
    modes = grid_modes()
    reward = reward_of(modes)
    weights = mixture_weights(reward)
    assert len(KEPT) == 9 and (weights > 0.01).sum() == 9
    assert float(weights[modes.nearest(torch.tensor([[5.0, 0.0]]))]) == pytest.approx(15 / 61, rel=1e-3)


@pytest.mark.parametrize(
    "make, said",
    [
        (lambda: reward_of(FOUR, KEEP, floor=0.0), "floor"),
        (lambda: Modes(FOUR.means, torch.tensor([0.5, 0.5, 0.5, 0.5]), 0.5), "sum to 1"),
        (lambda: Modes(FOUR.means, FOUR.weights, 0.0), "variance"),
        (lambda: Chain(FOUR, steps=2), "3 steps"),
        (lambda: Chain(FOUR).sample(torch.zeros(1, dtype=torch.long), generator(0), {"epsilon": 0.1}), "epsilon"),
    ],
)
def test_what_cannot_be(make, said):
    with pytest.raises(InputError, match=said):
        make()
