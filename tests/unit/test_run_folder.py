"""The run folder: whole or not at all, never another run's, readable without the model, kept by an interrupt."""

from __future__ import annotations

import getpass
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
import yaml

import retrodict as rd
from retrodict.cli import pieces, targets
from retrodict.cli.main import main
from retrodict.errors import InputError
from retrodict.report.compare import compare
from retrodict.report.run import RunFolder, environment, plain, read, sample_rows
from retrodict.samplers.table import SAMPLERS


@pytest.fixture(scope="module")
def target():
    lm = rd.TabularLM.random(".ab<", seed=3)
    data = [rd.TextProblem("a", "<b", name="one", chat=False), rd.TextProblem("ab", "<a", name="two", chat=False)]
    return rd.posterior(lm, data, stop=".", max_tokens=4)


@pytest.fixture(scope="module")
def particles(target):
    return rd.smc(target, n=6, seed=0, runs=3)


ROOT = Path(__file__).resolve().parents[2]
INFILL = ["--target", "infill", "--before", "abc", "--after", "<de.", "--join", "", "--max-tokens", "5"]
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


# -- pieces ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name, more", [
    ("smc", {"n": 4, "runs": 3}), ("importance", {"n": 4, "runs": 11}), ("best_of_n", {"n": 3, "draws": 5}),
    ("ancestral", {"n": 70}), ("mh", {"n": 65, "steps": 4, "keep": 2}), ("exact", {}),
    ("rejection", {"n": 5, "runs": 2}), ("tempering", {"n": 65, "steps": 4, "keep": 2}),
    ("annealed", {"n": 4, "runs": 3, "rungs": 2}), ("pimh", {"n": 4, "runs": 3, "steps": 4, "keep": 2}),
])  # fmt: skip
def test_pieces_joined_are_one_answer(name, more):
    lm = rd.TabularLM.random(".ab", seed=2)
    data = [rd.TextProblem(x, name=x, chat=False) for x in ("a", "b", "ab")]
    target = rd.posterior(lm, data, stop=".", max_tokens=4)
    method = targets.method_of(name, SAMPLERS[name]).with_options(more)
    calls = pieces.pieces(method, target, seed=5, batch=2)
    steps: list[float] = []
    found = list(pieces.run(method, calls, lambda done, of: steps.append(done / of)))
    p = found[-1]
    assert p.m == 3 and p.names == ("a", "b", "ab") and steps[-1] == 1 and len(set(c.seed for c in calls)) == len(calls)
    assert p.objects.problem.tolist() == [q for q in range(3) for _ in range(p.k)]
    for key, total in more.items():
        assert p.trace.settings.get(key, total) == total
    if name != "exact":
        assert p.k == {"smc": 12, "importance": 44, "best_of_n": 5, "ancestral": 70, "mh": 130, "rejection": 10,
                       "tempering": 130, "annealed": 12, "pimh": 6}[name]  # fmt: skip
    assert [target.space.show(p.objects)[i] for i in range(p.m * p.k)] == list(p.shown)
    first = method.fn(target.on(target.problems[:2]), **calls[0].arguments, seed=calls[0].seed)
    if p.log_z is not None and first.log_z is not None:
        assert torch.equal(p.log_z[:2, : first.log_z.shape[1]], first.log_z)
    if p.trace.ess is not None:
        assert p.trace.ess.shape[1] == 9 and p.trace.ancestors is not None and p.trace.ancestors.shape[1:] == (9, 4)
    assert len(rd.diagnose(p).verdicts) == 3


def test_the_pieces_of_a_zero_run_do_not_blame_a_factor():
    lm = rd.TabularLM.random(".ab", seed=2)
    target = rd.continuation(lm, "a", stop=".", max_tokens=4)
    zero = target * rd.verifier(lambda texts, rows: [False] * len(texts), kind="bool")
    dead, live = rd.importance(zero, n=4, seed=0, runs=1), rd.importance(target, n=4, seed=0, runs=1)
    assert dead.trace.notes and not pieces.join_runs([dead, live]).trace.notes
    assert pieces.join_runs([dead, dead]).trace.notes == dead.trace.notes


# -- interrupts -----------------------------------------------------------------------------------------------------

SLOW = """
import signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job starts with it ignored
import retrodict as rd
import retrodict.models.load as door
from retrodict.cli.main import main

door.load = lambda name, **how: rd.TabularLM.random(".abcde <", seed=1)
def slow(texts, rows):
    time.sleep(0.15)
    return [0.5] * len(texts)
if __name__ == "__main__":
    sys.modules["slow"] = sys.modules["__main__"]
    sys.exit(main(sys.argv[1:]))
"""


def started(folder: Path, *words: str, **how) -> subprocess.Popen:
    (folder / "slow.py").write_text(SLOW)
    env = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, "slow.py", *words], cwd=folder, env=env, stderr=subprocess.PIPE, text=True,
                            **how)  # fmt: skip


@pytest.mark.parametrize("number, code", [(signal.SIGINT, 130), (signal.SIGTERM, 130)])
def test_an_interrupt_saves_what_is_finished(number, code, tmp_path):
    go = ["sample", *INFILL, "--n", "4", "--runs", "400", "--verifier", "slow:slow"]
    p = started(tmp_path, *go, stdout=subprocess.PIPE)
    kept = tmp_path / "runs/infill-001/particles/smc.safetensors"
    end = time.monotonic() + 200
    while not kept.exists() and time.monotonic() < end and p.poll() is None:
        time.sleep(0.05)
    p.send_signal(number)
    out, err = p.communicate(timeout=120)
    assert p.returncode == code, err
    assert err.startswith("retrodict: interrupted; what had finished (") and err.count("\n") == 1
    assert "runs/infill-001" in err
    folder = tmp_path / "runs/infill-001"
    particles = rd.Particles.load(kept)
    assert 0 < particles.k < 1600 and particles.k == len(lines(folder / "samples.jsonl"))
    assert json.loads((folder / "status.json").read_text())["status"] == "interrupted"
    assert "Interrupted. What had finished" in (folder / "report.html").read_text()
    assert not list(folder.rglob("*.part"))


def test_a_kill_during_a_save_counts_where_a_shell_has_ctrl_c_ignored():
    """As in a background job: SIGINT does nothing, and SIGTERM still ends the run, after the save."""
    from retrodict.cli.main import _terminable
    from retrodict.cli.run import _unbroken

    before, saved = signal.signal(signal.SIGINT, signal.SIG_IGN), False
    try:
        with _unbroken():
            os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(KeyboardInterrupt), _terminable(), _unbroken():
            os.kill(os.getpid(), signal.SIGTERM)
            saved = True
    finally:
        signal.signal(signal.SIGINT, before)
    assert saved


def test_a_closed_pipe_is_no_error(tmp_path):
    read, write = os.pipe()
    os.close(read)
    p = started(tmp_path, "sample", *INFILL, "--n", "8", "--runs", "2", stdout=write)
    os.close(write)
    _, err = p.communicate(timeout=60)
    assert p.returncode == 141 and err == ""
    assert (tmp_path / "runs/infill-001/report.html").exists()
