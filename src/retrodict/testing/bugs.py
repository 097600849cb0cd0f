"""Planted bugs: the mistakes that inference code ships with, each as a wrapper around the honest parts.

None is a switch in the library. Each is run through the same gates as the sampler it spoils and must miss one by more
than 8 standard errors; a gate that cannot see them proves nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, cast
from unittest.mock import patch

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from retrodict.models.tabular import TabularLM
from retrodict.numerics import at_end, log_mean_exp, prefix_values, safe_sub
from retrodict.particles import Particles
from retrodict.policies.base import FiniteStepper
from retrodict.policies.lm import LMPolicy
from retrodict.records import Menu, Rollouts, Scores, Trace
from retrodict.rng import generator
from retrodict.samplers.common import draw, finish, log_pb_of, proposal, rows_for
from retrodict.samplers.importance import importance
from retrodict.samplers.mh.kernels import KERNELS, SUFFIX, Kernel
from retrodict.samplers.mh.run import mh
from retrodict.samplers.smc import _Run, smc
from retrodict.spaces.limits import Limit
from retrodict.spaces.strings import Strings
from retrodict.targets.algebra import Target
from retrodict.targets.constraint import short_words
from retrodict.targets.likelihood import Likelihood
from retrodict.targets.prior import Prior
from retrodict.targets.ready import continuation, infill
from retrodict.testing.chains import law_after, transition
from retrodict.testing.oracle import (
    Gate,
    conditional_gates,
    enumerate_target,
    evidence_gates,
    law_gates,
)
from retrodict.testing.sets import SetPolicy, SetState, Subsets, set_target

BAR = 8.0
"""Standard errors by which a planted bug must show."""


@dataclass(frozen=True)
class Bug:
    """A planted bug: what is wrong, which method it spoils, and that method's gates with the bug in."""

    name: str
    method: str
    gates: Callable[[int], list[Gate]]

    def caught(self, seeds: int = 200) -> Gate:
        """The gate in standard errors that the bug misses most (a finite one, where weights do not all agree)."""
        found = [g for g in self.gates(seeds) if g.metric.startswith("|z|")]
        return max(found, key=lambda g: g.value if math.isfinite(g.value) else 0.0)


def _story(limit: Limit = "own_stop", tokens: int = 4, scale: float = 1.0) -> Target:
    lm = TabularLM.random(".ab ", order=3, seed=1, scale=scale)
    return infill(lm, "ab", "ba", stop=".", max_tokens=tokens, limit=limit, join="", lookahead=1.0)


def _parts(target: Target) -> tuple[TabularLM, Strings]:
    return cast(TabularLM, cast(LMPolicy, target.prior).lm), cast(Strings, target.space)


# -- SMC ----------------------------------------------------------------------------------------------------------


class KeepsWeights(_Run):
    """Resamples, and leaves the weights as they were: every particle is paid for twice."""

    def _parents(self, log_w: Tensor, alive: Tensor, room: Tensor, pick: Tensor) -> tuple[Tensor, Tensor]:
        index, _ = super()._parents(log_w, alive, room, pick)
        return index, log_w.view(self.pops, self.n).gather(1, index).flatten()


class KeepsTwist(_Run):
    """Does not divide the guide out at the stop: finished particles keep psi of their last prefix."""

    def _draw(self, tape: Any, rows: Tensor, look: Any, log_w: Tensor, log_pre: Tensor) -> tuple[Tensor, Tensor]:
        bare, psi = log_pre.clone(), self.walk.log_psi()
        assert isinstance(psi, Tensor)
        begun = tape.n[rows] > 0
        bare[rows[begun]] -= psi[begun]
        return super()._draw(tape, rows, look, log_w, bare)


def _run(kind: type[_Run], target: Target, policy: FiniteStepper | None, runs: int, seed: int, *, n: int = 16,
         scheme: str = "systematic", threshold: float = 0.9, exact: Rollouts | None = None) -> Particles:  # fmt: skip
    return kind(target, policy, n, seed, runs, threshold, scheme, None, exact).go()


def _smc_bug(kind: type[_Run]) -> Callable[[int], list[Gate]]:
    def gates(seeds: int) -> list[Gate]:
        target = _story()
        return evidence_gates(enumerate_target(target), lambda r, s: _run(kind, target, None, r, s), seeds)

    return gates


