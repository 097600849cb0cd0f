"""Particle filtering over steps, and self-consistency, on small targets: their rows of ``testing.testtime``."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import combinations_with_replacement
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from retrodict.diagnostics.divergence import tv_bound
from retrodict.diagnostics.votes import Answer, Votes, votes
from retrodict.models.tabular import TabularLM
from retrodict.particles import Particles
from retrodict.records import Problem, Problems
from retrodict.samplers.importance import ancestral
from retrodict.samplers.smc import smc
from retrodict.spaces.tools import Tool
from retrodict.targets.algebra import Target
from retrodict.targets.constraint import short_words
from retrodict.targets.ready import continuation, infill, posterior, scored
from retrodict.targets.steps import stepwise
from retrodict.targets.verifier import verifier
from retrodict.testing.bugs import Bug
from retrodict.testing.oracle import LEVEL, MIN_HITS, Z_BAR, Exact, Gate, enumerate_target, evidence_gates
from retrodict.testing.targets import Case

if TYPE_CHECKING:
    from retrodict.testing.testtime import Pair

CHAINS = 5
"""Chains that vote."""

Row = Mapping[str, Any]


def _steps_reward(texts: Sequence[str], rows: Sequence[Row]) -> list[float]:
    """A process reward that is often wrong about the end: it likes "b"."""
    return [0.2 + 0.3 * min(t.count("b"), 2) for t in texts]


def _raw_product(texts: Sequence[str], rows: Sequence[Row]) -> list[float]:
    """Product of the rewards at every boundary " " of each text."""
    ends = [[i + 1 for i, x in enumerate(t) if x == " "] for t in texts]
    return [math.prod(_steps_reward([t[:e] for e in on], []), start=1.0) for t, on in zip(texts, ends, strict=True)]


def _last_letter(text: str, row: Row) -> str | None:
    """The answer of a toy chain: its last letter."""
    letters = [x for x in text if x in "ab12"]
    return letters[-1] if letters else None


def _likes_a(texts: Sequence[str], rows: Sequence[Row]) -> list[float]:
    return [0.1 + 0.2 * min(t.count("a"), 4) for t in texts]


def _answer(text: str) -> str | None:
    """What the toy tool writes after "=": one token or two."""
    return "12" if text.count("1") % 2 else "2"


def step_cases() -> list[Case]:
    """Small targets whose guide is a process reward; steps end at " " (or "," and a tool's answer)."""
    lm = TabularLM.random(".ab ", order=3, seed=1, scale=0.6)
    two = TabularLM.random(".!ab ", order=2, seed=2, scale=0.6)
    sums = TabularLM.random(".=12,", order=2, seed=3, scale=0.4)
    likes, reward = verifier(_likes_a), verifier(_steps_reward)
    bare = [
        ("scored, force", scored(lm, "a", likes, stop=".", max_tokens=4)),
        ("scored, own_stop", scored(lm, "a", likes, stop=".", max_tokens=4, limit="own_stop")),
        ("tempered", continuation(lm, "a", temperature=0.7, stop=".", max_tokens=4)),
        ("infill, exact, and a look-ahead", infill(lm, "ab", "ba", stop=".", max_tokens=4, limit="exact", join="")),
        ("short words", continuation(lm, "a ", stop=".", max_tokens=4) * short_words(1)),
        ("batch of problems", posterior(lm, [Problem((2, 3)), Problem((3, 1)), Problem((1,))], stop=".", max_tokens=3,
                                        verifier=likes)),
        ("two stops", posterior(two, [Problem((2,))], stop=(0, 1), max_tokens=3, verifier=likes)),
    ]  # fmt: skip
    out = [Case(name, stepwise(target, reward, boundary=" ")) for name, target in bare]
    tool = posterior(sums, [Problem((2, 3))], stop=".", max_tokens=3, tool=Tool(_answer, room=3),
                     verifier=verifier(lambda t, _: [0.1 + 0.2 * min(x.count("2"), 4) for x in t]))  # fmt: skip
    likes_one = verifier(lambda t, _: [0.3 + 0.2 * min(x.count("1"), 3) for x in t])
    return [*out, Case("a tool's answers", stepwise(tool, likes_one, boundary=",", power=0.5))]


# -- gates ----------------------------------------------------------------------------------------------------------


def _filtered(case: Case, exact: list[Exact], seeds: int) -> list[Gate]:
    def sample(runs: int, seed: int) -> Particles:
        return smc(case.target, n=16, runs=runs, seed=seed, ess_threshold=0.9)

    return evidence_gates(exact, sample, seeds)


def majority_law(p: Float[Tensor, " answers"], n: int) -> tuple[Float[Tensor, " answers"], float]:
    """Law of the winner among n chains, and the mean of its share; the last entry of p (and of the law) is "none".

    Chains without an answer do not win unless all are. Counts are multinomial; of equals the first drawn wins, and
    each of them is as likely to have come first.
    """
    none, law, share = len(p) - 1, torch.zeros_like(p), 0.0
    for drawn in combinations_with_replacement(range(len(p)), n):
        count = [drawn.count(a) for a in range(len(p))]
        chance = math.factorial(n) * math.prod(float(x) ** c / math.factorial(c) for x, c in zip(p, count, strict=True))
        top = max(count[:none])
        winners = [a for a in range(none) if count[a] == top] if top else [none]
        for a in winners:
            law[a] += chance / len(winners)
        share += chance * top / n
    return law, share


def _answers(exact: Exact, target: Target, answer: Answer) -> dict[str | None, float]:
    """Probability of each answer of one chain; no answer comes last."""
    found: dict[str | None, float] = {}
    for text, log_q in zip(target.space.show(exact.paths), exact.log_base.tolist(), strict=True):
        y = answer(text, {})
        found[y] = found.get(y, 0.0) + math.exp(log_q)
    none = found.pop(None, 0.0)
    return {**found, None: none}


def self_consistency_gates(
    case: Case,
    exact: list[Exact],
    seeds: int,
    n: int = CHAINS,
    count: Callable[[Particles, Problems, Answer], Votes] = votes,
) -> list[Gate]:
    """Winners and shares of many independent votes of n chains against their exact law."""
    runs, worst, worst_share, tv = 10 * seeds, 0.0, 0.0, (0.0, 1.0)
    for i, e in enumerate(exact):
        data = [case.target.problems[i]] * runs
        found = count(ancestral(case.target.with_guide(None).on(data), n=n, seed=i), data, _last_letter)
        p = _answers(e, case.target, _last_letter)
        law, share = majority_law(torch.tensor(list(p.values()), dtype=torch.float64), n)
        names = list(p)
        at = torch.tensor([names.index(y) for y in found.answers])
        seen = torch.bincount(at, minlength=len(names)).double() / runs
        often = runs * law.minimum(1 - law) >= MIN_HITS
        z = ((seen - law) / (law * (1 - law) / runs).clamp_min(1e-300).sqrt())[often]
        worst = max(worst, float(z.abs().max())) if len(z) else worst
        spread = float(found.share.std()) / math.sqrt(runs)
        worst_share = max(worst_share, abs(float(found.share.mean()) - share) / max(spread, 1e-12))
        here = (0.5 * float((seen - law).abs().sum()), tv_bound(law.tolist(), runs, LEVEL))
        tv = max(tv, here, key=lambda x: x[0] / x[1])
    note = f"{runs} votes of {n}"
    return [Gate("|z| of answers", worst, Z_BAR, note), Gate("|z| of the mean share", worst_share, Z_BAR, note),
            Gate("total variation", *tv)]  # fmt: skip


def pairs(quick: bool = False) -> list[Pair]:
    """Filtering on all small targets, votes on those whose plain chains differ; quick keeps three and two."""
    from retrodict.testing.testtime import Pair

    cases = step_cases()
    filtered, voted = ((1, 3, 7), (3, 7)) if quick else (range(8), (0, 3, 4, 5, 6, 7))
    out = [Pair("smc, step guide", cases[i], _filtered) for i in filtered]
    return out + [Pair("self-consistency", cases[i], self_consistency_gates) for i in voted]


# -- planted bugs ---------------------------------------------------------------------------------------------------


def raw_rewards(seeds: int) -> list[Gate]:
    """Weights multiplied by r at each boundary instead of by the ratio to the r before: the target becomes p prod r.

    Written as the SMC it is: a guide whose psi is the product of all rewards so far, never divided out.
    """
    lm = TabularLM.random(".ab ", order=3, seed=1, scale=0.6)
    honest = scored(lm, "a", verifier(_likes_a), stop=".", max_tokens=4)
    raw = stepwise(honest * verifier(_raw_product, name="raw"), verifier(_raw_product), boundary=" ")
    return evidence_gates(
        enumerate_target(honest), lambda r, s: smc(raw, n=16, runs=r, seed=s, ess_threshold=0.9), seeds
    )


def ties_by_name(seeds: int) -> list[Gate]:
    """Votes whose ties go to the answer that sorts first, not to the one that came first."""

    def count(p: Particles, problems: Problems, answer: Answer) -> Votes:
        found = votes(p, problems, answer)
        best = [min((y for y, x in s.items() if x == max(s.values())), default=None) for s in found.shares]
        return replace(found, answers=tuple(best))

    case = step_cases()[0]
    return self_consistency_gates(case, enumerate_target(case.target), 4 * seeds, n=2, count=count)


BUGS: tuple[Bug, ...] = (
    Bug("raw rewards instead of ratios", "smc, step guide", raw_rewards),
    Bug("ties go by name", "self-consistency", ties_by_name),
)
