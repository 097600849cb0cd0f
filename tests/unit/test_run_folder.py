"""The run folder: whole or not at all, never another run's, and readable without the model."""

from __future__ import annotations

import getpass
import json
import os
import socket
import threading

import pytest
import yaml

import retrodict as rd
from retrodict.cli.main import main
from retrodict.errors import InputError
from retrodict.report.compare import compare
from retrodict.report.run import RunFolder, environment, plain, read, sample_rows


@pytest.fixture(scope="module")
def target():
    lm = rd.TabularLM.random(".ab<", seed=3)
    data = [rd.TextProblem("a", "<b", name="one", chat=False), rd.TextProblem("ab", "<a", name="two", chat=False)]
    return rd.posterior(lm, data, stop=".", max_tokens=4)


@pytest.fixture(scope="module")
def particles(target):
    return rd.smc(target, n=6, seed=0, runs=3)


CONFIG = {"target": "infill", "before": "a", "sampler": {"smc": {"n": 6}}, "name": "x"}


def lines(path):
    return [json.loads(x) for x in path.read_text().splitlines()]


def test_numbers_go_up_and_nothing_is_overwritten(tmp_path):
    names = [RunFolder.create(tmp_path, "x", CONFIG).path.name for _ in range(3)]
    assert names == ["x-001", "x-002", "x-003"]
    (tmp_path / "x-004").write_text("a file of someone else")
    assert RunFolder.create(tmp_path, "x", CONFIG).path.name == "x-005"
    assert (tmp_path / "x-004").read_text() == "a file of someone else"
    assert not list(tmp_path.glob(".*"))


def test_runs_that_start_together_get_their_own_folders(tmp_path):
    found: list[str] = []
    threads = [threading.Thread(target=lambda: found.append(RunFolder.create(tmp_path, "x", CONFIG).path.name))
               for _ in range(8)]  # fmt: skip
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert sorted(found) == [f"x-{i:03d}" for i in range(1, 9)]


def test_what_a_run_leaves(tmp_path, target, particles):
    told = [{"name": "one", "context": "a", "evidence": "<b"}, {"name": "two", "context": "ab", "evidence": "<a"}]
    folder = RunFolder.create(tmp_path, "x", CONFIG, told, environment())
    folder.put("smc", particles)
    folder.comparison(compare(target, {"smc": particles}))
    folder.failure("smc", "bad\ntext \ud800", "it raised")
    folder.close("complete")
    rows = lines(folder.path / "samples.jsonl")
    assert len(rows) == particles.m * particles.k
    assert {(r["method"], r["problem"]) for r in rows} == {("smc", "one"), ("smc", "two")}
    for name in ("one", "two"):
        assert abs(sum(r["weight"] for r in rows if r["problem"] == name) - 1) < 1e-9
    assert set(rows[0]) == {"method", "problem", "text", "weight", "log_w", "tokens", "terms"}
    assert [r["verdict"] for r in lines(folder.path / "metrics.jsonl")] == list(rd.diagnose(particles).verdicts)
    assert lines(folder.path / "failures.jsonl")[0]["text"] == "bad\ntext \ud800"
    run = read(folder.path)
    assert run.config == CONFIG and run.status["status"] == "complete" and list(run.methods) == ["smc"]
    assert run.methods["smc"].shown == particles.shown and run.problems == told
    assert run.comparison["rows"][0]["method"] == "smc" and len(run.failures) == 1


def test_a_killed_run_can_be_read(tmp_path, particles):
    """Nothing of close() is needed: after put() the folder stands by itself."""
    folder = RunFolder.create(tmp_path, "x", CONFIG)
    folder.put("smc", particles, final=False)
    run = read(folder.path)
    assert run.status["status"] == "running" and run.methods["smc"].k == particles.k
    assert main(["report", str(folder.path)]) == 0
    assert "Not finished" in (folder.path / "report.html").read_text()


def test_reading_says_which_file_is_at_fault(tmp_path, particles, capsys):
    def fails(*words: str) -> str:
        assert main(["report", str(folder.path)]) == 2
        said = capsys.readouterr().err
        assert said.count("\n") == 1 and all(w in said for w in words), said
        return said

    folder = RunFolder.create(tmp_path, "x", CONFIG)
    folder.put("smc", particles)
    folder.close("complete")
    page = (folder.path / "report.html").read_text()
    file = folder.path / "particles/smc.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-9])
    fails("smc.safetensors", "cut short")
    file.write_bytes(whole[:-9] + bytes(255 - b for b in whole[-9:]))
    fails("smc.safetensors", "damaged")
    assert (folder.path / "report.html").read_text() == page  # the old page stays
    file.write_bytes(whole)
    for name in ("problems.jsonl", "status.json", "comparison.json", "config.yaml"):
        before = (folder.path / name).read_bytes() if (folder.path / name).exists() else None
        (folder.path / name).write_text("{broken: [")
        fails(name)
        (folder.path / name).unlink() if before is None else (folder.path / name).write_bytes(before)
    assert main(["report", str(folder.path)]) == 0
    assert main(["report", str(tmp_path)]) == 2 and "such as x-001" in capsys.readouterr().err


def test_nothing_in_it_names_a_machine_or_a_person(tmp_path, particles):
    lm = rd.TinyLM(seed=0)
    home = os.path.expanduser("~")
    folder = RunFolder.create(tmp_path, "x", {**CONFIG, "model": f"{home}/models/mine"}, (), environment(lm))
    folder.put("smc", particles)
    folder.close("complete")
    told = json.loads((folder.path / "environment.json").read_text())
    assert told["packages"]["torch"] and told["threads"] >= 1 and told["model"]["name"] == lm.name
    assert yaml.safe_load((folder.path / "config.yaml").read_text())["model"] == "~/models/mine"
    for file in folder.path.rglob("*"):
        if file.is_file():
            text = file.read_bytes().decode("utf-8", "replace")
            assert str(tmp_path) not in text and socket.gethostname() not in text, file.name
            assert f"/{getpass.getuser()}/" not in text, file.name


def test_plain_is_json(particles):
    assert plain({"a": float("-inf"), "b": (1, {2}), "c": particles.log_w[:1, :1]})["a"] == "-inf"
    json.dumps(sample_rows("smc", particles), allow_nan=False) if particles.log_w.isfinite().all() else None


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot make a run folder"):
        RunFolder.create(tmp_path / "file", "x", CONFIG)