def conditional_with(scheme: str) -> Callable[[int], list[Gate]]:
    """Conditional SMC of two particles a population under any resampling scheme (``multinomial`` is the honest one).

    With systematic resampling the retained particle's slot is no longer exchangeable with the others.
    """

    def gates(seeds: int) -> list[Gate]:
        target = _story("exact", tokens=6, scale=0.6)

        def sample(rows: Rollouts, runs: int, seed: int) -> Particles:
            return _run(_Run, target, None, runs, seed, n=2, threshold=1.0, scheme=scheme, exact=rows)

        def free(runs: int, seed: int) -> Particles:
            return smc(target, n=2, runs=runs, seed=seed, ess_threshold=1.0)

        return conditional_gates(enumerate_target(target), sample, free, max(seeds, 10_000))

    return gates


# -- the prior ----------------------------------------------------------------------------------------------------


class StoplessPrior(LMPolicy):
    """A prior that forgets to pay for its stop."""

    def log_probs(self, c: Any, s: Any, menu: Menu, raw: bool = False) -> tuple[Tensor, Tensor]:
        """Raw log p(stop) is 0 wherever one may stop."""
        move, stop = super().log_probs(c, s, menu, raw)
        return (move, torch.where(stop.isfinite(), 0.0, stop)) if raw else (move, stop)

    def score(self, rollouts: Rollouts, raw: bool = False) -> Scores:
        """Likewise."""
        scores = super().score(rollouts, raw)
        free = torch.where(scores.log_stop.isfinite(), 0.0, scores.log_stop)
        return replace(scores, log_stop=free) if raw else scores


def _copy(space: Strings, kind: type[Strings], limit: Limit) -> Strings:
    return kind(space.vocab_size, space.stops, space.max_moves, limit, space.min_moves, space.banned, space.tokenizer)


class FreeLimit(Strings):
    """Counts the stop forced at L as free although only strings that stop on their own should count."""

    def log_p_stop(
        self, raw: Float[Tensor, "b s"], n: Int[Tensor, " b"], ended: Bool[Tensor, " b"]
    ) -> Float[Tensor, "b s"]:
        """The price under another limit."""
        return _copy(self, Strings, "force").log_p_stop(raw, n, ended)


@dataclass(frozen=True)
class ShiftedPrior(Prior):
    """Scores token i with the logits after it instead of those before it."""

    def __call__(self, rollouts: Rollouts, every_prefix: bool = False) -> Tensor:
        """Off by one in the moves; the stop is right."""
        policy: Any = self.policy
        t = rollouts.moves.shape[1]
        every = tuple(range(policy.lm.vocab_size))
        after = policy.lm.score(policy.prompts(rollouts.problem), rollouts.moves, rollouts.n, every)[1][:, 1:]
        inside = torch.arange(t) < rollouts.n[:, None]
        moves = torch.where(inside, after.gather(2, rollouts.moves[:, :, None]).squeeze(2), 0.0)
        values = prefix_values(moves, policy.score(rollouts, raw=True).log_stop)
        return values if every_prefix else at_end(values, rollouts.n, rollouts.stop)


class Proposal(LMPolicy):
    """The same model, but not known as the prior: its p is taken from the term, not from the drawing pass."""


def _prior_bug(make: Callable[[Target], tuple[Target, FiniteStepper | None]], how: Any) -> Callable[[int], list[Gate]]:
    def gates(seeds: int) -> list[Gate]:
        honest = _story()
        wrong, policy = make(honest)
        return evidence_gates(enumerate_target(honest), lambda r, s: how(wrong, policy, n=16, runs=r, seed=s), seeds)

    return gates


def _stopless(target: Target) -> tuple[Target, None]:
    lm, space = _parts(target)
    prior = StoplessPrior(lm, space, target.problems)
    return replace(target, prior=prior, factors={**target.factors, "prior": Prior(prior)}), None


def _free_limit(target: Target) -> tuple[Target, None]:
    lm, space = _parts(target)
    wrong = _copy(space, FreeLimit, space.limit)
    prior = LMPolicy(lm, wrong, target.problems)
    factors = {"prior": Prior(prior), "likelihood": Likelihood(lm, wrong, target.problems)}
    return Target(wrong, target.problems, factors, prior=prior), None


def _shifted(target: Target) -> tuple[Target, FiniteStepper]:
    lm, space = _parts(target)
    policy = LMPolicy(lm, space, target.problems)
    wrong = replace(target, factors={**target.factors, "prior": ShiftedPrior(policy)})
    return wrong, Proposal(lm, space, target.problems)


# -- the weight ---------------------------------------------------------------------------------------------------


