"""Calibration: the exact posterior passes, and every posterior that was spoiled on purpose fails."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from retrodict.diagnostics import (
    brier,
    calibration_error,
    ecdf_band,
    risk_coverage,
    sbc_pit,
    sbc_ranks,
    uniformity,
)
from retrodict.errors import InputError
from retrodict.rng import generator

D = torch.float64


def normal_problems(b: int, k: int, seed: int, shift: float = 0.0, scale: float = 1.0):
    """theta ~ N(0, 1), y ~ N(theta, 1), draws from N(y/2 + shift, scale^2/2): exact for shift 0 and scale 1."""
    gen = generator(seed)
    theta = torch.randn(b, generator=gen, dtype=D)
    y = theta + torch.randn(b, generator=gen, dtype=D)
    return theta, y, y[:, None] / 2 + shift + scale * math.sqrt(0.5) * torch.randn(b, k, generator=gen, dtype=D)


def test_ranks_of_the_exact_posterior_are_uniform_and_of_wrong_ones_are_not():
    k = 31
    p_values = []
    for seed in range(20):
        theta, _, draws = normal_problems(1000, k, seed)
        p_values.append(uniformity(sbc_ranks(theta, draws, generator(seed, "cpu", 1)), k).p_value)
    assert min(p_values) > 1e-4 and max(p_values) > 0.5
    for planted in ({"shift": 0.2}, {"scale": 0.75}, {"scale": 1.3}):
        theta, _, draws = normal_problems(1000, k, 0, **planted)
        ranks = sbc_ranks(theta, draws, generator(1))
        assert uniformity(ranks, k).p_value < 1e-6, planted
        u = (ranks + torch.rand(1000, generator=generator(2))) / (k + 1)
        if planted != {"scale": 1.3}:
            assert not ecdf_band(u, 0.999).inside, planted


def test_ranks_break_ties_at_random():
    """Coin-valued truths: without random ties the ranks are 0 or a multiple, and the test must say so."""
    gen = generator(0)
    truth, draws = torch.randint(0, 3, (2000,), generator=gen), torch.randint(0, 3, (2000, 15), generator=gen)
    ranks = sbc_ranks(truth, draws, generator(1))
    assert uniformity(ranks, 15).p_value > 1e-3 and ranks.min() == 0 and ranks.max() == 15
    assert uniformity((draws < truth[:, None]).sum(1), 15).p_value < 1e-6
    assert torch.equal(ranks, sbc_ranks(truth, draws, generator(1)))


def test_weighted_ranks():
    """Draws from the prior, weighted by the likelihood: uniform; the same draws without weights are not."""
    gen, b, k = generator(5), 1500, 400
    theta, y, _ = normal_problems(b, 1, 5)
    draws = torch.randn(b, k, generator=gen, dtype=D)
    log_w = -0.5 * (y[:, None] - draws).square()
    u = sbc_pit(theta, draws, log_w, gen)
    assert uniformity(u).p_value > 1e-3 and ecdf_band(u, 0.999).inside
    assert uniformity(sbc_pit(theta, draws, 2 * log_w, gen)).p_value < 1e-6, "planted: the likelihood counted twice"
    equal = torch.zeros(b, 15)
    theta, _, draws = normal_problems(b, 15, 6)
    a = sbc_pit(theta, draws, equal, generator(1))
    assert torch.equal((a * 16).long(), sbc_ranks(theta, draws, generator(1)))
    with pytest.raises(InputError, match="1 problems"):
        sbc_pit(theta[:1], draws[:1], torch.full((1, 15), -math.inf), gen)


def test_uniformity_is_the_chi_square_test():
    stats = pytest.importorskip("scipy.stats")
    ranks = torch.randint(0, 8, (400,), generator=generator(0))
    ours = uniformity(ranks, 7, bins=8)
    theirs = stats.chisquare(torch.bincount(ranks, minlength=8).numpy())
    assert ours.p_value == pytest.approx(theirs.pvalue) and ours.statistic == pytest.approx(theirs.statistic)
    uneven = uniformity(torch.arange(11).repeat(30), 10, bins=4)
    assert uneven.statistic == pytest.approx(0) and float(uneven.expected.sum()) == 330
    with pytest.raises(InputError):
        uniformity(torch.tensor([9]), 8)


def test_ecdf_band_level():
    u = torch.rand(2000, 200, generator=generator(0), dtype=D)
    inside = np.mean([ecdf_band(row, 0.9).inside for row in u])
    assert abs(inside - 0.91) < 4.5 * math.sqrt(0.9 * 0.1 / 2000)


def test_calibration_of_probabilities():
    gen = generator(0)
    p = torch.rand(50_000, generator=gen, dtype=D)
    right = torch.rand(50_000, generator=gen, dtype=D) < p
    assert calibration_error(p, right) < 0.015
    assert calibration_error(p.sqrt(), right) > 0.1, "planted: overconfident"
    assert abs(brier(p, right) - 1 / 6) < 0.005 and brier(p.sqrt(), right) > 0.18
    assert brier(torch.tensor([1.0, 0.0]), torch.tensor([True, False])) == 0
    assert calibration_error(torch.tensor([1.0, 0.0]), torch.tensor([True, False])) == 0
    assert calibration_error(torch.tensor([1.0, 1.0]), torch.tensor([True, False])) == 0.5
    curve = risk_coverage(p, right)
    assert curve.at(0.1) < 0.1 and curve.at(1.0) == pytest.approx(float(1 - right.double().mean()))
    assert risk_coverage(-p, right).area > curve.area + 0.2
    tied = risk_coverage(torch.tensor([0.5, 0.5, 0.9]), torch.tensor([True, False, True]))
    assert tied.risk.tolist() == pytest.approx([0, 0.25, 1 / 3])
    with pytest.raises(InputError):
        brier(torch.tensor([1.5]), torch.tensor([True]))
