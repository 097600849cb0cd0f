"""``retrodict train`` as a user meets it: bad input in one line before any weight is loaded; stopped and resumed."""

from __future__ import annotations

import dataclasses
import json
import textwrap
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import retrodict.models.load as door
from retrodict.cli import demo
from retrodict.cli import train as room
from retrodict.cli.main import main
from retrodict.report import html, svg
from retrodict.report.learning import learning
from retrodict.report.run import plain
from retrodict.rng import generator

STORY = "model: random:tiny\ntarget: infill\nbefore: ab\nafter: cd\nmax_tokens: 3\nstop: '.'\n"
SHORT = STORY + "steps: 4\nsamples: 2\nevaluate: 4\nrank: 2\nlora_targets: [q_proj]\nobjective: vargrad\n"


@pytest.fixture
def folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def unloaded(monkeypatch: pytest.MonkeyPatch, folder: Path) -> Path:
    """Nothing may be loaded."""

    def load(*args: Any, **how: Any) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(door, "load", load)
    return folder


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert main(["train", *words]) == 2
    said = capsys.readouterr()
    assert said.err.startswith("retrodict: ") and said.err.count("\n") == 1 and "Traceback" not in said.err
    return said.err.removeprefix("retrodict: ").strip()


@pytest.mark.parametrize("more, said", [
    ("objektive: tb", "did you mean 'objective'?"),
    ("objective: vargard", "did you mean 'vargrad'?"),
    ("steps: 0", "r.yaml: key 'steps': must be at least 1, not 0"),
    ("lr: -1", "r.yaml: key 'lr': must be above 0"),
    ("lr: fast", "r.yaml: key 'lr': expected a number"),
    ("checkpointing: maybe", "expected true or false"),
    ("temperatures: [0.5, 2]", "'temperatures' is unused without 'tempered'"),
    ("epsilon: 0.1", "'epsilon' is unused without 'tempered'"),
    ("tempered: 0.5\ntemperatures: [2, 0.5]", "low first"),
    ("tempered: 0.7\nreplay: 0.7", "more than all samples"),
    ("priority: reward", "'priority' is unused without 'replay'"),
    ("replay: 0.5\ndistance: edit", "'distance' is unused without 'tolerance'"),
    ("held_out: 4", "'held_out' is unused without 'simulated'"),
    ("lam: 0.9", "'lam' is unused by auto"),
    ("objective: tb\nentropy: 1", "'entropy' is unused by tb"),
    ("objective: vargrad\nlr_log_z: 0.1", "'lr_log_z' is unused by vargrad, which learn no log Z"),
    ("baselines: [sft]", "unknown objective 'sft'"),
    ("objective: tb\nbaselines: [tb]", "'tb' is the objective itself"),
    ("objective: vargrad\nsamples: 1", "vargrad compares samples of one problem"),
    ("samples: 6\nshards: 4", "samples 6 do not divide into 4 shards"),
    ("sees: y", "'y' is neither x nor xy, nor a template with {context} in it"),
    ("reward_temperature: [2, 1]", "expected 3 numbers"),
    ("reward_temperature: [0, 1, 10]", "reward temperatures must be above 0"),
    ("prompt: hello", "'prompt' is unused: the target 'infill' reads"),
    ("n: 64", "unknown key"),
    ("min_tokens: 9", "min_tokens 9 is over max_tokens 3"),
    ("simulated: 4\navoid: [cat]", "without further factors can be simulated"),
    ("adapter: nowhere", "no adapter in 'nowhere'"),
    ("verifier: my.module:fn\nverifier_kind: prob", "my.module"),
])  # fmt: skip
def test_a_recipe_that_cannot_be_run_is_refused_in_one_line(unloaded, capsys, more: str, said: str) -> None:
    (unloaded / "r.yaml").write_text(STORY + more + "\n")
    line = refused(capsys, "r.yaml")
    assert said in line, line
    assert not (unloaded / "runs").exists()