def weighted_by(
    target: Target, log_b: Callable[[Rollouts], Tensor], n: int, runs: int, seed: int, temperature: float = 1.0
) -> Particles:
    """Importance sampling with the wrong density under the fraction: a copy of the sampler's four lines."""
    policy = proposal(target, None)
    rows = rows_for(target, n * runs, torch.device("cpu"))
    rollouts = target.terms(draw(target, policy, rows, generator(seed), {"temperature": temperature}))
    log_w = safe_sub(target.log_gamma(rollouts) + log_pb_of(target, rollouts), log_b(rollouts).double())
    log_w = log_w.view(len(target.problems), -1)
    log_z = log_mean_exp(log_w.view(len(target.problems), runs, n))
    return finish(target, rollouts, log_w, log_z, Trace("importance"), 0.0)


def _log_q(rollouts: Rollouts) -> Tensor:
    inside = torch.arange(rollouts.moves.shape[1]) < rollouts.n[:, None]
    stop = at_end(rollouts.log_stop, rollouts.n, rollouts.stop)
    return torch.where(inside, rollouts.log_q, 0.0).sum(1) + stop


def _leaked_temperature(seeds: int) -> list[Gate]:
    """Draws at T = 2, weights with log q at T = 1."""
    target = _story()
    return evidence_gates(
        enumerate_target(target), lambda r, s: weighted_by(target, _log_q, 16, r, s, temperature=2.0), seeds
    )


def _local_mask(seeds: int) -> list[Gate]:
    """Masks tokens, renormalises, and calls the result the conditioned model: the lost mass is never paid for."""
    lm = TabularLM.random(".ab ", order=3, seed=1)
    target = continuation(lm, "a ", stop=".", max_tokens=4, limit="own_stop") * short_words(1)

    def prior(rollouts: Rollouts) -> Tensor:
        return at_end(rollouts.terms["prior"], rollouts.n, rollouts.stop)

    return evidence_gates(enumerate_target(target), lambda r, s: weighted_by(target, prior, 16, r, s), seeds)


class NoBackward(Subsets):
    """Subsets whose orders are not counted: a set of k atoms weighs k! times too much."""

    def log_pb(self, s: SetState) -> Float[Tensor, " b"]:
        """P_B ignored."""
        return torch.zeros(len(s.n), dtype=torch.float64)


def _no_backward(how: Any) -> Callable[[int], list[Gate]]:
    def gates(seeds: int) -> list[Gate]:
        honest, wrong = set_target(3), set_target(3, space=NoBackward(3))
        exact = enumerate_target(honest, SetPolicy(Subsets(3), honest.problems))
        policy = SetPolicy(NoBackward(3), honest.problems)
        return evidence_gates(exact, lambda r, s: how(wrong, policy, n=16, runs=r, seed=s), seeds)

    return gates


# -- Metropolis-Hastings ------------------------------------------------------------------------------------------


def _no_length_correction(seeds: int) -> list[Gate]:
    """Leaves (n + 1) / (n' + 1) out of the acceptance ratio."""
    target, steps = _story(), 12
    exact = enumerate_target(target)
    policy = proposal(target, None)
    law = law_after(exact[0], transition(policy, exact[0], SUFFIX), steps)
    bugged = Kernel(SUFFIX.cut, lambda n: torch.zeros(len(n), dtype=torch.float64))
    with patch.dict(KERNELS, {"suffix, no length correction": bugged}):
        p = mh(target, n=20 * seeds, steps=steps, kernel="suffix, no length correction", keep=1, seed=0)
    return law_gates(exact, p, [law])


BUGS: tuple[Bug, ...] = (
    Bug("weights not reset after resampling", "smc", _smc_bug(KeepsWeights)),
    Bug("guide not divided out at the stop", "smc", _smc_bug(KeepsTwist)),
    Bug("systematic resampling", "conditional smc", conditional_with("systematic")),
    Bug("stop term dropped from the prior", "smc", _prior_bug(_stopless, smc)),
    Bug("forced stop counted as free", "importance", _prior_bug(_free_limit, importance)),
    Bug("prior shifted by one token", "importance", _prior_bug(_shifted, importance)),
    Bug("behaviour temperature left out of the weight", "importance", _leaked_temperature),
    Bug("local mask without weight", "importance", _local_mask),
    Bug("P_B ignored", "importance", _no_backward(importance)),
    Bug("P_B ignored", "smc", _no_backward(smc)),
    Bug("length correction dropped", "mh", _no_length_correction),
)
