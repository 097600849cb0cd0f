"""Is the posterior right on average? Ranks over simulated problems, and the calibration of probabilities.

Simulation-based calibration (Talts et al. 2018, arXiv 1804.06788; the ECDF view of Säilynoja et al. 2022): draw a
truth from the prior and data from the truth, draw k times from the posterior of that data; the rank of the truth's
statistic among the draws' is then uniform. A peak in the middle means draws that spread too wide, a U too narrow, a
slope a bias. Uniform ranks are necessary, not sufficient (the prior itself passes): use statistics that involve the
data, such as log_gamma.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int, Real, Shaped
from torch import Tensor

from retrodict.errors import InputError
from retrodict.numerics import ess


def _uniform(b: int, gen: torch.Generator) -> Tensor:
    return torch.rand(b, generator=gen, dtype=torch.float64, device=gen.device).cpu()


def sbc_ranks(truth: Real[Tensor, " b"], draws: Real[Tensor, "b k"], gen: torch.Generator) -> Int[Tensor, " b"]:
    """Rank 0..k of each problem's truth among its k unweighted posterior draws, ties broken at random by ``gen``.

    Uniform on 0..k if truth and draws are exchangeable, so the draws must be independent (thin a chain).
    """
    truth, draws = truth.double().cpu()[:, None], draws.double().cpu()
    below, ties = (draws < truth).sum(1), (draws == truth).sum(1)
    return below + (_uniform(len(truth), gen) * (ties + 1)).long().clamp_max(ties)


def sbc_pit(
    truth: Real[Tensor, " b"], draws: Real[Tensor, "b k"], log_w: Float[Tensor, "b k"], gen: torch.Generator
) -> Float[Tensor, " b"]:
    """The same for weighted draws: a number in [0, 1], uniform as the weighted draws approach the posterior.

    The truth counts as one more draw of weight 1 / ESS and its place among ties is random, so for equal weights this
    is (rank + U) / (k + 1), exactly uniform. With few effective draws the bias of self-normalised weights shows.
    A problem without weight is an error: drop it and say how many.
    """
    size = ess(log_w.double().cpu())
    if (size == 0).any():
        raise InputError(f"{int((size == 0).sum())} problems have no particle of positive weight; leave them out")
    w = torch.softmax(log_w.double().cpu(), 1)
    truth, draws = truth.double().cpu()[:, None], draws.double().cpu()
    below, ties = (w * (draws < truth)).sum(1), (w * (draws == truth)).sum(1)
    return (below * size + _uniform(len(truth), gen) * (ties * size + 1)) / (size + 1)


@dataclass(frozen=True)
class Uniformity:
    """Chi-square test of uniformity: ``counts`` in equal bins against ``expected``, and the p-value."""

    p_value: float
    statistic: float
    counts: Float[Tensor, " bins"]
    expected: Float[Tensor, " bins"]


def uniformity(ranks: Real[Tensor, " b"], k: int | None = None, bins: int = 0) -> Uniformity:
    """Are ranks 0..k (or, with k None, numbers in [0, 1]) uniform?

    ``bins`` defaults to b/10 within [2, 20], and to no more than there are ranks. The p-value is chi-square's, by the
    regularised incomplete gamma function; good while every bin expects 5 or more.
    """
    b = len(ranks)
    bins = bins or max(2, min(20, b // 10))
    if k is None:
        where = (ranks.double() * bins).long().clamp(0, bins - 1)
        expected = torch.full((bins,), b / bins, dtype=torch.float64)
    else:
        if b and (int(ranks.min()) < 0 or int(ranks.max()) > k):
            raise InputError(f"ranks among {k} draws lie in 0..{k}")
        bins = min(bins, k + 1)
        where = (ranks.long() * bins) // (k + 1)
        expected = torch.bincount(torch.arange(k + 1) * bins // (k + 1), minlength=bins).double() * b / (k + 1)
    counts = torch.bincount(where.cpu(), minlength=bins).double()
    statistic = float(((counts - expected).square() / expected.clamp_min(1e-300)).sum()) if b else 0.0
    half = torch.tensor([(bins - 1) / 2, statistic / 2], dtype=torch.float64)
    return Uniformity(float(torch.special.gammaincc(half[0], half[1])), statistic, counts, expected)


@dataclass(frozen=True)
class EcdfBand:
    """The ECDF minus the uniform's, at ``x``; uniform numbers stay within ± ``half`` everywhere w.p. >= level."""

    x: Float[Tensor, " points"]
    difference: Float[Tensor, " points"]
    half: float
    inside: bool


def ecdf_band(u: Float[Tensor, " b"], level: float = 0.95) -> EcdfBand:
    """ECDF difference of numbers in [0, 1] with the simultaneous Dvoretzky-Kiefer-Wolfowitz band (Massart's constant).

    Ranks: pass (rank + U) / (k + 1). Valid for every b; wide near the ends, where ``uniformity`` sees more.
    """
    b = len(u)
    x = u.double().cpu().sort().values
    after = torch.arange(1, b + 1, dtype=torch.float64) / b - x
    before = after - 1 / b
    difference = torch.where(after.abs() >= before.abs(), after, before)
    half = math.sqrt(math.log(2 / (1 - level)) / (2 * b))
    return EcdfBand(x, difference, half, bool(difference.abs().max() <= half))


