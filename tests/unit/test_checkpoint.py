"""A run that is stopped and resumed is the run that never stopped; a kill or a full disk leaves the last checkpoint."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from retrodict.errors import InputError
from retrodict.records import Rollouts, Scores
from retrodict.testing.trained import Table, fresh, training_targets
from retrodict.training.amortize import amortize
from retrodict.training.checkpoint import Keeper, state
from retrodict.training.loop import Run, begin, steps
from retrodict.training.settings import settings

PLAN: dict[str, Any] = {"objective": "subtb", "steps": 9, "samples": 8, "evaluate": 2, "replay": 0.25, "tempered": 0.25,
                        "epsilon": 0.1, "lr": 0.1, "priority": "recency", "capacity": 12}  # fmt: skip
WHERE = "tempered, force"  # its root may not stop, so that log Z is learned


class Pulled(BaseException):
    """The plug."""


def pull(step: int) -> Any:
    """A callback that ends a run after a step."""

    def at(metrics: dict[str, Any]) -> None:
        if metrics["step"] == step:
            raise Pulled

    return at


def lines(folder: Path) -> list[dict[str, Any]]:
    """Metrics without what a clock says."""
    read = [json.loads(x) for x in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in x.items() if not k.startswith("seconds")} for x in read]


def bits(folder: Path) -> dict[str, Any]:
    """Everything that a run's checkpoint holds; safetensors writes its metadata in any order."""
    told = json.loads((folder / "checkpoint.json").read_text())
    kept: dict[str, Any] = {"head": {k: v for k, v in told.items() if k != "seconds"}}
    for name in told["files"]:
        with safe_open(folder / name, "pt") as f:
            meta = {k: v for k, v in (f.metadata() or {}).items() if k != "digest"}
            tensors = {k: f.get_tensor(k) for k in f.keys()}  # noqa: SIM118
        bytes_of = {k: (v.dtype, v.shape, v.contiguous().view(torch.uint8).numpy().tobytes() if v.dim() else v.item())
                    for k, v in tensors.items()}  # fmt: skip
        kept[name.split("-")[0]] = (meta, bytes_of)
    return kept


def table(folder: Path, **more: Any) -> Table:
    target = training_targets()[WHERE]
    return amortize(target, fresh(target), folder=folder, save_every=3, **{**PLAN, **more})


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Tensor]:
    """A run that nobody stopped."""
    at = tmp_path_factory.mktemp("whole")
    return at, table(at).logits.detach()


