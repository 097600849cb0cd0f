"""Arithmetic and continuation as training tasks: data, annotations, replay, and each method's goal, on tiny models."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("peft")

import transformers  # noqa: E402
from tiny_llama import tokenizer  # noqa: E402

from retrodict.bench import arithmetic as table  # noqa: E402
from retrodict.bench import continuation as other_table  # noqa: E402
from retrodict.errors import InputError  # noqa: E402
from retrodict.models.load import load  # noqa: E402
from retrodict.rng import generator  # noqa: E402
from retrodict.spaces.strings import Strings  # noqa: E402
from retrodict.tasks import arithmetic_train as train  # noqa: E402
from retrodict.tasks import continuation  # noqa: E402
from retrodict.tasks.arithmetic import Question, accuracy, generate, problems, space, steps, target  # noqa: E402
from retrodict.training.loop import begin  # noqa: E402
from retrodict.training.replay import written  # noqa: E402
from retrodict.training.settings import settings  # noqa: E402


def tiny(spread: float = 0.02) -> Any:
    """A random Llama of two layers whose tokens are bytes, with room for the worked examples."""
    config = transformers.LlamaConfig(vocab_size=264, hidden_size=16, intermediate_size=32, num_hidden_layers=2,
                                      num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=512,
                                      initializer_range=spread)  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        module: Any = transformers.LlamaForCausalLM(config)
    return load((module, tokenizer()))


@pytest.fixture(scope="module")
def lm() -> Any:
    return tiny()


# -- data -------------------------------------------------------------------------------------------------------------


def test_questions_that_are_judged_are_never_trained_on() -> None:
    data = train.questions(annotated=6, unannotated=300, dev=40)
    judged = {q.query for each in data.dev.values() for q in each}
    trained = [q.query for q in (*data.annotated, *data.unannotated)]
    assert not judged & {*trained} and len({*trained}) == 306 and [*data.dev] == [3, 4, 5]
    assert all(q.rationale for q in data.annotated) and not any(q.rationale for q in data.unannotated)
    assert all(q.query.count(" ") == 2 + 2 * k for k, each in data.dev.items() for q in each)


def test_questions_of_a_folder(tmp_path: Path) -> None:
    def put(name: str, data: list[Question], annotated: bool = False) -> None:
        rows = [{"str_query": q.query, "num_sol": q.answer} | ({"str_rationale": q.rationale} if annotated else {})
                for q in data]  # fmt: skip
        (tmp_path / name).write_text(json.dumps(rows))

    pool = generate(12, operands=(3,), seed=1)
    put("annotated_50.json", pool[:4], annotated=True)
    put("hard_dev.json", pool[3:12])
    for k in (3, 4, 5):
        put(f"dev_{k}_operands.json", [pool[0], pool[5]] if k == 3 else generate(2, operands=(k,)))
    data = train.questions(tmp_path, annotated=3, unannotated=7, dev=5)
    assert [q.query for q in data.annotated] == [q.query for q in pool[1:4]]  # the first is judged
    assert [q.query for q in data.unannotated] == [q.query for q in (pool[4], *pool[6:12])]
    with pytest.raises(InputError, match="3 annotated and 7 other"):
        train.questions(tmp_path, annotated=4, unannotated=7)


def test_written_steps_hold_the_results_and_are_all_right(lm: Any) -> None:
    data = generate(9, operands=(3, 4, 5), seed=4)
    where = space(lm, max_tokens=60)
    goal = target(lm, problems(lm, data), where)
    assert goal.prior is not None
    rows = train.annotated_rows(goal.prior, where, data)
    assert rows.problem.tolist() == list(range(9))
    assert accuracy(rows, data, lm).chain == 1.0
    one = Question("Question: 6 - 8 - 4 = ? Answer:", -6, "6 - 8 =, -2 - 4 =")
    assert lm.tokenizer.decode(train.written_ids(where, one)) == " 6 - 8 = -2, -2 - 4 = -6"
    with pytest.raises(InputError, match="no written steps"):
        train.written_ids(where, Question(one.query, -6))


# -- training ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> train.Task:
    monkeypatch.setattr(train, "TOKENS", 20)
    data = train.Data(generate(2, operands=(3,), seed=0), [Question(q.query, q.answer) for q in
                      generate(4, operands=(3,), seed=1)], {3: generate(2, operands=(3,), seed=2)})  # fmt: skip
    return train.task(tiny(), data, rank=4)


def test_annotated_questions_come_first_and_often(small: train.Task) -> None:
    names = [p.name for p in small.target.problems]
    assert len(names) == 2 * train.OFTEN + 4
    assert all(names.count(q.query) == train.OFTEN for q in small.data.annotated)
    rows = small.annotated()
    assert [names[p] for p in rows.problem.tolist()] == [q.query for q in small.data.annotated]


def test_replay_starts_from_the_annotations_of_every_copy(small: train.Task) -> None:
    rows = small.annotated()
    run = begin(small.target, small.policy, settings(objective="vargrad", replay=0.5, samples=4))
    assert train.seeded(run, rows) == 2 * train.OFTEN and [*run.replay.sizes()] == list(range(2 * train.OFTEN))
    every = torch.arange(len(small.target.problems))
    drawn, served = run.replay.draw(every, generator(0))
    assert served.tolist() == list(range(2 * train.OFTEN))
    texts = small.space.show(drawn)
    assert [steps(small.target.problems[p].name)[0] for p in served.tolist()] == [
        ", ".join(step.strip().split("=")[0] + "=" for step in t.rstrip(".").split(",")) for t in texts
    ]
    stored = small.target.log_gamma(drawn)
    again = small.target.log_gamma(dataclasses.replace(drawn, terms={}, versions={}))
    torch.testing.assert_close(stored, again, atol=1e-3, rtol=0)


def test_imitation_climbs_and_every_method_moves(small: train.Task) -> None:
    rows, start = small.annotated(), train.kept_values(small.policy)
    losses = train.imitate(small.policy, rows, steps=6, lr=1e-2)
    assert losses[-1] < losses[0] - 0.5
    tuned = train.kept_values(small.policy)
    assert any(bool((start[k] != tuned[k]).any()) for k in start)
    seen: list[dict[str, Any]] = []
    for method in ("vargrad", "grpo_reward"):
        told = train.learn(small, method, rows, steps=2, samples=4, per_step=3, lr=1e-2, on_metrics=seen.append)
        assert told["steps"] == 2 and told["tokens"] > 0
    assert [m["objective"] for m in seen] == ["vargrad"] * 2 + ["grpo"] * 2
    assert seen[0]["replay"] >= 2 * train.OFTEN and seen[2]["replay"] == 0
    assert seen[0]["reward_temperature"] == 1.1 and seen[2]["reward_temperature"] == 1.0
    assert train.learn(small, "vargrad", rows, steps=2, samples=4, per_step=3, seconds=0.0)["steps"] == 0


def test_each_method_has_its_own_goal(small: train.Task) -> None:
    """``grpo_reward`` is paid log p(Y | X, Z) alone: from the same draws its rewards are the likelihood's."""
    rows = small.annotated()
    found: dict[str, float] = {}
    for method in ("grpo", "grpo_reward"):
        told = train.learn(small, method, rows, steps=1, samples=8, per_step=2, lr=1e-9)
        found[method] = told["reward"]
    assert found["grpo_reward"] > found["grpo"] + 5  # log p(Z | X) - log q(Z | X): p says bytes that q may not


