"""Reasoning at test time: chains of steps, a verifier that never sees the answer, a final answer.

    gamma(z) = p(z | X) SLIP^(wrong + lacking steps of z)        r(z_1..c) = SLIP^wrong HOPE^lacking

The first is the target: prior times the verifier of finished chains. The second is the process reward that guides
particle filtering (``targets.steps``): of the steps to come, each counts HOPE, about the share that the model gets
right. Both are programmatic checks of the steps against the question:

    arithmetic       a calculator writes the results; the left part of each step must use the question's numbers in
                     order, after the result before it
    chain_sum        the same check of left parts, no calculator: the sums are the model's own, and nobody checks them
    number_sorting   each number must be in the list, not used up, and not on the wrong side of the one before it

The last two ask questions of reasoning-gym 0.1.25 (``tasks.reasoning_gym``) and are scored by it.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from retrodict.diagnostics.votes import Answer, Votes
from retrodict.errors import InputError, nearest
from retrodict.protocols import LanguageModel
from retrodict.records import Problem
from retrodict.targets.algebra import Target
from retrodict.targets.ready import from_prior, strings
from retrodict.targets.steps import stepwise
from retrodict.targets.verifier import Verifier, verifier
from retrodict.tasks import arithmetic, reasoning_gym

SLIP = 0.05
"""What a wrong step costs, and one that a finished chain lacks."""

HOPE = 0.3
"""What a step to come is worth to the process reward."""

LENGTH = 24
"""Free tokens of a chain; a right one takes at most 18."""

SORTING = (
    "Numbers: 7, 2, 9\nAscending: 2, 7, 9\n\n"
    "Numbers: 3, 8, 1\nDescending: 8, 3, 1\n\n"
    "Numbers: 5, 9, 5\nAscending: 5, 5, 9\n\n"
    "Numbers: 6, 1, 4\nDescending: 6, 4, 1\n\n"
)
"""Four worked examples that p reads before each list."""

Wrong = Callable[[str, Mapping[str, Any]], tuple[int, int]]
"""(text, row) to how many of its steps are wrong, and how many a finished chain would lack."""


@dataclass(frozen=True)
class Task:
    """Questions, what is sampled for them, and how answers are read and scored.

    Attributes:
        name: as in TASKS.
        target: prior times the verifier of finished chains.
        reward: the verifier of partial chains.
        boundary: what ends a step.
        answer: reads a chain's final answer.
        right: whether an answer is right, given the data row.
    """

    name: str
    target: Target
    reward: Verifier
    boundary: tuple[str, ...]
    answer: Answer
    right: Callable[[str, Mapping[str, Any]], bool]

    @property
    def guided(self) -> Target:
        """The target with the process reward as its guide."""
        return stepwise(self.target, self.reward, boundary=self.boundary)

    def correct(self, found: Votes) -> list[bool]:
        """Whether each problem's winner is right; no answer is wrong."""
        rows = [p.row for p in self.target.problems]
        return [y is not None and self.right(y, row) for y, row in zip(found.answers, rows, strict=True)]


# -- checks of steps --------------------------------------------------------------------------------------------------

_STEP = re.compile(r" ?(-?[0-9]+) ([-+]) ([0-9]+) = (-?[0-9]+)")


def equations(text: str, row: Mapping[str, Any]) -> tuple[int, int]:
    """Wrong and lacking steps of " 6 - 0 = 6, 6 - 4 = 2" for ``row["expression"]`` "6 - 0 - 4".

    Step i must be what was written after "=" before it (the first number at first), then sign and number i. Whether its
    own result is right is not asked.
    """
    value, *rest = str(row["expression"]).split(" ")
    todo = list(zip(rest[::2], rest[1::2], strict=True))
    wrong, done = 0, 0
    for i, step in enumerate(_steps(text)):
        found = _STEP.fullmatch(step)
        good = found is not None and i < len(todo) and found.groups()[:3] == (value, *todo[i])
        value = found[4] if found is not None else ""
        wrong, done = wrong + (not good), done + good
    return wrong, max(len(todo) - done - wrong, 0)


def ordered(text: str, row: Mapping[str, Any]) -> tuple[int, int]:
    """Wrong and lacking numbers of " 8, 19, 31" for ``row["numbers"]``, sorted as ``row["direction"]`` says."""
    left, sign = Counter(row["numbers"]), 1 if row["direction"] == "ascending" else -1
    wrong, last = 0, None
    for step in _steps(text):
        number = step.removeprefix(" ")
        if not number.isdigit() or not left[number] or last is not None and sign * (int(number) - int(last)) < 0:
            wrong += 1
            continue
        left[number] -= 1
        last = number
    return wrong, max(left.total() - wrong, 0)


