"""A tool inside the latent, against enumeration by a pencil that shares no code with the space or the scoring."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from retrodict.errors import InputError
from retrodict.guides.mask import TokenMask
from retrodict.models.tabular import TabularLM
from retrodict.models.tiny import TinyLM
from retrodict.numerics import NEG_INF
from retrodict.objectives.db import db
from retrodict.objectives.pooled import pooled
from retrodict.objectives.residual import residual
from retrodict.objectives.subtb import subtb
from retrodict.policies.base import FiniteStepper
from retrodict.policies.guided import GuidedPolicy
from retrodict.policies.lm import LMPolicy
from retrodict.protocols import LanguageModel
from retrodict.records import FORCED, FREE, MUST_MOVE, MUST_STOP, Menu, Problem, Rollouts, Scores
from retrodict.rng import generator
from retrodict.samplers.exact import exact
from retrodict.samplers.importance import importance
from retrodict.samplers.mh.run import mh
from retrodict.spaces.enumerate import enumerate_objects
from retrodict.spaces.limits import Limit
from retrodict.spaces.stops import EndsWith, Stops
from retrodict.spaces.strings import Strings, StringState
from retrodict.spaces.tools import Tool, ToolError, ToolState, ToolStrings, with_tool
from retrodict.targets.algebra import Target
from retrodict.targets.likelihood import Likelihood
from retrodict.targets.prior import Prior
from retrodict.targets.ready import from_prior
from retrodict.testing import (
    Case,
    Exact,
    TableGuide,
    check_exact,
    check_guide,
    check_policy,
    check_space,
    check_target,
    enumerate_target,
    evidence_gates,
)
from retrodict.testing.bugs import BAR

ALPHABET = ".=12"
FREE_MOVES, ROOM = 4, 3
SHORT = 2  # free moves where samplers are counted
LM = TabularLM.random(ALPHABET, order=3, seed=1, scale=0.4)
PROBLEMS = [Problem((2,), (3, 2), name="one"), Problem((3, 1), (1,), name="two")]


def answer(text: str) -> str | None:
    """Nothing, one token or two: by the number of "1" before the "=". "2=" ends with the trigger itself."""
    return (None, "2=", "1")[text.count("1") % 3]


TOOL = Tool(answer, room=ROOM)


def space(limit: Limit = "force", stops: Stops | None = None, low: int = 0, kind: Any = None,
          length: int = FREE_MOVES) -> Strings:  # fmt: skip
    stops = stops or Stops((0,), in_text=True)
    plain = Strings(4, stops, length, limit, low, tokenizer=LM.tokenizer)
    made = with_tool(plain, TOOL)
    fields = {f.name: getattr(made, f.name) for f in dataclasses.fields(made)}
    return made if kind is None else kind(**fields)


def target_on(s: Strings, lm: LanguageModel = LM, problems: Sequence[Problem] = PROBLEMS) -> Target:
    prior = from_prior(lm, problems, s)
    return prior._with({"likelihood": Likelihood(lm, s, problems)}, {}, None, None)


def by_pencil(target: Target) -> list[dict[tuple[int, ...], float]]:
    """log gamma of every string: plain recursion over text, with its own count of free tokens and of room."""
    s = cast(ToolStrings, target.space)
    stop_id = s.stops.ids[0] if s.stops.ids else None

    def one(problem: Problem) -> dict[tuple[int, ...], float]:
        out: dict[tuple[int, ...], float] = {}

        def log_p(ids: Sequence[int], more: Sequence[int]) -> float:
            total, ids = 0.0, list(ids)
            for token in more:
                total += float(LM.encode([ids])[1][0].log_softmax(-1)[token])
                ids.append(token)
            return total

        def end(z: list[int], prior: float) -> None:
            text = [stop_id] if stop_id is not None else []
            out[(*z, -1)] = prior + log_p([*problem.context, *z, *text], problem.evidence)

        def grow(z: list[int], free: int, put: int, prior: float) -> None:
            here = [*problem.context, *z]
            over = s.stops.predicate is not None and s.stops.predicate("".join(ALPHABET[i] for i in z))
            if over or free == s.max_free:
                priced = stop_id is not None and s.limit in ("own_stop", "exact")
                lost = s.stops.predicate is not None and not over and s.limit == "own_stop"
                return end(z, NEG_INF if lost else prior + (log_p(here, [stop_id]) if priced else 0.0))  # type: ignore[list-item]
            if stop_id is not None and not s.limit.startswith("exact") and free >= s.min_moves:
                end(z, prior + log_p(here, [stop_id]))
            for token in range(4):
                if token == stop_id:
                    continue
                new, more = [*z, token], []
                text = "".join(ALPHABET[i] for i in new)
                ended = s.stops.predicate is not None and s.stops.predicate(text)
                if token == 1 and not ended:
                    more = [ALPHABET.index(c) for c in answer(text) or ""]
                    more = more if put + len(more) <= ROOM else []
                grow(new + more, free + 1, put + len(more), prior + log_p(here, [token]))

        grow([], 0, 0, 0.0)
        return out

    return [one(p) for p in target.problems]


UNTIL = Stops(predicate=EndsWith("2=2"), label="until '2=2'")
SPACES: dict[str, Callable[[], Strings]] = {
    "force": space,
    "own_stop": lambda: space("own_stop"),
    "exact": lambda: space("exact"),
    "exact_prefix": lambda: space("exact_prefix", Stops()),
    "min length": lambda: space("force", low=2),
    "until": lambda: space("force", UNTIL),
    "until, own_stop": lambda: space("own_stop", UNTIL),
}
SHORTER: dict[str, Callable[[], Strings]] = {
    "short, force": lambda: space(length=SHORT),
    "short, own_stop": lambda: space("own_stop", length=SHORT),
    "three, force": lambda: space(length=SHORT + 1),
    "short, until": lambda: space("force", UNTIL, length=SHORT + 1),
}
every_space = pytest.mark.parametrize("name", SPACES)


@functools.cache
def truth(name: str) -> tuple[Case, list[Exact]]:
    target = target_on({**SPACES, **SHORTER}[name]())
    return Case(f"tool, {name}", target), enumerate_target(target)


# -- the space, and what enumeration says -----------------------------------------------------------------------------


@every_space
def test_enumeration_equals_the_pencil(name: str) -> None:
    case, tables = truth(name)
    for e, hand in zip(tables, by_pencil(case.target), strict=True):
        got = dict(zip(case.target.space.keys(e.paths), e.log_gamma.tolist(), strict=True))
        assert set(got) == set(hand) and len(got) == len(e.paths)
        assert got == pytest.approx(hand, abs=1e-9)
        assert (e.paths.kind == FORCED).any()


@every_space
def test_laws(name: str) -> None:
    case, _ = truth(name)
    s = cast(ToolStrings, case.target.space)
    check_space(s, 2)
    check_policy(cast(FiniteStepper, case.target.prior), 2)
    check_target(case.target)
    soft, mask = TableGuide(s, seed=5), TokenMask([1, 2, 3], 4)
    check_guide(soft, s, 2)
    check_policy(GuidedPolicy(cast(FiniteStepper, case.target.prior), soft), 2, rows=24)
    check_policy(GuidedPolicy(cast(FiniteStepper, case.target.prior), mask), 2, rows=24)


def test_laws_on_a_transformer() -> None:
    """With a key-value cache that insertions go into; a batch has rows that are free and rows that are forced."""
    tiny = TinyLM(ALPHABET, seed=3, dtype=torch.float64)
    s = replace(cast(ToolStrings, space()), tokenizer=tiny.tokenizer)
    target = target_on(s, tiny)
    check_policy(cast(FiniteStepper, target.prior), 2)
    check_target(target)


@pytest.mark.parametrize("name", ["force", "exact_prefix", "min length"])
def test_prior_mass_is_one_under_force(name: str) -> None:
    """p of all strings sums to one, insertions free: also at L, inside which nothing may stop. (A minimal length is
    a condition that p does not renormalise for.)"""
    target = from_prior(LM, PROBLEMS, SPACES[name]())
    log_z = exact(target).log_z
    assert log_z is not None
    if name == "min length":
        assert (log_z < -1e-3).all()
    else:
        assert log_z.abs().max() < 1e-9


def test_where_one_may_stop() -> None:
    """Nowhere inside an insertion, under p, q and the menu; and the limit counts free moves."""
    case, (e, _) = truth("force")
    rows, prior = e.paths, cast(LMPolicy, case.target.prior)
    t = rows.moves.shape[1]
    inside = torch.cat([rows.kind == FORCED, torch.zeros(len(rows), 1, dtype=torch.bool)], 1)
    assert inside[:, 1:].any() and t == FREE_MOVES + ROOM
    assert not (rows.can_stop & inside).any()
    for raw in (False, True):
        scores = prior.score(rows, raw=raw)
        assert (scores.log_stop[inside] == NEG_INF).all()
        assert (scores.log_q[rows.kind == FORCED] == 0).all()
    assert ((rows.kind == FREE).sum(1) <= FREE_MOVES).all()
    over = (rows.kind == FREE).sum(1) == FREE_MOVES
    last = rows.kind[torch.arange(len(rows)), (rows.n - 1).clamp_min(0)]
    assert (over & (last == FORCED)).any()  # an answer to the last free move is still written
    assert (prior.score(rows).log_stop[over, rows.n[over], 0] == 0).all()


def test_room_silences_the_tool() -> None:
    s = cast(ToolStrings, space())
    rows = enumerate_objects(s, 0)
    put = (rows.kind == FORCED).sum(1)
    assert put.max() == ROOM
    text = dict(zip(s.show(rows), put.tolist(), strict=True))
    assert text["11=1."] == 1 and text["1=2=."] == 2
    assert text["1=2==."] == 2  # the second answer takes two tokens, and one is left
    assert text["1=2=1=1."] == 3  # the second answer takes that one


def test_a_cut_inside_an_insertion_is_finished_off_the_record() -> None:
    s = cast(ToolStrings, space())
    ids = [2, 1, 3, 1, 3]  # 1 = [2 =] 2
    s0, kinds = s.start(torch.zeros(1, dtype=torch.long)), []
    for i, token in enumerate(ids):
        menu = s.menu(s0)
        kinds.append(FORCED if int(menu.must[0]) == MUST_MOVE else FREE)
        assert kinds[-1] == FREE or int(menu.forced[0]) == token, i  # pyright: ignore[reportOptionalSubscript]
        s0 = s.step(s0, torch.tensor([token]))
    assert kinds == [FREE, FREE, FORCED, FORCED, FREE]
    rows = enumerate_objects(s, 0)
    row = s.keys(rows).index((*ids, -1))
    record = rows.take(torch.tensor([row]))
    quiet = replace(s, tool=Tool(_refuse, room=ROOM))
    for cut in range(len(ids) + 1):
        state = quiet.replay(record, torch.tensor([cut]))
        assert int(state.planned[0]) == (4 if cut in (2, 3) else cut)
        assert int(state.free[0]) == min(cut, 2) + (cut == 5)
        menu = quiet.menu(state)
        assert (int(menu.must[0]) == MUST_MOVE) == (cut in (2, 3))
        if cut in (2, 3):
            state = quiet.step(state, record.moves[:, cut])
            assert state.tokens[0, :4].tolist() == ids[:4] and not bool(menu.can_stop[0])


def _refuse(text: str) -> str:
    raise RuntimeError("no tool runs here")


def test_scoring_runs_no_tool() -> None:
    """Neither the pass of a model, nor the replay that guided policies score by, nor the terms."""
    target = target_on(space())
    rows = target.prior.sample(torch.arange(64) % 2, generator(0))  # pyright: ignore[reportOptionalMemberAccess]
    assert (rows.kind == FORCED).any()
    quiet = replace(cast(ToolStrings, target.space), tool=Tool(_refuse, room=ROOM))
    again = target_on(quiet)
    prior = cast(LMPolicy, again.prior)
    assert torch.equal(again.log_gamma(rows), target.log_gamma(rows))
    bent = GuidedPolicy(prior, TableGuide(quiet, seed=5))
    honest = GuidedPolicy(cast(LMPolicy, target.prior), TableGuide(cast(Strings, target.space), seed=5))
    assert torch.equal(bent.score(rows).log_q, honest.score(rows).log_q)
    assert torch.equal(bent.score(rows).log_stop, honest.score(rows).log_stop)


# -- samplers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, method",
    [
        ("short, force", m)
        for m in (
            "ancestral",
            "importance",
            "importance, draws at T = 1.5",
            "mh, suffix",
            "mh, independence",
            "best of 3",
            "smc, systematic",
            "conditional smc",
        )
    ]
    + [("short, own_stop", m) for m in ("importance", "mh, suffix")]
    + [("short, until", m) for m in ("smc, systematic", "mh, suffix")],
)
def test_samplers_are_exact(name: str, method: str) -> None:
    case, tables = truth(name)
    check_exact(case, method, 100, tables)


@pytest.mark.parametrize("method", ["smc, systematic", "mh, suffix"])
def test_guided_samplers_are_exact(method: str) -> None:
    """A random twist bends proposals and weighs prefixes, within insertions too."""
    case, tables = truth("short, force")
    bent = case.target.with_guide(TableGuide(cast(Strings, case.target.space), seed=7))
    assert all(torch.equal(a.log_gamma, b.log_gamma) for a, b in zip(tables, enumerate_target(bent), strict=True))
    check_exact(Case("tool, twisted", bent), method, 100, enumerate_target(bent))


# -- objectives -------------------------------------------------------------------------------------------------------


def prior_as_posterior(rows: Rollouts) -> tuple[Scores, Tensor]:
    """Where gamma is p itself under the limit "force", q = p is the optimum and log Z = 0."""
    target = from_prior(LM, PROBLEMS, space())
    rows = target.terms(rows, every_prefix=True)
    return cast(LMPolicy, target.prior).score(rows), target.log_gamma(rows, every_prefix=True)


def test_objectives_jump_over_insertions() -> None:
    """At the optimum every a_i is log Z, and all losses are 0; no a_i comes from inside an insertion."""
    rows = from_prior(LM, PROBLEMS, space()).prior.sample(torch.arange(200) % 2, generator(0))  # pyright: ignore[reportOptionalMemberAccess]
    scores, log_gamma = prior_as_posterior(rows)
    a, mask, _ = residual(scores, rows, log_gamma)
    inside = torch.cat([rows.kind == FORCED, torch.zeros(len(rows), 1, dtype=torch.bool)], 1)
    assert not mask[inside].any() and mask[~inside].any() and a.abs().max() < 1e-9
    for objective in (pooled, subtb, db):
        assert float(objective(scores, rows, log_gamma)[0]) < 1e-15


# -- planted bugs -----------------------------------------------------------------------------------------------------


class PaysForAnswers(LMPolicy):
    """Scores inserted tokens under p as if the model had to say them."""

    def score(self, rollouts: Rollouts, raw: bool = False) -> Scores:  # pyright: ignore[reportIncompatibleMethodOverride]
        """All moves are free."""
        scores = super().score(rollouts, raw)
        as_said = replace(rollouts, kind=torch.where(rollouts.kind == FORCED, FREE, rollouts.kind).to(torch.int8))
        return replace(scores, log_q=super().score(as_said, raw).log_q) if raw else scores


class StopsAnywhere(ToolStrings):
    """Lets a string stop inside an insertion, and p pay for it."""

    def menu(self, s: StringState) -> Menu:
        """Inside an insertion one may go on with it or stop: the move is no longer forced."""
        menu, plain = super().menu(s), Strings.menu(self, s)
        assert isinstance(s, ToolState) and menu.legal is not None and menu.forced is not None
        inside = menu.must == MUST_MOVE
        only = torch.zeros_like(menu.legal).scatter(1, menu.forced[:, None], True)
        legal = torch.where(inside[:, None], only, menu.legal)
        return Menu(legal, plain.can_stop, plain.must)

    def log_p_stops(self, raw: Tensor, s: StringState) -> Tensor:
        """At the model's price everywhere."""
        return Strings.log_p_stops(self, raw, s)


