"""What a constraint leaves open under every length limit and stop, against enumeration: no dead ends, none invented."""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch

from retrodict.guides.automata import ByteDFA, contains, ends_with, max_word_length, word_count
from retrodict.guides.base import ProductGuide
from retrodict.guides.dfa import DFAGuide
from retrodict.models.tabular import TabularLM
from retrodict.numerics import NEG_INF
from retrodict.policies.base import rollout
from retrodict.policies.guided import GuidedPolicy
from retrodict.policies.lm import LMPolicy
from retrodict.records import Problem, Rollouts
from retrodict.rng import generator
from retrodict.samplers.exact import exact
from retrodict.samplers.importance import importance
from retrodict.spaces.enumerate import enumerate_objects
from retrodict.spaces.stops import Stops
from retrodict.spaces.strings import Strings
from retrodict.spaces.tools import Tool
from retrodict.targets.lexical import lexical
from retrodict.targets.ready import continuation, posterior, until


def space_of(limit: str, low: int, stops: Stops, top: int = 4) -> Strings:
    return Strings(4, stops, top, limit, low, tokenizer=TabularLM.random(".ab ").tokenizer)


@pytest.mark.parametrize(
    "dfa", [ends_with("ab"), contains("ab"), word_count(2, 2), max_word_length(1), ends_with("a.")]
)
@pytest.mark.parametrize("limit", ["force", "own_stop", "exact", "exact_prefix"])
@pytest.mark.parametrize("low", [0, 3])
@pytest.mark.parametrize("stops", [Stops((0,), in_text=True), Stops((0,)), Stops(), Stops((1, 0), in_text=True),
                                   until("b "), until("a")],
                         ids=["text", "no text", "none", "two", "until", "until one letter"])  # fmt: skip
def test_alive_is_exactly_what_a_legal_string_continues(dfa: ByteDFA, limit: str, low: int, stops: Stops) -> None:
    if not stops.acts and not stops.predicate and limit in ("own_stop", "exact"):
        return
    if stops.predicate and (low or limit.startswith("exact")):
        return
    space = space_of(limit, low, stops)
    guide = DFAGuide(dfa, space, TabularLM.random(".ab ").token_bytes)
    rows = enumerate_objects(space, 0)
    stop_there = priced(space, rows)
    accepted = (guide.score(rows) == 0) & stop_there
    text = space.show(rows)
    for ok, t in zip((guide.score(rows) == 0).tolist(), text, strict=True):
        assert ok == dfa.accepts(t.encode()), t
    for m in range(5):
        prefixes = {tuple(z[:m]) for z, n in zip(rows.moves.tolist(), rows.n.tolist(), strict=True) if n >= m}
        good = {tuple(z[:m]) for z, n, ok in zip(rows.moves.tolist(), rows.n.tolist(), accepted.tolist(), strict=True)
                if ok and n >= m}  # fmt: skip
        listed = torch.tensor(sorted(prefixes), dtype=torch.long).view(len(prefixes), m)
        s = space.start(torch.zeros(len(listed), dtype=torch.long))
        c = guide.start(s.problem)
        for t in range(m):
            c, s = guide.step(c, s, listed[:, t]), space.step(s, listed[:, t])
        alive = {tuple(z) for z, psi in zip(listed.tolist(), guide.log_psi(c, s).tolist(), strict=True) if psi == 0}
        assert alive == good, (m, alive ^ good)
        if m:
            assert torch.equal(nexts(guide, space, listed[:, :-1], listed[:, -1]), guide.log_psi(c, s))


def nexts(guide: DFAGuide, space: Strings, before: torch.Tensor, move: torch.Tensor) -> torch.Tensor:
    """log_next of the last move, asked for one move earlier."""
    s = space.start(torch.zeros(len(before), dtype=torch.long))
    c = guide.start(s.problem)
    for t in range(before.shape[1]):
        c, s = guide.step(c, s, before[:, t]), space.step(s, before[:, t])
    return guide.log_next(c, s).gather(1, move[:, None]).squeeze(1)


def priced(space: Strings, rows: Rollouts) -> torch.Tensor:
    """Objects that p gives a price above zero: where they may stop, with a stop that may be taken there."""
    raw = torch.full((len(rows), space.n_stops), -1.0)
    price = space.log_p_stop(raw, rows.n, space.replay(rows, rows.n).ended)
    return price.gather(1, rows.stop[:, None]).squeeze(1) > NEG_INF


