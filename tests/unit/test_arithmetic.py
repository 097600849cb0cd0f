"""The arithmetic task: data, prompts and evaluation, on tables (no language model)."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from pathlib import Path

import pytest
import torch

from retrodict.errors import InputError
from retrodict.models.tabular import TabularLM
from retrodict.policies.lm import LMPolicy
from retrodict.records import FORCED, FREE, PAD, Rollouts
from retrodict.rng import generator
from retrodict.samplers.importance import ancestral
from retrodict.tasks import arithmetic
from retrodict.tasks.arithmetic import SHOTS, Question, accuracy, generate, load, predictions, steps

ALPHABET = "".join(dict.fromkeys(".0123456789+-=, ?:\n" + "QuestionAnswerThe answer is"))
LM = TabularLM.random(ALPHABET, order=1, seed=0)
ROW = {
    "str_query": "Question: 6 - 0 - 4 - 8 = ? Answer:",
    "num_sol": -6,
    "str_rationale": "6 - 0 =, 6 - 4 =, 2 - 8 =",
    "str_sol": ". The answer is -6.",
}


# -- data -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "query, rationale, answer",
    [
        ("6 - 0 - 4 - 8", "6 - 0 =, 6 - 4 =, 2 - 8 =", -6),
        ("5 - 9 - 3 - 8", "5 - 9 =, -4 - 3 =, -7 - 8 =", -15),
        ("9 + 4 - 8", "9 + 4 =, 13 - 8 =", 5),
        ("1 + 7", "1 + 7 =", 8),
    ],
)
def test_steps_are_written_as_people_annotated_them(query: str, rationale: str, answer: int) -> None:
    assert steps(f"Question: {query} = ? Answer:") == (rationale, answer)


@pytest.mark.parametrize(
    "query", ["Question: 6 - 0 = ?", "Question: 6 = ? Answer:", "Question: 16 - 0 = ? Answer:", ""]
)
def test_queries_of_another_form(query: str) -> None:
    with pytest.raises(InputError, match="not a question of this task"):
        steps(query)


def test_generated_questions() -> None:
    data = generate(270, operands=(2, 3, 5), seed=3)
    assert data == generate(270, operands=(2, 3, 5), seed=3) != generate(270, operands=(2, 3, 5), seed=4)
    assert len({q.query for q in data}) == 270
    assert max(Counter(q.query.count(" ") for q in data).values()) <= 91
    for q in data:
        assert (q.rationale, q.answer) == steps(q.query)
        expression = q.query.removeprefix("Question: ").removesuffix(" = ? Answer:").replace(" - ", " + -")
        assert q.answer == sum(int(x) for x in expression.split(" + "))  # another way to read it
    signs = Counter(c for q in data for c in q.query if c in "+-")
    assert abs(signs["+"] - signs["-"]) < 5 * sum(signs.values()) ** 0.5


def test_generate_refuses() -> None:
    with pytest.raises(InputError, match="at least 2 operands, not 1"):
        generate(3, operands=(1, 3))
    with pytest.raises(InputError, match="too many for 2 operands"):
        generate(150, operands=(2,))
    with pytest.raises(InputError, match="at least 2 operands, not 0"):
        generate(3, operands=())
    assert generate(0) == []


def write(path: Path, rows: list[dict[str, object]]) -> Path:
    path.write_text(json.dumps(rows))
    return path


def test_load(tmp_path: Path) -> None:
    bare = {k: ROW[k] for k in ("str_query", "num_sol")}
    assert load(write(tmp_path / "q.json", [ROW, bare])) == [
        Question(ROW["str_query"], -6, ROW["str_rationale"]), Question(ROW["str_query"], -6)
    ]  # fmt: skip


@pytest.mark.parametrize(
    "change, says",
    [
        ({"num_sol": None}, r"q.json, row 2: field 'num_sol' is None"),
        ({"num_sol": "-6"}, r"row 2: field 'num_sol' is '-6'; give an integer"),
        ({"num_sol": True}, r"row 2: field 'num_sol' is True"),
        ({"str_query": 3}, r"row 2: field 'str_query' is 3; give a string"),
        ({"str_rationale": ["6 - 0 ="]}, r"row 2: field 'str_rationale'"),
        ({"str_sol": ". The answer is 6."}, r"row 2: field 'str_sol' is '. The answer is 6.', and num_sol is -6"),
    ],
)
def test_load_names_file_row_and_field(tmp_path: Path, change: dict[str, object], says: str) -> None:
    with pytest.raises(InputError, match=says):
        load(write(tmp_path / "q.json", [ROW, {**ROW, **change}]))


def test_load_names_a_missing_field(tmp_path: Path) -> None:
    for name in ("str_query", "num_sol"):
        with pytest.raises(InputError, match=rf"q\.json, line 2: no field '{name}'"):
            load(write(tmp_path / "q.json", [ROW, {k: v for k, v in ROW.items() if k != name}]))
    with pytest.raises(InputError, match="no such file"):
        load(tmp_path / "absent.json")


# -- prompts and problems ---------------------------------------------------------------------------------------------


def test_worked_examples_are_right() -> None:
    lines = SHOTS.splitlines()
    assert len(lines) == 3
    for line in lines:
        query, _, worked = line.partition(" Answer:")
        rationale, answer = steps(f"{query} Answer:")
        said, _, end = worked.partition(". The answer is ")
        assert end == f"{answer}."
        values = [eval_step(step) for step in said.removeprefix(" ").split(", ")]
        assert all(values) and values[-1] == answer
        assert ", ".join(step.rpartition("= ")[0] + "=" for step in said.removeprefix(" ").split(", ")) == rationale


def eval_step(step: str) -> int:
    """The result that a step states, if it is its result."""
    left, _, right = step.partition(" = ")
    a, op, b = left.split(" ")
    value = int(a) + int(b) if op == "+" else int(a) - int(b)
    assert value == int(right)
    return value


def test_problems() -> None:
    question = Question("Question: 6 - 8 = ? Answer:", -2)
    (p,) = arithmetic.problems(LM, [question])
    assert LM.tokenizer.decode(p.context) == SHOTS + question.query
    assert LM.tokenizer.decode(p.evidence) == " The answer is -2."
    assert p.row["answer"] == -2 and p.name == question.query


def test_space() -> None:
    s = arithmetic.space(LM)
    legal = [ALPHABET[i] for i in s.legal_ids().nonzero().flatten().tolist()]
    assert sorted(legal) == sorted(arithmetic.CHARACTERS + " ") and s.max_free == arithmetic.MAX_TOKENS
    assert s.stops.ids == (0,) and s.stops.in_text
    every = arithmetic.space(LM, any_token=True)
    assert every.legal_ids().sum() == len(ALPHABET) - 1


def test_space_refuses_other_vocabularies() -> None:
    with pytest.raises(InputError, match="no token for '='"):
        arithmetic.space(TabularLM.random(".0123456789+-, ", order=1, seed=0))
    with pytest.raises(InputError, match="no token for '9' alone; use any_token=True"):
        arithmetic.space(TabularLM.random(".012345678+-=, ", order=1, seed=0))
    with pytest.raises(InputError, match=r"character '\.' is not in"):
        arithmetic.space(TabularLM.random("0123456789+-=, ", order=1, seed=0))


def test_chains_of_a_table() -> None:
    """Random chains: the tool writes where two operands stand before "=", and what it writes is right."""
    questions = generate(4, seed=0)
    target = arithmetic.target(LM, arithmetic.problems(LM, questions), arithmetic.space(LM))
    p = ancestral(target, n=100, seed=0)
    said = [y for y in predictions(p.objects, LM) if y is not None]
    assert len(said) > 10
    for text, y in zip(p.shown, predictions(p.objects, LM), strict=True):
        assert y is None or f"= {y}" in text
    found = accuracy(p.objects, questions, LM)
    assert 0 < found.answered < 1 and 0 <= found.chain <= found.answered
    one = LMPolicy(LM, arithmetic.space(LM), target.problems).sample(torch.zeros(5, dtype=torch.long), generator(1))
    with pytest.raises(InputError, match="question 1 has no chain"):
        accuracy(one, questions, LM)


# -- evaluation -------------------------------------------------------------------------------------------------------


def chains(texts: list[tuple[int, str]]) -> Rollouts:
    """Rollouts from (question, text) with what the tool wrote in square brackets."""
    rows = []
    for _, text in texts:
        ids, kinds, kind = [], [], FREE
        for c in text:
            if c in "[]":
                kind = FORCED if c == "[" else FREE
            else:
                ids.append(ALPHABET.index(c))
                kinds.append(kind)
        rows.append((ids, kinds))
    t = max(len(ids) for ids, _ in rows)
    moves = torch.tensor([ids + [0] * (t - len(ids)) for ids, _ in rows])
    kind = torch.tensor([k + [PAD] * (t - len(k)) for _, k in rows], dtype=torch.int8)
    b, zeros = len(rows), torch.zeros(len(rows), t)
    return Rollouts(torch.tensor([q for q, _ in texts]), moves, kind, torch.tensor([len(ids) for ids, _ in rows]),
                    torch.zeros(b, dtype=torch.long), torch.zeros(b, t + 1, dtype=torch.bool), zeros,
                    torch.zeros(b, t + 1, 1), torch.zeros(b, t + 1), zeros)  # fmt: skip


QUESTIONS = [Question(str(i), y) for i, y in enumerate((4, -5, 7))]
CHAINS = chains(
    [
        (0, " 6 - 0 =[ 6], 6 - 2 =[ 4]"),
        (0, " 6 - 0 =[ 6], 6 - 2 =[ 4], 1"),
        (0, " 6 - 0 =[ 6]"),
        (0, " 4"),
        (1, " 3 - 8 =[ -5]"),
        (1, " 3 + 8 =[ 11]"),
        (2, " 7 = 7"),
        (2, " 7"),
    ]
)


def test_predictions_are_what_the_tool_wrote_last() -> None:
    assert predictions(CHAINS, LM) == [4, 4, 6, None, -5, 11, None, None]


def test_votes() -> None:
    found = accuracy(CHAINS, QUESTIONS, LM)
    assert found.predicted == (4, -5, None)  # a tie goes to the first; no answer is no prediction
    assert found.share.tolist() == [0.5, 0.5, 0.0]
    assert found.vote == pytest.approx(2 / 3) and found.answered == pytest.approx((3 / 4 + 1 + 0) / 3)
    assert found.chain == pytest.approx((2 / 4 + 1 / 2 + 0) / 3)
    assert found.ece == pytest.approx((0.5 + 0.5 + 0.0) / 3)
    assert found.risk.at(2 / 3) == 0.0 and found.risk.at(1.0) == pytest.approx(1 / 3)


def test_weighted_votes() -> None:
    """Posterior predictive counting: a heavy chain outvotes two light ones; weight zero is no vote."""
    w = torch.tensor([0.1, 0.1, 0.7, 0.1, 0.0, 1.0, 0.0, 0.0])
    found = accuracy(CHAINS, QUESTIONS, LM, w)
    assert found.predicted == (6, 11, None) and found.share.tolist() == pytest.approx([0.7, 1.0, 0.0])
    assert found.vote == 0 and found.chain == pytest.approx(0.2 / 3)
    swapped = accuracy(CHAINS.take(torch.arange(8).flip(0)), QUESTIONS, LM, w.flip(0))
    assert dataclasses.replace(swapped, share=found.share, risk=found.risk) == found