class CountsAnswers(ToolStrings):
    """A limit on all moves, insertions included."""

    def counted(self, s: StringState) -> Tensor:
        """All of them."""
        return s.n


@dataclass(frozen=True)
class OtherPrior(Prior):
    """A prior term read off a policy that is not the sampler's."""


def wrong_prior(honest: Target) -> tuple[Target, FiniteStepper | None]:
    bugged = PaysForAnswers(LM, cast(Strings, honest.space), PROBLEMS)

    class Proposal(LMPolicy):
        """Not known as the prior, so that p is taken from the term."""

    factors = {**honest.factors, "prior": OtherPrior(bugged)}
    return replace(honest, factors=factors), Proposal(LM, cast(Strings, honest.space), PROBLEMS)


def wrong_space(kind: type[ToolStrings]) -> Callable[[Target], tuple[Target, None]]:
    return lambda honest: (target_on(space(kind=kind, length=SHORT + 1)), None)


@pytest.mark.parametrize(
    "make", [wrong_prior, wrong_space(StopsAnywhere), wrong_space(CountsAnswers)],
    ids=["forced tokens scored under p", "stop allowed inside an insertion", "limit counts forced tokens"],
)  # fmt: skip
def test_planted_bug_is_caught(make: Callable[[Target], tuple[Target, FiniteStepper | None]]) -> None:
    case, tables = truth("three, force")
    target, policy = make(case.target)
    try:
        gates = evidence_gates(tables, lambda r, s: importance(target, policy, n=16, runs=r, seed=s), 100)
    except AssertionError as error:  # it draws what is no object at all
        assert "not an object of the space" in str(error)
        log_z = exact(target).log_z
        assert log_z is not None and (log_z[:, 0] - torch.stack([e.z for e in tables]).log()).abs().max() > 1e-3
        return
    assert max(g.value for g in gates if g.metric.startswith("|z|")) > BAR


