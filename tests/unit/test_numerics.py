"""Numerics and randomness: no NaN from infinities, one seed one result."""

from __future__ import annotations

import math

import torch

from retrodict.numerics import (
    NEG_INF,
    at_end,
    ess,
    jackknife_log_mean,
    log_mean_exp,
    log_prob_of,
    normalise,
    prefix_values,
    safe_sub,
    sample_categorical,
)
from retrodict.rng import child_seed, generator


def test_log_mean_exp() -> None:
    x = torch.tensor([[0.0, math.log(3.0)], [NEG_INF, NEG_INF], [1000.0, 1000.0]], dtype=torch.float64)
    assert torch.allclose(log_mean_exp(x), torch.tensor([math.log(2.0), NEG_INF, 1000.0], dtype=torch.float64))


def test_weights_and_ess() -> None:
    log_w = torch.tensor(
        [[1000.0, 1000.0, NEG_INF], [NEG_INF] * 3, [0.0, NEG_INF, NEG_INF], [-2000.0, -2000.0, -2000.0]]
    )
    w = normalise(log_w)
    assert torch.allclose(w[0], torch.tensor([0.5, 0.5, 0.0])) and (w[1] == 0).all() and not w.isnan().any()
    assert torch.allclose(ess(log_w), torch.tensor([2.0, 0.0, 1.0, 3.0]))


def test_safe_sub_keeps_zeros_zero() -> None:
    a = torch.tensor([NEG_INF, NEG_INF, 1.0, 1.0])
    b = torch.tensor([NEG_INF, 0.0, 2.0, NEG_INF])
    assert safe_sub(a, b).tolist() == [NEG_INF, NEG_INF, -1.0, math.inf]


def test_log_prob_of_renormalises_over_the_legal() -> None:
    legal = torch.tensor([True, False, True])
    x = torch.tensor([[0.0, 5.0, 0.0]], dtype=torch.bfloat16)
    lp = log_prob_of(x, legal)
    assert lp.dtype == torch.float32
    assert torch.allclose(lp, torch.tensor([[math.log(0.5), NEG_INF, math.log(0.5)]]))
    assert log_prob_of(x.double()).dtype == torch.float64


def test_sample_categorical_has_the_right_frequencies() -> None:
    log_p = torch.tensor([[0.1, 0.0, 0.6, 0.3]]).log().expand(40_000, -1) + 3.0  # need not be normalised
    share = torch.bincount(sample_categorical(log_p, generator(0)), minlength=4) / 40_000
    assert share[1] == 0
    assert (share - torch.tensor([0.1, 0.0, 0.6, 0.3])).abs().max() < 4.5 * math.sqrt(0.25 / 40_000)


def test_jackknife() -> None:
    log_z = torch.tensor([0.3, -0.2, 0.5, 0.0, -1.0], dtype=torch.float64)
    value, error = jackknife_log_mean(log_z)
    assert math.isclose(value.item(), math.log(log_z.exp().mean().item()))
    left = torch.tensor(
        [math.log(log_z[torch.arange(5) != i].exp().mean().item()) for i in range(5)], dtype=torch.float64
    )
    assert math.isclose(error.item(), math.sqrt(4 / 5 * float((left - left.mean()).square().sum())))
    assert jackknife_log_mean(log_z[:1])[1].item() == math.inf


def test_prefix_values_and_at_end() -> None:
    move = torch.tensor([[1.0, 2.0], [4.0, 8.0]])
    stop = torch.tensor([[0.1, 0.2, 0.3], [0.4, 0.5, 0.6]])[:, :, None]
    values = prefix_values(move, stop)
    assert torch.allclose(values[:, :, 0], torch.tensor([[0.1, 1.2, 3.3], [0.4, 4.5, 12.6]]))
    assert torch.allclose(at_end(values, torch.tensor([1, 2]), torch.tensor([0, 0])), torch.tensor([1.2, 12.6]))


def test_seeds() -> None:
    def first(*path: int) -> float:
        return torch.rand(1, generator=generator(7, "cpu", *path)).item()

    assert first() == first() and len({first(), first(0), first(1), first(0, 1), first(1, 0)}) == 5
    assert child_seed(3, 1) == child_seed(3, 1) != child_seed(3, 2)
    torch.manual_seed(0)
    before = torch.random.get_rng_state()
    generator(3)
    assert torch.equal(before, torch.random.get_rng_state())  # no global random state is touched
