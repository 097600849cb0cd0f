"""Distance of a sample from an exact table, and how large chance alone makes it.

A table is a mapping from objects (:attr:`Particles.keys`) to non-negative numbers; it is normalised here.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from retrodict.errors import InputError


def normalised(table: Mapping[Any, float]) -> dict[Any, float]:
    """The table divided by its sum."""
    total = math.fsum(table.values())
    if not (total > 0 and math.isfinite(total)) or min(table.values()) < 0:
        raise InputError("a table of probabilities needs non-negative numbers with a positive, finite sum")
    return {key: value / total for key, value in table.items()}


def total_variation(a: Mapping[Any, float], b: Mapping[Any, float]) -> float:
    """Total variation 1/2 sum |a - b| of two tables, in [0, 1]; an object that only one of them has counts in full."""
    a, b = normalised(a), normalised(b)
    return 0.5 * math.fsum(abs(a.get(key, 0.0) - b.get(key, 0.0)) for key in a.keys() | b.keys())


def tv_bound(p: Iterable[float] | Mapping[Any, float], n: float, level: float = 0.999) -> float:
    """The total variation between p and the frequencies of n independent draws of p is below this w.p. >= ``level``.

    Mean: E TV <= 1/2 sum sqrt(p (1 - p) / n) (Jensen); spread: one draw moves TV by at most 1/n, so McDiarmid adds
    sqrt(log(1 / (1 - level)) / (2 n)). Proven for n independent unweighted draws; with n an ESS it is a rule of thumb.
    """
    if n <= 0:
        return 1.0
    p = list(p.values() if isinstance(p, Mapping) else p)
    total = math.fsum(p)
    mean = 0.5 * math.fsum(math.sqrt(max(x / total * (1 - x / total), 0.0) / n) for x in p)
    return min(mean + math.sqrt(-math.log1p(-level) / (2 * n)), 1.0)


def kl(a: Mapping[Any, float], b: Mapping[Any, float]) -> float:
    """KL(a, b) = sum a log(a / b) of two tables, in nats; inf where a has an object that b excludes."""
    a, b = normalised(a), normalised(b)
    if any(value > 0 and b.get(key, 0.0) == 0 for key, value in a.items()):
        return math.inf
    return max(math.fsum(value * (math.log(value) - math.log(b[key])) for key, value in a.items() if value > 0), 0.0)


def kl_both(a: Mapping[Any, float], b: Mapping[Any, float]) -> tuple[float, float]:
    """KL(a, b) and KL(b, a), in nats."""
    return kl(a, b), kl(b, a)


def z_score(estimates: Float[Tensor, "r *x"], truth: Float[Tensor, "*x"] | float) -> Tensor:
    """(mean over r independent estimates - truth) in standard errors, entry by entry.

    For unbiasedness on the natural scale pass Z-hat (or Z-hat W(x)), not its logarithm, and choose r and the sampler's
    n so that sd(mean) is a few percent of the truth. Where all r agree: 0 if they equal the truth to 1e-9, else inf.
    """
    x = torch.as_tensor(estimates).double()
    if x.shape[0] < 2:
        raise InputError("z_score needs at least two independent estimates")
    off = x.mean(0) - torch.as_tensor(truth, dtype=torch.float64)
    se = x.std(0) / math.sqrt(x.shape[0])
    scale = x.abs().amax(0).clamp_min(1e-300)
    same = se <= 1e-12 * scale
    exact = torch.where(off.abs() <= 1e-9 * scale, 0.0, torch.copysign(torch.tensor(math.inf, dtype=x.dtype), off))
    return torch.where(same, exact, off / torch.where(same, torch.ones_like(se), se))
