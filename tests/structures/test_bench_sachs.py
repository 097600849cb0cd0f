"""``retrodict bench sachs`` on stand-ins for its files: rows, bars, and the calibration split."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest

from retrodict.bench import sachs
from retrodict.errors import InputError
from retrodict.testing.waves import waves

BIF = """variable Smoker { type discrete [ 2 ] { yes, no }; }
variable Cancer { type discrete [ 2 ] { yes, no }; }
probability ( Smoker ) { table 0.5, 0.5; }
probability ( Cancer | Smoker ) { (yes) 0.9, 0.1; (no) 0.2, 0.8; }
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "cancer.bif.gz").write_bytes(gzip.compress(BIF.encode()))
    rows = "\n".join(",".join(str(2 + abs(x)) for x in r) for r in waves(3).values.tolist())
    (tmp_path / "cyto_full_data.csv").write_text(f"praf,pmek,plcg\n{rows}\n", encoding="utf-8")
    (tmp_path / "cyto_full_target.csv").write_text("Cause,Effect\npraf,pmek\n", encoding="utf-8")
    monkeypatch.setattr(sachs, "SIZES", (20,))
    return tmp_path


def test_methods_are_held_to_the_exact_sum(folder: Path) -> None:
    rows = sachs.run(data=str(folder), sets="cancer,sachs", model="", steps=200, chains=128, seeds=2)
    gated = {(r.name, r.method, r.metric) for r in rows if r.bar is not None}
    assert gated == {("N=20", "order, data", f"sachs: {m}") for m in sachs.BARS}
    assert all(r.holds is not False for r in rows)
    shown = {r.metric: r.value for r in rows if r.name == "N=20" and r.method == "data"}
    assert shown["cancer: e_shd"] < 1 and 0 < shown["cancer: edges"] < 2 and shown["cancer: brier"] < 0.5
    other = [r for r in rows if r.name == "N=20" and r.metric == "cancer: mean difference"]
    assert {r.method for r in other} == {"order, data", "structure, data"} and all(r.value < 0.2 for r in other)


def test_input(folder: Path) -> None:
    with pytest.raises(InputError, match="--data needs the folder"):
        sachs.run()
    with pytest.raises(InputError, match="unknown data set 'saxs'"):
        sachs.run(data=str(folder), sets="saxs")
