"""Which processes a launcher started: accelerate on this machine without a GPU, and what mpirun says."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import sys, torch
from pathlib import Path
from retrodict.training.distributed import world
here = world()
x = torch.tensor([here.rank + 1.0], requires_grad=True)
x.grad = x.detach().clone()
here.sum_gradients([x])
Path(sys.argv[1], f"{here.rank}").write_text(f"{here.size} {x.grad.item():g}")
"""
ROOT = Path(__file__).parents[2]
ENV = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
ACCELERATE = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "2", "--num_machines", "1",
              "--mixed_precision", "no", "--dynamo_backend", "no"]  # fmt: skip


def free_port() -> str:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return str(s.getsockname()[1])


@pytest.fixture
def script(tmp_path: Path) -> Path:
    path = tmp_path / "script.py"
    path.write_text(SCRIPT)
    (tmp_path / "out").mkdir()
    return path


def said(script: Path) -> dict[str, str]:
    return {x.name: x.read_text() for x in (script.parent / "out").iterdir()}


@pytest.mark.parametrize("how", [["--multi_gpu"], ["--config_file", "recipes/accelerate/fsdp2.yaml"]])
def test_accelerate_starts_two(script: Path, how: list[str]) -> None:
    pytest.importorskip("accelerate")
    command = [*ACCELERATE, *how, "--main_process_port", free_port(), str(script), str(script.parent / "out")]
    subprocess.run(command, env=ENV, cwd=ROOT, check=True, capture_output=True, timeout=120)
    assert said(script) == {"0": "2 3", "1": "2 3"}


def test_accelerate_on_a_cpu_starts_one_and_that_is_said(script: Path) -> None:
    pytest.importorskip("accelerate")
    command = [*ACCELERATE, "--cpu", str(script), str(script.parent / "out")]
    done = subprocess.run(command, env=ENV, check=True, capture_output=True, text=True, timeout=120)
    assert said(script) == {"0": "1 1"} and "starts one process" in done.stderr


def test_processes_of_mpirun_are_joined(script: Path) -> None:
    """What accelerate --mpirun_hostfile leaves in the environment of each process."""
    meet = ENV | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "OMPI_COMM_WORLD_SIZE": "2"}
    command = [sys.executable, str(script), str(script.parent / "out")]
    started = [subprocess.Popen(command, env=meet | {"OMPI_COMM_WORLD_RANK": str(i)}) for i in range(2)]
    assert [p.wait(120) for p in started] == [0, 0]
    assert said(script) == {"0": "2 3", "1": "2 3"}


def test_a_cluster_s_variables_alone_start_nothing(script: Path) -> None:
    alone = {k: v for k, v in ENV.items() if k != "MASTER_ADDR"} | {"PMI_SIZE": "4", "PMI_RANK": "2"}
    subprocess.run([sys.executable, str(script), str(script.parent / "out")], env=alone, check=True, timeout=120)
    assert said(script) == {"0": "1 1"}


RECIPE = """model: random:tiny
target: infill
before: ab
after: cd
stop: '.'
max_tokens: 3
objective: vargrad
steps: 2
samples: 4
shards: 2
evaluate: 4
rank: 2
lora_targets: [q_proj]
"""


def test_train_on_two_processes_makes_one_run_folder_and_the_run_of_one(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_text(RECIPE, encoding="utf-8")
    two = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", free_port(), "-m"]
    for how in (two, [sys.executable, "-m"]):
        done = subprocess.run([*how, "retrodict", "train", "recipe.yaml"], env=ENV, cwd=tmp_path, check=True,
                              capture_output=True, text=True, timeout=240)  # fmt: skip
        assert done.stdout.count("report ") == 1
    folders = sorted((tmp_path / "runs").iterdir())
    assert [x.name for x in folders] == ["recipe-001", "recipe-002"]
    assert all(json.loads((x / "status.json").read_bytes())["status"] == "complete" for x in folders)
    curves = [[json.loads(line)["loss"] for line in (x / "training/vargrad/metrics.jsonl").read_text().splitlines()]
              for x in folders]  # fmt: skip
    assert len(curves[0]) == 2 and curves[0] == pytest.approx(curves[1], rel=1e-4)
