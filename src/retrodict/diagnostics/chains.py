"""Agreement and autocorrelation of Markov chains, from one statistic per draw.

The equal weights of a chain make its ESS look like the number of draws; these two numbers do not.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor


def split_rhat(x: Float[Tensor, "c d"]) -> float:
    """Split R-hat of c chains of d draws (Gelman et al., BDA3, 11.4): 1 where halves of all chains agree.

    1 for a statistic that never changes (acceptance says whether that is the posterior or a stuck chain), inf for
    chains that stand still at different values, NaN for fewer than 4 draws.
    """
    d = x.shape[1] // 2
    if d < 2:
        return math.nan
    halves = torch.cat([x[:, :d], x[:, -d:]]).double()
    within, between = float(halves.var(1).mean()), d * float(halves.mean(1).var())
    if within == 0:
        return 1.0 if between == 0 else math.inf
    return math.sqrt((d - 1) / d + between / (d * within))


def chain_ess(x: Float[Tensor, "c d"]) -> float:
    """Effective number of draws for the mean of one statistic over c chains of d draws.

    Geyer's initial monotone sequence on the combined autocorrelation (Vehtari et al. 2021, arXiv 1903.08008, eq. 10).
    At most c d log10(c d); c d for a statistic that never changes; NaN for fewer than 4 draws.
    """
    c, d = x.shape
    if d < 4:
        return math.nan
    y = x.double().cpu().numpy()
    y = y - y.mean(1, keepdims=True)
    if not y.any():
        return float(c * d) if torch.unique(x).numel() == 1 else float(c)
    spectrum = np.fft.rfft(y, 2 * d, axis=1)
    gamma = np.fft.irfft(spectrum * spectrum.conj(), 2 * d, axis=1)[:, :d].real / d
    within = gamma[:, 0].mean() * d / (d - 1)
    total = within * (d - 1) / d + (float(x.double().mean(1).var()) if c > 1 else 0.0)
    rho = 1 - (within - gamma.mean(0)) / total
    rho[0] = 1.0
    pairs = rho[: d - d % 2].reshape(-1, 2)
    sums = pairs.sum(1)
    stop = int(np.argmax(sums <= 0)) if (sums <= 0).any() else len(sums)
    last = max(float(pairs[stop, 0]), 0.0) if 0 < stop < len(sums) else 0.0
    tau = max(-1 + 2 * float(np.minimum.accumulate(sums[: max(stop, 1)]).sum()) + last, 1 / math.log10(c * d))
    return c * d / tau