def test_bugs_break_the_laws_too() -> None:
    with pytest.raises(AssertionError, match="score equals the sum of"):
        check_policy(LMPolicy(LM, space(kind=StopsAnywhere), PROBLEMS), 2)
    with pytest.raises(AssertionError, match="score equals the sum of"):
        check_policy(LMPolicy(LM, space(kind=CountsAnswers), PROBLEMS), 2)
    with pytest.raises(AssertionError, match="raw score equals the sum of raw steps"):
        check_policy(PaysForAnswers(LM, space(), PROBLEMS), 2)


# -- bad input --------------------------------------------------------------------------------------------------------


def sample_with(tool: Tool) -> Rollouts:
    s = replace(cast(ToolStrings, space()), tool=tool)
    return LMPolicy(LM, s, PROBLEMS).sample(torch.zeros(64, dtype=torch.long), generator(0))


def test_a_tool_that_raises_is_named_with_its_text() -> None:
    def broken(text: str) -> str:
        raise ZeroDivisionError("by zero")

    with pytest.raises(ToolError, match=r"'abacus' raised ZeroDivisionError: by zero; on the text '.*='") as error:
        sample_with(Tool(broken, room=ROOM, name="abacus"))
    assert error.value.text.endswith("=") and isinstance(error.value, InputError)


