"""Adaptive weighted rejection: the estimators against the local sum, predicates as factors, and what is asked."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from jaxtyping import Float
from torch import Tensor

from retrodict.errors import InputError
from retrodict.guides.base import BaseGuide, ProductGuide, hard_part, parts
from retrodict.models.tabular import TabularLM
from retrodict.policies.awrs import AWRS, ESTIMATORS, _Pool
from retrodict.policies.guided import GuidedPolicy
from retrodict.rng import generator
from retrodict.samplers.common import proposal
from retrodict.samplers.importance import importance
from retrodict.samplers.mh.run import mh
from retrodict.samplers.smc import conditional_smc, smc
from retrodict.targets.algebra import Target
from retrodict.targets.constraint import short_words
from retrodict.targets.predicate import PredicateGuide, predicate
from retrodict.targets.ready import continuation, infill
from retrodict.targets.verifier import VerifierError
from retrodict.testing.oracle import enumerate_target
from retrodict.testing.targets import TableGuide

LAW = torch.tensor([0.5, 0.2, 0.15, 0.1, 0.05], dtype=torch.float64)
ROWS = 40_000


def short(texts: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> list[bool]:
    return [not re.search("[a-z]{2}", t) for t in texts]


def letters(limit: Any = "own_stop") -> Target:
    return continuation(TabularLM.random(".ab ", order=3, seed=1), "a ", stop=".", max_tokens=4, limit=limit)


def estimates(
    name: str, psi: Tensor, cap: int, accepts: int = 2, p: Tensor = LAW, held: int = -1
) -> Float[Tensor, "v"]:
    """Mean over many rows of Z-hat 1[token], and where a token is held, of 1 / Z-hat there."""
    pool = _Pool(p.expand(ROWS, -1).clone(), lambda rows, x: psi[x], generator(0))
    rows = torch.arange(ROWS)
    token, log_z = ESTIMATORS[name](pool, rows, torch.full((ROWS,), held), 2, cap)
    z = -log_z if held >= 0 else log_z
    return torch.zeros(5, dtype=torch.float64).index_add(0, token.clamp_min(0), z.exp()) / ROWS


@pytest.mark.parametrize("name", ESTIMATORS)
@pytest.mark.parametrize("psi", [(1, 0, 1, 0, 1), (0, 0, 1, 1, 0), (0, 0, 0, 0, 1), (1, 1, 1, 1, 1), (0, 0, 0, 0, 0)])
@pytest.mark.parametrize("cap", [1, 2, 1000])
def test_estimates_are_properly_weighted(name: str, psi: tuple[int, ...], cap: int) -> None:
    allowed = torch.tensor(psi, dtype=torch.bool)
    got, want = estimates(name, allowed, cap), LAW * allowed
    assert ((got - want).abs() <= 4.5 / ROWS**0.5 * (want * allowed.double()).clamp_min(0.02).sqrt()).all()
    assert (got[~allowed] == 0).all()


def test_more_accepts_give_less_variance() -> None:
    psi, spread = torch.tensor([True, False, True, False, False]), []
    for accepts in (2, 4, 8):
        pool = _Pool(LAW.expand(ROWS, -1).clone(), lambda rows, x: psi[x], generator(0))
        log_z = ESTIMATORS["geometric"](pool, torch.arange(ROWS), torch.full((ROWS,), -1), accepts, 10**6)[1]
        spread.append(float(log_z.exp().var()))
    assert spread[0] > 1.5 * spread[1] > 2 * spread[2]


@pytest.mark.parametrize("name", ESTIMATORS)
@pytest.mark.parametrize("cap", [1, 2, 1000])
def test_estimates_given_the_token_are_tilted(name: str, cap: int) -> None:
    """Given the token v the law of Z-hat is tilted by it: E[1 / Z-hat | v] = P(v is drawn, Z-hat > 0) / p(v)."""
    psi, v = torch.tensor([True, False, True, False, True]), 2
    pool = _Pool(LAW.expand(ROWS, -1).clone(), lambda rows, x: psi[x], generator(1))
    token, log_z = ESTIMATORS[name](pool, torch.arange(ROWS), torch.full((ROWS,), -1), 2, cap)
    drawn = float(((token == v) & (log_z > -torch.inf)).double().mean())
    got = float(estimates(name, psi, cap, held=v)[v])
    assert got == pytest.approx(drawn / float(LAW[v]), rel=0.05)


@pytest.mark.parametrize("name", ESTIMATORS)
def test_a_token_of_tiny_probability_is_found(name: str) -> None:
    """1 - p(R) is a sum over what is left: with 1 - sum it would round to 0 here."""
    p = torch.tensor([1 - 1e-25, 1e-25], dtype=torch.float64)
    pool = _Pool(p.expand(4, -1).clone(), lambda rows, x: x == 1, generator(0))
    token, log_z = ESTIMATORS[name](pool, torch.arange(4), torch.full((4,), -1), 2, 1000)
    assert (token == 1).all()
    if name == "recursive":  # all that is left: exact
        assert torch.allclose(log_z.exp(), torch.full((4,), 1e-25, dtype=torch.float64))


def test_each_text_is_asked_once_and_only_while_it_matters() -> None:
    asked: list[str] = []

    def check(texts: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> list[bool]:
        asked.extend(texts)
        return short(texts, rows)

    target = letters() * predicate(check, check)
    p = smc(target, n=32, runs=2, seed=0)
    assert len(asked) == len(set(asked)) == p.trace.counts["checks"]
    assert all(short([t[:-1]], [{}])[0] for t in asked if len(t) > 1)  # nothing is asked beyond a text that failed
    assert all(short([t], [{}])[0] for t, w in zip(p.shown, p.log_w.flatten().tolist(), strict=True) if w > -torch.inf)
    again = smc(target, n=32, runs=2, seed=0)
    assert again.trace.counts["checks"] == 0 and again.keys == p.keys


def test_the_proposal_is_chosen_by_the_target() -> None:
    plain, tested, masked = letters(), letters() * predicate(short, short), letters() * short_words(1)
    assert proposal(plain, None) is plain.prior
    assert type(proposal(tested, None)) is AWRS and type(proposal(masked, None)) is GuidedPolicy
    both = tested * short_words(2)
    found = proposal(both, None)
    assert isinstance(found, AWRS) and len(parts(found.guide)) == 2
    story = infill(TabularLM.random(".ab ", order=3, seed=1), "ab", "ba", stop=".", max_tokens=3, join="")
    found = proposal(story * predicate(short, short), None)
    assert isinstance(found, AWRS) and isinstance(found.guide, PredicateGuide)  # without the look-ahead
    assert isinstance(proposal(story * predicate(short, short), None, soft=True), AWRS)
    assert hard_part(story.guide) is None and hard_part(None) is None


def test_score_is_the_masks_law() -> None:
    """Asked about every token, the check gives what the automaton's mask gives (away from the length limit)."""
    tested, masked = letters("force") * predicate(short, short), letters("force") * short_words(1)
    a, b = enumerate_target(tested)[0], enumerate_target(masked)[0]
    assert torch.allclose(a.log_q, b.log_q, atol=1e-6)


