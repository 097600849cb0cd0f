"""``retrodict plan``: what it says, what it keeps, and the one line for what it cannot use."""

from __future__ import annotations

import json

import pytest

from retrodict.cli.main import main
from retrodict.models.tiny import TinyLM
from retrodict.structures.stories_words import ROOMS, TIES
from retrodict.structures.story_names import given_places, places_in, start_of

ALPHABET = " .:'?abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789,\n$"
HOUSE = ("You are in the hall. The hall opens onto the attic. A door leads from the attic to the cellar.\n"
         "In the cellar lie 7 dollars, in the attic $3.")  # fmt: skip


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setattr("retrodict.models.load.load", lambda *a, **k: TinyLM(ALPHABET, seed=1, context=1024))


def told(tmp_path, capsys, text: str | None, *more: str) -> tuple[int, str, str]:
    path = tmp_path / "story.txt"
    if text is not None:
        path.write_text(text)
    code = main(["plan", str(path), "--out", str(tmp_path / "runs"), *more])
    return code, *capsys.readouterr()


def test_a_story_is_read_and_planned(tiny, tmp_path, capsys):
    code, out, _ = told(tmp_path, capsys, HOUSE, "--draws", "100")
    assert code == 0 and "3 places: the hall, the attic, the cellar; you are in the hall" in out and "directly" in out
    (folder,) = (tmp_path / "runs").iterdir()
    answer = json.loads((folder / "answer.json").read_text())
    assert answer["exact"] and answer["start"] == 0 and len(answer["sentences"]) == 4
    assert 0.999 < sum(answer["direct"]) < 1.001
    assert all(0 <= p["optimal"] <= 1 and 0 <= p["works"] <= 1 for p in answer["plans"])
    assert answer["plans"][0]["utility"] == max(p["utility"] for p in answer["plans"])
    page = (folder / "report.html").read_text()
    assert "Sentences" in page and "<svg" in page and "http" not in page.split("</head>")[1]
    before = page
    (folder / "report.html").unlink()
    assert main(["report", str(folder)]) == 0 and (folder / "report.html").read_text() == before


def test_a_goal_instead_of_money(tiny, tmp_path, capsys):
    text = HOUSE.replace("7 dollars", "apples").replace("$3", "pears")
    code, out, _ = told(tmp_path, capsys, text, "--goal", "cellar", "--draws", "50")
    assert code == 0 and "gain" not in out and "possible" in out


@pytest.mark.parametrize("text, more, says", [
    (None, (), "cannot read"),
    (" \n", (), "is empty"),
    ("Nothing leads anywhere.", (), "no places found"),
    (HOUSE, ("--start", "celar"), "did you mean 'the cellar'"),
    (HOUSE, ("--goal", "moon"), "--goal 'moon' is no place"),
    (HOUSE, ("--goal", "hall"), "where you are already"),
    (HOUSE, ("--places", "hall, moon"), "never mentions 'moon'"),
    ("The hall opens onto the attic.", (), "names no amounts"),
    (HOUSE, ("--unsaid", "1.5"), "between 0 and 1"),
    (HOUSE, ("--draws", "0"), "draws must be at least 1"),
])  # fmt: skip
def test_bad_input_is_one_line_before_a_model_is_loaded(monkeypatch, tmp_path, capsys, text, more, says):
    def never(*_, **__):
        raise AssertionError("loaded")

    monkeypatch.setattr("retrodict.models.load.load", never)
    code, out, err = told(tmp_path, capsys, text, *more)
    assert code == 2 and says in err and err.count("\n") == 1 and not out and not (tmp_path / "runs").exists()
    assert main(["plan"]) == 2


def test_names_are_found():
    names, words = places_in("Room 1 leads to room 2. The Tower is beyond room 2.")
    assert names == ("room 1", "room 2", "the tower") and words is ROOMS
    names, words = places_in("On Sunday Ann met Bo. Later Bo called Cy.")
    assert names == ("Ann", "Bo", "Cy") and words is TIES
    names, _ = given_places("The mossy nook is near the pond, says Ann.", ["mossy nook", "pond"])
    assert names == ("the mossy nook", "the pond")
    assert start_of("The attic is dark. You wake in the cellar.", ("the attic", "the cellar")) == 1
