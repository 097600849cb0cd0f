"""Exactness of lexical constraints: samplers under byte automata against enumeration and Python's re, and their bugs.

The targets differ in what is asked, in the stop and in the length limit, since these decide what the mask must know:
the stop's own text, the one stop that is left at L, an exact or a least length, and conditions that can each be met
but no longer together.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, cast

import torch
from jaxtyping import Float
from torch import Tensor

from retrodict.guides.automata import contains, ends_with
from retrodict.guides.base import ProductGuide
from retrodict.guides.dfa import DFAGuide
from retrodict.models.tabular import TabularLM
from retrodict.numerics import NEG_INF, log_mean_exp
from retrodict.particles import Particles
from retrodict.records import Problem, Rollouts, Trace
from retrodict.samplers.common import finish
from retrodict.samplers.importance import importance
from retrodict.samplers.smc import smc
from retrodict.targets.algebra import Target
from retrodict.targets.constraint import Constraint, HardTerm
from retrodict.targets.lexical import lexical
from retrodict.targets.ready import continuation, of_length, posterior
from retrodict.testing.bugs import Bug
from retrodict.testing.gates import METHODS
from retrodict.testing.oracle import Gate, enumerate_target, evidence_gates
from retrodict.testing.targets import Case

if TYPE_CHECKING:
    from retrodict.testing.testtime import Pair


def _model() -> TabularLM:
    return TabularLM.random(".ab ", order=3, seed=1, scale=0.5)


def _case(name: str, target: Target, factor: Constraint, holds: Callable[[str], object]) -> Case:
    """A target times a factor, which ``holds`` states once more in plain Python."""
    by_text = {factor.name: lambda t: 0.0 if holds(t) else NEG_INF}
    return Case(f"lexical: {name}", target * factor, None, by_text)


def _two_words() -> tuple[Target, Constraint, Constraint]:
    base = continuation(_model(), "a ", stop=".", max_tokens=3)
    return base, lexical(contain=["a"]), lexical(contain=["b"])


def _pair_of_masks() -> Target:
    """Two words whose masks do not know of each other."""
    base, a, b = _two_words()
    masks = [cast(DFAGuide, (base * f).guide) for f in (a, b)]
    return (base * a * b).with_guide(ProductGuide(*masks))


def _both_words() -> list[Case]:
    base, a, b = _two_words()
    hold = {f.name: (lambda t, w=w: 0.0 if w in t.rstrip(".").split() else NEG_INF) for f, w in ((a, "a"), (b, "b"))}
    return [Case("lexical: two factors", base * a * b, None, hold),
            Case("lexical: two factors, a mask each", _pair_of_masks(), None, hold)]  # fmt: skip


def cases() -> list[Case]:
    """The small targets."""
    lm, other = _model(), TabularLM.random(".!ab ", order=2, seed=2, scale=0.6)
    ask = [Problem((1, 3), (2, 1), name="Y")]
    return [
        _case("in order, force", continuation(lm, "a ", stop=".", max_tokens=4), lexical(in_order=["a", "b"]),
              lambda t: re.search(r"(?<![ab])a(?![ab]).*(?<![ab])b(?![ab])", t)),
        _case("suffix with the stop, force", continuation(lm, "a ", stop=".", max_tokens=4),
              lexical(suffix="ab."), lambda t: t.endswith("ab.")),
        _case("two words, exact", of_length(lm, "a ", tokens=4, stop="."), lexical(words=2, max_letters=2),
              lambda t: len(t.split()) == 2 and not re.search("[ab]{3}", t)),
        _case("prefix and avoid, 2 to 4", continuation(lm, "a", stop=".", max_tokens=4, min_tokens=2,
              limit="own_stop"), lexical(prefix="a", avoid=["ab", "a b"], whole=False),
              lambda t: t.startswith("a") and "ab" not in t and "a b" not in t),
        _case("two stops", continuation(other, "a", stop=(0, 1), max_tokens=3, limit="own_stop"),
              Constraint(ends_with("a!") | ends_with("b."), "end"),
              lambda t: t.endswith(("a!", "b."))),
        _case("no stop", of_length(lm, "a", tokens=4, stop=None), lexical(contain=["a b"], only="ab "),
              lambda t: re.search(r"(?<![ab])a b(?![ab])", t) and "." not in t),
        _case("with evidence", posterior(lm, ask, stop=".", max_tokens=4), lexical(contain=["ab"], words=(1, 2)),
              lambda t: re.search(r"(?<![ab])ab(?![ab])", t) and 1 <= len(t.split()) <= 2),
        *_both_words(),
    ]  # fmt: skip


LABELS = {"exact": "exact, lexical", "importance": "importance, lexical", "smc, systematic": "smc, lexical",
          "mh, suffix": "mh suffix, lexical"}  # fmt: skip


def pairs(quick: bool) -> list[Pair]:
    """Each sampler on each target; two targets a sampler when quick."""
    from retrodict.testing.testtime import Pair

    every = cases()
    return [Pair(label, case, METHODS[method][1]) for i, (method, label) in enumerate(LABELS.items())
            for case in (every[2 * i : 2 * i + 2] if quick else every)]  # fmt: skip


# -- planted bugs ---------------------------------------------------------------------------------------------------


class ForgetsStop(DFAGuide):
    """Asks for acceptance before the stop's own text was read."""

    def __init__(self, guide: DFAGuide) -> None:
        self.__dict__.update(guide.__dict__)
        blind = replace(guide.space.stops, in_text=False)
        space = replace(guide.space, stops=blind)
        told = DFAGuide(guide.dfa, space, guide.token_bytes)
        self.tokens, self.alive = told.tokens, told.alive