@dataclass(frozen=True)
class Coverage:
    """Share of ``n`` problems whose truth lies in the region of credibility ``level``."""

    level: float
    share: float
    n: int

    @property
    def se(self) -> float:
        """Of the share, where the posterior is right: binomial."""
        return math.sqrt(self.level * (1 - self.level) / self.n)

    @property
    def z(self) -> float:
        """Standard errors by which the share is off: below 0 the posterior is too sure."""
        return (self.share - self.level) / self.se


def coverage(ranks: Int[Tensor, " b"], k: int, levels: Sequence[float], gen: torch.Generator) -> list[Coverage]:
    """Expected coverage of highest-density regions (Hermans et al. 2022, arXiv 2110.06581), from :func:`sbc_ranks` of
    log q.

    The truth lies in the region of credibility c where at most a share c of k draws are denser. Its place among the
    draws is (rank + U) / (k + 1), uniform where the posterior is right, also for discrete objects: ties in density are
    broken at random, as is the edge of a region that no set of objects meets exactly. Right coverage is necessary, not
    sufficient: the prior has it too.
    """
    denser = 1 - (ranks.double().cpu() + _uniform(len(ranks), gen)) / (k + 1)
    return [Coverage(c, float((denser <= c).double().mean()), len(ranks)) for c in levels]


def calibration_error(p: Real[Tensor, " b"], correct: Shaped[Tensor, " b"], bins: int = 10) -> float:
    """Expected calibration error: mean over rows of |accuracy - mean p| of the row's bin (equal widths on [0, 1]).

    Biased up: about sqrt(bins / b) / 3 even for perfect probabilities, so compare at equal b and bins.
    """
    p, hit = _checked(p, correct)
    where = (p * bins).long().clamp(0, bins - 1)
    off = torch.zeros(bins, dtype=torch.float64).index_add_(0, where, hit - p)
    return float(off.abs().sum() / len(p))


def brier(p: Real[Tensor, " b"], correct: Shaped[Tensor, " b"]) -> float:
    """Brier score: mean of (p - correct)^2, in [0, 1]; proper, lower is better, 1/4 for p = 1/2 throughout."""
    p, hit = _checked(p, correct)
    return float((p - hit).square().mean())


def auroc(score: Real[Tensor, " b"], positive: Shaped[Tensor, " b"]) -> float:
    """Area under the ROC curve: how often a positive's score exceeds a negative's, ties as half; NaN without both."""
    score, hit = score.double().cpu(), positive.bool().cpu()
    if score.shape != hit.shape:
        raise InputError("give one score and one true/false for each answer")
    n = int(hit.sum())
    if n in (0, len(hit)):
        return math.nan
    _, group, size = torch.unique(score, return_inverse=True, return_counts=True)
    rank = (size.cumsum(0) - (size - 1) / 2.0)[group]
    return (float(rank[hit].sum()) - n * (n + 1) / 2) / (n * (len(hit) - n))


@dataclass(frozen=True)
class RiskCoverage:
    """Error rate ``risk`` among the ``coverage`` most confident answers; ``area`` is its mean over coverages."""

    coverage: Float[Tensor, " b"]
    risk: Float[Tensor, " b"]
    area: float

    def at(self, coverage: float) -> float:
        """Risk when the given share of questions is answered."""
        return float(self.risk[max(math.ceil(coverage * len(self.risk) - 1e-9), 1) - 1])


def risk_coverage(confidence: Real[Tensor, " b"], correct: Shaped[Tensor, " b"]) -> RiskCoverage:
    """Risk-coverage curve (Geifman and El-Yaniv 2017): answers in falling confidence, error rate so far.

    Tied answers count as their mean, so the order of the rows does not matter. Any monotone confidence will do.
    """
    confidence, hit = confidence.double().cpu(), correct.double().cpu()
    _, group = torch.unique(-confidence, return_inverse=True)
    size = torch.bincount(group).double()
    wrong = (torch.zeros(len(size), dtype=torch.float64).index_add_(0, group, 1 - hit) / size)[group.sort().values]
    count = torch.arange(1, len(hit) + 1, dtype=torch.float64)
    risk = wrong.cumsum(0) / count
    return RiskCoverage(count / len(hit), risk, float(risk.mean()))


def _checked(p: Tensor, correct: Tensor) -> tuple[Tensor, Tensor]:
    p, hit = p.double().cpu(), correct.double().cpu()
    if p.shape != hit.shape or not len(p) or not bool(((p >= 0) & (p <= 1)).all()):
        raise InputError("give one probability in [0, 1] and one true/false for each answer")
    return p, hit