@pytest.mark.parametrize("stop", [0, 3, 5])
def test_resume_equals_an_uninterrupted_run(stop: int, whole: tuple[Path, Tensor], tmp_path: Path) -> None:
    with pytest.raises(Pulled):
        table(tmp_path, on_metrics=pull(stop))
    assert json.loads((tmp_path / "checkpoint.json").read_text())["step"] == stop + 1
    logits = table(tmp_path, resume=True).logits
    assert torch.equal(logits, whole[1]) and lines(tmp_path) == lines(whole[0]) and bits(tmp_path) == bits(whole[0])
    seconds = [json.loads(x)["seconds"] for x in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert seconds == sorted(seconds)  # they go on too


@pytest.mark.parametrize("forget", ["adam", "log_z", "replay", "random"])
def test_each_part_of_a_checkpoint_matters(forget: str, whole: tuple[Path, Tensor], tmp_path: Path,
                                           monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    """Planted: a resume that leaves one part out does not end at the same bits."""
    with pytest.raises(Pulled):
        table(tmp_path, on_metrics=pull(4))
    honest = Keeper.resume

    def forgets(self: Keeper, run: Run) -> None:
        empty = run.replay
        honest(self, run)
        if forget == "adam":
            run.adam.state.clear()
        elif forget == "replay":
            run.replay = empty
        elif forget == "log_z" and run.log_z is not None:
            run.log_z.data.zero_()
        elif forget == "random":
            run.settings = settings(**{**PLAN, "seed": 1})

    monkeypatch.setattr(Keeper, "resume", forgets)
    assert not torch.equal(table(tmp_path, resume=True).logits, whole[1])


def test_a_step_cut_in_half_is_not_kept(whole: tuple[Path, Tensor], tmp_path: Path) -> None:
    """Ctrl-C between Adam's step and the count of steps: the checkpoint before stays."""

    class Cut(Table):
        def refresh(self) -> None:
            super().refresh()
            if self.updates == 5:
                raise Pulled

    target = training_targets()[WHERE]
    with pytest.raises(Pulled):
        amortize(target, fresh(target, Cut), folder=tmp_path, save_every=3, **PLAN)
    assert json.loads((tmp_path / "checkpoint.json").read_text())["step"] == 3
    told = json.loads((tmp_path / "checkpoint.json").read_text())
    told["policy"]["kind"] = "Table"
    (tmp_path / "checkpoint.json").write_text(json.dumps(told))
    assert torch.equal(table(tmp_path, resume=True).logits, whole[1]) and lines(tmp_path) == lines(whole[0])


def test_failures_in_a_row_are_counted_across_a_resume(tmp_path: Path) -> None:
    class Nan(Table):
        def score(self, rollouts: Rollouts, raw: bool = False, grad: bool = False) -> Scores:
            s = super().score(rollouts, raw, grad)
            return Scores(s.log_q, s.log_stop * torch.nan)

    target = training_targets()[WHERE]
    with pytest.raises(Pulled):
        amortize(target, fresh(target, Nan), folder=tmp_path, on_metrics=pull(1), **PLAN)
    assert json.loads((tmp_path / "checkpoint.json").read_text())["failures"] == 2


# -- what a kill and a full disk leave --------------------------------------------------------------------------------

KILLED = """
import os, random, signal, sys, time
from pathlib import Path
sys.path.insert(0, {here!r})
from test_checkpoint import PLAN, WHERE, fresh, training_targets
from retrodict.training.amortize import amortize

target = training_targets()[WHERE]
plan = {{**PLAN, "steps": 40}}
amortize(target, fresh(target), **{{**PLAN, "steps": 1}})  # everything is imported
began = time.monotonic()
amortize(target, fresh(target), folder={whole!r}, save_every=1, **plan)
length, draw, kills = time.monotonic() - began, random.Random(0), 0
for i in range(30):
    child = os.fork()
    if not child:
        amortize(target, fresh(target), folder={folder!r}, save_every=1, resume=True, **plan)
        os._exit(0)
    deadline = time.monotonic() + (draw.uniform(0.02, 0.3) * length if i < 6 else 100)
    while time.monotonic() < deadline:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            break
        time.sleep(0.002)
    else:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        kills += 1
        continue
    assert status == 0, status
    break
print("kills", kills)
"""


def test_kill_9_at_random_moments(tmp_path: Path) -> None:
    names = {"here": str(Path(__file__).parent), "whole": str(tmp_path / "whole"), "folder": str(tmp_path / "killed")}
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", KILLED.format(**names)], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout.split()[-1]) >= 2, "nothing was killed"
    assert bits(tmp_path / "killed") == bits(tmp_path / "whole")
    assert lines(tmp_path / "killed") == lines(tmp_path / "whole")
    assert not list((tmp_path / "killed").glob(".*.part"))


def started(at: Path, done: int = 4) -> tuple[Run, Keeper]:
    """A run with a checkpoint after ``done`` steps."""
    target = training_targets()[WHERE]
    run, keeper = begin(target, fresh(target), settings(**PLAN)), Keeper(at)
    going = steps(run)
    for _ in range(done):
        keeper.step(run, next(going))
    keeper.save(run)
    next(going)
    return run, keeper


@pytest.mark.parametrize("call", ["replace", "fsync"])
@pytest.mark.parametrize("at", [0, 1, 2])
def test_a_full_disk_leaves_the_last_good_checkpoint(call: str, at: int, tmp_path: Path,
                                                     monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    """The state, the replay buffer and checkpoint.json are written in turn; any of them may find no room."""
    run, keeper = started(tmp_path)
    before, honest, calls = bits(tmp_path), getattr(os, call), []

    def full(*args: Any) -> Any:
        calls.append(args)
        if len(calls) == at + 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        return honest(*args)

    monkeypatch.setattr(os, call, full)
    with pytest.raises(InputError, match="No space left on device") as error:
        keeper.save(run)
    assert "\n" not in str(error.value) and len(calls) == at + 1
    monkeypatch.undo()
    assert bits(tmp_path) == before
    again, _ = begin(run.target, fresh(run.target), settings(**PLAN)), keeper.save(run)
    keeper.resume(again)
    assert again.step == run.step == 5 and torch.equal(
        again.policy.parameters()["logits"], run.policy.parameters()["logits"]
    )


def test_a_run_on_a_full_disk_ends_with_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(fd: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(InputError, match="cannot write .*state-3.safetensors .No space left on device") as error:
        table(tmp_path)
    assert "\n" not in str(error.value)


# -- what is refused --------------------------------------------------------------------------------------------------


def one_line(says: str, run: Run, keeper: Keeper) -> str:
    with pytest.raises(InputError, match=says) as error:
        keeper.resume(run)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_folder_that_holds_a_run_is_not_begun_anew(whole: tuple[Path, Tensor], tmp_path: Path) -> None:
    before = bits(whole[0]), lines(whole[0])
    with pytest.raises(InputError, match="holds a run already .checkpoint.json.; say resume=True"):
        table(whole[0])
    assert (bits(whole[0]), lines(whole[0])) == before
    (tmp_path / "metrics.jsonl").write_text('{"step": 0}\n')  # killed before its first checkpoint
    with pytest.raises(InputError, match="holds a run already .metrics.jsonl."):
        table(tmp_path)
    assert torch.equal(table(tmp_path, resume=True).logits, whole[1]) and lines(tmp_path) == before[1]


def test_resuming_a_finished_run_does_nothing(whole: tuple[Path, Tensor]) -> None:
    before = bits(whole[0]), lines(whole[0])
    assert torch.equal(table(whole[0], resume=True).logits, whole[1])
    assert (bits(whole[0]), lines(whole[0])) == before


def test_another_run_is_refused_with_both_names(tmp_path: Path) -> None:
    run, keeper = started(tmp_path)
    other = training_targets()["infill, force"]
    said = one_line("another target", begin(other, fresh(other), settings(**PLAN)), keeper)
    assert run.target.version in said and other.version in said
    changed = settings(**{**PLAN, "samples": 12})
    assert "samples = 8, not 12" in one_line("made with samples", begin(run.target, fresh(run.target), changed), keeper)
    mixed = settings(**{**PLAN, "replay": 0.5})
    one_line("made with mixture", begin(run.target, fresh(run.target), mixed), keeper)
    wide = begin(run.target, Table(run.target.space, run.target.problems, 7), settings(**PLAN))
    one_line("trained logits of shape .*; give the same rank and targets", wide, keeper)


def test_another_model_is_refused_with_both_names(tmp_path: Path) -> None:
    run, keeper = started(tmp_path)
    told = json.loads((tmp_path / "checkpoint.json").read_text())
    (tmp_path / "checkpoint.json").write_text(json.dumps(told | {"model": "abc"}))
    assert "'abc'" in one_line("another model", begin(run.target, fresh(run.target), settings(**PLAN)), keeper)


@pytest.mark.parametrize("part", ["checkpoint.json", "state", "replay"])
@pytest.mark.parametrize("left", [0, 30, -7])
def test_a_cut_file_is_one_clear_line(part: str, left: int, tmp_path: Path) -> None:
    run, keeper = started(tmp_path)
    path = next(x for x in tmp_path.iterdir() if x.name.startswith(part))
    path.write_bytes(path.read_bytes()[:left])
    new = begin(run.target, fresh(run.target), settings(**PLAN))
    before = {k: v.clone() for k, v in state(new).items()}
    one_line(path.name if part == "replay" else "damaged", new, keeper)
    if part != "replay":
        same = {k: torch.allclose(v, before[k], rtol=0, atol=0, equal_nan=True) for k, v in state(new).items()}
        assert new.step == 0 and all(same.values())  # log Z is NaN until its problem is met


def test_missing_state_is_one_clear_line(tmp_path: Path) -> None:
    run, keeper = started(tmp_path)
    next(tmp_path.glob("state-*")).unlink()
    one_line("damaged", begin(run.target, fresh(run.target), settings(**PLAN)), keeper)


def test_adam_and_log_z_come_back(tmp_path: Path) -> None:
    run, keeper = started(tmp_path)
    keeper.save(run)
    new = begin(run.target, fresh(run.target), settings(**PLAN))
    keeper.resume(new)
    theirs, mine = state(run), state(new)
    assert {"adam.logits.exp_avg", "adam.logits.step", "adam.log_z.exp_avg_sq", "parameter.log_z"} <= set(mine)
    assert set(theirs) == set(mine) and all(torch.equal(v, mine[k]) for k, v in theirs.items())
    assert float(mine["parameter.log_z"].detach().abs().sum()) > 0 and float(mine["adam.logits.step"]) == 5
    assert new.replay.sizes() == run.replay.sizes() and not list(tmp_path.glob("state-4*"))


# -- a language model -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_lora_adapter_resumes_to_the_bit(dtype: torch.dtype, tmp_path: Path) -> None:
    pytest.importorskip("peft")
    from tiny_llama import tiny_llama

    from retrodict.targets.ready import infill

    plan: dict[str, Any] = {"steps": 4, "samples": 4, "rank": 2, "evaluate": 2, "replay": 0.25, "lr": 0.05,
                            "sees": "xy", "save_every": 1}  # fmt: skip

    def run(folder: Path, **more: Any) -> Any:
        torch.set_num_threads(1)
        target = infill(tiny_llama(dtype), "ab", "c", stop=".", max_tokens=3)
        return amortize(target, folder=folder, **{**plan, **more})

    whole = run(tmp_path / "whole")
    with pytest.raises(Pulled):
        run(tmp_path / "cut", on_metrics=pull(1))
    resumed = run(tmp_path / "cut", resume=True)
    assert bits(tmp_path / "cut") == bits(tmp_path / "whole") and lines(tmp_path / "cut") == lines(tmp_path / "whole")
    before = run(tmp_path / "other", steps=1, lr=1e-9).parameters()
    for k, p in whole.parameters().items():
        assert torch.equal(p, resumed.parameters()[k])
        if ".lora_B." in k:
            assert not torch.allclose(p, before[k], atol=1e-3), f"{k} did not train"
    for wrong, says in (({"rank": 3}, "trained .* of shape"), ({"sees": "x"}, "made with sees = 'xy', not 'x'")):
        with pytest.raises(InputError, match=says):
            run(tmp_path / "cut", resume=True, **wrong)