def test_a_tool_that_returns_no_text() -> None:
    with pytest.raises(ToolError, match="returned 6 on the text"):
        sample_with(Tool(lambda text: 6, room=ROOM))  # type: ignore[arg-type, return-value]
    with pytest.raises(ToolError, match="answered '7' to the text '.*=': character '7' is not in"):
        sample_with(Tool(lambda text: "7", room=ROOM))
    assert (sample_with(Tool(lambda text: "", room=ROOM)).kind != FORCED).all()


def test_bad_spaces() -> None:
    with pytest.raises(InputError, match="at least 1, not 0"):
        Tool(answer, room=0)
    with pytest.raises(InputError, match="needs a tokenizer"):
        with_tool(Strings(4, Stops((0,)), 3), TOOL)
    with pytest.raises(InputError, match="has a tool already"):
        with_tool(space(), TOOL)
    with pytest.raises(InputError, match="min length 5 is over max length 4"):
        space(low=5)
    assert space().with_limits(max_moves=5).max_free == 5 and space().max_free == FREE_MOVES


def test_triggers() -> None:
    """The text may complete the trigger over several tokens; an empty one asks after every free move."""
    seen: list[str] = []

    def note(text: str) -> None:
        seen.append(text)

    s = with_tool(Strings(4, Stops((0,)), 3, tokenizer=LM.tokenizer), Tool(note, trigger="1=", room=1))
    enumerate_objects(s, 0)
    assert set(seen) == {"1=", "11=", "21=", "=1="}
    seen.clear()
    s = with_tool(Strings(4, Stops((0,)), 2, tokenizer=LM.tokenizer), Tool(note, trigger="", room=1))
    enumerate_objects(s, 0)
    assert len(seen) == 3 + 9
    assert all(int(m) != MUST_STOP for m in s.menu(s.start(torch.zeros(2, dtype=torch.long))).must)


def test_chains_keep_whole_insertions() -> None:
    """MH cuts anywhere, also within an insertion: what comes out is still made of whole answers."""
    case, _ = truth("force")
    p = mh(case.target, n=50, steps=20, keep=1, seed=0)
    honest = {k for q in range(2) for k in case.target.space.keys(enumerate_objects(case.target.space, q))}
    assert set(p.keys) <= honest and (p.objects.kind == FORCED).any()
