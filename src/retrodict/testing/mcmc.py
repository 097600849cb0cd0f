"""Exactness of the Markov chain methods beyond their rows in ``gates.METHODS``, and their planted bugs.

Chains are stationary if those that begin at exact draws stay exact: a few steps from there, counts must still be those
of the law, whatever the kernel's matrix would look like.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import torch
from jaxtyping import Float, Int
from torch import Tensor

from retrodict.models.tabular import TabularLM
from retrodict.numerics import NEG_INF, log_mean_exp
from retrodict.particles import Particles
from retrodict.policies.base import FiniteStepper
from retrodict.policies.tempered import TemperedPolicy
from retrodict.records import Rollouts, Trace
from retrodict.rng import generator
from retrodict.samplers import pimh as pimh_module
from retrodict.samplers import tempering as tempering_module
from retrodict.samplers.annealed import annealed, increment
from retrodict.samplers.common import finish, proposal, rows_for
from retrodict.samplers.importance import ancestral
from retrodict.samplers.mh.block import Block
from retrodict.samplers.mh.chains import Chains, begin, joined, scaled, step, under, weighed
from retrodict.samplers.mh.kernels import BLOCK, KERNELS, SUFFIX
from retrodict.samplers.mh.run import mh
from retrodict.samplers.pimh import pimh
from retrodict.samplers.smc import smc
from retrodict.samplers.tempering import ladder, sweep, tempering
from retrodict.targets.algebra import Target
from retrodict.targets.ready import continuation, infill
from retrodict.testing.bugs import Bug
from retrodict.testing.chains import law_after, transition
from retrodict.testing.gates import DRAWS, _mh, _weighted
from retrodict.testing.oracle import Exact, Gate, enumerate_target, evidence_gates, law_gates
from retrodict.testing.targets import Case, cases

if TYPE_CHECKING:
    from retrodict.testing.testtime import Pair

STEPS = 4


# -- chains that begin at exact draws --------------------------------------------------------------------------------


def exact_chains(
    target: Target, policy: FiniteStepper, exact: list[Exact], n: int, seed: int, b: float = 1.0
) -> Chains:
    """n chains a problem at exact draws of gamma_b."""
    parts = []
    for i, e in enumerate(exact):
        pick = torch.multinomial(log_rung(e, b).exp(), n, replacement=True, generator=generator(seed, "cpu", i))
        parts.append(weighed(target, under(target, policy, e.paths.take(pick))))
    return joined(parts)


def log_rung(exact: Exact, b: float) -> Float[Tensor, " paths"]:
    """log gamma_b of every path, -inf where the policy cannot draw it."""
    log_q = exact.log_q.double()
    return torch.where(log_q == NEG_INF, NEG_INF, log_q + scaled(exact.log_gamma + exact.log_pb - log_q, b))


def as_particles(target: Target, rows: Rollouts) -> Particles:
    """States of chains, n a problem, as an unweighted sample."""
    m = len(target.problems)
    return finish(target, rows, torch.zeros(m, len(rows) // m), None, Trace("chains"), time.perf_counter())


def _rungs(case: Case, exact: list[Exact], seeds: int) -> list[Gate]:
    """A ladder of three rungs that begins exact on all of them: every rung stays exact."""
    target, policy, n = case.target, proposal(case.target, case.policy), DRAWS * seeds // 400
    levels, gen = ladder(2), generator(3)
    now = joined([exact_chains(target, policy, exact, n, r, float(x)) for r, x in enumerate(levels)])
    for t in range(STEPS):
        now, *_ = sweep(target, policy, SUFFIX, now, levels, t, gen)
    gates, rows = [], torch.arange(len(exact) * n)
    for r, x in enumerate(levels.tolist()[1:], 1):
        laws = [e.law(log_rung(e, x)) for e in exact]
        p = as_particles(target, now.rows.take(rows + r * len(rows)))
        gates += law_gates(exact, p, [law / law.sum() for law in laws])
    return gates


# -- a noisy score -----------------------------------------------------------------------------------------------


@dataclass
class Noisy:
    """An unbiased estimate of a factor: its value times 2s or 2(1 - s) with a fair coin for each evaluation."""

    exact: Callable[[Rollouts], Float[Tensor, " b"]]
    gen: torch.Generator
    spread: float = 0.9
    name: str = "verifier"
    noise: str = "linear"
    version: str = "noisy"
    prefixes: bool = False
    drawn: list[Int[Tensor, " b"]] = field(default_factory=list)

    def __call__(self, rollouts: Rollouts, every_prefix: bool = False) -> Tensor:
        """A new estimate for each row."""
        coin = torch.rand(len(rollouts), generator=self.gen, dtype=torch.float64) < 0.5
        return self.exact(rollouts) + torch.where(coin, 2 * self.spread, 2 - 2 * self.spread).log()


def _score(rollouts: Rollouts) -> Float[Tensor, " b"]:
    return 0.7 * (rollouts.n.double() - 2).abs()


def noisy_case(limit: str, alpha: float) -> Case:
    """A target with a factor that a sampler sees through noise only; enumeration sees it without."""
    plain = continuation(_lm(), "a", temperature=1 / alpha, stop=".", max_tokens=3, limit=limit)
    term = replace_noise(Noisy(_score, generator(1)), 0.5)
    return Case(f"score, {limit}, p^{alpha:g}", replace(plain, factors={**plain.factors, "verifier": term}, betas={
        **plain.betas, "verifier": 1.0}))  # fmt: skip


def replace_noise(term: Noisy, spread: float) -> Noisy:
    """The same factor at another spread (0.5: exact)."""
    return replace(term, spread=spread)


def _pseudo_marginal(fresh: bool) -> Callable[[Case, list[Exact], int], list[Gate]]:
    """Chains that begin at exact draws of (object, estimate); ``fresh`` is the bug: the state's estimate made anew."""

    def gates(case: Case, exact: list[Exact], seeds: int) -> list[Gate]:
        term = case.target.factors["verifier"]
        assert isinstance(term, Noisy)
        noisy = replace_noise(term, 0.9)
        target = replace(case.target, factors={**case.target.factors, "verifier": noisy})
        policy, gen, n = proposal(target, None), generator(5), DRAWS * seeds // 200
        rows = exact_chains(case.target, policy, exact, n, 2).rows
        high = torch.rand(n, generator=gen, dtype=torch.float64) < noisy.spread  # law of the estimate given the object
        estimate = _score(rows) + torch.where(high, 2 * noisy.spread, 2 - 2 * noisy.spread).log()
        now = weighed(target, rows.with_terms({"verifier": estimate}, {"verifier": noisy.version}))
        for _ in range(3 * STEPS):
            if fresh:
                now = weighed(target, replace(now.rows, terms={
                    k: v for k, v in now.rows.terms.items() if k != "verifier"}))  # fmt: skip
            now, _ = step(target, policy, SUFFIX, now, gen)
        return law_gates(exact, as_particles(target, now.rows), [e.gamma / e.z for e in exact])

    return gates


