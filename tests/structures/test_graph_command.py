"""``retrodict graph``: what it prints and keeps, the page made again, and what it refuses."""

from __future__ import annotations

import json
import string
from pathlib import Path

import pytest

from retrodict.cli import graph
from retrodict.cli.main import main
from retrodict.models.tiny import TinyLM
from retrodict.spaces.dags import all_dags
from retrodict.structures.data import Table
from retrodict.structures.methods import amortized, graph_posterior
from retrodict.structures.posterior import difference
from retrodict.structures.scores import bge
from retrodict.testing.waves import WAVES, waves


@pytest.fixture
def table(tmp_path: Path) -> Path:
    rows = "\n".join(",".join(map(str, r)) for r in waves(4).values.tolist())
    path = tmp_path / "waves.csv"
    path.write_text(f"a,b,c,d\n{rows}\n", encoding="utf-8")
    return path


def said(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str, str]:
    code = main(["graph", *map(str, words)])
    told = capsys.readouterr()
    return code, told.out, told.err


def test_data_alone_gives_the_exact_answer_and_a_page(table: Path, tmp_path: Path, capsys) -> None:
    truth = tmp_path / "truth.csv"
    truth.write_text("cause,effect\na,b\nb,c\n", encoding="utf-8")
    code, out, err = said(capsys, table, "--no-standardise", "--truth", truth, "--out", tmp_path / "runs")
    assert (code, err) == (0, "") and "method exact" in out and "against the true graph: E-SHD" in out
    folder = tmp_path / "runs" / "graph-001"
    answer = json.loads((folder / "answer.json").read_text())
    assert answer["log_z"] == pytest.approx(WAVES[4][0], abs=1e-6) and answer["rows"] == 20
    assert sum(map(sum, answer["marginals"])) == pytest.approx(WAVES[4][2], abs=1e-6)
    assert answer["top"][0]["weight"] == pytest.approx(WAVES[4][1], abs=1e-6) and len(answer["drawn"]) == 6
    assert "most telling experiment: set" in out and len(answer["gain"]) == 4
    assert answer["metrics"]["edges"] == pytest.approx(WAVES[4][2], abs=1e-6)
    page = (folder / "report.html").read_text()
    assert page.count("<svg") >= 8 and "http" not in page.replace("http-equiv", "") and "<script" not in page
    (folder / "report.html").unlink()
    assert main(["report", str(folder)]) == 0 and (folder / "report.html").read_text() == page


@pytest.mark.parametrize("method", ["subsets", "order", "structure"])
def test_methods_and_constraints_by_flags(table: Path, tmp_path: Path, capsys, method: str) -> None:
    code, out, _ = said(capsys, table, "--method", method, "--required", "a -> c", "--forbidden", "b -> c, d->a",
                        "--chains", 4, "--steps", 60, "--prior", "fair", "--out", tmp_path)  # fmt: skip
    answer = json.loads((tmp_path / "graph-001" / "answer.json").read_text())
    assert code == 0 and f"method {method}" in out
    assert answer["marginals"][0][2] == pytest.approx(1) and answer["marginals"][1][2] == 0 == answer["marginals"][3][0]
    assert (not answer["top"]) == (method == "subsets")


