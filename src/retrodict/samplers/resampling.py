"""Resampling schemes: unbiased counts, E[#copies of i] = k W_i in k slots (n of them or fewer), in float64.

Multinomial; stratified and systematic (Kitagawa 1996; Carpenter et al. 1999); residual (Liu and Chen 1998, with
multinomial remainders). Compared in Douc, Cappe and Moulines (2005). Without replacement, from more candidates than are
kept: Fearnhead and Clifford (2003, section 3.2), which SMC steering uses after cloning (Lew et al. 2023, arXiv
2306.03081, algorithm 2).
"""

from __future__ import annotations

from typing import Protocol

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from retrodict.numerics import invert_cdf


class Scheme(Protocol):
    """Parents of n slots by weight, of which the first ``slots`` count (all n where it is left out)."""

    def __call__(
        self, weights: Float[Tensor, "p n"], gen: torch.Generator, slots: Int[Tensor, "p 1"] | None = None
    ) -> Int[Tensor, "p n"]: ...  # noqa: D102


def _uniform(p: int, n: int, gen: torch.Generator) -> Tensor:
    return torch.rand(p, n, generator=gen, dtype=torch.float64, device=gen.device)


def multinomial(
    weights: Float[Tensor, "p n"], gen: torch.Generator, slots: Int[Tensor, "p 1"] | None = None
) -> Int[Tensor, "p n"]:
    """n independent draws; as every row's are alike, ``slots`` changes nothing."""
    return invert_cdf(weights, _uniform(weights.shape[0], weights.shape[1], gen))


def _strata(weights: Tensor, u: Tensor, slots: Tensor | None) -> Tensor:
    grid = torch.arange(weights.shape[1], dtype=torch.float64, device=weights.device)
    return invert_cdf(weights, ((grid + u) / _some(slots, weights)).clamp_max(1.0))


def _some(slots: Tensor | None, weights: Tensor) -> Tensor | int:
    return weights.shape[1] if slots is None else slots


def stratified(
    weights: Float[Tensor, "p n"], gen: torch.Generator, slots: Int[Tensor, "p 1"] | None = None
) -> Int[Tensor, "p n"]:
    """One draw in each equal stratum."""
    return _strata(weights, _uniform(weights.shape[0], weights.shape[1], gen), slots)


def systematic(
    weights: Float[Tensor, "p n"], gen: torch.Generator, slots: Int[Tensor, "p 1"] | None = None
) -> Int[Tensor, "p n"]:
    """One uniform shared by all strata."""
    return _strata(weights, _uniform(len(weights), 1, gen), slots)


def residual(
    weights: Float[Tensor, "p n"], gen: torch.Generator, slots: Int[Tensor, "p 1"] | None = None
) -> Int[Tensor, "p n"]:
    """floor(k W_i) copies for certain, the rest multinomially from what is left."""
    p, n = weights.shape
    w, k = weights.double(), _some(slots, weights)
    w = w / w.sum(-1, keepdim=True)
    sure = (k * w + 1e-9).floor()
    left = (k * w - sure).clamp_min(0)
    fill = invert_cdf(torch.where(left.sum(-1, keepdim=True) > 0, left, w), _uniform(p, n, gen))
    ends = sure.cumsum(-1)
    grid = torch.arange(n, dtype=torch.float64, device=w.device).expand(p, n).contiguous()
    certain = torch.searchsorted(ends, grid, right=True)
    return torch.where(certain < n, certain, fill)


def without_replacement(
    weights: Float[Tensor, "p k"], n: int, gen: torch.Generator
) -> tuple[Int[Tensor, "p n"], Float[Tensor, "p n"]]:
    """n of k particles, none twice, with new weights of the same sum and E[new weight of i] = W_i.

    With c such that sum_i min(1, c W_i) = n, particles of c W >= 1 stay as they are; of the others each stays with
    probability c W_i, by one systematic draw, and then weighs 1/c. Of all schemes that is the one of least expected
    squared error of the weights. Where no more than n have weight, they stay, and the places left weigh 0.
    """
    w = weights.double()
    top, order = w.sort(-1, descending=True)
    rest = top.flip(-1).cumsum(-1).flip(-1)  # what is left when the j heaviest stay as they are
    j = torch.arange(n, device=w.device)
    thin = (n - j) * top[:, :n] < rest[:, :n]  # then c W < 1 for the heaviest of the rest
    few = ~thin.any(-1)
    sure = torch.where(few, n, thin.to(torch.int8).argmax(-1))
    c = (n - sure) / rest.gather(1, sure.clamp_max(n - 1)[:, None]).squeeze(1).clamp_min(torch.finfo(w.dtype).tiny)
    others = torch.where(torch.arange(w.shape[1], device=w.device) < sure[:, None], 0.0, top)
    place = (j - sure[:, None]).clamp_min(0)
    u = (place + _uniform(len(w), 1, gen)) / (n - sure).clamp_min(1)[:, None]
    drawn = invert_cdf(others, u)
    pick = torch.where(j < sure[:, None], j, drawn)
    weight = torch.where(j < sure[:, None], top[:, :n], (1 / c)[:, None])
    return order.gather(1, pick), weight


def fan_out(
    index: Int[Tensor, "p n"], weight: Float[Tensor, "p n"], grows: Bool[Tensor, "p n"], beam: int
) -> tuple[Int[Tensor, "p k"], Float[Tensor, "p k"]]:
    """``beam`` clones of every particle that grows, each with its share of the weight, in k = n * beam slots.

    A finished particle keeps one slot; its others are empty (weight 0).
    """
    first = torch.arange(beam, device=index.device) == 0
    share = torch.where(grows[:, :, None], weight[:, :, None] / beam, weight[:, :, None] * first)
    return index.repeat_interleave(beam, 1), share.flatten(1)


STEERING = "without_replacement"
"""The scheme that needs more candidates than it keeps."""

RESAMPLERS: dict[str, Scheme] = {
    "multinomial": multinomial,
    "stratified": stratified,
    "systematic": systematic,
    "residual": residual,
}
