"""Diagnostics against enumeration, against known laws, and against errors planted on purpose."""

from __future__ import annotations

import math
import random
import time

import numpy as np
import pytest
import torch

from retrodict.diagnostics import (
    bounds,
    certain_lower,
    certain_upper,
    chain_ess,
    distinct_n,
    edit_distance,
    effective_distinct,
    elbo,
    eubo,
    iwae_lower,
    iwae_upper,
    kl_both,
    length_histogram,
    log_evidence,
    log_z_interval,
    max_share,
    ngram_diversity,
    pareto_k,
    pareto_threshold,
    relative_variance,
    smc_lower,
    smc_upper,
    split_rhat,
    t_quantile,
    total_variation,
    tv_bound,
    two_sided,
    weight_se,
    z_score,
    zero_share,
)
from retrodict.diagnostics.weights import stage_variance
from retrodict.errors import InputError
from retrodict.numerics import ess, jackknife_log_mean, log_mean_exp
from retrodict.rng import generator
from retrodict.samplers.smc import smc
from retrodict.testing.targets import cases

D = torch.float64

# An enumerable toy: 6 objects, log Z known.
LOG_GAMMA = torch.tensor([-1.0, -2.0, -0.5, -4.0, -3.0, -6.0], dtype=D)
LOG_Q = torch.tensor([0.3, 0.1, 0.2, 0.15, 0.05, 0.2], dtype=D).log()
LOG_Z = float(LOG_GAMMA.logsumexp(0))
POST = (LOG_GAMMA - LOG_Z).exp()
LOG_W = LOG_GAMMA - LOG_Q
KL_Q, KL_P = LOG_Z - float((LOG_Q.exp() * LOG_W).sum()), float((POST * LOG_W).sum()) - LOG_Z


def draw(p: torch.Tensor, shape: tuple[int, ...], seed: int) -> torch.Tensor:
    """Log-weights of draws from p."""
    picks = torch.multinomial(p, max(math.prod(shape), 1), replacement=True, generator=generator(seed))
    return LOG_W[picks][: math.prod(shape)].view(shape)


# Bounds


def test_bounds_bracket_log_z_and_have_the_expectations_of_enumeration():
    q, post = draw(LOG_Q.exp(), (20_000,), 0), draw(POST, (20_000,), 1)
    low, high = elbo(q), eubo(post)
    for bound, truth in ((low, LOG_Z - KL_Q), (high, LOG_Z + KL_P)):
        assert abs(bound.value - truth) < 4.5 * bound.se < 0.1
    assert low.value + 8 * low.se < LOG_Z < high.value - 8 * high.se
    lower = [iwae_lower(draw(LOG_Q.exp(), (8000, k), 2)) for k in (1, 4, 32)]
    upper = [iwae_upper(draw(POST, (8000,), 3), draw(LOG_Q.exp(), (8000, k - 1), 4)) for k in (1, 4, 32)]
    pair = torch.logsumexp(torch.stack([LOG_W[:, None].expand(6, 6), LOG_W.expand(6, 6)]), 0) - math.log(2)
    for first, bound in ((LOG_Q.exp(), iwae_lower(draw(LOG_Q.exp(), (8000, 2), 5))),
                         (POST, iwae_upper(draw(POST, (8000,), 6), draw(LOG_Q.exp(), (8000, 1), 7)))):  # fmt: skip
        assert abs(bound.value - float((first[:, None] * LOG_Q.exp() * pair).sum())) < 4.5 * bound.se
    for worse, better in zip(lower, lower[1:], strict=False):
        assert worse.value < better.value < LOG_Z + 4.5 * better.se
    for worse, better in zip(upper, upper[1:], strict=False):
        assert worse.value > better.value > LOG_Z - 4.5 * better.se
    assert lower[0].kind == "lower" and upper[0].kind == "upper"


def test_an_upper_bound_without_the_exact_sample_is_caught():
    """Planted: the 'exact' draws come from q. The upper bound then crosses the lower one."""
    low, fake = iwae_lower(draw(LOG_Q.exp(), (20_000, 16), 0)), eubo(draw(LOG_Q.exp(), (20_000,), 1))
    assert two_sided(low, fake).crossed
    assert fake.value < LOG_Z - 8 * fake.se
    assert not two_sided(low, eubo(draw(POST, (20_000,), 2))).crossed


