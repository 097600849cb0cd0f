"""The loop: what is skipped, what stops a run, what its metrics and schedules say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from retrodict.errors import InputError
from retrodict.records import Rollouts, Scores
from retrodict.testing.sets import set_target
from retrodict.testing.trained import Table, fresh, posterior_paths, train, training_targets
from retrodict.training.amortize import amortize
from retrodict.training.loop import TrainingError, advance, begin, evaluate
from retrodict.training.settings import settings


def sets() -> Any:
    return training_targets()["sets"]


class Spoilt(Table):
    """NaN at the steps in ``bad``."""

    bad: tuple[int, ...] = ()

    def score(self, rollouts: Rollouts, raw: bool = False, grad: bool = False) -> Scores:
        s = super().score(rollouts, raw, grad)
        self.calls = getattr(self, "calls", -1) + 1
        return Scores(s.log_q, s.log_stop + (torch.nan if self.calls in self.bad else 0.0))


def spoilt(*bad: int) -> Spoilt:
    policy = fresh(sets(), Spoilt)
    assert isinstance(policy, Spoilt)
    policy.bad = bad
    return policy


def test_a_step_without_a_number_is_kept_and_skipped(tmp_path: Path) -> None:
    told: list[tuple[int, int, str]] = []
    run = amortize(
        sets(), spoilt(2, 5), objective="vargrad", steps=8, evaluate=2, folder=tmp_path,
        on_failure=lambda step, rows, why: told.append((step, len(rows), why)),
    )  # fmt: skip
    assert bool(run.logits.isfinite().all())
    assert [t[0] for t in told] == [2, 5] and all("NaN" in t[2] and t[1] == 16 for t in told)
    lines = [json.loads(x) for x in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [x["step"] for x in lines] == list(range(8)) and [x["step"] for x in lines if "skipped" in x] == [2, 5]
    assert sorted(x.name for x in (tmp_path / "failures").iterdir()) == ["step-2.safetensors", "step-5.safetensors"]
    with safe_open(tmp_path / "failures" / "step-2.safetensors", "pt") as f:
        assert "NaN" in f.metadata()["why"] and f.get_tensor("moves").shape[0] == 16
        assert f.get_tensor("term.table").shape[0] == 16


def test_three_in_a_row_stop_the_run_with_the_cause(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="3 steps in a row .* log q of a stop is NaN") as error:
        amortize(sets(), spoilt(3, 4, 5), objective="vargrad", steps=9, folder=tmp_path)
    assert "\n" not in str(error.value)
    assert json.loads((tmp_path / "checkpoint.json").read_text())["step"] == 5  # what was learned before is kept
    amortize(sets(), spoilt(3, 4, 6, 7, 9), objective="vargrad", steps=12, evaluate=2)  # never three in a row


def test_a_gradient_that_is_no_number_changes_nothing() -> None:
    class Overflow(Table):
        def score(self, rollouts: Rollouts, raw: bool = False, grad: bool = False) -> Scores:
            s = super().score(rollouts, raw, grad)
            if grad and s.log_q.requires_grad:
                s.log_q.register_hook(lambda g: g * torch.inf)
            return s

    run = begin(sets(), fresh(sets(), Overflow), settings(objective="vargrad", steps=5))
    metrics = advance(run)
    assert "gradient" in metrics["skipped"] and bool((run.policy.parameters()["logits"] == 0).all())


def test_log_z_begins_where_the_first_rows_say() -> None:
    """Not at 0, tens of nats from a real evidence and a tenth of a nat a step away, but at the first lower bound."""
    target = sets()
    run = begin(target, fresh(target), settings(objective="tb", steps=2, samples=32, lr=0.1, lr_log_z=1e-12))
    first = advance(run)
    assert run.log_z is not None and abs(float(run.log_z[0].detach()) - first["elbo"]) < 1e-6


def test_log_z_is_learned() -> None:
    target = sets()
    policy = fresh(target)
    run = begin(target, policy, settings(objective="tb", steps=150, samples=32, lr=0.1, lr_log_z=0.1))
    for _ in range(150):
        advance(run)
    r, _ = posterior_paths(target, 0)
    truth = float((target.log_gamma(r) + r.log_pb.sum(1)).logsumexp(0))
    assert run.log_z is not None and abs(float(run.log_z[0].detach()) - truth) < 0.02
    found = evaluate(target, policy, 200, 1)
    assert found["zeros"] == 0 and abs(found["elbo"] - truth) < 0.05 and found["ess"] > 0.95


def test_metrics_are_of_fresh_draws_at_temperature_one() -> None:
    target = training_targets()["infill, own_stop"]
    shared = {"steps": 1, "samples": 64, "objective": "pooled", "evaluate": 2}
    seen: list[dict[str, Any]] = []
    amortize(target, fresh(target), on_metrics=seen.append, tempered=0.5, temperatures=(9.0, 9.0), **shared)
    amortize(target, fresh(target), on_metrics=seen.append, tempered=1.0, **shared)
    assert sum(seen[0]["lengths"]) == 32 and 0 < seen[0]["ess"] <= 1 and seen[0]["var_a"] > 0
    assert seen[0]["behaviour_temperature"] == 9.0 and seen[0]["scored"] <= 64
    assert "elbo" not in seen[1]  # nothing was drawn from q itself


def test_one_seed_one_result() -> None:
    same = [train(sets(), "subtb", "all", steps=12, seed=s).logits for s in (4, 4, 5)]
    assert torch.equal(same[0], same[1]) and not torch.equal(same[0], same[2])


def test_shards_are_streams_of_their_own() -> None:
    rows: list[list[int]] = []
    for shards in (1, 2):
        run = begin(sets(), fresh(sets()), settings(objective="vargrad", samples=8, shards=shards))
        from retrodict.training.loop import _collect

        rows.append(_collect(run, torch.device("cpu")).rollouts.n.tolist())
    assert len(rows[0]) == len(rows[1]) == 8 and rows[1][:4] != rows[1][4:]


def test_reward_temperature_falls() -> None:
    s = settings(reward_temperature=(3.0, 1.0, 4))
    assert [s.reward_t(i) for i in (0, 2, 4, 9)] == [3.0, 2.0, 1.0, 1.0]
    target, seen = training_targets()["sets"], []
    amortize(target, fresh(target), objective="vargrad", steps=6, evaluate=2, reward_temperature=(3.0, 1.0, 4),
             on_metrics=seen.append)  # fmt: skip
    assert [m["reward_temperature"] for m in seen] == [3.0, 2.5, 2.0, 1.5, 1.0, 1.0]


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"objective": "subtbb"}, "unknown objective 'subtbb'; did you mean 'subtb'"),
        ({"stps": 3}, "unknown setting 'stps'; did you mean 'steps'"),
        ({"samples": 1, "objective": "vargrad"}, "give samples of at least 2, or use tb"),
        ({"samples": 10, "shards": 3}, "do not divide into 3 shards"),
        ({"tempered": 0.7, "replay": 0.5}, "more than all samples"),
        ({"resume": True}, "resume needs the folder"),
    ],
)
def test_settings_that_do_not_go_together(given: dict[str, Any], says: str) -> None:
    with pytest.raises(InputError, match=says) as error:
        amortize(sets(), fresh(sets()), **given)
    assert "\n" not in str(error.value)


def test_objectives_that_a_target_cannot_serve() -> None:
    whole = training_targets()["paths of sets"]
    with pytest.raises(InputError, match="pooled needs values of every prefix, and the factor 'prior' has none"):
        amortize(whole, fresh(whole), objective="pooled")
    assert begin(whole, fresh(whole), settings()).objective == "vargrad"
    assert begin(sets(), fresh(sets()), settings()).objective == "pooled"
    with pytest.raises(InputError, match="only a prior from rd.load can be given an adapter"):
        amortize(set_target(3))
