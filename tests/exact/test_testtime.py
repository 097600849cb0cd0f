"""Test-time Monte Carlo against enumeration, and its planted bugs: the rows of ``bench exact``, at fewer seeds."""

from __future__ import annotations

from collections import Counter

import pytest

from retrodict.testing.bugs import BAR, Bug
from retrodict.testing.testtime import Pair, all_bugs, all_pairs

SEEDS = 100


@pytest.mark.parametrize("pair", all_pairs(quick=True), ids=lambda p: f"{p.method}: {p.case.name}")
def test_method(pair: Pair) -> None:
    for gate in pair.run(SEEDS):
        assert gate.holds, gate


@pytest.mark.parametrize("bug", all_bugs(), ids=lambda b: f"{b.name} ({b.method})")
def test_planted_bug_is_caught(bug: Bug) -> None:
    assert bug.caught(SEEDS).value > BAR


def test_every_method_has_six_targets() -> None:
    count = Counter(p.method for p in all_pairs())
    assert all(n >= 6 for n in count.values()), count