@pytest.mark.parametrize("words, said", [
    (("gone.yaml",), "cannot read the recipe gone.yaml"),
    ((), "no target"),
    (("--target", "infill"), "needs 'before'"),
    (("--target", "continuation", "--prompt", "a", "--sees", "xy"), "there is no evidence for q to read"),
    (("--stpes", "3"), "unknown flag --stpes; did you mean --steps?"),
    (("--resume", "runs/none"), "no run folder 'runs/none'"),
    (("--resume", "runs/none", "--steps", "3"), "give no other key"),
])  # fmt: skip
def test_words_that_cannot_be_run(unloaded, capsys, words: tuple[str, ...], said: str) -> None:
    assert said in refused(capsys, *words)


def test_a_folder_of_another_command_is_not_resumed(unloaded, capsys) -> None:
    (unloaded / "config.yaml").write_text("command: sample\n")
    assert "was not written by retrodict train" in refused(capsys, "--resume", str(unloaded))
    (unloaded / "config.yaml").write_text("command: train\n")
    (unloaded / "status.json").write_text('{"status": "complete"}')
    assert "is complete" in refused(capsys, "--resume", str(unloaded))


def test_options_of_a_baseline_are_used(unloaded) -> None:
    (unloaded / "r.yaml").write_text(STORY + "objective: vargrad\nbaselines: [subtb]\nlam: 0.8\nlr_log_z: 0.2\n")
    plan = room.plan("r.yaml", {})
    assert plan.settings.options == {} and plan.keys.lam == 0.8


def test_a_resolved_recipe_is_a_recipe(unloaded) -> None:
    """What the run folder keeps reads back as the same run."""
    (unloaded / "r.yaml").write_text(textwrap.dedent(SHORT) + "tempered: 0.5\ntemperatures: [0.8, 1.2]\n")
    first = room.plan("r.yaml", {})
    told = yaml.safe_load(yaml.safe_dump(plain(dict(first.resolved))))
    assert told.pop("command") == "train"
    again = room.plan(None, told)
    assert again.settings == first.settings and dict(again.arguments) == dict(first.arguments)


# -- stopped, and gone on with --------------------------------------------------------------------------------------


def ran(folder: Path, recipe: str = SHORT, name: str = "r") -> Path:
    (folder / f"{name}.yaml").write_text(recipe)
    assert main(["train", f"{name}.yaml"]) == 0
    return folder / "runs" / f"{name}-001"


def weights(run: Path) -> bytes:
    return (run / "adapter" / "adapter_model.safetensors").read_bytes()


@pytest.mark.parametrize("stop, save_every", [(KeyboardInterrupt, 20), (SystemExit, 1)], ids=["Ctrl-C", "killed"])
def test_a_stopped_run_goes_on_to_the_same_adapter(folder, capsys, monkeypatch, stop, save_every: int) -> None:
    whole = ran(folder)
    (folder / "cut.yaml").write_text(SHORT + f"save_every: {save_every}\n")
    real, seen = room.line, []

    def line(m: Any) -> str:
        seen.append(m["step"])
        if m["step"] == 1:
            raise stop()
        return real(m)

    monkeypatch.setattr(room, "line", line)
    code = main(["train", "cut.yaml"])
    said = capsys.readouterr().err
    cut = folder / "runs" / "cut-001"
    if stop is KeyboardInterrupt:
        assert code == 130 and f"go on with: retrodict train --resume {cut.relative_to(folder)}" in said
        assert json.loads((cut / "status.json").read_text())["status"] == "interrupted"
        assert "Training" in (cut / "report.html").read_text()
    monkeypatch.setattr(room, "line", real)
    assert main(["train", "--resume", str(cut)]) == 0
    assert weights(cut) == weights(whole)
    steps = [json.loads(x)["step"] for x in (cut / "training/vargrad/metrics.jsonl").read_text().splitlines()]
    assert steps == [0, 1, 2, 3]


