"""Tools inside the latent: planted bugs, and bad input."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import cast

import pytest
import torch
from abacus import (
    FREE_MOVES,
    LM,
    PROBLEMS,
    ROOM,
    SHORT,
    TOOL,
    answer,
    space,
    target_on,
    truth,
)
from torch import Tensor

from retrodict.errors import InputError
from retrodict.policies.base import FiniteStepper
from retrodict.policies.lm import LMPolicy
from retrodict.records import FORCED, FREE, MUST_MOVE, MUST_STOP, Menu, Rollouts, Scores
from retrodict.rng import generator
from retrodict.samplers.exact import exact
from retrodict.samplers.importance import importance
from retrodict.samplers.mh.run import mh
from retrodict.spaces.enumerate import enumerate_objects
from retrodict.spaces.stops import Stops
from retrodict.spaces.strings import Strings, StringState
from retrodict.spaces.tools import Tool, ToolError, ToolState, ToolStrings, with_tool
from retrodict.targets.algebra import Target
from retrodict.targets.prior import Prior
from retrodict.testing import (
    check_policy,
    evidence_gates,
)
from retrodict.testing.bugs import BAR

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
