"""Bounds on the log-evidence log Z from log-weights, and the two KLs between a policy q and the posterior.

Write w(z) = gamma(z) / q(z), Z = sum gamma, post = gamma / Z; ``log_w = log_gamma - log_q`` in nats, with the P_B of
the object's path included where an object has several. Every function averages over independent repetitions and gives
the standard error of that average. What each average estimates (so its bias as an estimate of log Z):

| function     | expectation                                         | bias                                     |
|--------------|-----------------------------------------------------|------------------------------------------|
| elbo         | E_q[log w]                                          | - KL(q, post)                            |
| iwae_lower   | E log mean_K w, all K from q                        | in [-KL(q, post), 0], up to 0 as K grows |
| smc_lower    | E log Z-hat of SMC                                  | <= 0 (Jensen), about -Var(Z-hat / Z) / 2 |
| log_evidence | log mean_r Z-hat (consistent as r grows)            | <= 0, a 1/r share of smc_lower's         |
| eubo         | E_post[log w]                                       | + KL(post, q)                            |
| iwae_upper   | E log mean_K w, one from post and K - 1 from q      | in [0, KL(post, q)], down to 0           |
| smc_upper    | E log Z-hat of conditional SMC around an exact draw | >= 0, since E[Z / Z-hat] = 1             |

Upper bounds need *exact* posterior draws; a draw that is only close breaks them. One exact draw is noisy (standard
deviations of 6 nats were seen): average over many simulated problems. Sources: Grosse, Ghahramani and Adams 2015
(bidirectional Monte Carlo); Burda et al. 2016 (IWAE); Zhao et al. 2024, arXiv 2404.17546 (the SMC pair and both KLs).

Shapes: the last axes are repetitions of one problem. One more axis in front, ``[m, ...]``, holds m problems: the value
is then the mean over problems of their log-evidence bounds and the error is the one over problems.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import lru_cache

import torch
from jaxtyping import Float
from torch import Tensor

from retrodict.errors import InputError
from retrodict.numerics import jackknife_log_mean, log_mean_exp

CROSSED = 4.5
"""Standard errors by which an upper bound must lie below a lower one before it is called a contradiction."""


@lru_cache
def t_quantile(df: int, level: float = 0.95) -> float:
    """Half-width, in standard errors, of a two-sided Student-t interval with ``df`` degrees of freedom.

    Exact for integer ``df`` (the finite trigonometric series, Abramowitz and Stegun 26.7.3-4), normal above 400.
    """
    if df < 1:
        return math.inf
    if df > 400:
        return float(torch.special.ndtri(torch.tensor(0.5 + level / 2, dtype=torch.float64)))

    def inside(theta: float) -> float:
        c, odd = math.cos(theta), df % 2
        term, total = (c if odd else 1.0), 0.0
        for i in range(1 + odd, df, 2):
            total += term
            term *= c * c * i / (i + 1)
        return 2 / math.pi * (theta + math.sin(theta) * total) if odd else math.sin(theta) * total

    low, high = 0.0, math.pi / 2
    for _ in range(80):
        mid = (low + high) / 2
        low, high = (mid, high) if inside(mid) < level else (low, mid)
    return math.sqrt(df) * math.tan(low)


@dataclass(frozen=True)
class Bound:
    """A Monte Carlo estimate of a bound on log Z, in nats.

    Attributes:
        value: the estimate; -inf for a lower bound some of whose draws have weight zero.
        se: its standard error over ``n`` independent repetitions; inf where they cannot tell (one, or infinite values).
        n: repetitions (problems, where there are several).
        kind: ``lower``, ``upper`` or ``estimate``.
        per_problem: the value of each problem, where there are several.
    """

    value: float
    se: float
    n: int
    kind: str
    per_problem: tuple[float, ...] = field(default=(), repr=False, compare=False)

    def interval(self, level: float = 0.95) -> tuple[float, float]:
        """Student-t interval for the expectation (not for log Z: the bias is not in it)."""
        if not math.isfinite(self.se):
            return -math.inf, math.inf
        half = t_quantile(self.n - 1, level) * self.se
        return self.value - half, self.value + half

    def __str__(self) -> str:
        sign = {"lower": ">=", "upper": "<=", "estimate": "~"}[self.kind]
        error = f" ± {self.se:.2f}" if math.isfinite(self.se) else ""
        return f"log Z {sign} {self.value:.2f}{error} nats (n = {self.n})"


def _check(name: str, x: Tensor, dims: int) -> Tensor:
    if x.dim() not in (dims, dims + 1):
        raise InputError(f"{name} has {x.dim()} axes; give {dims}, or {dims + 1} with one for problems in front")
    if torch.isnan(x).any():
        raise InputError(f"{name} holds NaN; a zero weight is written as -inf")
    return x.double()


def _average(x: Float[Tensor, "m r"] | Float[Tensor, " r"], kind: str) -> Bound:
    rows = x.mean(-1) if x.dim() == 2 and x.shape[0] > 1 else x.reshape(-1)
    n = rows.numel()
    if n == 0:
        raise InputError("a bound needs at least one draw")
    known = n > 1 and bool(rows.isfinite().all())
    se = float(rows.std()) / math.sqrt(n) if known else math.inf
    return Bound(float(rows.mean()), se, n, kind, tuple(rows.tolist()) if x.dim() == 2 and x.shape[0] > 1 else ())


def elbo(log_w_q: Float[Tensor, "*m n"]) -> Bound:
    """Lower bound E_q[log w] from n draws of q. Biased low by KL(q, post): -inf once q puts mass on gamma = 0."""
    return _average(_check("log_w_q", log_w_q, 1), "lower")


def eubo(log_w_posterior: Float[Tensor, "*m n"]) -> Bound:
    """Upper bound E_post[log w] from n exact posterior draws. Biased high by KL(post, q): inf where q misses one.

    Draws of a chain are not independent: pass one mean a chain, else the error is too small.
    """
    return _average(_check("log_w_posterior", log_w_posterior, 1), "upper")


def iwae_lower(log_w: Float[Tensor, "*m r k"]) -> Bound:
    """Lower bound E log mean_k w, all k from q, averaged over r repetitions. k = 1 is the ELBO."""
    return _average(log_mean_exp(_check("log_w", log_w, 2)), "lower")


def iwae_upper(log_w_exact: Float[Tensor, "*m r"], log_w_q: Float[Tensor, "*m r j"]) -> Bound:
    """Upper bound E log mean over one exact posterior draw and j = K - 1 draws of q. j = 0 is the EUBO."""
    exact = _check("log_w_exact", log_w_exact, 1)
    both = torch.cat([exact.unsqueeze(-1), _check("log_w_q", log_w_q, 2)], -1)
    return _average(log_mean_exp(both), "upper")


def smc_lower(log_z: Float[Tensor, "*m r"]) -> Bound:
    """Lower bound: the mean of log Z-hat over r independent runs of SMC (or any unbiased Z-hat)."""
    return _average(_check("log_z", log_z, 1), "lower")


def smc_upper(log_z_conditional: Float[Tensor, "*m r"]) -> Bound:
    """Upper bound: the mean of log Z-hat over r runs of conditional SMC, each around its own exact posterior draw.

    Valid only if the conditional resampling is (E[Z / Z-hat] = 1: multinomial is, plain systematic is not).
    """
    return _average(_check("log_z_conditional", log_z_conditional, 1), "upper")


def log_evidence(log_z: Float[Tensor, " r"]) -> Bound:
    """Estimate of log Z: log of the mean Z-hat over r independent runs, with its jackknife standard error.

    Biased low by about Var(Z-hat) / (2 r Z^2); with heavy tails by more, and the error is then too small as well.
    """
    x = _check("log_z", log_z, 1).reshape(-1)
    value, se = jackknife_log_mean(x)
    return Bound(float(value), float(se) if math.isfinite(float(se)) else math.inf, x.numel(), "estimate")


def log_z_interval(log_z: Float[Tensor, " r"], level: float = 0.95, within: float = 0.0) -> tuple[float, float]:
    """Interval of log Z from r independent unbiased estimates Z-hat, by their log-normal limit.

    log Z-hat of SMC tends to N(log Z - s^2/2, s^2) (Berard, Del Moral and Doucet 2014, arXiv:1307.0181), so log Z is
    centred on mean + s^2/2, with error (s^2/r + s^4 / (2 (r - 1)))^1/2 and Student's quantile (Cox's interval; Zhou and
    Gao 1997). s^2 is the variance over runs, but never less than ``within``, what the runs' own weights say of it:
    a few runs that agree by chance are no reason for trust. Tails heavier than the log-normal's still escape it. One
    run, or one whose Z-hat is 0, bounds nothing.
    """
    x = _check("log_z", log_z, 1).reshape(-1)
    r = x.numel()
    if r < 2 or not bool(x.isfinite().all()):
        return -math.inf, math.inf
    s2 = max(float(x.var()), within)
    middle = float(x.mean()) + s2 / 2
    half = t_quantile(r - 1, level) * math.sqrt(s2 / r + s2 * s2 / (2 * (r - 1)))
    return middle - half, middle + half


def certain_lower(log_z: Float[Tensor, " r"], level: float = 0.95) -> float:
    """log Z is above this with probability at least ``level``, whatever the tails: Markov on the unbiased mean Z-hat.

    It is log mean Z-hat - log(1 / (1 - level)): 3.0 nats below the estimate at 95%.
    """
    return float(log_mean_exp(_check("log_z", log_z, 1).reshape(-1))) + math.log1p(-level)


def certain_upper(log_z_conditional: Float[Tensor, " r"], level: float = 0.95) -> float:
    """log Z is below this with probability at least ``level``: Markov on E[Z / Z-hat] = 1 of conditional SMC.

    Needs runs around exact posterior draws, as ``smc_upper`` does. Without such a draw nothing this general bounds
    log Z from above: an unbiased Z-hat can miss most of Z in every run but a rare one.
    """
    x = _check("log_z_conditional", log_z_conditional, 1).reshape(-1)
    return -float(log_mean_exp(-x)) - math.log1p(-level)


def relative_variance(log_z_conditional: Float[Tensor, " r"], log_z: float) -> tuple[float, float]:
    """Var(Z-hat) / Z^2 of free SMC, and its standard error, from r runs of conditional SMC around posterior draws.

    A conditional run's law is the free one's times Z-hat / Z (Andrieu, Doucet and Holenstein 2010), so

        E_free[Z-hat^2] = Z E_conditional[Z-hat]

    Free runs see this variance only once they have met what carries it: where Z-hat is nearly always 0 their own spread
    is 0 as well. Needs exact posterior draws, as ``smc_upper``, and log Z; it is the variance under multinomial
    resampling, which conditional SMC has.
    """
    ratio = (_check("log_z_conditional", log_z_conditional, 1).reshape(-1) - log_z).exp()
    se = float(ratio.std()) / math.sqrt(ratio.numel()) if ratio.numel() > 1 else math.inf
    return float(ratio.mean()) - 1, se


@dataclass(frozen=True)
class Span:
    """A number in nats with a 95% interval; ``value`` is NaN where only the interval is known."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.2f} [{self.low:.2f}, {self.high:.2f}]"


