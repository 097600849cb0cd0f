"""The asker against a table: probabilities, outside mass, caching and its file."""

import json
import math

import pytest
import torch

from retrodict.errors import InputError
from retrodict.models.tabular import TabularLM
from retrodict.models.tiny import TinyLM
from retrodict.structures.ask import Asker

OPTIONS = ["ab", "c", "ba"]


def by_hand(lm: TabularLM, prompt: str, text: str) -> float:
    ids, total = lm.tokenizer.encode(prompt), 0.0
    for token in lm.tokenizer.encode(text):
        _, logits = lm.encode([ids])
        total += float(logits[0].log_softmax(-1)[token])
        ids = [*ids, token]
    return total


def test_options_are_whole_strings_and_what_is_left_over_is_counted():
    lm = TabularLM.random(".abc", order=2, seed=3)
    asker = Asker(lm, batch=2)
    prompts = ["a", "bca", "c."]
    found = asker.options(prompts, OPTIONS)
    want = torch.tensor([[by_hand(lm, p, o) for o in OPTIONS] for p in prompts], dtype=torch.float64)
    torch.testing.assert_close(found, want, rtol=0, atol=1e-12)
    torch.testing.assert_close(asker.outside(found, OPTIONS), 1 - want.exp().sum(1), rtol=0, atol=1e-12)
    assert asker.counts.questions == 3
    assert math.isclose(asker.counts.mean_outside, float((1 - want.exp().sum(1)).mean()), abs_tol=1e-12)
    assert asker.counts.mostly_outside == int((want.exp().sum(1) < 0.5).sum())


def test_an_option_that_begins_with_another_is_part_of_it():
    asker = Asker(TabularLM.random(".abc", seed=1))
    found = asker.options(["b"], ["a", "ab"])
    assert torch.allclose(asker.outside(found, ["a", "ab"]), 1 - found[:, 0].exp())


def test_batches_of_a_transformer_agree_with_one_question_at_a_time():
    lm = TinyLM(seed=2)
    together = Asker(lm).options(["a", "bcdef", "gh"], [".", "abca", "hg"])
    alone = torch.cat([Asker(lm, batch=1).options([p], [".", "abca", "hg"]) for p in ("a", "bcdef", "gh")])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-5)


def test_the_file_spares_the_model_and_survives_a_kill(tmp_path):
    path, lm = tmp_path / "answers.jsonl", TabularLM.random(".abc", seed=3)
    first = Asker(lm, path).options(["a", "b"], OPTIONS)
    before = path.read_text()
    with path.open("a") as file:  # killed in the middle of a line
        file.write(before.splitlines()[0][:20])
    again = Asker(lm, path)
    runs = lm.forwards
    assert torch.equal(again.options(["a", "b"], OPTIONS), first) and lm.forwards == runs
    assert again.counts.scored == 0 and again.counts.cached == 6
    again.options(["c"], OPTIONS)
    assert path.read_text().startswith(before) and len(path.read_text().splitlines()) == 9


def test_another_model_does_not_read_these_answers(tmp_path):
    path = tmp_path / "answers.jsonl"
    Asker(TabularLM.random(".abc", seed=3), path).options(["a"], OPTIONS)
    other = Asker(TabularLM.random(".abc", seed=4), path)
    other.options(["a"], OPTIONS)
    assert other.counts.scored == 3
    assert len({json.loads(line)["model"] for line in path.read_text().splitlines()}) == 2


def test_what_cannot_be_asked_is_said(tmp_path):
    lm = TabularLM.random(".abc", seed=3)
    with pytest.raises(InputError, match="at least two answers"):
        Asker(lm).options(["a"], ["b"])
    with pytest.raises(InputError, match="has no tokens"):
        Asker(lm).log_p([("a", "")])
    path = tmp_path / "notes.txt"
    path.write_text("shopping\n")
    with pytest.raises(InputError, match=r"notes\.txt, line 1: not an answer"):
        Asker(lm, path)
    small = TinyLM(context=8)
    with pytest.raises(InputError, match="over the context"):
        Asker(small).options(["abcdefg"], ["abc", "b"])
