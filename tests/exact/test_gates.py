"""Every sampler against enumeration, at fewer seeds than ``retrodict bench exact``; and every planted bug is caught."""

from __future__ import annotations

import functools
import itertools
import math
from typing import Any

import pytest
import torch

from retrodict.bench import exact as bench
from retrodict.models.tabular import TabularLM
from retrodict.records import Problem
from retrodict.samplers.common import proposal
from retrodict.samplers.mh.kernels import KERNELS, SUFFIX, Kernel
from retrodict.samplers.smc import conditional_smc, smc
from retrodict.samplers.table import SAMPLERS
from retrodict.targets.ready import posterior, until
from retrodict.testing import BUGS, METHODS, Bug, Case, Exact, cases, check_exact, enumerate_target
from retrodict.testing.bugs import BAR, conditional_with
from retrodict.testing.chains import invariance, transition
from retrodict.testing.oracle import MIN_HITS, best_law, conditional_gates, per_run, weighted_tv, z_objects

SEEDS = 100
CASES = {c.name: c for c in cases(quick=True)}
MORE = {c.name: c for c in cases() if c.name not in CASES}
"""Cases of ``bench exact`` that are tested with one method each here."""


@functools.cache
def truth(name: str) -> tuple[Case, list[Exact]]:
    case = {**CASES, **MORE}[name]
    return case, enumerate_target(case.target, case.policy)


@pytest.mark.parametrize("name, method", list(itertools.product(CASES, METHODS)))
def test_method(name: str, method: str) -> None:
    case, exact = truth(name)
    if method == "smc, no guide" and case.target.guide is None:
        return  # the same as with it
    check_exact(case, method, SEEDS, exact)


@pytest.mark.parametrize("name, method", list(zip(MORE, itertools.cycle(METHODS), strict=False)))
def test_other_targets(name: str, method: str) -> None:
    check_exact(truth(name)[0], "exact")
    check_exact(truth(name)[0], method, SEEDS, truth(name)[1])


def test_every_sampler_has_gates() -> None:
    missing = {*SAMPLERS, "conditional_smc"} - {sampler for sampler, _ in METHODS.values()}
    assert not missing, f"no exactness gate for {missing}: add a row to retrodict.testing.gates.METHODS"


def test_every_kernel_has_gates() -> None:
    assert set(KERNELS) <= {m.removeprefix("mh, ") for m in METHODS}


@pytest.mark.parametrize("bug", BUGS, ids=lambda b: f"{b.name} ({b.method})")
def test_planted_bug_is_caught(bug: Bug) -> None:
    row = bench.bug_row(bug, SEEDS)
    assert row.holds and row.value > BAR


def test_the_honest_conditional_smc_passes_where_systematic_resampling_fails() -> None:
    gates = conditional_with("multinomial")(SEEDS)
    assert all(g.holds for g in gates), gates


def test_conditional_smc_where_free_populations_die_out() -> None:
    """E[Z / Z-hat] is not 1 but the chance that free SMC survives: here three particles rarely meet the predicate."""
    lm = TabularLM.random(".ab ", order=3, seed=1, scale=0.6)
    target = posterior(lm, [Problem((1,), (2,))], stop=until("b"), max_tokens=3, limit="own_stop")
    same: dict[str, Any] = {"n": 3, "ess_threshold": 0.8}
    gates = conditional_gates(
        enumerate_target(target),
        lambda rows, runs, seed: conditional_smc(target, exact=rows, runs=runs, seed=seed, **same),
        lambda runs, seed: smc(target, runs=runs, seed=seed, resampling="multinomial", **same),
        4000,
    )
    assert all(g.holds for g in gates), gates
    assert float(gates[0].note.split()[2].rstrip("%")) < 96


def test_transition_matrix_without_length_correction_is_not_invariant() -> None:
    case, (exact,) = truth("infill, own_stop")
    policy = proposal(case.target, None)
    honest = transition(policy, exact, SUFFIX)
    assert (honest >= -1e-15).all() and invariance(policy, exact, honest) < 1e-10
    bugged = Kernel(SUFFIX.cut, lambda n: torch.zeros(len(n), dtype=torch.float64))
    assert invariance(policy, exact, transition(policy, exact, bugged)) > 1e-3


def test_best_law_is_the_law_of_the_first_best() -> None:
    _, (exact,) = truth("scored, force")
    score = torch.arange(len(exact.paths)).double() % 3  # many ties
    law = best_law(exact, score, 2)
    q = exact.log_base.exp()
    pairs = q[:, None] * q[None]
    first = score[:, None] >= score[None]
    by_hand = (pairs * first).sum(1) + (pairs * ~first).sum(0)
    assert torch.allclose(law, exact.law(by_hand.log()), atol=1e-12)
    assert torch.allclose(best_law(exact, score, 1), exact.law(exact.log_base))


def test_bounds_hold_as_often_as_they_say_and_no_more_loosely() -> None:
    """On honest multinomial counts the 99.9% bound of total variation holds, and is within a factor of the mean."""
    gen = torch.Generator().manual_seed(0)
    pi = torch.softmax(torch.randn(40, generator=gen, dtype=torch.float64), 0)
    over, ratios, worst = 0, [], 0.0
    for _ in range(60):
        draws = torch.multinomial(pi, 8000, replacement=True, generator=gen).view(500, 16)
        y = torch.nn.functional.one_hot(draws, 40).double().mean(1)
        tv, bound = weighted_tv(y, pi, 16)
        over += tv > bound
        ratios.append(bound / tv)
        worst = max(worst, z_objects(y, pi, 16)[0])
    assert over == 0 and sum(ratios) / len(ratios) < 2.5 and worst < 4.5


def test_objects_outside_the_space_are_named() -> None:
    _, (exact,) = truth("infill, own_stop")
    with pytest.raises(AssertionError, match="not an object of the space"):
        per_run(exact, [(0, 0, 0)], torch.ones(1, 1))


def test_rare_objects_are_not_tested_alone() -> None:
    y = torch.zeros(100, 2)
    y[:, 0] = 1.0
    y[: MIN_HITS - 1, 1] = 1.0
    assert z_objects(y, torch.tensor([1.0, 1e-9]))[1] == 1


def test_bench_rows(capsys: pytest.CaptureFixture[str]) -> None:
    case, exact = truth("sets")
    rows = bench.method_rows(case, "smc, systematic", exact, SEEDS)
    assert {r.metric for r in rows} == {"|z| of evidence", "|z| of objects", "total variation", "s.e. / Z"}
    assert all(r.holds and r.suite == "exact" and r.name == "sets" and math.isfinite(r.value) for r in rows)