def test_smc_bounds_and_markov_bounds():
    """Z-hat = mean of 4 weights; the conditional one keeps an exact draw among them, so E[Z / Z-hat] = 1."""
    plain = log_mean_exp(draw(LOG_Q.exp(), (20_000, 4), 0))
    conditional = log_mean_exp(torch.cat([draw(POST, (20_000, 1), 1), draw(LOG_Q.exp(), (20_000, 3), 2)], 1))
    assert smc_lower(plain).value < LOG_Z < smc_upper(conditional).value
    assert abs(float(z_score((LOG_Z - conditional).exp(), 1.0))) < 4.5
    assert abs(float(z_score(plain.exp(), math.exp(LOG_Z)))) < 4.5
    assert abs(float(z_score((LOG_Z - plain).exp(), 1.0))) > 8, "planted: the exact draw is not kept"
    for level in (0.5, 0.9, 0.99):
        low = sum(certain_lower(x[None], level) <= LOG_Z for x in plain[:2000]) / 2000
        high = sum(certain_upper(x[None], level) >= LOG_Z for x in conditional[:2000]) / 2000
        assert low >= level and high >= level
    assert certain_lower(torch.tensor([0.0]), 0.95) == pytest.approx(-math.log(20))


def test_the_variance_of_z_hat_comes_out_of_conditional_runs():
    """Against the variance by enumeration of a mean of four weights, and against free runs that cannot see it."""
    conditional = log_mean_exp(torch.cat([draw(POST, (20_000, 1), 1), draw(LOG_Q.exp(), (20_000, 3), 2)], 1))
    exact = float((LOG_Q.exp() * (LOG_W - LOG_Z).exp().square()).sum() - 1) / 4
    value, se = relative_variance(conditional, LOG_Z)
    assert abs(value - exact) < 4.5 * se < 0.2 * exact
    free = log_mean_exp(draw(LOG_Q.exp(), (20_000, 4), 0))
    assert abs(relative_variance(free, LOG_Z)[0] - exact) > 8 * se, "planted: the exact draw is not kept"


def test_two_sided_gives_both_kls():
    low, high = elbo(draw(LOG_Q.exp(), (40_000,), 0)), eubo(draw(POST, (40_000,), 1))
    both = two_sided(low, high, log_z=LOG_Z)
    assert both.kl_q_post.low <= KL_Q <= both.kl_q_post.high and both.kl_q_post.high - both.kl_q_post.low < 0.1
    assert both.kl_post_q.low <= KL_P <= both.kl_post_q.high and both.kl_post_q.high - both.kl_post_q.low < 0.1
    assert both.gap.value == pytest.approx(both.kl_q_post.value + both.kl_post_q.value)
    unknown = two_sided(low, high)
    assert math.isnan(unknown.kl_q_post.value) and unknown.kl_q_post.high >= KL_Q and unknown.gap == both.gap
    tight = (iwae_lower(draw(LOG_Q.exp(), (4000, 64), 2)),
             iwae_upper(draw(POST, (4000,), 3), draw(LOG_Q.exp(), (4000, 63), 4)))  # fmt: skip
    placed = two_sided(low, high, log_z=tight)
    assert placed.kl_q_post.low <= KL_Q <= placed.kl_q_post.high < KL_Q + 0.2
    assert "CROSSED" not in str(placed) and str(low).startswith("log Z >= ")


def test_bounds_over_problems_cluster_and_pair():
    """Problems differ by 50 nats: the error of each bound is theirs, the paired gap has none of it."""
    shift = 50 * torch.randn(64, 1, generator=generator(0), dtype=D)
    low, high = elbo(draw(LOG_Q.exp(), (64, 200), 1) + shift), eubo(draw(POST, (64, 1), 2) + shift)
    assert low.n == 64 and 3 < low.se < 10
    gap = two_sided(low, high).gap
    assert gap.low <= KL_Q + KL_P <= gap.high and gap.high - gap.low < 1
    assert elbo(torch.zeros(1, 9)).n == 9


def test_zero_weights_and_bad_input():
    q = torch.cat([draw(LOG_Q.exp(), (9,), 0), torch.tensor([-math.inf])])
    assert elbo(q).value == -math.inf and elbo(q).se == math.inf and elbo(q).interval() == (-math.inf, math.inf)
    assert zero_share(q) == pytest.approx(0.1)
    dead = log_evidence(torch.tensor([-5.0, -math.inf, -5.1]))
    assert math.isfinite(dead.value) and dead.se == math.inf or math.isfinite(dead.se)
    assert log_evidence(torch.tensor([-5.0])).se == math.inf
    for bad in (torch.tensor([math.nan]), torch.zeros(2, 2, 2), torch.zeros(0)):
        with pytest.raises(InputError):
            elbo(bad)