class ForgetsWindow(DFAGuide):
    """Allows what acceptance can follow at any length, and takes what it allowed for accepted: a mask's own word."""

    def __init__(self, guide: DFAGuide) -> None:
        self.__dict__.update(guide.__dict__)
        self.alive = guide.alive.any(0).expand_as(guide.alive)

    def score(self, rollouts: Rollouts) -> Float[Tensor, " b"]:
        """0 wherever the mask let the string go on to its end."""
        state = self.start_at(rollouts, rollouts.n)
        return torch.where(self.alive[0, state], 0.0, NEG_INF)


def _stop_forgotten(seeds: int) -> list[Gate]:
    base = continuation(_model(), "a ", stop=".", max_tokens=4, limit="own_stop")
    honest = base * Constraint(contains("b") | ends_with("a."), "says b or ends with a")
    wrong = honest.with_guide(ForgetsStop(cast(DFAGuide, honest.guide)))
    return evidence_gates(enumerate_target(honest), lambda r, s: smc(wrong, n=16, runs=r, seed=s), seeds)


def _window_forgotten(seeds: int) -> list[Gate]:
    honest = of_length(_model(), "a ", tokens=4, stop=".") * lexical(words=2)
    guide = ForgetsWindow(cast(DFAGuide, honest.guide))
    wrong = replace(honest, guide=guide, factors={**honest.factors, "2 words": HardTerm(guide, "2 words")})
    return evidence_gates(enumerate_target(honest), lambda r, s: smc(wrong, n=16, runs=r, seed=s), seeds)


def _redrawn(target: Target, n: int, runs: int, seed: int) -> Particles:
    """The first n draws of each run that did not end in a dead end; the others are not counted."""
    p = importance(target, n=4 * n, runs=runs, seed=seed)
    first = (p.log_w.view(runs, 4 * n) == NEG_INF).long().argsort(dim=1, stable=True)[:, :n]
    rows = (torch.arange(runs)[:, None] * 4 * n + first).flatten()
    log_w = p.log_w[:, rows]
    log_z = log_mean_exp(log_w.view(1, runs, n))
    return finish(target, p.objects.take(rows), log_w, log_z, Trace("importance"), 0.0)


def _dead_ends_redrawn(seeds: int) -> list[Gate]:
    target = _pair_of_masks()
    return evidence_gates(enumerate_target(target), lambda r, s: _redrawn(target, 16, r, s), seeds)


BUGS: tuple[Bug, ...] = (
    Bug("acceptance asked before the stop was read", "smc, lexical", _stop_forgotten),
    Bug("what a mask without the length window let pass counted as legal", "smc, lexical", _window_forgotten),
    Bug("dead ends of two masks drawn again and not counted", "importance, lexical", _dead_ends_redrawn),
)