# -- pairs -------------------------------------------------------------------------------------------------------


def _lm(order: int = 3) -> TabularLM:
    return TabularLM.random(".ab ", order=order, seed=1)


def power_case(alpha: float, limit: str) -> Case:
    """p^alpha, proposed for at temperature 1/alpha."""
    target = continuation(_lm(), "a", temperature=1 / alpha, stop=".", max_tokens=4, limit=limit)
    assert isinstance(target.prior, FiniteStepper)
    return Case(f"p^{alpha:g}, {limit}", target, TemperedPolicy(target.prior, 1 / alpha))


LADDER = ("sets", "scored, force", "infill, own_stop", "including, own_stop", "short words", "tempered, force")


def pairs(quick: bool = False) -> list[Pair]:
    """Power sampling by two samplers; ladders with other kernels and more rungs; a noisy score."""
    from retrodict.testing.testtime import Pair

    sharp = [power_case(a, limit) for limit in ("own_stop", "force", "exact") for a in (4.0, 2.0)]
    mild = [power_case(a, limit) for limit in ("own_stop", "force", "exact") for a in (2.0, 3.0)]
    small = {c.name: c for c in cases(quick=True)}
    some = [small[name] for name in LADDER]
    noisy = [noisy_case(limit, a) for limit in ("force", "own_stop", "exact") for a in (1.0, 2.0)]
    rows: list[tuple[str, Sequence[Case], Any]] = [
        ("mh, p^alpha", sharp, _mh("suffix", 6)),
        ("smc, p^alpha", mild, _weighted(smc, ess_threshold=0.8)),
        ("annealed, block", some, _weighted(annealed, rungs=3, kernel="block")),
        ("tempering, 3 rungs", some, _rungs),
        ("mh, noisy score", noisy, _pseudo_marginal(False)),
    ]
    return [Pair(method, c, gates) for method, todo, gates in rows for c in todo[: 2 if quick else None]]


