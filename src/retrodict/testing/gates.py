"""Every sampler's exactness gates on one small target, by method: what ``retrodict bench exact`` and the tests run.

A method is a sampler with its settings. A new row of ``samplers.table.SAMPLERS`` needs a row here (a test says so).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from retrodict.particles import Particles
from retrodict.records import Rollouts, cat_rollouts
from retrodict.samplers.annealed import annealed
from retrodict.samplers.common import proposal
from retrodict.samplers.exact import exact as exact_sampler
from retrodict.samplers.importance import ancestral, best_of_n, importance, rank_score, rejection
from retrodict.samplers.mh.kernels import KERNELS
from retrodict.samplers.mh.run import mh
from retrodict.samplers.pimh import pimh
from retrodict.samplers.smc import conditional_smc, smc
from retrodict.samplers.tempering import tempering
from retrodict.testing.chains import invariance, law_after, transition
from retrodict.testing.oracle import (
    Exact,
    Gate,
    best_law,
    conditional_gates,
    evidence_gates,
    law_gates,
    log_bound,
)
from retrodict.testing.targets import Case, by_hand

Gates = Callable[[Case, list[Exact], int], list[Gate]]
"""(case, its exact answer, least number of independent runs) to gates."""

DRAWS = 4000
"""Independent draws (or chains) behind a gate on counts, for 200 seeds."""


def _weighted(
    sampler: Callable[..., Particles], n: int = 16, bound: bool = False, bare: bool = False, **settings: Any
) -> Gates:
    def gates(case: Case, exact: list[Exact], seeds: int) -> list[Gate]:
        target = case.target.with_guide(None) if bare else case.target
        extra = {"log_bound": log_bound(exact)} if bound else {}
        return evidence_gates(
            exact,
            lambda runs, seed: sampler(target, case.policy, n=n, runs=runs, seed=seed, **settings, **extra),
            seeds,
        )

    return gates


def _exact(case: Case, exact: list[Exact], seeds: int) -> list[Gate]:
    """Against plain loops over next-token probabilities."""
    p = exact_sampler(case.target)
    assert p.log_z is not None
    off_z = off_x = 0.0
    for i, table in enumerate(by_hand(case)):
        hand = torch.tensor(list(table.values()), dtype=torch.float64)
        off_z = max(off_z, abs(float(p.log_z[i, 0] - hand.logsumexp(0))))
        keys = p.keys[i * p.k : (i + 1) * p.k]
        scale = torch.log(torch.tensor(float(p.k), dtype=torch.float64))
        w = dict(zip(keys[::-1], (p.log_w[i] - scale).tolist()[::-1], strict=True))  # padding repeats the first row
        if set(w) != set(table):
            raise AssertionError(f"{case.name}: {len(set(w) ^ set(table))} objects are on one side only")
        got = torch.tensor([w[k] for k in table], dtype=torch.float64)
        off_x = max(off_x, float(torch.where(got == hand, 0.0, (got - hand).abs()).max()))
    return [Gate("|log Z - by hand|", off_z, 1e-9), Gate("|log gamma - by hand|", off_x, 1e-9)]


def _ancestral(case: Case, exact: list[Exact], seeds: int) -> list[Gate]:
    p = ancestral(case.target, case.policy, n=DRAWS * seeds // 200, seed=0)
    return law_gates(exact, p, [e.law(e.log_base) for e in exact])


def _best_of(n: int) -> Gates:
    def gates(case: Case, exact: list[Exact], seeds: int) -> list[Gate]:
        laws = [best_law(e, rank_score(case.target, e.paths, None), n) for e in exact]
        return law_gates(exact, best_of_n(case.target, case.policy, n=n, draws=DRAWS * seeds // 200, seed=0), laws)

    return gates


def _mh(kernel: str, steps: int) -> Gates:
    def gates(case: Case, exact: list[Exact], seeds: int) -> list[Gate]:
        policy = proposal(case.target, case.policy)
        matrices = [transition(policy, e, KERNELS[kernel]) for e in exact]
        off = max(invariance(policy, e, m) for e, m in zip(exact, matrices, strict=True))
        p = mh(case.target, case.policy, n=DRAWS * seeds // 200, steps=steps, kernel=kernel, keep=1, seed=0)
        laws = [law_after(e, m, steps) for e, m in zip(exact, matrices, strict=True)]
        return [Gate("max |sigma P - sigma|", off, 1e-10), *law_gates(exact, p, laws)]

    return gates


def _stays(run: Callable[[Case, Rollouts, int], Particles], chains: int) -> Gates:
    """Chains that begin at exact draws and take a few steps: their states still have the exact law."""

    def gates(case: Case, exact: list[Exact], seeds: int) -> list[Gate]:
        n = chains * seeds // 200
        rows = cat_rollouts([e.draw(n, 7 + i) for i, e in enumerate(exact)])
        return law_gates(exact, run(case, rows, n), [e.gamma / e.z for e in exact])

    return gates


def _pimh(case: Case, rows: Rollouts, n: int) -> Particles:
    return pimh(case.target, case.policy, n=4, runs=n, steps=2, keep=1, seed=0, ess_threshold=0.8,
                resampling="multinomial", start=rows)  # fmt: skip


def _tempering(case: Case, rows: Rollouts, n: int) -> Particles:
    """Of two rungs, so that draws of the policy are exact for the other one."""
    return tempering(case.target, case.policy, n=n, rungs=2, steps=3, keep=1, seed=0, start=rows)


def _conditional(case: Case, exact: list[Exact], seeds: int) -> list[Gate]:
    same: dict[str, Any] = {"n": 16, "ess_threshold": 0.8}

    def sample(rows: Rollouts, runs: int, seed: int) -> Particles:
        return conditional_smc(case.target, case.policy, exact=rows, runs=runs, seed=seed, **same)

    def free(runs: int, seed: int) -> Particles:
        return smc(case.target, case.policy, runs=runs, seed=seed, resampling="multinomial", **same)

    return conditional_gates(exact, sample, free, seeds)


METHODS: dict[str, tuple[str, Gates]] = {
    "exact": ("exact", _exact),
    "ancestral": ("ancestral", _ancestral),
    "importance": ("importance", _weighted(importance)),
    "importance, draws at T = 1.5": ("importance", _weighted(importance, temperature=1.5)),
    "rejection": ("rejection", _weighted(rejection, bound=True)),
    "best of 3": ("best_of_n", _best_of(3)),
    "mh, suffix": ("mh", _mh("suffix", 6)),
    "mh, independence": ("mh", _mh("independence", 4)),
    "mh, block": ("mh", _mh("block", 6)),
    "tempering, 2 rungs": ("tempering", _stays(_tempering, DRAWS)),
    "annealed": ("annealed", _weighted(annealed, rungs=3)),
    "pimh": ("pimh", _stays(_pimh, DRAWS)),
    "smc, systematic": ("smc", _weighted(smc)),
    "smc, stratified": ("smc", _weighted(smc, resampling="stratified", ess_threshold=0.9)),
    "smc, residual": ("smc", _weighted(smc, resampling="residual", ess_threshold=0.9)),
    "smc, multinomial": ("smc", _weighted(smc, resampling="multinomial", ess_threshold=1.0)),
    "smc, no guide": ("smc", _weighted(smc, bare=True, ess_threshold=0.2)),
    "conditional smc": ("conditional_smc", _conditional),
}
"""Label of each method: its sampler's name, and its gates."""


def check_exact(case: Case, method: str, seeds: int = 200, exact: list[Exact] | None = None) -> list[Gate]:
    """Run one method's gates; raises AssertionError, naming gate, value and bar, where one is missed."""
    from retrodict.testing.oracle import enumerate_target

    exact = enumerate_target(case.target, case.policy) if exact is None else exact
    gates = METHODS[method][1](case, exact, seeds)
    for g in gates:
        if not g.holds:
            raise AssertionError(f"{case.name}, {method}: {g.metric} is {g.value:.4g}, over {g.bar:.4g} ({g.note})")
    return gates