def test_a_language_model_is_a_prior_and_can_speak_alone(tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.setattr(graph, "load", lambda name, **_: TinyLM(alphabet=string.printable))
    two = Table(waves(2).values, ("a", "b"))
    rows = "\n".join(",".join(map(str, r)) for r in two.values.tolist())
    table, book = tmp_path / "two.csv", tmp_path / "names.yaml"
    table.write_text(f"a,b\n{rows}\n", encoding="utf-8")
    book.write_text("variables:\n  a: the rain\n  b:\n", encoding="utf-8")
    both = said(capsys, table, "--variables", book, "--lm", "tiny", "--alpha", "0.3", "--out", tmp_path)
    assert both[0] == 0 and "the model" in both[1] and "answered 40 questions" in both[1]
    answer = json.loads((tmp_path / "graph-001" / "answer.json").read_text())
    p = answer["lm"]["probabilities"]
    assert answer["lm"]["alpha"] == 0.3 and p[0][1] > 0 and p[0][0] == 0
    data = graph_posterior(bge(two.standardised())).marginals
    odds = [data[i, 1 - i] / (1 - data.sum()) * (p[i][1 - i] / (1 - p[i][1 - i])) ** 0.3 for i in (0, 1)]
    want = odds[0] / (1 + odds[0] + odds[1])
    assert answer["marginals"][0][1] == pytest.approx(float(want), abs=1e-6)
    alone = said(capsys, "--variables", book, "--lm", "tiny", "--context", "About gardens.", "--out", tmp_path)
    answer = json.loads((tmp_path / "graph-002" / "answer.json").read_text())
    assert alone[0] == 0 and answer["rows"] is None and answer["names"] == ["a", "b"]
    assert answer["factors"].keys() == {"prior", "lm"} and "no data" in (tmp_path / "graph-002/report.html").read_text()


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ([], "give a CSV file; or --variables and --lm"),
        (["{t}", "--alpha", "0.5"], "--alpha is the exponent of a language model's prior"),
        (["{t}", "--method", "ordr"], "did you mean 'order'"),
        (["{t}", "--score", "bgee"], "did you mean 'bge'"),
        (["{t}", "--score", "bdeu"], "bdeu cannot score continuous values; use bge or bic"),
        (["{t}", "--ess", "3"], "--ess is the prior of bdeu; the score is bge"),
        (["{t}", "--prior", "fare"], "did you mean 'fair'"),
        (["{t}", "--required", "a -> b, b -> a"], "the required edges a -> b, b -> a lie on a cycle"),
        (["{t}", "--required", "a -> b", "--forbidden", "a -> b"], "a -> b is both required and forbidden"),
        (["{t}", "--required", "a -> b, c -> b", "--max-parents", "1"], "2 parents are required"),
        (["{t}", "--required", "a, b"], "write edges as 'a -> b, c -> d'"),
        (["{t}", "--forbidden", "a -> bb"], "'bb', which is no variable"),
        (["{t}", "--variables", "{b}"], "column 'b' is not in the codebook (--variables); choose one of a, bee, c, d"),
        (["{t}", "--variables", "{n}"], "cannot read"),
        (["{t}", "--truth", "{t}"], "row 1 names"),
        (["{w}", "--method", "exact"], "use the method subsets (up to 12), order (up to 14), structure or amortized"),
        (["{w}", "--method", "exact", "--lm", "no-such-model"], "6 variables are too many for the method exact"),
        (["{t}", "--steps", "-5", "--method", "order"], "must be 1 or more"),
        (["{t}", "--lmm", "x"], "unknown flag --lmm; did you mean --lm?"),
    ],
)
def test_bad_input_is_one_clear_line(table: Path, tmp_path: Path, capsys, words: list[str], told: str) -> None:
    book, wide = tmp_path / "names.yaml", tmp_path / "wide.csv"
    book.write_text("a: x\nbee: y\nc: z\nd: w\n", encoding="utf-8")
    rows = "\n".join(",".join(map(str, r)) for r in waves(6).values.tolist())
    wide.write_text(f"a,b,c,d,e,f\n{rows}\n", encoding="utf-8")
    files = {"t": table, "b": book, "w": wide, "n": tmp_path / "none.yaml"}
    code, out, err = said(capsys, *(w.format(**files) for w in words), "--out", tmp_path / "runs")
    assert code == 2 and told in err and err.count("\n") == 1 and not out
    assert not (tmp_path / "runs").exists()


def test_an_amortized_policy_gives_the_same_answer() -> None:
    score = bge(waves(3))
    found = amortized(score, steps=2)
    assert difference(graph_posterior(score), found)[1] < 0.05
    assert found.runs is not None and len(found.runs) == 16 and found.graphs is not None
    assert len(found.graphs) <= len(all_dags(3))
