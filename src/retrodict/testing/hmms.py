"""HMM guides on small targets: whatever the HMM, evidence and law stay the target's; and its planted bugs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import TYPE_CHECKING, Any, cast

import torch
from jaxtyping import Float
from torch import Tensor

from retrodict.guides.dfa import DFAGuide
from retrodict.guides.hmm import HMM
from retrodict.guides.hmm_fit import fit_hmm
from retrodict.guides.hmm_guide import HMMGuide
from retrodict.latent.hmm import random_hmm
from retrodict.models.tabular import TabularLM
from retrodict.numerics import log_mean_exp
from retrodict.particles import Particles
from retrodict.policies.guided import GuidedPolicy
from retrodict.records import Problem
from retrodict.samplers.importance import importance
from retrodict.samplers.smc import smc
from retrodict.spaces.stops import Stops
from retrodict.spaces.strings import Strings
from retrodict.targets.algebra import Target
from retrodict.targets.constraint import short_words
from retrodict.targets.hmm import with_hmm
from retrodict.targets.ready import continuation, including, infill, posterior
from retrodict.testing.bugs import Bug, KeepsTwist, _run
from retrodict.testing.oracle import Gate, enumerate_target, evidence_gates
from retrodict.testing.targets import Case

if TYPE_CHECKING:
    from retrodict.testing.testtime import Pair


def markov(table: Float[Tensor, "v1 v"], first: int) -> HMM:
    """The HMM that *is* a first-order Markov chain: z_t is the last token.

    ``table[i]`` is the distribution of the next token after token i; its row ``first`` begins (v: "no token yet").
    """
    v = table.shape[1]
    transition = torch.cat([table, table.new_zeros(v + 1, 1)], 1)
    emission = torch.cat([torch.eye(v, dtype=table.dtype), table.new_full((1, v), 1 / v)])
    return HMM(torch.eye(v + 1, dtype=table.dtype)[first], transition, emission)


@cache
def _lm() -> TabularLM:
    return TabularLM.random(".ab ", order=3, seed=1, scale=0.8)


@cache
def fitted() -> HMM:
    """A small HMM of the small targets' model."""
    return fit_hmm(_lm(), ["a", "b ", "ab", " a"], states=6, texts=240, length=12, em=4, soft=2).to(torch.float64)


def targets(quick: bool = False) -> dict[str, Target]:
    """Word constraints, windows and suffixes under every limit; the model is of third order, no HMM."""
    lm, two = _lm(), TabularLM.random(".!ab ", order=2, seed=2, scale=0.6)
    own = {"stop": ".", "max_tokens": 4, "limit": "own_stop"}
    some: dict[str, Target] = {
        "including, own_stop": including(lm, "a ", contain=["ab"], avoid=["ba"], **own),
        "infill, own_stop": infill(lm, "ab", "ba", join="", **own),
    }
    if quick:
        return some
    ends = [Problem((1, 2), (2, 3), name="ends")]
    return some | {
        "short words, own_stop": continuation(lm, "a ", **own) * short_words(1),
        "including, force": including(lm, "a ", contain=["ab"], stop=".", max_tokens=4),
        "including, exact": including(lm, "a ", contain=["ab"], stop=".", max_tokens=4, limit="exact"),
        "window only": continuation(lm, "a", stop=".", max_tokens=4, min_tokens=2, limit="own_stop"),
        "infill, exact": infill(lm, "ab", "ba", stop=".", max_tokens=4, limit="exact", join=""),
        "suffix replaces two ends": posterior(two, ends, stop=Stops((0, 1), label="ends"), max_tokens=3),
        "suffix, two stops": posterior(two, ends, stop=(0, 1), max_tokens=3, limit="own_stop"),
    }


def _guided(target: Target, look: bool, seed: int = 0) -> Target:
    space = cast(Strings, target.space)
    hmm = fitted() if space.vocab_size == _lm().vocab_size and not look else random_hmm(3, space.vocab_size, seed)
    guided = with_hmm(target, hmm)
    return guided if look else guided.with_guide(_blind(cast(HMMGuide, guided.guide)))


def _blind(guide: HMMGuide) -> HMMGuide:
    return HMMGuide(guide.hmm, guide.space, guide.problems, guide.automaton, guide.power)


def pairs(quick: bool) -> list[Pair]:
    """SMC with psi as proposal and twist (fitted; random, with one look further), and importance by its proposal."""
    from retrodict.testing.testtime import Pair

    out = []
    for name, target in targets(quick).items():
        blind, look = _guided(target, False), _guided(target, True)
        policy = GuidedPolicy(cast(Any, target.prior), cast(HMMGuide, look.guide))
        out += [
            Pair("smc, fitted HMM", Case(name, blind), _gates(smc, ess_threshold=0.9)),
            Pair("smc, random HMM, a look further", Case(name, look), _gates(smc, ess_threshold=0.9)),
            Pair("importance, random HMM proposes", Case(name, target.with_guide(None), policy), _gates(importance)),
        ]
    return out


def _gates(sampler: Callable[..., Particles], **settings: Any) -> Any:
    def gates(case: Case, exact: list[Any], seeds: int) -> list[Gate]:
        return evidence_gates(
            exact, lambda r, s: sampler(case.target, case.policy, n=16, runs=r, seed=s, **settings), seeds
        )

    return gates


# -- planted bugs ---------------------------------------------------------------------------------------------------


class ShortWindow(DFAGuide):
    """An automaton whose window is one move short: what needs the last move looks dead."""

    def __init__(self, guide: DFAGuide) -> None:
        self.__dict__.update(guide.__dict__)
        self.alive = torch.cat([guide.alive[:1], guide.alive[:-1]])


def _words() -> Target:
    return targets()["including, force"]


def _twist_kept(seeds: int) -> list[Gate]:
    target = _guided(_words(), False)
    return evidence_gates(enumerate_target(target), lambda r, s: _run(KeepsTwist, target, None, r, s), seeds)


def _short_window(seeds: int) -> list[Gate]:
    target = _guided(_words(), False)
    guide = cast(HMMGuide, target.guide)
    short = ShortWindow(cast(DFAGuide, guide.automaton))
    bad = target.with_guide(HMMGuide(guide.hmm, guide.space, guide.problems, short))
    return evidence_gates(enumerate_target(target), lambda r, s: smc(bad, n=16, runs=r, seed=s), seeds)


def _unweighted(seeds: int) -> list[Gate]:
    """Ctrl-G: the bent model's draws are taken as they come, at the HMM's own estimate of the evidence."""
    target = _words()
    guide = cast(HMMGuide, _guided(target, False).guide)
    policy = GuidedPolicy(cast(Any, target.prior), guide)
    empty = torch.zeros(1, dtype=torch.long)
    log_z = guide.log_psi(guide.start(empty), cast(Strings, target.space).start(empty))

    def run(r: int, s: int) -> Particles:
        p = importance(target.with_guide(None), policy, n=16, runs=r, seed=s)
        flat = log_z.expand_as(p.log_w).contiguous()
        return replace(p, log_w=flat, log_z=log_mean_exp(flat.view(1, r, 16)))

    return evidence_gates(enumerate_target(target.with_guide(None), policy), run, seeds)


BUGS: tuple[Bug, ...] = (
    Bug("HMM twist not divided out at the stop", "smc", _twist_kept),
    Bug("HMM window one move short", "smc", _short_window),
    Bug("HMM guide without weights", "importance", _unweighted),
)
