"""The card of a saved adapter as a stranger reads it, and what ``compare`` says of a policy."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import retrodict as rd
from retrodict.errors import InputError
from retrodict.policies.card import read_card, write_card
from retrodict.targets.simulate import simulate

ABOUT = {"target": "prior * likelihood", "sees": "xy", "objective": "vargrad", "seconds": 61.2,
         "settings": {"steps": 30, "samples": 16, "lr": 0.001, "seed": 4},
         "evaluation": {"elbo": -20.6, "elbo_se": 0.11, "log_z": -19.5, "ess": 0.12, "distinct": 97.0, "n": 128,
                        "length": 7.3, "var_a": 2.25, "zeros": 0.0}}  # fmt: skip


def story() -> rd.Target:
    lm = rd.TabularLM.random(". abc", order=2, seed=1)
    return rd.infill(lm, before="ab", after="ca", stop=".", max_tokens=4, join="")


def policy(about: dict[str, Any], sees: str = "xy") -> Any:
    lm = SimpleNamespace(base_name="tiny", base_version="abc-float32")
    return SimpleNamespace(lm=lm, sees=sees, space=story().space, about=about)


def test_the_card_says_what_it_samples_reads_and_reached(tmp_path: Path) -> None:
    target = story()
    table = rd.compare(target, {"prior": target.prior}, n=8)  # pyright: ignore[reportArgumentType]
    write_card(tmp_path, policy(ABOUT), table, {"steps": 30})
    card = (tmp_path / "README.md").read_text()
    for said in ("base_model: tiny", "# A sampler of prior * likelihood", "X and Y, what comes before and after",
                 "at most 4 tokens, limit `force`", "-20.60 ± 0.11 nats", "-19.50 nats", "2.25 (0 at the posterior)",
                 "12.0% of the draws", "97 of 128 draws a problem", "30 steps of 16 samples a problem, lr 0.001, 61 s",
                 "| problem | method |", 'rd.load_policy(target, "this folder")',
                 "PeftModel.from_pretrained"):  # fmt: skip
        assert said in card, said
    assert card.startswith("---\n") and str(tmp_path) not in card
    told = read_card(tmp_path)
    assert told["sees"] == "xy" and told["about"]["evaluation"]["elbo"] == -20.6 and told["recipe"] == {"steps": 30}


def test_a_card_without_training_and_with_a_template(tmp_path: Path) -> None:
    write_card(tmp_path, policy({}, sees="After|{evidence}\n{context}"))
    card = (tmp_path / "README.md").read_text()
    assert "a template (`After\\|{evidence}\\n{context}`)" in card and "lower bound" not in card and "steps" not in card


def test_no_card_and_a_damaged_one(tmp_path: Path) -> None:
    assert read_card(tmp_path) == {}
    (tmp_path / "retrodict.json").write_text('{"sees"')
    with pytest.raises(InputError, match="retrodict.json is damaged"):
        read_card(tmp_path)


def test_compare_gives_both_divergences_of_a_policy() -> None:
    """On an enumerable target: the mean over many exact draws of each KL against its sum over all texts."""
    lm = rd.TabularLM.random(".abc ", order=2, seed=0)
    target, exact = simulate(rd.infill(lm, "ab", "ca", stop=".", max_tokens=3, join=""), 80, 3, tokens=2)
    q: Any = target.prior
    table = rd.compare(target, {"q": q, "truth": rd.exact(target)}, n=32, exact=exact)
    for q_row, true in zip(*([r for r in table.rows if r["method"] == m] for m in ("q", "truth")), strict=True):
        assert q_row["lower"] + q_row["kl_q"] == pytest.approx(true["log_z"], abs=1e-9)
        assert q_row["upper"] - q_row["kl_post"] == pytest.approx(true["log_z"], abs=1e-9)
    row = table.mean()[0]
    assert row["kl_q"] + row["kl_post"] == pytest.approx(row["gap"], abs=1e-9)
    assert "q: KL(q, posterior)" in " ".join(table.notes) and "mean of 80" in " ".join(table.notes)
    truth = rd.exact(target)
    rows, scores = truth.objects, q.score(truth.objects)
    inside = torch.arange(rows.moves.shape[1]) < rows.n[:, None]
    from retrodict.numerics import at_end

    log_q = torch.where(inside, scores.log_q, 0.0).double().sum(1) + at_end(scores.log_stop, rows.n, rows.stop).double()
    log_q, p = log_q.view(truth.m, -1), truth.weights / truth.weights.sum(1, keepdim=True)
    q_p = log_q.exp() / log_q.exp().sum(1, keepdim=True)
    safe = torch.where(p > 0, p, 1.0).log()
    forward = (q_p * (log_q - safe)).sum(1).mean()
    backward = (p * (safe - log_q)).sum(1).mean()
    for key, value in (("kl_q", forward), ("kl_post", backward)):
        assert abs(row[key] - float(value)) < 4.5 * row[f"{key}_se"] + 1e-3, (key, row[key], float(value))
        assert math.isfinite(row[f"{key}_se"]) and row[f"{key}_se"] < 0.4
    assert json.loads(json.dumps(row["kl_q"])) == row["kl_q"]
