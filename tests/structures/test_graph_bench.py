"""The parts of ``retrodict bench graphs``: laws of samples, chains for a time, what it says of a peer that fails."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

from retrodict.bench import graphs
from retrodict.errors import InputError
from retrodict.spaces.dags import Dags
from retrodict.structures.exact import enumerated
from retrodict.structures.law import posterior_law, total_variation
from retrodict.structures.mcmc_structure import structure_mcmc
from retrodict.structures.scores import bge
from retrodict.structures.target import graph_target
from retrodict.testing.waves import waves


def test_an_answer_as_a_law() -> None:
    """Two ways to the exact posterior agree graph by graph, and a short chain is near it but not there."""
    score = bge(waves(3))
    truth = posterior_law(graph_target(Dags(3), {"data": score}))
    assert total_variation(graphs.law_of(enumerated(score), truth), truth) < 1e-12
    law = graphs.law_of(structure_mcmc(score, chains=64, steps=100, burn_in=20, seed=0), truth)
    assert float(law.log_p.exp().sum()) == pytest.approx(1)
    assert 0.005 < total_variation(law, truth) < 0.4


def test_rows_hold_the_worst_seed() -> None:
    found = [(0.01, 3.0, 9.0, 0.001), (0.03, 4.0, 8.0, 0.002)]
    rows = {r.metric: r for r in graphs._method("d = 4", "db", found, 0.02, 20.0, "")}
    assert rows["total variation"].value == pytest.approx(0.02) and rows["total variation"].holds is None
    assert rows["worst total variation"].value == 0.03 and rows["worst total variation"].holds is False
    assert rows["processor seconds"].value == 4.0 and rows["processor seconds"].holds is True


def test_the_peer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "MOVES", 2)
    (alone, missing) = graphs.speed("", "")
    assert alone.value > 0 and missing.method == graphs.PEER and missing.value != missing.value
    script = tmp_path / "peer.py"
    script.write_text(f"print({json.dumps(json.dumps({'steps': 100, 'cpu_seconds': 2.0}))})")
    assert graphs.ask_peer(sys.executable, str(script)) == 50.0
    script.write_text("raise SystemExit('no module gfn')")
    with pytest.raises(InputError, match="no module gfn.*benchmarks/peers"):
        graphs.ask_peer(sys.executable, str(script))
    assert torch.get_num_threads() >= 1
