"""Exactness of what SMC was given for tests, beams and powers: weighted rejection, steering, the alpha ramp,
stopped particles set aside."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import torch
from torch import Tensor

from retrodict.models.tabular import TabularLM
from retrodict.particles import Particles
from retrodict.policies import awrs
from retrodict.policies.awrs import AWRS
from retrodict.policies.base import FiniteStepper
from retrodict.records import Problem, Rollouts
from retrodict.samplers.importance import importance
from retrodict.samplers.resampling import RESAMPLERS, STEERING, without_replacement
from retrodict.samplers.smc import _Run, conditional_smc, smc
from retrodict.targets.algebra import Target
from retrodict.targets.constraint import short_words
from retrodict.targets.predicate import predicate
from retrodict.targets.ready import continuation, infill, posterior, until
from retrodict.testing.bugs import Bug
from retrodict.testing.gates import Gates, _weighted
from retrodict.testing.oracle import Exact, Gate, conditional_gates, enumerate_target, evidence_gates
from retrodict.testing.targets import Case, cases

if TYPE_CHECKING:
    from retrodict.testing.testtime import Pair

Rows = Sequence[Mapping[str, Any]]


# -- predicates and targets -------------------------------------------------------------------------------------------


def _letters(most: int) -> Callable[[list[str], Rows], list[bool]]:
    def check(texts: list[str], rows: Rows) -> list[bool]:
        return [not re.search("[a-z]" * (most + 1), t) for t in texts]

    return check


def _has_ab(texts: list[str], rows: Rows) -> list[bool]:
    return ["ab" in t for t in texts]


def _fewer_a(texts: list[str], rows: Rows) -> list[bool]:
    """At most as many a as the row allows: a check of each problem's own."""
    return [t.count("a") <= r.get("most", 1) for t, r in zip(texts, rows, strict=True)]


def _loud(texts: list[str], rows: Rows) -> list[bool]:
    """Only what holds a b may end in "!"; the stop's own text is part of what is asked."""
    return [not t.endswith("!") or "b" in t for t in texts]


def _many(lm: TabularLM) -> Target:
    ids = lm.tokenizer.encode
    data = [Problem(tuple(ids(x)), row={"most": k}, name=x) for x, k in (("a", 0), ("ab", 1))]
    return posterior(lm, data, stop=".", max_tokens=3, limit="own_stop") * predicate(_fewer_a, _fewer_a)


def _story() -> Target:
    lm = TabularLM.random(".ab ", order=3, seed=1)
    return infill(lm, "ab", "ba", stop=".", max_tokens=4, limit="own_stop", join="", lookahead=1.0)


def _tested(quick: bool) -> list[Case]:
    """Targets with a check on text."""
    lm = TabularLM.random(".ab ", order=3, seed=1)
    two = TabularLM.random(".!ab ", order=2, seed=2, scale=0.6)
    one, pair = predicate(_letters(1), _letters(1)), predicate(_letters(2), _letters(2))
    out = [Case("short words", continuation(lm, "a ", stop=".", max_tokens=4, limit="own_stop") * one),
           Case("infill", infill(lm, "ab", "ba", stop=".", max_tokens=4, join="") * pair)]  # fmt: skip
    if quick:
        return out
    say = [Problem((1,), (2, 1), name="until")]
    loud = continuation(two, "ab", stop=(0, 1), max_tokens=3) * predicate(_loud)
    out += [
        Case("short words, exact", continuation(lm, "a ", stop=".", max_tokens=3, limit="exact") * pair),
        Case("contains", continuation(lm, "a", stop=".", max_tokens=3) * predicate(_has_ab)),
        Case("of each problem", _many(lm)),
        Case("two stops", loud),
        Case("until", posterior(TabularLM.random(".ab ", order=3, seed=1, scale=0.6), say, stop=until("b "),
                                max_tokens=3) * pair),
        Case("automaton", continuation(lm, "a ", stop=".", max_tokens=4, limit="own_stop") * short_words(1)),
        Case("automaton and check", continuation(lm, "b", stop=".", max_tokens=4) * short_words(2)
             * predicate(_fewer_a, _fewer_a)),
    ]  # fmt: skip
    return out


def _by(case: Case, **settings: Any) -> Case:
    target = case.target
    assert isinstance(target.prior, FiniteStepper) and target.guide is not None
    return Case(case.name, target, AWRS(target.prior, target.guide, **settings))


STEERED = ("infill, force", "infill, own_stop", "infill, exact", "including, own_stop", "scored, force",
           "batch of problems", "two stops, likelihood^0.5", "until, force", "sets", "random twist")  # fmt: skip