def test_intervals_cover():
    x = LOG_Z + torch.randn(2000, 5, generator=generator(3), dtype=D)
    hits = [a <= LOG_Z <= b for a, b in (elbo(row).interval() for row in x)]
    assert abs(np.mean(hits) - 0.95) < 4.5 * math.sqrt(0.95 * 0.05 / 2000)
    normal = [abs(float(r.mean()) - LOG_Z) < 1.96 * float(r.std()) / math.sqrt(5) for r in x]
    assert np.mean(normal) < 0.91, "planted: the normal quantile in place of Student's"


def test_log_z_interval_covers_where_the_jackknife_does_not():
    gen = torch.Generator().manual_seed(3)
    for runs, sd, least in ((4, 0.3, 0.93), (4, 1.5, 0.89), (16, 1.0, 0.92)):
        log_z = sd * torch.randn(4000, runs, generator=gen, dtype=torch.float64) - sd * sd / 2  # E[Z-hat] = 1
        spans = [log_z_interval(row) for row in log_z]
        cover = sum(low <= 0 <= high for low, high in spans) / len(spans)
        value, se = jackknife_log_mean(log_z)
        plain = float((value.abs() <= t_quantile(runs - 1) * se).double().mean())
        assert least < cover < 0.975
        assert sd < 1 or cover > plain + 0.02  # the log of the mean sits too low, and its error is too small
    assert log_z_interval(torch.tensor([1.0])) == (-math.inf, math.inf)
    assert log_z_interval(torch.tensor([1.0, -math.inf])) == (-math.inf, math.inf)
    same = torch.full((5,), 2.0)
    assert log_z_interval(same) == (2.0, 2.0)
    low, high = log_z_interval(same, within=0.25)  # runs that agree by chance are not trusted beyond their weights
    assert low < 2.0 < high and high - low > 2 * 0.5 / math.sqrt(5)


def test_stage_variance_is_the_spread_of_runs():
    target = next(c.target for c in cases() if c.name == "short words")
    for n in (16, 64):
        runs = 600
        p = smc(target, n=n, seed=1, runs=runs, ess_threshold=0.9)
        assert p.log_z is not None and p.trace.ess is not None and p.trace.resampled is not None
        told = stage_variance(p.trace.ess, p.trace.resampled, ess(p.log_w[0].view(runs, -1)), n)
        assert 0.5 < float(told.mean() / p.log_z.var()) < 1.5
        last = stage_variance(p.trace.ess[:0], p.trace.resampled[:0], ess(p.log_w[0].view(runs, -1)), n)
        assert float(last.mean()) < 0.8 * float(told.mean()), "planted: earlier stages forgotten"


def test_t_quantile_is_scipys():
    stats = pytest.importorskip("scipy.stats")
    for df in (1, 2, 3, 4, 7, 30, 200, 5000):
        for level in (0.5, 0.95, 0.999):
            assert t_quantile(df, level) == pytest.approx(stats.t.ppf(0.5 + level / 2, df), rel=5e-3)
    assert t_quantile(0) == math.inf and bounds.t_quantile(6) == pytest.approx(2.446912, abs=1e-6)


# Weights


def test_pareto_k_of_known_tails():
    g = np.random.default_rng(0)
    for k in (0.1, 0.5, 0.8, 1.2):
        w = g.pareto(1 / k, 20_000) + 1
        assert pareto_k(torch.tensor(np.log(w))) == pytest.approx(k, abs=0.15)
    uniform = torch.tensor(g.uniform(1, 2, 20_000)).log()
    assert pareto_k(uniform) < -0.5
    heavier = 1.7 * torch.tensor(np.log(g.pareto(1.0, 2000)))
    assert pareto_k(heavier) > pareto_threshold(2000)


def test_pareto_k_is_arviz_psis():
    array_stats = pytest.importorskip("arviz_stats.base").array_stats
    g = np.random.default_rng(1)
    for scale in (0.3, 1, 3, 8):
        for n in (100, 226, 3000):
            x = g.normal(size=n) * scale
            assert pareto_k(torch.tensor(x)) == pytest.approx(float(array_stats.psislw(-x)[1]), abs=1e-6)