def test_the_table(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(train, "TOKENS", 34)
    monkeypatch.setattr(table, "load", lambda *_, **__: tiny())
    rows = table.run(methods="prompt,sft,vargrad", steps=1, samples=2, per_step=2, sft_steps=1, dev=1, chains=2,
                     unannotated=4, partial=str(tmp_path / "a.json"))  # fmt: skip
    assert {r.method for r in rows} == {"prompt", "sft", "vargrad"}
    assert sum(r.metric.startswith("accuracy") for r in rows) == 3 * 3 * 3
    assert all(0 <= r.value <= 1 for r in rows if r.metric.startswith(("accuracy", "chains with")))
    assert len(json.loads((tmp_path / "a.json").read_text())["rows"]) == len(rows)
    with pytest.raises(InputError, match="did you mean 'vargrad'"):
        table.run(methods="vargrd")


# -- continuation -----------------------------------------------------------------------------------------------------


def test_beam_search_finds_the_most_likely_sentence() -> None:
    lm = tiny(0.5)
    goal = continuation.target(lm, ["Rain fell.", "A cat"], temperature=0.5, max_tokens=1, min_tokens=1)
    beams = continuation.beam_search(lm, goal, 128)
    where, prior, untempered = goal.space, goal.prior, goal.with_betas(prior=1.0)
    assert isinstance(where, Strings) and prior is not None
    legal = where.legal_ids().nonzero().flatten().tolist()
    for p in (0, 1):
        best = untempered.log_gamma(written(prior, p, [[i] for i in legal])).max()
        mine = beams.take((beams.problem == p).nonzero().squeeze(1))
        assert len({*where.keys(mine)}) == len(mine) == 128  # the stop at the limit is theirs too: none twice
        assert abs(float(untempered.log_gamma(mine).max() - best)) < 1e-4


def test_draws_are_judged_untempered(lm: Any) -> None:
    goal = continuation.target(lm, ["Rain fell.", "A cat"], temperature=0.5, max_tokens=4)
    rows = continuation.token_temperature(goal, 6, generator(0), 1.0)
    found = continuation.judge(goal, rows)
    values = (goal.log_gamma(rows) * 0.5).view(2, 6)  # gamma = p^2
    assert abs(found.best - float(values.amax(1).mean())) < 1e-4 and abs(found.mean - float(values.mean())) < 1e-4
    assert found.best > found.mean and 1 < found.distinct <= 6 and 3 <= found.length <= 4
    same = continuation.judge(goal, rows.take(torch.tensor([0, 0, 6, 6])))
    assert same.distance == 0 and same.distinct == 1
    with pytest.raises(InputError, match="must be positive"):
        continuation.target(lm, temperature=0.0)


def test_prompts_are_read(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("One.\n\n Two. \n")
    assert continuation.read_prompts(tmp_path / "p.txt") == ["One.", "Two."]
    (tmp_path / "e.txt").write_text("\n")
    for name, said in (("e.txt", "no prompt"), ("absent.txt", "cannot read prompts")):
        with pytest.raises(InputError, match=said):
            continuation.read_prompts(tmp_path / name)
    assert len({*continuation.PROMPTS}) == len(continuation.PROMPTS) == 24


def test_the_other_table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(other_table, "load", lambda *_, **__: tiny())
    rows = other_table.run(train=2, held_out=2, draws=2, taus="0.6", objectives="pooled", steps=1, samples=2,
                           per_step=2, max_tokens=4)  # fmt: skip
    assert [*dict.fromkeys(r.method for r in rows)] == ["beam search", "tokens at 0.6", "pooled, T 0.8"]
    with pytest.raises(InputError, match="fewer than train"):
        other_table.run(train=20, held_out=8)