def _powers(quick: bool) -> list[Case]:
    """Targets whose prior has an exponent."""
    lm = TabularLM.random(".ab ", order=3, seed=1, scale=0.6)
    cool = continuation(lm, "a", temperature=0.5, stop=".", max_tokens=4, min_tokens=1)
    out = [Case("p^2", cool), Case("p^2, own_stop", continuation(lm, "a", temperature=0.5, stop=".", max_tokens=4,
                                                                     limit="own_stop"))]  # fmt: skip
    if quick:
        return out
    story = infill(lm, "ab", "ba", stop=".", max_tokens=4, join="")
    say = [Problem((1,), (2, 1), name="until")]
    return [
        *out,
        Case("p^0.5", continuation(lm, "b", temperature=2, stop=".", max_tokens=4)),
        Case("p^2, exact", continuation(lm, "b", temperature=0.5, stop=".", max_tokens=4, limit="exact")),
        Case("infill, p^2", story.with_betas(prior=2.0)),
        Case("short words, p^2", (continuation(lm, "a ", stop=".", max_tokens=4) * short_words(1)).with_betas(prior=2)),
        Case("until, p^2", posterior(lm, say, stop=until("b "), max_tokens=4).with_betas(prior=2)),
    ]


ESTIMATES: dict[str, dict[str, Any]] = {
    "recursive": {"estimator": "recursive"},
    "geometric": {"estimator": "geometric", "accepts": 3},
    "recursive, given up early": {"estimator": "recursive", "max_rejects": 1},
    "geometric, given up early": {"estimator": "geometric", "max_rejects": 1},
}
WIDE = ("short words, exact", "contains", "until")
"""Targets of so many objects that conditional runs on them take long."""

# -- rows -------------------------------------------------------------------------------------------------------------


def _held(n: int, **how: Any) -> Gates:
    """Conditional SMC of n particles: the retained one's Z-hats are drawn given its tokens."""
    same: dict[str, Any] = {"n": n, "ess_threshold": 0.9, **how}

    def gates(case: Case, exact: list[Exact], seeds: int) -> list[Gate]:
        def sample(rows: Rollouts, runs: int, seed: int) -> Particles:
            return conditional_smc(case.target, case.policy, exact=rows, runs=runs, seed=seed, **same)

        def free(runs: int, seed: int) -> Particles:
            return smc(case.target, case.policy, runs=runs, seed=seed, resampling="multinomial", **same)

        return conditional_gates(exact, sample, free, seeds)

    return gates


def pairs(quick: bool) -> list[Pair]:
    """Every method on its targets."""
    from retrodict.testing.testtime import Pair

    tested, powers = _tested(quick), _powers(quick)
    steered = [c for c in cases() if c.name in STEERED[: 2 if quick else None]]
    out = []
    for name, settings in ESTIMATES.items():
        policies = [_by(c, **settings) for c in tested]
        out += [Pair(f"awrs {name}, smc", c, _weighted(smc, ess_threshold=0.9)) for c in policies]
        if "early" not in name:
            some = policies[: 1 if quick else None]
            out += [Pair(f"awrs {name}, importance", c, _weighted(importance)) for c in some]
            some = [c for c in policies[1 if quick else 0 :] if c.name not in WIDE]
            out += [Pair(f"awrs {name}, conditional smc", c, _held(16)) for c in some]
    out += [Pair("smc, check on text", c, _weighted(smc)) for c in tested[1 if quick else 0 :]]
    for beam in (2, 3):
        how = {"resampling": STEERING, "beam": beam, "ess_threshold": 1.0}
        out += [Pair(f"steering, beam {beam}", c, _weighted(smc, n=6, **how)) for c in steered]
    for ramp in (2, 9):
        out += [Pair(f"smc, ramp {ramp}", c, _weighted(smc, ramp=ramp, ess_threshold=1.0)) for c in powers]
    out += [Pair("conditional smc, ramp 2", c, _held(16, ramp=2)) for c in powers[: 1 if quick else 6]]
    aside: dict[str, Any] = {"stopped": "aside", "ess_threshold": 1.0}
    for scheme in tuple(RESAMPLERS)[: 1 if quick else None]:
        name = f"smc, stopped aside, {scheme}"
        out += [Pair(name, c, _weighted(smc, resampling=scheme, **aside)) for c in (*steered, *powers)]
    out += [Pair("conditional smc, stopped aside", c, _held(16, **aside)) for c in powers[: 1 if quick else 6]]
    return out


# -- planted bugs -----------------------------------------------------------------------------------------------------