def test_pareto_k_where_there_is_nothing_to_fit():
    assert math.isnan(pareto_k(torch.zeros(100))) and math.isnan(pareto_k(torch.randn(20)))
    assert math.isnan(pareto_k(torch.full((100,), -math.inf)))
    assert pareto_k(torch.arange(100.0) * 1000) == math.inf
    assert math.isnan(pareto_k(1e-9 * torch.randn(200, dtype=D))), "rounding has no tail"
    half = torch.cat([torch.full((90,), -math.inf), torch.linspace(0, 1, 10)])
    assert math.isfinite(pareto_k(half))


def test_shares_and_weight_se():
    log_w = torch.tensor([0.0, 0.0, math.log(2), -math.inf])
    assert max_share(log_w) == pytest.approx(0.5) and zero_share(log_w) == 0.25
    assert max_share(torch.full((3,), -math.inf)) == 0 and weight_se(torch.full((3,), -math.inf)) == math.inf
    x = draw(LOG_Q.exp(), (3000, 400), 0)
    se = torch.tensor([weight_se(r) for r in x[:200]])
    assert float(se.mean()) == pytest.approx(float(log_mean_exp(x).std()), rel=0.08)


# Chains


def ar1(c: int, d: int, rho: float, seed: int, start: float = 0.0) -> torch.Tensor:
    e, x = torch.randn(c, d, generator=generator(seed), dtype=D), torch.full((c, d), start, dtype=D)
    for t in range(1, d):
        x[:, t] = rho * x[:, t - 1] + math.sqrt(1 - rho**2) * e[:, t]
    return x


def test_chain_numbers_are_arviz_and_see_disagreement():
    array_stats = pytest.importorskip("arviz_stats.base").array_stats
    long = [(2, 300, 0.97, seed) for seed in (4, 5, 8)]
    for case in [(4, 500, 0.9, 0), (2, 101, -0.5, 0), (4, 8, 0.3, 0), *long]:
        x = ar1(*case)
        axes = {"chain_axis": 0, "draw_axis": 1}
        assert chain_ess(x) == pytest.approx(float(array_stats.ess(x.numpy(), method="identity", **axes)), rel=1e-9)
        assert split_rhat(x) == pytest.approx(float(array_stats.rhat(x.numpy(), method="split", **axes)), rel=1e-9)
    assert chain_ess(ar1(1, 20_000, 0.8, 1)) == pytest.approx(20_000 / 9, rel=0.2)
    apart = ar1(4, 200, 0.5, 2) + torch.arange(4.0)[:, None]
    assert split_rhat(apart) > 1.2 and chain_ess(apart) < 20
    still = torch.arange(3.0)[:, None].expand(3, 10)
    assert split_rhat(still) == math.inf and chain_ess(still) == 3
    assert split_rhat(torch.ones(2, 10)) == 1 and math.isnan(split_rhat(torch.ones(2, 3)))


# Divergence


def test_tv_bound_holds_at_its_level_and_is_not_idle():
    p = POST
    for n in (10, 100, 1000):
        counts = torch.distributions.Multinomial(n, p)
        with torch.random.fork_rng():
            torch.manual_seed(n)
            tv = 0.5 * (counts.sample((4000,)) / n - p).abs().sum(1)
        assert (tv <= tv_bound(p.tolist(), n, 0.999)).double().mean() >= 0.999
        assert (tv <= tv_bound(p.tolist(), n, 0.5)).double().mean() >= 0.5
        assert tv.mean() <= 0.5 * (p * (1 - p) / n).sqrt().sum() < 1.3 * tv.mean()
        with torch.random.fork_rng():
            torch.manual_seed(n)
            tempered = torch.distributions.Multinomial(n, p.sqrt() / p.sqrt().sum())
            off = 0.5 * (tempered.sample((1000,)) / n - p).abs().sum(1)
        if n == 1000:
            assert (off > tv_bound(p.tolist(), n)).all(), "planted: draws from a tempered law"
    assert tv_bound([0.5, 0.5], 100) == pytest.approx(0.05 + math.sqrt(math.log(1000) / 200))
    assert tv_bound([1.0], 0) == 1.0 and tv_bound({"a": 3, "b": 1}, 50) == tv_bound([0.75, 0.25], 50)


