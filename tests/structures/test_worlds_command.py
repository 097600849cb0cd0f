"""``retrodict worlds``: its file, what it prints and keeps, texts that poison, and what it refuses."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from retrodict.cli.main import main
from retrodict.models import load
from retrodict.models.tiny import TinyLM

ZEUS = Path(__file__).parents[2] / "docs" / "structures" / "zeus.yaml"
ASKED = """
name: weather
relations:
  hotter:
    says: "{a} is hotter than {b}"
    rules: [antisymmetric, transitive]
    among: [ice, tea, fire]
beliefs:
  - {says: it rains, p: 0.2, truth: true}
  - {says: it is dry}
constraints:
  - negation: [it rains, it is dry]
contexts:
  - {name: almanac, says: The moon is far., harmless: true}
  - {name: hoax, says: "ice is hotter than fire. ice is hotter than fire."}
"""


def said(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str, str]:
    code = main(["worlds", *map(str, words)])
    told = capsys.readouterr()
    return code, told.out, told.err


def test_the_circle_from_a_file(tmp_path: Path, capsys) -> None:
    code, out, err = said(capsys, ZEUS, "--out", tmp_path)
    assert (code, err) == (0, "") and "inconsistency mass 0.777871 (exact)" in out and "0.7779  acyclic(made)" in out
    folder = tmp_path / "worlds-001"
    answer = json.loads((folder / "answer.json").read_text())
    assert abs(math.exp(answer["log_z"]) - 0.222129) < 1e-6 and answer["calibration"]["known"] == 3
    assert [round(s["after"], 6) for s in answer["statements"]] == [0.627203] * 3 + [0.037276] * 3
    assert [round(w["p"], 6) for w in answer["worlds"]] == [0.265832] * 3
    page = (folder / "report.html").read_text()
    assert "Zeus made Kronos" in page and page.count("<svg") == 1 and "<script" not in page
    (folder / "report.html").unlink()
    assert main(["report", str(folder)]) == 0 and (folder / "report.html").read_text() == page


def test_a_model_is_asked_what_the_file_leaves_open(tmp_path: Path, capsys, monkeypatch) -> None:
    alphabet = "".join(map(chr, range(32, 127))) + "\n"
    lm = TinyLM(alphabet=alphabet, seed=1, context=512)
    monkeypatch.setattr(load, "load", lambda name, **given: lm)
    path = tmp_path / "asked.yaml"
    path.write_text(ASKED, encoding="utf-8")
    cache = tmp_path / "answers.jsonl"
    code, out, err = said(capsys, path, "--lm", "table", "--out", tmp_path, "--cache", cache)
    assert (code, err) == (0, "") and "was asked about 7 statements" in out
    assert "context almanac: KL" in out and "harmless" in out and "context hoax" in out
    answer = json.loads((tmp_path / "worlds-001" / "answer.json").read_text())
    rows = {s["says"]: s for s in answer["statements"]}
    assert rows["it rains"]["before"] == 0.2 and rows["it is dry"]["before"] not in (0.2, 0.5)
    assert rows["it rains"]["after"] + rows["it is dry"]["after"] == pytest.approx(1.0)
    assert answer["lm"]["asked"] == 7 and 0 <= answer["lm"]["outside"] <= 1 and len(cache.read_text()) > 1000
    assert [c["flagged"] for c in answer["contexts"]][0] is None and "Texts before the questions" in (
        tmp_path / "worlds-001" / "report.html"
    ).read_text()
    runs = lm.forwards
    assert said(capsys, path, "--lm", "table", "--out", tmp_path, "--cache", cache)[0] == 0 and lm.forwards == runs


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "the file is empty"),
        ("beliefs: [1", "not YAML"),
        ("belief: []", "line 1: unknown key 'belief'; did you mean 'beliefs'?"),
        ("name: x\nbeliefs:\n  - {says: a, p: 1.5}", "line 3, beliefs[0].p: must be a share between 0 and 1"),
        ("beliefs:\n  - {says: a, p: 0.5}\n  - {says: a, p: 0.4}", "line 3, beliefs[1]: 'a' stands twice"),
        ("beliefs:\n  - {says: a, q: 0.5}", "line 2, beliefs[0]: unknown key 'q'"),
        ("beliefs:\n  - {relation: r, a: x, b: y}", "line 2, beliefs[0].relation: no relation 'r'"),
        ("beliefs:\n  - {says: a, p: 0.5}\nconstraints:\n  - negation: [a, c]",
         "line 4, constraints[0].negation[1]: no belief says 'c'"),
        ("relations:\n  r:\n    says: '{a} x'\n    among: [a, b]", "line 3, relations.r.says: needs both {a} and {b}"),
        ("relations:\n  r:\n    among: [a, b]", "line 3, relations.r: a relation needs says"),
        ("relations:\n  r:\n    says: '{a} x {b} {c}'", "line 3, relations.r.says: only {a} and {b}"),
        ("relations:\n  r:\n    says: '{a} x {b}'\n    among: [a, b]\n    rules: [acylic]",
         "line 5, relations.r.rules[0]: unknown rule 'acylic'; did you mean 'acyclic'?"),
        ("beliefs:\n  - {says: a}", "1 beliefs have no p, such as 'a'; give p, or --lm smollm2"),
        ("beliefs:\n  - {says: a, p: 1}\n  - {says: b, p: 1}\nconstraints:\n  - exclusive: [a, b]",
         "exclusive(a | b) and 'a' (p = 1) and 'b' (p = 1) contradict each other"),
        ("name: x\nname: y", "line 2: the key 'name' stands twice"),
        ("beliefs:\n  - {says: 2020-13-45}", "line 2, beliefs[0].says: cannot read '2020-13-45'; write it in quotes"),
        ("beliefs:\n  - {says: a, p: !x 0.5}", "line 2, beliefs[0].p: cannot read '0.5'"),
        ("name: x", "no beliefs; give at least one statement"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_in_one_line(tmp_path: Path, capsys, text: str, message: str) -> None:
    path = tmp_path / "beliefs.yaml"
    path.write_text(text, encoding="utf-8")
    code, out, err = said(capsys, path, "--out", tmp_path / "runs")
    assert code == 2 and out == "" and message in err and err.count("\n") == 1
    assert not (tmp_path / "runs").exists()


def test_no_file(capsys) -> None:
    assert "which beliefs?" in said(capsys)[2] and "cannot read" in said(capsys, "nowhere.yaml")[2]