@pytest.mark.parametrize("limit", ["force", "own_stop", "exact"])
@pytest.mark.parametrize("low", [0, 3])
def test_no_draw_is_a_dead_end(limit: Any, low: int) -> None:
    lm = TabularLM.random(".ab ", order=2, seed=4)
    for factor in (lexical(suffix="ab."), lexical(in_order=["a", "b"]), lexical(words=2, max_letters=1, avoid=["b"])):
        target = continuation(lm, "a ", stop=".", max_tokens=4, min_tokens=low, limit=limit) * factor
        policy = GuidedPolicy(cast(LMPolicy, target.prior), cast(DFAGuide, target.guide))
        drawn = rollout(policy, torch.zeros(400, dtype=torch.long), generator(0))
        assert (target.log_gamma(drawn) > NEG_INF).all() and len(set(target.space.show(drawn))) > 1


def test_one_automaton_of_two_conditions_sees_what_two_cannot() -> None:
    """Two words in two tokens of a and b: each alone leaves room until the end, both together do not.

    "contains a" and "contains b" are each within reach of one more token after " ", but both are not.
    """
    lm = TabularLM.random(".ab ", order=2, seed=4)
    base = continuation(lm, "a ", stop=".", max_tokens=3)
    a, b = lexical(contain=["a"]), lexical(contain=["b"])
    joined = base * a * b
    assert isinstance(joined.guide, DFAGuide) and set(joined.factors) == {"prior", "contains a", "contains b"}
    alone = [cast(DFAGuide, (base * f).guide) for f in (a, b)]
    pair = joined.with_guide(ProductGuide(*alone))
    truth = float(exact(joined).evidence[0])
    dead = {}
    for name, target in (("one", joined), ("two", pair)):
        p = importance(target, n=4000, seed=0)
        dead[name] = float((p.log_w == NEG_INF).double().mean())
        assert abs(float(p.evidence[0]) - truth) < 5 * float(p.evidence[1])  # both are unbiased
    assert dead["one"] == 0 and dead["two"] > 0.3, dead


def test_guides_of_other_kinds_stay_beside_the_automaton() -> None:
    lm = TabularLM.random(".ab ", order=2, seed=4)
    story = posterior(lm, [problem(lm)], stop=".", max_tokens=4) * lexical(contain=["a"]) * lexical(contain=["b"])
    assert isinstance(story.guide, ProductGuide) and len(story.guide.guides) == 2
    merged = cast(DFAGuide, story.guide.guides[1])
    assert merged.label == "contains a; contains b"


def problem(lm: TabularLM) -> Any:
    return Problem(tuple(lm.tokenizer.encode("a ")), tuple(lm.tokenizer.encode("b")), name="p")


@pytest.mark.parametrize("limit", ["force", "own_stop"])
def test_a_predicate_or_a_tool_makes_no_legal_string_impossible(limit: Any) -> None:
    lm = TabularLM.random(".ab ", order=2, seed=4)
    tool = Tool(lambda text: ". b", trigger="a", room=6)
    for target in (
        posterior(lm, [problem(lm)], stop=until("b "), max_tokens=4, limit=limit) * lexical(contain=["a"]),
        posterior(lm, [problem(lm)], stop=".", max_tokens=3, limit=limit, tool=tool)
        * lexical(contain=["b"], avoid=["bb"]),
    ):
        rows = target.terms(enumerate_objects(target.space, 0))
        bent = GuidedPolicy(cast(LMPolicy, target.prior), cast(Any, hard(target.guide))).score(rows)
        inside = torch.arange(rows.moves.shape[1]) < rows.n[:, None]
        log_q = torch.where(inside, bent.log_q, 0.0).sum(1) + bent.log_stop[torch.arange(len(rows)), rows.n, rows.stop]
        alive = target.log_gamma(rows) > NEG_INF
        assert alive.any() and (log_q[alive] > NEG_INF).all()


def hard(guide: Any) -> Any:
    return next(g for g in guide.guides if g.hard) if isinstance(guide, ProductGuide) else guide
