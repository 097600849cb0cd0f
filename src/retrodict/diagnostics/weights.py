"""What the weights of one problem say about themselves: ESS, Pareto tail, shares.

Inputs are unnormalised log-weights in nats, -inf for zero, one problem at a time. None of these numbers can see a mode
that no particle found: they only ever lower trust. After resampling they describe the last stage alone.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from retrodict.numerics import ess, normalise

__all__ = ["ess", "max_share", "pareto_k", "pareto_threshold", "stage_variance", "weight_se", "zero_share"]


TIE = 1e-6
"""Log-weights this close are one weight: objects that were drawn twice, up to rounding."""


def max_share(log_w: Float[Tensor, " k"]) -> float:
    """Largest self-normalised weight; 0 where every weight is zero."""
    return float(normalise(log_w.double()).max())


def zero_share(log_w: Float[Tensor, " k"]) -> float:
    """Share of particles of weight zero: for unweighted draws of q, q's mass on objects the target excludes."""
    return float((log_w == -math.inf).double().mean())


def weight_se(log_w: Float[Tensor, " k"]) -> float:
    """Standard error (nats) of log mean w for k *independent* weights: sqrt((k / ESS - 1) / (k - 1)), delta method.

    Too small when the Pareto shape is above about 0.5. Not for weights that went through resampling.
    """
    k, size = log_w.numel(), float(ess(log_w.double()))
    return math.sqrt(max(k / size - 1, 0.0) / (k - 1)) if size > 0 and k > 1 else math.inf


def stage_variance(
    ess: Float[Tensor, "step r"], resampled: Bool[Tensor, "step r"], last: Float[Tensor, " r"], k: int
) -> Float[Tensor, " r"]:
    """What the weights of each SMC run say of Var(log Z-hat): the sum over stages of (k / ESS - 1) / k.

    Z-hat is a product of mean weights, one a stage between resamplings (``last``: the ESS at the end); each mean has
    that relative variance by the delta method. Stages are not independent, and what a lost branch would have been worth
    is in no weight: take it as a floor, not as the variance (Lee and Whiteley 2018, arXiv:1509.00394, for multinomial
    resampling, have an estimate that is; systematic resampling breaks it).
    """
    each = torch.where(resampled, (k / ess.double().clamp_min(1.0) - 1) / k, 0.0)
    return each.sum(0) + (k / last.double().clamp_min(1.0) - 1) / k


def pareto_threshold(k: int) -> float:
    """Largest Pareto shape at which an importance estimate from k draws can be trusted: min(1 - 1/log10 k, 0.7).

    Vehtari, Simpson, Gelman, Yao and Gabry 2024 (JMLR 25, arXiv 1507.02646), section 3. Above 1 the mean weight, so
    the evidence, has no finite expectation as far as the tail tells, and no number of draws helps.
    """
    return min(1 - 1 / math.log10(k), 0.7) if k > 1 else -math.inf


def pareto_k(log_w: Float[Tensor, " k"]) -> float:
    """Shape of the generalised Pareto distribution fitted to the largest weights (k-hat of PSIS).

    The tail is the top min(k/5, 3 sqrt k) draws, less those within TIE nats of the threshold; the fit is the empirical
    Bayes estimate of Zhang and Stephens 2009 with the prior of Vehtari et al. 2024 (10 draws' worth at 0.5). NaN where
    fewer than 5 draws lie above the threshold and nothing can be fitted (equal weights; fewer than 25 draws); inf where
    the weights below the largest vanish in float64, so that the tail has no end in sight.
    """
    log_w = log_w.double().flatten()
    k = log_w.numel()
    size = math.floor(3 * math.sqrt(k)) if k > 225 else k // 5
    if size < 5 or not torch.isfinite(log_w.max()):
        return math.nan
    log_w = (log_w - log_w.max()).sort().values
    above = log_w[-size:] > log_w[-size - 1] + TIE
    if int(above.sum()) < 5:
        return math.nan
    x = log_w[-size:].exp() - log_w[-size - 1].exp()
    x = x[above & (x > 0)]
    return _gpd_shape(x) if x.numel() >= 5 else math.inf


def _gpd_shape(x: Float[Tensor, " n"]) -> float:
    """Zhang and Stephens 2009: posterior mean of b = -k/sigma over a grid, then k; x sorted, positive, float64."""
    n = x.numel()
    grid = 30 + int(math.sqrt(n))
    i = torch.arange(1, grid + 1, dtype=torch.float64)
    quartile = x[int(n / 4 + 0.5) - 1]
    b = 1 / x[-1] + (1 - (grid / (i - 0.5)).sqrt()) / (3 * quartile)
    shape = torch.log1p(-b[:, None] * x).mean(1)
    profile = n * ((-b / shape).log() - shape - 1)
    weight = torch.softmax(profile, 0)
    weight = torch.where(weight >= 10 * torch.finfo(torch.float64).eps, weight, 0.0)
    best = (b * weight).sum() / weight.sum()
    fitted = float(torch.log1p(-best * x).mean())
    return (n * fitted + 10 * 0.5) / (n + 10)