def test_tables():
    assert total_variation({"a": 2, "b": 2}, {"a": 1.0}) == pytest.approx(0.5)
    assert total_variation({"a": 1}, {"b": 1}) == 1
    a, b = {"x": 0.25, "y": 0.75}, {"x": 0.5, "y": 0.5}
    there, back = kl_both(a, b)
    assert there == pytest.approx(0.25 * math.log(0.5) + 0.75 * math.log(1.5))
    assert back == pytest.approx(0.5 * math.log(2) + 0.5 * math.log(2 / 3))
    assert kl_both({"x": 1.0}, b)[1] == math.inf and kl_both(a, a) == (0, 0)
    for bad in ({"a": 0.0}, {"a": -1.0, "b": 2.0}, {"a": math.inf}):
        with pytest.raises(InputError):
            total_variation(bad, {"a": 1.0})


def test_z_score_is_standard_normal_and_sees_a_bias():
    x = torch.randn(50, 4000, generator=generator(0), dtype=D) + 3
    z = z_score(x, 3.0)
    assert abs(float(z.mean())) < 0.08 and abs(float(z.std()) - 1) < 0.08
    assert (z_score(x + 2, 3.0) > 8).float().mean() > 0.99
    assert z_score(torch.ones(5, 2), torch.tensor([1.0, 2.0])).tolist() == [0.0, -math.inf]
    with pytest.raises(InputError):
        z_score(torch.ones(1), 1.0)


# Diversity


def levenshtein(a: tuple[int, ...], b: tuple[int, ...]) -> int:
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        new = [i]
        for j, y in enumerate(b, 1):
            new.append(min(row[j] + 1, new[-1] + 1, row[j - 1] + (x != y)))
        row = new
    return row[-1]


def test_pairwise_means_equal_the_textbook():
    rnd = random.Random(0)
    for longest in (3, 12, 64, 65, 150):
        s = [tuple(rnd.randrange(4) for _ in range(rnd.randrange(longest + 1))) for _ in range(14)] * 2
        w = [rnd.random() for _ in s]
        pairs = [(i, j) for i in range(len(s)) for j in range(len(s)) if i != j]
        edit = {(i, j): levenshtein(s[i], s[j]) / max(len(s[i]), len(s[j]), 1) for i, j in pairs}
        grams = [{x[a : a + 2] for a in range(len(x) - 1)} or {x} for x in s]
        jaccard = {(i, j): 1 - len(grams[i] & grams[j]) / len(grams[i] | grams[j]) for i, j in pairs}
        for truth, measured in ((edit, edit_distance), (jaccard, ngram_diversity)):
            mean = sum(truth[p] for p in pairs) / len(pairs)
            assert measured(s).value == pytest.approx(mean, abs=1e-6)
            weighted = sum(w[i] * w[j] * truth[i, j] for i, j in pairs) / sum(w[i] * w[j] for i, j in pairs)
            assert measured(s, weights=w).value == pytest.approx(weighted, abs=1e-6)


def test_edit_distance_is_fast_and_says_when_it_samples():
    rnd = random.Random(1)
    s = [tuple(rnd.randrange(50) for _ in range(64)) for _ in range(256)]
    took = []
    for _ in range(3):
        began = time.perf_counter()
        whole = edit_distance(s)
        took.append(time.perf_counter() - began)
    assert min(took) < 1.0 and whole.used == whole.total == 256 and "of" not in str(whole)
    part = edit_distance(s, limit=100)
    assert (part.used, part.total) == (100, 256) and "on 100 of 256" in str(part)
    assert part == edit_distance(s, limit=100) and float(part) == pytest.approx(whole.value, abs=0.02)
    assert edit_distance([tuple(range(3000))] * 2 + [(1,)] * 60).used < 62
    assert edit_distance([(1, 2)] * 9).value == 0 and edit_distance([]).value == 0
    assert edit_distance([(1,), (2,)], weights=[1.0, 0.0]).value == 0


def test_distinct_entropy_and_lengths():
    assert distinct_n([(1, 2, 1, 2)], 2) == pytest.approx(2 / 3) and math.isnan(distinct_n([(1,)], 2))
    assert effective_distinct({"a": 1.0, "b": 1.0, "c": 0.0}) == pytest.approx(2)
    assert effective_distinct([0.9, 0.1]) == pytest.approx(math.exp(-0.9 * math.log(0.9) - 0.1 * math.log(0.1)))
    assert effective_distinct({}) == 0
    h = length_histogram(torch.tensor([0, 2, 2]), torch.tensor([1.0, 2.0, 1.0]))
    assert h.tolist() == [0.25, 0.0, 0.75]
