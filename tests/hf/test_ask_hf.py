"""The real small model, asked once."""

import pytest

import retrodict as rd
from retrodict.structures.ask import Asker
from retrodict.structures.lm_prior import ask_edges
from retrodict.structures.worlds_ask import ask

pytestmark = pytest.mark.hf


def test_a_real_model_answers_mostly_within_the_options(small, tmp_path):
    asker = Asker(rd.load("smollm2", dtype="float32"), tmp_path / "answers.jsonl")
    found = ask(asker, ["ice is cold", "fire is cold"])
    assert found.log_odds[0] > found.log_odds[1] and float(found.outside.mean()) < 0.9
    edges = ask_edges(asker, {"rain": "rain", "mud": "muddy ground"}, verbs=("cause",))
    assert edges.log_odds().isfinite().all() and asker.counts.questions == 2 * 4 + 3 * 4 + 2 * 2 + 3 * 2