# -- planted bugs ------------------------------------------------------------------------------------------------


def _story() -> Target:
    return infill(_lm(), "ab", "ba", stop=".", max_tokens=4, limit="own_stop", join="")


class CountlessBlock(Block):
    """Forgets that strings of other lengths have other numbers of blocks."""

    def log_count(self, n: Int[Tensor, " b"]) -> Float[Tensor, " b"]:
        """Nothing to correct."""
        return torch.zeros(len(n), dtype=torch.float64)


def _no_block_count(seeds: int) -> list[Gate]:
    target, steps = _story(), 12
    exact = enumerate_target(target)
    law = law_after(exact[0], transition(proposal(target, None), exact[0], BLOCK), steps)
    with patch.dict(KERNELS, {"block, uncounted": CountlessBlock()}):
        p = mh(target, n=20 * seeds, steps=steps, kernel="block, uncounted", keep=1, seed=0)
    return law_gates(exact, p, [law])


def _swap_inverted(seeds: int) -> list[Gate]:
    target, n = _story(), 20 * seeds
    exact = enumerate_target(target)
    honest = tempering_module.log_swap
    with patch.object(tempering_module, "log_swap", lambda x, y, b, c: -honest(x, y, b, c)):
        p = tempering(target, n=n, rungs=2, steps=3, keep=1, seed=0, start=exact[0].draw(n, 7))
    return law_gates(exact, p, [exact[0].gamma / exact[0].z])


def _increment_after_the_move(seeds: int) -> list[Gate]:
    """Annealed importance sampling that weighs the state it has just moved to."""
    target, levels = _story(), ladder(2).tolist()
    policy = proposal(target, None)

    def sample(runs: int, seed: int) -> Particles:
        gen = generator(seed)
        now = begin(target, policy, rows_for(target, 16 * runs, torch.device("cpu")), gen, None)
        log_w = torch.zeros(16 * runs, dtype=torch.float64)
        for last, b in zip(levels, levels[1:], strict=False):
            now, _ = step(target, policy, SUFFIX, now, gen, b)
            log_w = log_w + increment(now, last, b)
        log_w = log_w.view(1, -1)
        return finish(target, now.rows, log_w, log_mean_exp(log_w.view(1, runs, 16)), Trace("annealed"), 0.0)

    return evidence_gates(enumerate_target(target), sample, seeds)


def _every_run_accepted(seeds: int) -> list[Gate]:
    """Particle-independent MH without Z-hat'/Z-hat: self-normalised draws of SMC with two particles."""
    target, n = _story(), 60 * seeds
    exact = enumerate_target(target)
    with patch.object(pimh_module, "log_ratio", lambda z, new: torch.zeros_like(z)):
        p = pimh(target, n=2, runs=n, steps=2, keep=1, seed=0, resampling="multinomial", start=exact[0].draw(n, 7))
    return law_gates(exact, p, [exact[0].gamma / exact[0].z])


def _local_temperature(seeds: int) -> list[Gate]:
    """Every token drawn at temperature 1/alpha, and the strings called draws of p^alpha."""
    case = power_case(4.0, "own_stop")
    exact = enumerate_target(case.target, case.policy)
    p = ancestral(case.target, case.policy, n=20 * seeds, seed=0)
    return law_gates(exact, p, [exact[0].gamma / exact[0].z])


def _estimate_made_anew(seeds: int) -> list[Gate]:
    case = noisy_case("own_stop", 1.0)
    return _pseudo_marginal(True)(case, enumerate_target(case.target), seeds)


BUGS: tuple[Bug, ...] = (
    Bug("number of blocks left out", "mh, block", _no_block_count),
    Bug("swap ratio inverted", "tempering", _swap_inverted),
    Bug("increment at the new state", "annealed", _increment_after_the_move),
    Bug("every run accepted", "pimh", _every_run_accepted),
    Bug("token temperature called p^alpha", "mh, p^alpha", _local_temperature),
    Bug("estimate of the present state made anew", "mh, noisy score", _estimate_made_anew),
)