def _no_further(pool: Any, rows: Tensor, mass: Tensor, p: Tensor) -> Tensor:
    """Takes 1 - p(R) for Z: whatever was not rejected counts as allowed."""
    return mass


def _not_excluded(self: Any, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Draws with replacement, and counts as if without."""
    kept = self.left[rows].clone()
    x, p = _HONEST_DRAW(self, rows)
    self.left[rows] = kept
    return x, p


_HONEST_DRAW = awrs._Pool.draw


def _untilted(pool: Any, rows: Tensor, held: Tensor, accepts: int, max_rejects: int) -> tuple[Tensor, Tensor]:
    """The retained particle takes its token, and the Z-hat of a free draw."""
    token, log_z = awrs.geometric(pool, rows, torch.full_like(held, -1), accepts, max_rejects)
    return torch.where(held >= 0, held, token), log_z


def _kept_as_the_rest(weights: Tensor, n: int, gen: torch.Generator) -> tuple[Tensor, Tensor]:
    """Steering that gives every survivor 1/c, also those too heavy to be thinned."""
    index, weight = without_replacement(weights, n, gen)
    return index, torch.where(weight > 0, weight.amin(1, keepdim=True), 0.0)


class FlatRamp(_Run):
    """Pays alpha_t log p for the new move alone: (alpha_t - alpha_{t-1}) log p of what is there already is left out."""

    def _weigh(self, tape: Any, rows: Tensor, log_w: Tensor, log_pre: Tensor) -> None:
        t = int(tape.n[rows].max())
        before = tape.log_p[rows, : t - 1].double().sum(1)
        bare = log_pre.clone()
        bare[rows] += (self._exponent(t) - self._exponent(t - 1)) * before
        super()._weigh(tape, rows, log_w, bare)
        log_pre[rows] = bare[rows]


class Thinned(_Run):
    """Gives the slots that are filled anew the mean over all n, those of the stopped among them."""

    def _parents(self, log_w: Tensor, alive: Tensor, room: Tensor, pick: Tensor) -> tuple[Tensor, Tensor]:
        index, new = super()._parents(log_w, alive, room, pick)
        share = (room.sum(1, keepdim=True) / self.n).log()
        return index, torch.where(room & pick[:, None], new.view_as(room) + share, new.view_as(room)).flatten()


def _awrs_bug(mistake: Any) -> Callable[[int], list[Gate]]:
    def gates(seeds: int) -> list[Gate]:
        case = _by(_tested(True)[0], estimator="recursive")
        with mistake:
            return _weighted(smc)(case, enumerate_target(case.target, case.policy), 2 * seeds)

    return gates


def _held_bug(seeds: int) -> list[Gate]:
    case = _by(_tested(True)[0], estimator="geometric", accepts=2)
    with patch.dict(awrs.ESTIMATORS, geometric=_untilted):
        return _held(2)(case, enumerate_target(case.target, case.policy), 24 * seeds)


def _steering_bug(seeds: int) -> list[Gate]:
    case = Case("story", _story())
    with patch("retrodict.samplers.smc.without_replacement", _kept_as_the_rest):
        return _weighted(smc, n=6, resampling=STEERING, beam=3, ess_threshold=1.0)(
            case, enumerate_target(case.target), 2 * seeds
        )


def _ramp_bug(seeds: int) -> list[Gate]:
    target = _powers(True)[0].target

    def sample(runs: int, seed: int) -> Particles:
        return FlatRamp(target, None, 16, seed, runs, 1.0, "systematic", None, None, ramp=4).go()

    return evidence_gates(enumerate_target(target), sample, 2 * seeds)


def _aside_bug(seeds: int) -> list[Gate]:
    target = _powers(True)[0].target

    def sample(runs: int, seed: int) -> Particles:
        return Thinned(target, None, 16, seed, runs, 1.0, "systematic", None, None, stopped="aside").go()

    return evidence_gates(enumerate_target(target), sample, 2 * seeds)


BUGS: tuple[Bug, ...] = (
    Bug("estimator without the further draw", "awrs", _awrs_bug(patch.object(awrs, "_further", _no_further))),
    Bug("rejected tokens not excluded", "awrs", _awrs_bug(patch.object(awrs._Pool, "draw", _not_excluded))),
    Bug("retained token with a free draw's estimate", "awrs, conditional smc", _held_bug),
    Bug("kept particles weighted like the thinned", "steering", _steering_bug),
    Bug("alpha ramp without its increment", "smc, ramp", _ramp_bug),
    Bug("the room's weight shared by the stopped as well", "smc, stopped aside", _aside_bug),
)