def test_one_token_at_a_time_through_an_automaton() -> None:
    target = letters() * short_words(1)
    assert target.prior is not None and target.guide is not None
    p = smc(target, AWRS(target.prior, target.guide), n=64, runs=4, seed=0)
    assert "checks" not in p.trace.counts  # an automaton asks no function
    truth = float(enumerate_target(target)[0].z.log())
    assert abs(float(p.evidence[0]) - truth) < 5 * float(p.evidence[1])  # pyright: ignore[reportOptionalSubscript]


def test_a_soft_guide_beside_the_check_proposes_too() -> None:
    target = letters("force") * predicate(short, short)
    assert target.prior is not None and target.guide is not None
    twist = TableGuide(target.prior.space)
    policy = AWRS(target.prior, ProductGuide(target.guide, twist))
    row = torch.tensor([0])
    c, s = policy.start(row), target.space.start(row)
    menu = target.space.menu(s)
    move, bare = policy.log_probs(c, s, menu)[0], target.prior.log_probs(c.base, s, menu)[0]
    ratio = (move - bare - twist.log_next(c.guide[1], s))[0]
    ratio = ratio[ratio.isfinite()]
    assert len(ratio) > 1 and torch.allclose(ratio, ratio[:1].expand_as(ratio), atol=1e-6)


def test_a_dead_end_weighs_nothing_and_is_asked_about_once() -> None:
    def no_second(texts: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> list[bool]:
        return [len(t) <= 1 for t in texts]

    target = letters("exact") * predicate(no_second, no_second)
    for sampler in (smc, importance):
        p = sampler(target, n=8, runs=2, seed=0)
        assert (p.log_w == -torch.inf).all() and not p.log_w.isnan().any()
        assert p.trace.counts["checks"] <= 4 + 4 * 4


def test_mh_keeps_the_estimate_it_accepted() -> None:
    """Weighted rejection as the proposal of Metropolis-Hastings: chains stay on the target (pseudo-marginal)."""
    target = letters() * predicate(short, short)
    exact = enumerate_target(target)[0]
    p = mh(target, n=2000, steps=12, keep=1, seed=0)
    counts = torch.zeros(len(exact.keys), dtype=torch.float64)
    counts.index_add_(
        0, torch.tensor([exact.keys[k] for k in p.keys]), torch.full((2000,), 1 / 2000, dtype=torch.float64)
    )
    assert 0.5 * float((counts - exact.gamma / exact.z).abs().sum()) < 0.06


def test_conditional_smc_holds_its_object() -> None:
    target = letters() * predicate(short, short)
    held = enumerate_target(target)[0].draw(3, seed=1)
    p = conditional_smc(target, exact=held, n=4, runs=3, seed=0)
    assert [p.keys[i * 4] for i in range(3)] == target.space.keys(held)


def test_an_exception_names_the_text() -> None:
    def check(texts: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> list[bool]:
        if any("b" in t for t in texts):
            raise ValueError("no b please")
        return [True] * len(texts)

    with pytest.raises(VerifierError, match=r"predicate.*ValueError: no b please; on the text '.*b'"):
        smc(letters() * predicate(check, check), n=16, seed=0)
    with pytest.raises(VerifierError, match=r"\(prefix\)"):
        smc(letters() * predicate(short, check), n=16, seed=0)


def test_bad_input() -> None:
    target = letters() * predicate(short)
    assert target.prior is not None and target.guide is not None
    for settings in ({"estimator": "recusive"}, {"accepts": 1}, {"max_rejects": 0}):
        with pytest.raises(InputError):
            AWRS(target.prior, target.guide, **settings)  # pyright: ignore[reportArgumentType]
    with pytest.raises(InputError, match="0 or 1"):
        AWRS(target.prior, BaseGuide())
    with pytest.raises(InputError, match="temperature 1"):
        importance(target, n=4, seed=0, temperature=1.5)
    with pytest.raises((InputError, TypeError)):
        predicate("no")  # pyright: ignore[reportArgumentType]
