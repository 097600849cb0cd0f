"""Weights shared by two processes (FSDP2 on gloo): the run of one process that holds them all."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from retrodict.errors import InputError
from retrodict.training.distributed import World, shard

pytest.importorskip("peft")
HERE = Path(__file__).parent


def launch(folder: Path, *launcher: str) -> Path:
    env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "GLOO_SOCKET_IFNAME": "lo"}
    command = [sys.executable, *launcher, str(HERE / "sharded.py"), str(folder)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


def told(folder: Path, rank: int = 0) -> dict[str, Any]:
    return json.loads((folder / f"{rank}.json").read_text())


def test_two_processes_that_share_the_weights_train_as_one_does(tmp_path: Path) -> None:
    (tmp_path / "1").mkdir()
    (tmp_path / "2").mkdir()
    one = launch(tmp_path / "1")
    two = launch(tmp_path / "2", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    assert [told(one)["share"], told(two)["share"], told(two, 1)["share"]] == [1.0, 0.5, 0.5]
    curve = told(one)["metrics"]
    assert len(curve) == 3 and curve[0]["loss"] != curve[2]["loss"] and told(two, 1)["metrics"] == []
    for a, b in zip(curve, told(two)["metrics"], strict=True):
        assert a["lengths"] == b["lengths"] and a["loss"] == pytest.approx(b["loss"], rel=1e-3, abs=1e-6)
        assert a["elbo"] == pytest.approx(b["elbo"], abs=1e-4)
    want = load_file(one / "0.safetensors")
    for rank in (0, 1):
        got = load_file(two / f"{rank}.safetensors")
        assert all(torch.allclose(v, got[k], atol=1e-3) for k, v in want.items())
    assert told(two)["about"]["evaluation"] == told(two, 1)["about"]["evaluation"] != {}
    assert set(load_file(one / "adapter" / "adapter_model.safetensors")) == set(
        load_file(two / "adapter" / "adapter_model.safetensors")
    )
    assert told(one)["refused"] == "" and "give micro" in told(two)["refused"]


def test_processes_that_share_weights_run_every_row() -> None:
    both = [World(r, 2, together=True) for r in (0, 1)]
    assert [list(w.mine(3)) for w in both] == [[0, 1, 2]] * 2
    assert [w.rows(5, torch.device("cpu")).tolist() for w in both] == [[0, 1, 2, 3, 4]] * 2
    assert [w.first for w in both] == [True, False] and all(w.draws for w in both)


def test_one_process_has_nothing_to_share() -> None:
    with pytest.raises(InputError, match="start several with torchrun"):
        shard(object())