@dataclass(frozen=True)
class TwoSided:
    """ELBO and EUBO of one q, and what they say about it.

    Attributes:
        lower: the ELBO.
        upper: the EUBO.
        gap: EUBO - ELBO = KL(q, post) + KL(post, q), for which no log Z is needed.
        kl_q_post: log Z - ELBO: large where q puts mass off the posterior.
        kl_post_q: EUBO - log Z: large where q misses a part of the posterior.
        crossed: the upper bound lies below the lower one by more than CROSSED standard errors: some draw was not
            exact, or the two log-weights are of different targets.
    """

    lower: Bound
    upper: Bound
    gap: Span
    kl_q_post: Span
    kl_post_q: Span
    crossed: bool

    def __str__(self) -> str:
        text = f"{self.lower}\n{self.upper}\nKL(q, post) {self.kl_q_post}, KL(post, q) {self.kl_post_q}, sum {self.gap}"
        return text + ("\nCROSSED: the upper bound lies below the lower one" if self.crossed else "")


def two_sided(
    lower: Bound, upper: Bound, log_z: float | Bound | tuple[Bound, Bound] | None = None, level: float = 0.95
) -> TwoSided:
    """Both KLs of q from its ELBO and EUBO (the ``elbo`` and ``eubo`` of the same q).

    ``log_z`` places log Z between them: its value, an estimate, or a pair (tighter lower, tighter upper), such as IWAE
    or SMC bounds, whose midpoint is used and whose outer interval is carried. Without it the sum is all that is known:
    each KL is then NaN with the interval from 0 to the sum. Bounds over the same problems are paired.
    """
    sign = upper.value - lower.value
    if len(lower.per_problem) > 1 and len(lower.per_problem) == len(upper.per_problem):
        paired = torch.tensor(upper.per_problem, dtype=torch.float64) - torch.tensor(lower.per_problem).double()
        se = float(paired.std()) / math.sqrt(paired.numel())
    else:
        se = math.hypot(lower.se, upper.se)
    df = min(lower.n, upper.n) - 1
    half = t_quantile(df, level) * se if math.isfinite(se) else math.inf
    gap = Span(sign, max(sign - half, 0.0), sign + half)
    if log_z is None:
        kls = (Span(math.nan, 0.0, gap.high),) * 2
    else:
        low, mid, high = _placed(log_z, level)
        a, b = lower.interval(level), upper.interval(level)
        kls = (
            Span(mid - lower.value, max(low - a[1], 0.0), high - a[0]),
            Span(upper.value - mid, max(b[0] - high, 0.0), b[1] - low),
        )
    return TwoSided(lower, upper, gap, kls[0], kls[1], crossed=bool(sign < -CROSSED * se) and math.isfinite(se))


def _placed(log_z: float | Bound | tuple[Bound, Bound], level: float) -> tuple[float, float, float]:
    if isinstance(log_z, Bound):
        low, high = log_z.interval(level)
        return low, log_z.value, high
    if isinstance(log_z, tuple):
        below, above = log_z
        return below.interval(level)[0], (below.value + above.value) / 2, above.interval(level)[1]
    return log_z, log_z, log_z
