"""Resampling schemes: unbiased counts, E[#copies of i] = n W_i, in float64.

Multinomial; stratified and systematic (Kitagawa 1996; Carpenter et al. 1999); residual (Liu and Chen 1998, with
multinomial remainders). Compared in Douc, Cappe and Moulines (2005).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from retrodict.numerics import invert_cdf

Scheme = Callable[[Tensor, torch.Generator], Tensor]


def _uniform(p: int, n: int, gen: torch.Generator) -> Tensor:
    return torch.rand(p, n, generator=gen, dtype=torch.float64, device=gen.device)


def multinomial(weights: Float[Tensor, "p n"], gen: torch.Generator) -> Int[Tensor, "p n"]:
    """n independent draws."""
    return invert_cdf(weights, _uniform(weights.shape[0], weights.shape[1], gen))


def stratified(weights: Float[Tensor, "p n"], gen: torch.Generator) -> Int[Tensor, "p n"]:
    """One draw in each of n equal strata."""
    p, n = weights.shape
    grid = torch.arange(n, dtype=torch.float64, device=weights.device)
    return invert_cdf(weights, (grid + _uniform(p, n, gen)) / n)


def systematic(weights: Float[Tensor, "p n"], gen: torch.Generator) -> Int[Tensor, "p n"]:
    """One uniform shared by all strata."""
    p, n = weights.shape
    grid = torch.arange(n, dtype=torch.float64, device=weights.device)
    return invert_cdf(weights, (grid + _uniform(p, 1, gen)) / n)


def residual(weights: Float[Tensor, "p n"], gen: torch.Generator) -> Int[Tensor, "p n"]:
    """floor(n W_i) copies for certain, the rest multinomially from what is left."""
    p, n = weights.shape
    w = weights.double()
    w = w / w.sum(-1, keepdim=True)
    sure = (n * w + 1e-9).floor()
    left = (n * w - sure).clamp_min(0)
    fill = invert_cdf(torch.where(left.sum(-1, keepdim=True) > 0, left, w), _uniform(p, n, gen))
    ends = sure.cumsum(-1)
    grid = torch.arange(n, dtype=torch.float64, device=w.device).expand(p, n).contiguous()
    certain = torch.searchsorted(ends, grid, right=True)
    return torch.where(certain < n, certain, fill)


RESAMPLERS: dict[str, Scheme] = {
    "multinomial": multinomial,
    "stratified": stratified,
    "systematic": systematic,
    "residual": residual,
}