def test_a_run_killed_before_its_first_checkpoint_begins_again(folder, capsys) -> None:
    whole = ran(folder)
    cut = folder / "runs" / "cut-001"
    (cut / "training" / "vargrad").mkdir(parents=True)
    told = yaml.safe_load((whole / "config.yaml").read_text())
    (cut / "config.yaml").write_text(yaml.safe_dump(told))
    (cut / "status.json").write_text('{"status": "running"}')
    (cut / "training" / "vargrad" / "metrics.jsonl").write_text('{"step": 0}\n{"step')
    assert main(["train", "--resume", str(cut)]) == 0
    assert weights(cut) == weights(whole)
    told["lora_alpha"] = 3.0
    (cut / "config.yaml").write_text(yaml.safe_dump(told))
    (cut / "status.json").write_text('{"status": "running"}')
    capsys.readouterr()
    assert "the run was made with lora_alpha / rank = 2.0, not 1.5" in refused(capsys, "--resume", str(cut))


def test_training_starts_from_an_adapter(folder, capsys) -> None:
    first = ran(folder)
    more = SHORT.replace("rank: 2\nlora_targets: [q_proj]\n", f"adapter: {first / 'adapter'}\n")
    again = ran(folder, more, "more")
    assert weights(again) != weights(first)
    (folder / "r.yaml").write_text(more + "rank: 4\n")
    capsys.readouterr()
    assert "'rank' is unused with 'adapter'" in refused(capsys, "r.yaml")


# -- what people see ------------------------------------------------------------------------------------------------


def test_the_page_shows_curves_and_numbers(folder) -> None:
    run = ran(folder, SHORT + "baselines: [tb]\n")
    page = html.render(html.read(run))
    for said in ("<h2>Training</h2>", "Lower bound against steps", "Lower bound against seconds",
                 "Var(log γ/q) against steps", "Var(log γ/q) against seconds", "amortized reads X"):  # fmt: skip
        assert said in page, said
    assert page.count("learning curve over") == 8 // 2 and "tb" in page and "<script" not in page
    card = (run / "adapter" / "README.md").read_text()
    assert "before: ab" in card and "| objective | vargrad |" in card


def test_curves_of_runs_that_skipped_or_never_began() -> None:
    assert learning({}) == "" and learning({"a": ([], {})}) == "" and svg.curves([("a", [], "#000")], "steps") == ""
    rows = [{"step": 0, "skipped": "NaN"}, {"step": 1, "elbo": -3.0, "var_a": 1.0, "seconds": 2.0}]
    shown = learning({"a": (rows, {"evaluation": {"elbo": float("nan"), "elbo_se": None}})})
    assert "Lower bound against steps" in shown and "nan" not in shown.lower() and "skipped" in shown


def test_the_demo_amortizes_its_story(folder, capsys, monkeypatch) -> None:
    monkeypatch.setattr(demo, "JUDGED", 8)
    monkeypatch.setattr(demo, "LEARN", demo.LEARN | {"samples": 2, "evaluate": 2})
    monkeypatch.setattr(demo, "simulate", lambda t, *a, **k: _simulated(t))
    assert demo.run(n=8, stories=1, steps=2, model="random:tiny") == 0
    said = capsys.readouterr().out
    assert "prior -> amortized: the lower bound moved from" in said and "amortized reads X" in said
    run = folder / "runs" / "demo-001"
    rows = json.loads((run / "comparison.json").read_text())["rows"]
    assert [r["method"] for r in rows[:6]] == ["prior", "best of 16", "importance", "MH", "SMC", "amortized"]
    assert len(rows) == 11 and rows[0]["lower"] is not None and rows[5]["log_z"] is not None
    page = (run / "report.html").read_text()
    assert "Training" in page and "amortized" in page and (run / "adapter" / "adapter_config.json").is_file()


def _simulated(target: Any) -> Any:
    """Random bytes hardly ever end in a full stop: any middle will do here."""
    own = target.on([dataclasses.replace(target.problems[0], evidence=(70, 71), name="own 1")])
    return own, target.prior.sample(torch.zeros(1, dtype=torch.long), generator(0))