def _steps(text: str) -> list[str]:
    """Steps of a chain, its end stripped; a comma at the end opens no further one."""
    text = text.rstrip("\n.,")
    return text.split(",") if text else []


def _process(wrong: Wrong) -> Verifier:
    def reward(texts: list[str], rows: list[Mapping[str, Any]]) -> list[float]:
        found = [wrong(t, r) for t, r in zip(texts, rows, strict=True)]
        return [SLIP**bad * HOPE**lacking for bad, lacking in found]

    return verifier(reward, name="process")


def _final(wrong: Wrong) -> Verifier:
    return verifier(lambda texts, rows: [SLIP ** sum(wrong(t, r)) for t, r in zip(texts, rows, strict=True)])


# -- tasks ------------------------------------------------------------------------------------------------------------


def _result(text: str, row: Mapping[str, Any]) -> str | None:
    """What stands after the last "="."""
    found = re.search(r"= *(-?[0-9]+)[.\n]?\Z", text)
    return found[1] if found else None


def _list(text: str, row: Mapping[str, Any]) -> str | None:
    """The numbers, as reasoning-gym wants to read them."""
    found = re.findall(r"-?[0-9]+", text)
    return str(found) if found else None


def with_calculator(lm: LanguageModel, n: int, seed: int) -> Task:
    """Three operands of one digit."""
    asked = arithmetic.generate(n, operands=(3,), seed=seed)
    rows = [{"expression": q.query.removeprefix("Question: ").removesuffix(" = ? Answer:"), "answer": str(q.answer)}
            for q in asked]  # fmt: skip
    space = arithmetic.space(lm, max_tokens=LENGTH)
    data = _problems(lm, [arithmetic.SHOTS + q.query for q in asked], rows, [q.query for q in asked])
    target = from_prior(lm, data, space) * _final(equations)
    return Task("arithmetic", target, _process(equations), (",",), _result, lambda y, row: y == row["answer"])


def chain_sum(lm: LanguageModel, n: int, seed: int) -> Task:
    """Three terms of one digit, and no calculator."""
    rows, score = reasoning_gym.questions("chain_sum", n, seed, min_terms=3, max_terms=3, min_digits=1, max_digits=1)
    rows = [{**r, "expression": r["metadata"]["expression"]} for r in rows]
    asked = [f"Question: {r['expression']} = ? Answer:" for r in rows]
    data = _problems(lm, [arithmetic.SHOTS + q for q in asked], rows, asked)
    target = from_prior(lm, data, arithmetic.characters_only(lm, max_tokens=LENGTH)) * _final(equations)
    return Task("chain_sum", target, _process(equations), (",",), _result, score)


def number_sorting(lm: LanguageModel, n: int, seed: int) -> Task:
    """Lists of three numbers of one digit, ascending or descending."""
    rows, score = reasoning_gym.questions("number_sorting", n, seed, min_numbers=3, max_numbers=3, min_value=1,
                                          max_value=9, min_decimals=0, max_decimals=0)  # fmt: skip
    rows = [{**r, **_asked(r["metadata"])} for r in rows]
    asked = [f"Numbers: {', '.join(r['numbers'])}\n{r['direction'].capitalize()}:" for r in rows]
    data = _problems(lm, [SORTING + q for q in asked], rows, asked)
    target = from_prior(lm, data, strings(lm, "\n", max_tokens=LENGTH)) * _final(ordered)
    return Task("number_sorting", target, _process(ordered), (",",), _list, score)


def _asked(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Numbers as people write them ("7", where the data set has "7.0"), and the direction."""
    numbers = [str(int(float(x))) for x in metadata["original_numbers"]]
    return {"numbers": numbers, "direction": metadata["direction"]}


def _problems(
    lm: LanguageModel, contexts: Sequence[str], rows: Sequence[Mapping[str, Any]], names: Sequence[str]
) -> list[Problem]:
    encode = lm.tokenizer.encode
    return [Problem(tuple(encode(c)), (), None, r, n) for c, r, n in zip(contexts, rows, names, strict=True)]


TASKS: dict[str, Callable[[LanguageModel, int, int], Task]] = {
    "arithmetic": with_calculator,
    "chain_sum": chain_sum,
    "number_sorting": number_sorting,
}
"""(model, number of questions, seed) to a task."""


def task(name: str, lm: LanguageModel, n: int = 50, seed: int = 0) -> Task:
    """A task by name. Raises InputError for an unknown one, or fewer than one question."""
    if name not in TASKS:
        raise InputError(f"unknown task {name!r}{nearest(name, TASKS)}")
    if n < 1:
        raise InputError(f"a task needs at least one question, not {n}")
    return TASKS[name](lm, n, seed)


def recipe(lm: LanguageModel) -> Target:
    """Eight questions of the arithmetic task with the process reward as the guide, as a recipe names them."""
    return task("arithmetic", lm, 8).guided
