"""Resampling schemes: unbiased counts, E[#copies of i] = n W_i, in float64.

Multinomial; stratified and systematic (Kitagawa 1996; Carpenter et al. 1999); residual (Liu and Chen 1998, with
multinomial remainders). Compared in Douc, Cappe and Moulines (2005).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor

Scheme = Callable[[Tensor, torch.Generator], Tensor]


def _invert(weights: Float[Tensor, "p k"], u: Float[Tensor, "p n"]) -> Int[Tensor, "p n"]:
    """Inverse of each row's distribution function at u in [0, 1); never an index of weight zero."""
    cdf = weights.double().cumsum(-1)
    total = cdf[:, -1:]
    index = torch.searchsorted(cdf, (u * total).clamp_max(total * (1 - 1e-15)), right=True)
    last = weights.shape[1] - 1 - (weights.flip(-1) > 0).to(torch.int8).argmax(-1, keepdim=True)
    return torch.minimum(index, last)


def _uniform(p: int, n: int, gen: torch.Generator) -> Tensor:
    return torch.rand(p, n, generator=gen, dtype=torch.float64, device=gen.device)


def multinomial(weights: Float[Tensor, "p n"], gen: torch.Generator) -> Int[Tensor, "p n"]:
    """n independent draws."""
    return _invert(weights, _uniform(weights.shape[0], weights.shape[1], gen))


def stratified(weights: Float[Tensor, "p n"], gen: torch.Generator) -> Int[Tensor, "p n"]:
    """One draw in each of n equal strata."""
    p, n = weights.shape
    grid = torch.arange(n, dtype=torch.float64, device=weights.device)
    return _invert(weights, (grid + _uniform(p, n, gen)) / n)


def systematic(weights: Float[Tensor, "p n"], gen: torch.Generator) -> Int[Tensor, "p n"]:
    """One uniform shared by all strata."""
    p, n = weights.shape
    grid = torch.arange(n, dtype=torch.float64, device=weights.device)
    return _invert(weights, (grid + _uniform(p, 1, gen)) / n)


def residual(weights: Float[Tensor, "p n"], gen: torch.Generator) -> Int[Tensor, "p n"]:
    """floor(n W_i) copies for certain, the rest multinomially from what is left."""
    p, n = weights.shape
    w = weights.double()
    w = w / w.sum(-1, keepdim=True)
    sure = (n * w + 1e-9).floor()
    left = (n * w - sure).clamp_min(0)
    fill = _invert(torch.where(left.sum(-1, keepdim=True) > 0, left, w), _uniform(p, n, gen))
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
