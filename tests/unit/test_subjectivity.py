"""The subjectivity task: its rows, what each method computes, and a table that is kept; on a table of characters."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import retrodict as rd
from retrodict.errors import InputError
from retrodict.models.tabular import TabularLM
from retrodict.tasks import subjectivity as task
from retrodict.tasks.subjectivity import Plan, answers, direct, examples, questions, read, run, table, target
from retrodict.training.em import likelihood_of

TEXT = "".join(t for t, _ in task.EXAMPLES) + task.PROMPT + task.EVIDENCE + "".join(task.LABELS) + "\n,"
ALPHABET = "$" + "".join(sorted(set(TEXT) - set("$")))
SMALL = Plan(e_steps=2, samples=2, per_step=2, m_steps=2, draws=2, m_batch=4, sft_steps=8, sft_batch=4, sft_lr=0.1,
             chains=3, rounds=2, seed=1)  # fmt: skip


def model() -> Any:
    """A table over the characters of the task."""
    return TabularLM.random(ALPHABET, order=2, seed=0)


def test_examples_are_balanced_and_of_one_kind() -> None:
    rows = read(examples())
    assert len(rows) == 16 and sum(r["label"] for r in rows) == 8
    assert len({r["text"] for r in rows}) == 16 and all(r["text"].endswith(" .") for r in rows)


def test_rows_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    path.write_text('{"text": "a", "label": 0}\n{"text": "b"}\n')
    with pytest.raises(InputError, match=r"train\.jsonl, line 2: no field 'label'"):
        read(path)
    path.write_text('{"text": "a", "label": 0}\n{"text": "b", "label": "maybe"}\n')
    with pytest.raises(InputError, match=r"train\.jsonl, row 2: label is 'maybe'; write 0 for objective or 1"):
        read(path)
    path.write_text('{"text": "a", "label": "1"}\n')
    assert read(path)[0]["label"] == 1


def test_the_target_is_the_reference_setting() -> None:
    lm = model()
    t = target(lm, examples()[:2])
    first = t.problems[0]
    assert lm.tokenizer.decode(first.context) == (
        f'Classify this movie review as objective or subjective: "{task.EXAMPLES[0][0]}" This review is'
    )
    assert lm.tokenizer.decode(first.evidence) == " so it is objective."
    assert t.space.max_moves == 5 and t.space.stops.text_ids(0) == tuple(lm.tokenizer.encode(","))
    rows = rd.ancestral(t, n=3, seed=0).objects
    among = likelihood_of(t)(rows).exp()
    other = [{**r, "label": 1 - r["label"]} for r in examples()[:2]]
    assert torch.allclose(among + likelihood_of(target(lm, other))(rows).exp(), torch.ones(6, dtype=among.dtype))
    assert questions(lm, examples()[:2], labelled=False)[1].evidence == ()


@pytest.mark.parametrize("shots", [0, 2])
def test_labels_that_the_tokenizer_splits_are_scored_as_whole_strings(shots: int) -> None:
    lm, rows = model(), examples()
    found = direct(lm, rows[:3], rows[3 : 3 + shots], batch=2)
    worked = "".join(task.PROMPT.format(**r) + f" {task.LABELS[r['label']]}.\n" for r in rows[3 : 3 + shots])
    ids = answers(lm, task.DIRECT)
    assert len(ids[0]) != len(ids[1])  # "objective" has one character less
    for r, p in zip(rows[:3], found, strict=True):
        head = lm.tokenizer.encode(worked + task.PROMPT.format(**r))
        value = [float(lm.score([head], torch.tensor([a]), torch.tensor([len(a)]))[0].sum()) for a in ids]
        assert torch.allclose(p, torch.tensor(value, dtype=torch.float64).softmax(0))


def test_two_labels_of_one_spelling_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(task, "LABELS", ("objective", "objective"))
    with pytest.raises(InputError, match="same tokens"):
        target(model(), examples()[:2])


def test_few_shot_prompts_over_the_context_are_refused() -> None:
    lm = model()
    lm.context = 300
    with pytest.raises(InputError, match="2 worked examples are"):
        direct(lm, examples()[:1], examples()[1:3], batch=2)


def test_a_run_grades_every_method_and_keeps_its_rows(tmp_path: Path) -> None:
    rows, steps = examples(), []
    found = run(model(), rows[:4], rows[4:10], plan=SMALL, folder=tmp_path, on_metrics=steps.append)
    assert [r["method"] for r in found] == list(task.METHODS)
    for r in found:
        assert 0 <= r["accuracy"] <= 1 and 0 <= r["ece"] <= 1 and r["log_loss"] > 0 and r["labels"] == 4
        assert r["dev"] == 6 and 0 <= r["risk_at_half"] <= 1
    assert {m["method"] for m in steps} == {"sft", "amortized", "em"}
    assert [m["phase"] for m in steps if m["method"] == "em"] == ["m", "m", "e", "m", "m"]
    assert steps[7]["method"] == "sft" and steps[7]["log_p"] > steps[0]["log_p"]
    again = run(model(), rows[:4], rows[4:10], plan=SMALL, folder=tmp_path, on_metrics=lambda m: pytest.fail("ran"))
    assert again == [json.loads(json.dumps(r)) for r in found]
    assert table(found).count("\n") == 5
    fresh = run(model(), rows[:4], rows[4:10], methods=["amortized"], plan=SMALL)
    assert fresh[0]["log_loss"] == found[3]["log_loss"]  # one seed, one result
    with pytest.raises(InputError, match="did you mean 'few-shot'"):
        run(model(), rows[:4], rows[4:6], methods=["fewshot"])
