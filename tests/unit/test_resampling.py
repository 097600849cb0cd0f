"""Resampling schemes: unbiased, no noisier than multinomial, never a particle of weight zero."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from retrodict.numerics import invert_cdf
from retrodict.rng import generator
from retrodict.samplers.resampling import RESAMPLERS

every_scheme = pytest.mark.parametrize("name", RESAMPLERS)
WEIGHTS = {
    "uneven": [0.5, 0.2, 0.15, 0.1, 0.05],
    "one heavy": [0.96, 0.01, 0.01, 0.01, 0.01],
    "with zeros": [0.0, 0.3, 0.0, 0.7, 0.0],
    "equal": [0.2] * 5,
}


def copies(name: str, weights: list[float], repeats: int, seed: int = 0) -> Tensor:
    w = torch.tensor(weights, dtype=torch.float64).expand(repeats, -1)
    index = RESAMPLERS[name](w, generator(seed))
    assert index.shape == w.shape and index.min() >= 0 and index.max() < w.shape[1]
    return torch.nn.functional.one_hot(index, w.shape[1]).sum(1).double()


@every_scheme
@pytest.mark.parametrize("kind", WEIGHTS)
def test_counts_are_unbiased(name: str, kind: str) -> None:
    w = torch.tensor(WEIGHTS[kind], dtype=torch.float64)
    n = copies(name, WEIGHTS[kind], 20_000)
    se = n.std(0) / len(n) ** 0.5
    assert ((n.mean(0) - 5 * w).abs() <= 4.5 * se + 1e-12).all()


@every_scheme
@pytest.mark.parametrize("kind", WEIGHTS)
def test_counts_are_unbiased_in_fewer_slots(name: str, kind: str) -> None:
    w = torch.tensor(WEIGHTS[kind], dtype=torch.float64).expand(20_000, -1)
    slots = torch.tensor([[2], [3]]).repeat(10_000, 1)
    index = RESAMPLERS[name](w, generator(0), slots)
    used = torch.arange(5) < slots
    n = (torch.nn.functional.one_hot(index, 5).double() * used[:, :, None]).sum(1)
    for k, some in ((2, n[::2]), (3, n[1::2])):
        se = some.std(0) / len(some) ** 0.5
        assert ((some.mean(0) - k * w[0]).abs() <= 4.5 * se + 1e-12).all()


@every_scheme
@pytest.mark.parametrize("kind", WEIGHTS)
def test_counts_vary_no_more_than_multinomial_ones(name: str, kind: str) -> None:
    w = torch.tensor(WEIGHTS[kind], dtype=torch.float64)
    var = copies(name, WEIGHTS[kind], 20_000).var(0)
    assert (var <= 5 * w * (1 - w) * 1.05 + 1e-12).all()


@every_scheme
def test_weight_zero_is_never_chosen(name: str) -> None:
    gen = generator(3)
    w = torch.rand(2000, 7, generator=gen, dtype=torch.float64) * (torch.rand(2000, 7, generator=gen) < 0.4)
    w = w[w.sum(1) > 0]
    w = w / w.sum(1, keepdim=True)
    assert (w.gather(1, RESAMPLERS[name](w, gen)) > 0).all()


@every_scheme
def test_one_particle_with_all_the_weight_is_all_that_is_left(name: str) -> None:
    w = torch.eye(6, dtype=torch.float64)
    assert (RESAMPLERS[name](w, generator(0)) == torch.arange(6)[:, None]).all()


@pytest.mark.parametrize("name", ["stratified", "systematic", "residual"])
def test_equal_weights_are_left_alone(name: str) -> None:
    for k in (3, 7, 10, 33):  # k * (1/k) rounds below k for some of these
        n = copies(name, [1 / k] * k, 50)
        assert (n == 1).all() or name == "stratified"


def test_residual_keeps_the_whole_parts() -> None:
    n = copies("residual", WEIGHTS["uneven"], 500)
    assert (n >= torch.tensor([2, 1, 0, 0, 0])).all()


def test_systematic_counts_are_within_one_of_their_mean() -> None:
    n = copies("systematic", WEIGHTS["uneven"], 500)
    mean = 5 * torch.tensor(WEIGHTS["uneven"], dtype=torch.float64)
    assert (n >= mean.floor()).all() and (n <= mean.ceil()).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_distribution_function_that_ends_below_one(dtype: torch.dtype) -> None:
    """Ten weights of 0.1 add up to 0.99..9; u just under one must not fall off the end, or onto a zero there."""
    top = torch.tensor([[1 - 2**-53]], dtype=torch.float64)
    w = torch.full((1, 10), 0.1, dtype=dtype)
    assert invert_cdf(w, top).item() == 9
    w = torch.tensor([[0.1] * 10 + [0.0, 0.0]], dtype=dtype)
    assert invert_cdf(w, top).item() == 9
    assert invert_cdf(torch.tensor([[0.0, 1e-300, 0.0]], dtype=torch.float64), top).item() == 1
    assert invert_cdf(torch.tensor([[0.0, 0.4, 0.6]], dtype=dtype), torch.zeros(1, 1, dtype=torch.float64)).item() == 1


@every_scheme
def test_one_seed_one_result(name: str) -> None:
    assert torch.equal(copies(name, WEIGHTS["uneven"], 50, 1), copies(name, WEIGHTS["uneven"], 50, 1))
    assert not torch.equal(copies(name, WEIGHTS["uneven"], 50, 1), copies(name, WEIGHTS["uneven"], 50, 2))
