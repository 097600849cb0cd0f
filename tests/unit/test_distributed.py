"""Data parallel training on gloo: the same gradients, loss curve and parameters on one process and on two."""

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
from retrodict.records import cat_rollouts
from retrodict.rng import generator
from retrodict.testing.trained import fresh, training_targets
from retrodict.training.collect import Mixture, collect
from retrodict.training.distributed import World, joined, pack, unpack

pytest.importorskip("peft")
HERE = Path(__file__).parent
SCRIPT = str(HERE / "two_processes.py")


def launch(folder: Path, *launcher: str) -> str:
    """Run the script; gives what it said."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "GLOO_SOCKET_IFNAME": "lo"}
    done = subprocess.run([sys.executable, *launcher, SCRIPT, str(folder)], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, str]:
    """Folders of one process and of two, and what the two said."""
    one, two = tmp_path_factory.mktemp("one"), tmp_path_factory.mktemp("two")
    launch(one)
    said = launch(two, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    return one, two, said


def told(folder: Path, rank: int = 0) -> dict[str, Any]:
    return json.loads((folder / f"told-{rank}.json").read_text())


def test_gradients_on_fixed_rollouts(runs: tuple[Path, Path, str]) -> None:
    one = load_file(runs[0] / "gradients-0.safetensors")
    assert told(runs[1])["size"] == 2 and len(one) > 10
    assert max(float(v.abs().max()) for v in one.values()) > 1e-2
    for rank in (0, 1):
        two = load_file(runs[1] / f"gradients-{rank}.safetensors")
        assert set(one) == set(two)
        for k, v in one.items():
            assert torch.allclose(v, two[k], atol=1e-5, rtol=1e-5), k
            whole = one[k.rsplit(".", 1)[0] + ".None"]
            assert torch.allclose(v, whole, atol=1e-5, rtol=1e-5), k


def test_the_same_loss_curve_and_parameters(runs: tuple[Path, Path, str]) -> None:
    one, two = told(runs[0])["metrics"], told(runs[1])["metrics"]
    assert len(one) == len(two) == 6 and one[0]["var_a"] != one[5]["var_a"]
    for a, b in zip(one, two, strict=True):
        assert set(a) == set(b)
        for k in set(a) - {"objective", "lengths"}:
            assert k.startswith("seconds") or a[k] == pytest.approx(b[k], abs=1e-9), (a["step"], k)
        assert a["lengths"] == b["lengths"]
    trained = load_file(runs[0] / "trained-0.safetensors")
    for rank in (0, 1):
        other = load_file(runs[1] / f"trained-{rank}.safetensors")
        for k, v in trained.items():
            assert v.dtype == torch.float64, "the comparison is in float64"
            assert torch.allclose(v, other[k], atol=1e-9, rtol=0), k


def test_only_the_first_process_writes(runs: tuple[Path, Path, str]) -> None:
    lines = [json.loads(x) for x in (runs[1] / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [x["step"] for x in lines] == list(range(6)) and told(runs[1], 1)["metrics"] == []
    assert told(runs[1])["about"]["evaluation"]["n"] == 4 and told(runs[1], 1)["about"]["evaluation"] == {}
    names = [sorted(x.name for x in (folder / "run").iterdir()) for folder in runs[:2]]
    assert names[0] == names[1] and json.loads((runs[1] / "run" / "checkpoint.json").read_text())["step"] == 6
    assert told(runs[1])["again"] and told(runs[1], 1)["again"]  # both went on from the folder


def test_what_fails_on_one_fails_on_all(runs: tuple[Path, Path, str]) -> None:
    first, second = told(runs[1]), told(runs[1], 1)
    assert first["why"] == second["why"] == told(runs[0])["why"]
    assert "log q is NaN" in first["why"] and (first["times"], second["times"]) == (3, 0)


def test_nobody_complains_at_the_end(runs: tuple[Path, Path, str]) -> None:
    assert not [x for x in runs[2].splitlines() if "destroy_process_group" in x or "Traceback" in x or "leaked" in x], (
        runs[2]
    )


def test_shards_are_shared_out() -> None:
    assert [list(World(r, 2).mine(4)) for r in (0, 1)] == [[0, 1], [2, 3]]
    assert [World(r, 2).rows(5, torch.device("cpu")).tolist() for r in (0, 1)] == [[0, 1, 2], [3, 4]]
    with pytest.raises(InputError, match="3 shards cannot be shared by 2 processes; set shards to a multiple"):
        World(0, 2).mine(3)


def test_batches_travel_whole() -> None:
    """Shards of different widths, with replayed rows, packed and joined, are the rows they were."""
    target = training_targets()["infill, own_stop"]
    made = [collect(target, fresh(target), [0], n, generator(n), Mixture(tempered=0.5), None, True) for n in (2, 6)]
    back = [unpack(pack(b), b, torch.device("cpu")) for b in made]
    whole, rows = joined(back), cat_rollouts([b.rollouts for b in made])
    assert whole.own.tolist() == [0, 2, 3, 4] and whole.scored == sum(b.scored for b in made)
    for name in ("problem", "moves", "kind", "n", "stop", "can_stop", "log_q", "log_stop", "log_b", "log_pb"):
        x, y = getattr(whole.rollouts, name), getattr(rows, name)
        assert x.dtype == y.dtype and torch.equal(x, y), name
    assert set(whole.rollouts.terms) == set(rows.terms) and whole.rollouts.versions == rows.versions
    assert all(torch.equal(v, rows.terms[k]) for k, v in whole.rollouts.terms.items())
