"""``retrodict bench maps`` under a random model: every table is there, and what knows the truth is right."""

from __future__ import annotations

import pytest

from retrodict.bench import maps as bench
from retrodict.errors import InputError
from retrodict.models.tiny import TinyLM

ALPHABET = " .:;'?abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789,\n"


def test_rows(monkeypatch):
    monkeypatch.setattr(bench, "load", lambda *a, **k: TinyLM(ALPHABET, seed=1, context=2048))
    monkeypatch.setattr(bench, "FAMILIES", ("ring",))
    rows = bench.run(places=5, worlds=1, seen=2, episodes=1, horizon=2)
    value = {(r.name, r.method, r.metric): r.value for r in rows}
    for name in ("all", "plain", "revaluation", "detour", "ring", "which first", "which way", "which worth"):
        for method in ("direct", "chain", "posterior, utility", "posterior, vote", "best map", "chance"):
            assert 0 <= value[name, method, "accuracy"] <= 1
    assert value["all", "perfect reading", "accuracy"] > 0.6
    assert value["links", "perfect reading", "Brier"] < value["links", "prior", "Brier"]
    assert {m for n, m, _ in value if n == "rollout, 2 steps"} == {"direct", "posterior", "prior"}
    assert ("rules", "posterior", "nats gained on the true rule set") in value


def test_bad_sizes():
    with pytest.raises(InputError, match="one copy of the stories or one world"):
        bench.run(copies=0, worlds=0)
    with pytest.raises(InputError, match="chains must be at least 1"):
        bench.run(chains=0)
