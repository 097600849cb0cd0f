"""A small tool inside the latent, and its targets worked out by a pencil; for the tests of tools."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, cast

import pytest

from retrodict.models.tabular import TabularLM
from retrodict.numerics import NEG_INF
from retrodict.protocols import LanguageModel
from retrodict.records import Problem
from retrodict.spaces.limits import Limit
from retrodict.spaces.stops import EndsWith, Stops
from retrodict.spaces.strings import Strings
from retrodict.spaces.tools import Tool, ToolStrings, with_tool
from retrodict.targets.algebra import Target
from retrodict.targets.likelihood import Likelihood
from retrodict.targets.ready import from_prior
from retrodict.testing import (
    Case,
    Exact,
    enumerate_target,
)

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
