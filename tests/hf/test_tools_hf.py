"""A calculator inside the latent of a real model: what was stepped is what a teacher-forced pass says."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("transformers")

import retrodict as rd  # noqa: E402
from retrodict.records import FORCED, FREE  # noqa: E402
from retrodict.rng import generator  # noqa: E402
from retrodict.spaces.strings import Strings  # noqa: E402
from retrodict.spaces.tools import Tool, with_tool  # noqa: E402
from retrodict.tasks import arithmetic  # noqa: E402

pytestmark = pytest.mark.hf
SHOT = "Question: 7 + 2 - 5 = ? Answer: 7 + 2 = 9, 9 - 5 = 4. The answer is 4.\n"


@pytest.fixture(scope="module")
def lm() -> object:
    return rd.load("smollm2", dtype="float32")


def test_tokens_are_what_the_task_says(lm) -> None:  # noqa: ANN001
    ids = lm.tokenizer.encode(" 14 - 3 = 11, 11 - -2 =")
    assert [lm.tokenizer.decode([i]) for i in ids] == [
        " ", "1", "4", " -", " ", "3", " =", " ", "1", "1", ",", " ", "1", "1", " -", " -", "2", " ="
    ]  # fmt: skip
    legal = {lm.tokenizer.decode([i]) for i in arithmetic.vocabulary(lm)}
    assert {" ", " =", "=", " -", " +", ",", *"0123456789"} <= legal


def test_stepping_through_insertions_equals_scoring(lm) -> None:  # noqa: ANN001
    """Rows that are free and rows that are forced share a batch and a cache; both see the inserted text."""
    data = arithmetic.problems(lm, arithmetic.generate(2, seed=0), SHOT)
    space = arithmetic.space(lm, max_tokens=14)
    policy = rd.LMPolicy(lm, space, data)
    rows = rd.LMPolicy(lm, space, data).sample(torch.arange(8) % 2, generator(0))
    put = rows.kind == FORCED
    assert (put.any(1)).sum() >= 4 and not put.any(0).eq(put.all(0)).all()
    scores = policy.score(rows)
    inside = torch.arange(rows.moves.shape[1]) < rows.n[:, None]
    assert (scores.log_q - rows.log_q)[inside].abs().max() < 1e-3
    assert (scores.log_q[put] == 0).all() and (rows.log_b[:, :-1][put] == 0).all()
    until = torch.arange(rows.moves.shape[1] + 1) <= rows.n[:, None]
    may = rows.can_stop & until
    assert (scores.log_stop - rows.log_stop)[may].abs().max() < 1e-3
    without = policy.score(drop_insertions(rows))
    assert not torch.allclose(without.log_q.sum(1), scores.log_q.sum(1), atol=1e-2)  # what is inserted is read


def drop_insertions(rows: rd.Rollouts) -> rd.Rollouts:
    """The same free moves after insertions of zeros: what a cache that loses them would hold."""
    moves = torch.where(rows.kind == FORCED, 0, rows.moves)
    return rd.Rollouts(**{**vars(rows), "moves": moves})


def test_the_tool_answers_in_ids_of_its_own(lm) -> None:  # noqa: ANN001
    """The trigger may be a part of a longer text, and the answer's ids are those of its text alone."""
    plain = Strings(lm.vocab_size, rd.Stops(), 3, "exact_prefix", 0, (), lm.tokenizer)
    space = with_tool(plain, Tool(lambda text: " 42" if text == " 6 =" else None, room=4))
    s = space.start(torch.zeros(1, dtype=torch.long))
    ids, kinds = [*lm.tokenizer.encode(" 6 ="), *lm.tokenizer.encode(" 42")], []
    for i in ids:
        menu = space.menu(s)
        kinds.append(int(menu.must[0]))
        assert not kinds[-1] or int(menu.forced[0]) == i  # pyright: ignore[reportOptionalSubscript]
        s = space.step(s, torch.tensor([i]))
    assert kinds == [0, 0, 0, 1, 1, 1] and bool(space.menu(s).can_stop[0]) and FREE == 1
