"""Exactness gates: is a sampler right on a target whose every object can be listed?

Weighted averages of one run are biased O(1/n), so nothing here looks at one run.
With R independent runs, Z-hat_r W_r(x) = mean over the run's particles of w 1[x] is unbiased:

    E[Z-hat] = Z,  E[Z-hat W(x)] = gamma(x);     conditional SMC: E[Z / Z-hat] = P(Z-hat > 0),  E[W(x)] = gamma(x) / Z

Each is a z-test over runs. Counts of rare objects are skewed, so a standard error is taken at the larger of what was
seen and what is true (:func:`z_objects`). The total variation of the pooled weighted counts stands beside the bound
that chance keeps to with probability 99.9% (:func:`weighted_tv`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from retrodict.diagnostics.divergence import tv_bound, z_score
from retrodict.numerics import NEG_INF, at_end
from retrodict.particles import Particles
from retrodict.policies.base import FiniteStepper
from retrodict.records import Rollouts, cat_rollouts
from retrodict.rng import generator
from retrodict.samplers.common import base_of, log_pb_of, proposal
from retrodict.spaces.enumerate import enumerate_objects
from retrodict.targets.algebra import Target

Z_BAR = 4.5
SE_BAR = 0.02
LEVEL = 0.999
MIN_HITS = 20
PILOT = 200
MAX_RUNS = 20_000


@dataclass(frozen=True)
class Gate:
    """One number and the bar it must stay under."""

    metric: str
    value: float
    bar: float
    note: str = ""

    @property
    def holds(self) -> bool:
        """Whether it does (NaN does not)."""
        return self.value <= self.bar


@dataclass(frozen=True)
class Exact:
    """One problem of a target, enumerated: paths, and the objects they reach.

    Attributes:
        paths: every path, as ``spaces.enumerate`` gives them.
        of: the object each path reaches.
        keys: number of each object, by key.
        log_gamma: of each path's object. ``log_pb`` is the path's share of it, 0 for one path an object.
        log_q: of each path under the proposal, and ``log_base`` under what that bends (itself otherwise).
    """

    paths: Rollouts
    of: Int[Tensor, " paths"]
    keys: Mapping[tuple[int, ...], int]
    log_gamma: Float[Tensor, " paths"]
    log_pb: Float[Tensor, " paths"]
    log_q: Float[Tensor, " paths"]
    log_base: Float[Tensor, " paths"]

    def law(self, log_p: Float[Tensor, " paths"]) -> Float[Tensor, " objects"]:
        """Sum of exp(log_p) over the paths of each object."""
        out = torch.zeros(len(self.keys), dtype=torch.float64)
        return out.index_add(0, self.of, log_p.double().exp())

    @property
    def gamma(self) -> Float[Tensor, " objects"]:
        """gamma of each object."""
        return self.law(self.log_gamma + self.log_pb)

    @property
    def z(self) -> Tensor:
        """The evidence."""
        return self.gamma.sum()

    def draw(self, n: int, seed: int) -> Rollouts:
        """n paths from the posterior (an object's path in proportion to P_B)."""
        weights = (self.log_gamma + self.log_pb - self.z.log()).exp()
        return self.paths.take(torch.multinomial(weights, n, replacement=True, generator=generator(seed)))


def log_path(policy: FiniteStepper, paths: Rollouts) -> Float[Tensor, " paths"]:
    """log q of whole recorded paths, stop included."""
    scores = policy.score(paths)
    inside = torch.arange(paths.moves.shape[1]) < paths.n[:, None]
    moves = torch.where(inside, scores.log_q.double(), 0.0).sum(1)
    return moves + at_end(scores.log_stop.double(), paths.n, paths.stop)


def enumerate_target(target: Target, policy: FiniteStepper | None = None) -> list[Exact]:
    """Every problem's exact answer, computed once for all gates."""
    full = proposal(target, policy)
    out = []
    for p in range(len(target.problems)):
        paths = target.terms(enumerate_objects(target.space, p))
        keys: dict[tuple[int, ...], int] = {}
        of = torch.tensor([keys.setdefault(k, len(keys)) for k in target.space.keys(paths)])
        base = policy if policy is not None else base_of(full)  # what plain draws come from
        out.append(Exact(paths, of, keys, target.log_gamma(paths), log_pb_of(target, paths), log_path(full, paths),
                         log_path(base, paths)))  # fmt: skip
    return out


# -- statistics ---------------------------------------------------------------------------------------------------


def per_run(exact: Exact, keys: list[tuple[int, ...]], w: Float[Tensor, "r n"]) -> Float[Tensor, "r objects"]:
    """Mean over each run's n particles of w 1[x], for every object x."""
    r, n = w.shape
    foreign = next((k for k in keys if k not in exact.keys), None)
    if foreign is not None:
        raise AssertionError(f"a sampler returned {foreign}, which is not an object of the space")
    of = torch.tensor([exact.keys[k] for k in keys])
    flat = torch.arange(r).repeat_interleave(n) * len(exact.keys) + of
    return (
        torch.zeros(r * len(exact.keys), dtype=torch.float64).index_add(0, flat, w.flatten().double() / n).view(r, -1)
    )


def common(y: Float[Tensor, "r objects"], truth: Float[Tensor, " objects"], n: int, least: int) -> Tensor:
    """Objects that at least ``least`` runs met, and that R runs of n exact draws would meet as often.

    Choosing by hits cannot raise the chance of a false alarm over all objects; what is left out is in the total. The
    second condition leaves out what is mostly seen with tiny weights, its mean being made by events too rare to see.
    """
    return ((y > 0).sum(0) >= least) & (len(y) * n * truth / truth.sum() >= least)


def z_objects(y: Float[Tensor, "r objects"], truth: Float[Tensor, " objects"], n: int = 1) -> tuple[float, int]:
    """Largest |z| of mean over runs of y against the truth, over the common objects; and how many there are.

    ``n`` is the number of particles a run that can carry an object at its full weight.

    The variance of a count grows with its mean, so the standard error is that at the larger of the two means: with
    few hits a plain z would call a low count impossible, its own spread being low as well.
    """
    pick = common(y, truth, n, MIN_HITS)
    if not pick.any():
        return 0.0, 0
    y, truth = y[:, pick], truth[pick]
    z = z_score(y, truth) / (truth / y.mean(0)).sqrt().clamp_min(1.0)
    return float(z.abs().max()), int(pick.sum())


def weighted_tv(
    y: Float[Tensor, "r objects"], gamma: Float[Tensor, " objects"], n: int = 1, level: float = LEVEL, seed: int = 0
) -> tuple[float, float]:
    """Total variation of pooled weighted counts to gamma / Z, and the bound chance keeps to with probability ``level``.

    With W(x) = sum_r y_r(x) / sum_r Z-hat_r and pi = gamma / Z the delta method gives

        W(x) - pi(x) ~ 1/R sum_r e_r(x),     e_r(x) = (y_r(x) - pi(x) Z-hat_r) / Z

    so W - pi is Gaussian with the covariance of e over the R independent runs, whatever happens within a run. Objects
    that fewer than MIN_HITS / 4 runs met are put into one cell c, and exactly

        TV <= 1/2 sum over common x |W(x) - pi(x)| + 1/2 |W(c) - pi(c)| + pi(c)

    The bound is that expression's ``level`` quantile over 4,000 draws of the Gaussian.
    """
    r, total = len(y), gamma.sum()
    pi, w = gamma / total, y.mean(0) / y.sum(1).mean()
    tv = 0.5 * float((w - pi).abs().sum())
    pick = common(y, gamma, n, MIN_HITS // 4)
    cells = torch.cat([y[:, pick], y[:, ~pick].sum(1, keepdim=True)], 1)
    centre = torch.cat([pi[pick], pi[~pick].sum(0, keepdim=True)])
    e = (cells - centre * y.sum(1, keepdim=True)) / total
    e = (e - e.mean(0)) / r
    values, axes = torch.linalg.eigh(e.T @ e)
    root = (axes * values.clamp_min(0).sqrt()).T.float()
    draws = (torch.randn(4000, len(root), generator=generator(seed)) @ root).abs().sum(1) / 2
    return tv, min(float(draws.quantile(level)) + float(pi[~pick].sum()), 1.0)


# -- gates --------------------------------------------------------------------------------------------------------


def runs_for(relative_sd: float, least: int) -> int:
    """Independent runs that bring the standard error of Z-hat under SE_BAR of Z, with a third to spare."""
    return max(least, min(math.ceil((relative_sd / (0.67 * SE_BAR)) ** 2), MAX_RUNS))


def _sized(
    sample: Callable[[int, int], Particles], exact: list[Exact], power: float, seeds: int, seed: int
) -> tuple[Particles, Float[Tensor, "m r"], int]:
    """Runs of a batched sampler, (Z-hat / Z)^power of each, and how many.

    A pilot of PILOT runs, whose draws are not used, says how many are needed; where its tail had not shown yet, what
    was drawn is the next pilot.
    """
    log_z = torch.stack([e.z for e in exact]).log()[:, None]

    def call(runs: int, s: int) -> tuple[Particles, Tensor]:
        p = sample(runs, s)
        assert p.log_z is not None
        return p, (power * (p.log_z.double() - log_z)).exp()

    p, ratio = call(PILOT, seed + 1)
    for attempt in range(3):
        runs = runs_for(float(ratio.std(1).max()), seeds)
        p, ratio = call(runs, seed + 100 * attempt)
        if float(ratio.std(1).max()) / math.sqrt(runs) <= SE_BAR:
            break
    return p, ratio, runs


def evidence_gates(
    exact: list[Exact], sample: Callable[[int, int], Particles], seeds: int = 200, seed: int = 0
) -> list[Gate]:
    """Gates of a sampler that estimates the evidence; ``sample(runs, seed)`` is one batched call.

    There are at least ``seeds`` independent runs, and as many as the standard error of Z-hat asks for.
    """
    p, ratio, runs = _sized(sample, exact, 1.0, seeds, seed)
    assert p.log_z is not None
    worst_z = worst_x = 0.0
    tested, tv = 0, (0.0, 1.0)
    for i, e in enumerate(exact):
        worst_z = max(worst_z, abs(float(z_score(ratio[i], 1.0))))
        y = per_run(e, list(p.keys[i * p.k : (i + 1) * p.k]), p.log_w[i].double().exp().view(runs, -1))
        apart = (y.sum(1) - p.log_z[i].double().exp()).abs().max() / e.z
        if apart > 1e-6:
            raise AssertionError(f"mean weight and Z-hat of a run differ by {float(apart):.2g} of Z")
        z_x, k = z_objects(y, e.gamma, p.k // runs)
        worst_x, tested = max(worst_x, z_x), tested + k
        tv = _worse(tv, weighted_tv(y, e.gamma, p.k // runs))
    return [
        Gate("|z| of evidence", worst_z, Z_BAR, f"{runs} runs"),
        Gate("|z| of objects", worst_x, Z_BAR, f"{tested} objects"),
        Gate("total variation", *tv),
        Gate("s.e. / Z", float(ratio.std(1).max()) / math.sqrt(runs), SE_BAR),
    ]


def _worse(a: tuple[float, float], b: tuple[float, float]) -> tuple[float, float]:
    """The pair (value, bar) that is nearer to its bar, or further beyond it."""
    return max(a, b, key=lambda x: x[0] / max(x[1], 1e-300))


def conditional_gates(
    exact: list[Exact],
    sample: Callable[[Rollouts, int, int], Particles],
    free: Callable[[int, int], Particles],
    seeds: int = 200,
    seed: int = 0,
) -> list[Gate]:
    """Gates of conditional SMC; ``sample(exact paths, runs, seed)`` holds one exact path a population.

    E[Z / Z-hat] = P(Z-hat > 0) of the same SMC run freely, ``free(runs, seed)``: 1 where populations cannot die out
    (a population that holds an exact path never does). Since the kernel leaves the posterior alone, E[W(x)] is
    gamma(x) / Z over runs.
    """

    def call(runs: int, s: int) -> Particles:
        return sample(cat_rollouts([e.draw(runs, s + 7 + i) for i, e in enumerate(exact)]), runs, s)

    p, ratio, runs = _sized(call, exact, -1.0, seeds, seed)
    alive = free(runs, seed + 2).log_z
    assert p.log_z is not None and alive is not None
    gap = ratio - (alive > NEG_INF).double()
    worst_z, worst_x, tested, tv = 0.0, 0.0, 0, (0.0, 1.0)
    for i, e in enumerate(exact):
        worst_z = max(worst_z, abs(float(z_score(gap[i], 0.0))))
        w = (p.log_w[i].double().view(runs, -1) - p.log_z[i].double()[:, None]).exp()
        y = per_run(e, list(p.keys[i * p.k : (i + 1) * p.k]), w)
        z_x, k = z_objects(y, e.gamma / e.z)
        worst_x, tested = max(worst_x, z_x), tested + k
        tv = _worse(tv, weighted_tv(y, e.gamma / e.z))
    return [
        Gate(
            "|z| of E[Z / Z-hat]", worst_z, Z_BAR, f"{runs} runs, {float((alive > NEG_INF).double().mean()):.1%} alive"
        ),
        Gate("|z| of objects", worst_x, Z_BAR, f"{tested} objects"),
        Gate("total variation", *tv),
        Gate("s.e. / Z", float(ratio.std(1).max()) / math.sqrt(runs), SE_BAR),
    ]


def law_gates(exact: list[Exact], p: Particles, laws: list[Tensor]) -> list[Gate]:
    """Gates of independent unweighted draws against the law they should have, one ``[objects]`` a problem."""
    worst, tested, tv = 0.0, 0, (0.0, 1.0)
    for i, (e, law) in enumerate(zip(exact, laws, strict=True)):
        y = per_run(e, list(p.keys[i * p.k : (i + 1) * p.k]), torch.ones(p.k, 1))
        z_x, k = z_objects(y, law)
        worst, tested = max(worst, z_x), tested + k
        tv = _worse(tv, (0.5 * float((y.mean(0) - law / law.sum()).abs().sum()), tv_bound(law.tolist(), p.k, LEVEL)))
    note = f"{p.k} draws, {tested} objects"
    return [Gate("|z| of objects", worst, Z_BAR, note), Gate("total variation", *tv)]


def best_law(exact: Exact, score: Float[Tensor, " paths"], n: int) -> Float[Tensor, " objects"]:
    """P(the first best of n independent draws is x): q(x) (F(s)^n - F(s-)^n) / (F(s) - F(s-)), s the score of x."""
    q = exact.log_base.double().exp()
    levels, at = score.unique(return_inverse=True)
    mass = torch.zeros(len(levels), dtype=torch.float64).index_add(0, at, q)
    upto = mass.cumsum(0)
    below = upto - mass
    share = torch.where(mass > 0, (upto**n - below**n) / mass.clamp_min(1e-300), 0.0)
    return exact.law((q * share[at]).log())


def log_bound(exact: list[Exact]) -> float:
    """The smallest log M with gamma P_B <= M q on every path."""
    ratios = [torch.where(e.log_gamma == NEG_INF, NEG_INF, e.log_gamma + e.log_pb - e.log_q) for e in exact]
    return max(float(r.max()) for r in ratios)
