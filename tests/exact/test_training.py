"""Training through the loop reaches the enumerated posterior; planted bugs do not. ``bench exact`` runs all pairs."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch

from retrodict.bench import exact as bench
from retrodict.objectives import OBJECTIVES
from retrodict.objectives.mle import object_log_q
from retrodict.records import cat_rollouts
from retrodict.rng import generator
from retrodict.spaces.enumerate import enumerate_objects
from retrodict.testing.bugs_training import CAUGHT, TRAINING_BUGS, TrainingBug
from retrodict.testing.table import TablePolicy
from retrodict.testing.targets import cases
from retrodict.testing.trained import (
    BAR,
    GFLOWNET,
    MIXTURES,
    NAMES,
    SHOWN,
    Table,
    fresh,
    moves_of,
    pairs,
    posterior_paths,
    set_paths,
    show,
    tool_target,
    total_variation,
    train,
    training_targets,
)
from retrodict.training.collect import with_terms

HERE = [
    ("pooled", "sets", "all"),
    ("subtb", "tool", "replay"),
    ("vargrad", "sets", "tempered, epsilon"),
    ("tb", "sets", "tempered, epsilon"),
    ("db", "problems apart", "on policy"),
    ("rtb", "paths of sets", "tempered, epsilon"),
]
"""One pair an objective, in fewer steps; all pairs are rows of ``bench exact``."""
SHORT: dict[str, Any] = {"steps": 200}
QUICK = ("values of prefixes shared between paths", "accumulation over split groups")
"""Planted bugs that are seen in seconds; all are rows of ``bench exact``."""


@pytest.mark.parametrize("objective, name, mixture", HERE)
def test_training_from_samples_reaches_the_posterior(objective: str, name: str, mixture: str) -> None:
    target = training_targets()[name]
    assert total_variation(target, fresh(target), objective != "rtb") > CAUGHT
    policy = train(target, objective, mixture, **SHORT)
    assert total_variation(target, policy, objective != "rtb") < BAR


@pytest.mark.parametrize("bug", [b for b in TRAINING_BUGS if b.name in QUICK], ids=lambda b: b.name)
def test_planted_bug_is_caught(bug: TrainingBug) -> None:
    row = bench.training_bug_row(bug)
    assert row.holds and row.value > CAUGHT and row.method == bug.objective, row


def test_every_objective_meets_every_target_and_mixture() -> None:
    everything = {(o, t) for o, t in itertools.product(GFLOWNET, NAMES)}
    assert {(o, "sets" if t == "paths of sets" else t) for o, t, _ in pairs()} == everything
    assert {(o, m) for o, _, m in pairs()} == set(itertools.product(GFLOWNET, MIXTURES))
    assert {m for _, t, m in pairs() if t == NAMES[0]} == set(MIXTURES)
    assert len({b.name for b in TRAINING_BUGS}) == len(TRAINING_BUGS) >= 9 and len(NAMES) >= 5
    assert {*GFLOWNET, *SHOWN, "rloo"} == set(OBJECTIVES), "a new objective needs a row in testing.trained"
    assert all(b.objective in GFLOWNET and b.target in training_targets() for b in TRAINING_BUGS)


# -- what the numbers stand on ----------------------------------------------------------------------------------------


def raw(name: str) -> Any:
    """A training target before its values were listed."""
    made = {c.name: c.target for c in cases()} | {"tool": tool_target(), "paths of sets": set_paths()}
    return made[name]


@pytest.mark.parametrize("name", [n for n in NAMES if n != "problems apart"])
def test_the_list_holds_the_targets_values(name: str) -> None:
    target, honest = training_targets()[name], raw(name)
    for m in range(len(target.problems)):
        r = enumerate_objects(target.space, m)
        for every in (False, True):
            x, y = target.log_gamma(r, every), honest.log_gamma(r, every)
            assert x.shape == y.shape and torch.equal(x.isfinite(), y.isfinite())
            assert torch.allclose(x[x.isfinite()], y[y.isfinite()], atol=1e-12)
    assert target.version == honest.version


@pytest.mark.parametrize("name", NAMES)
def test_the_table_is_a_stepper_over_menus(name: str) -> None:
    """Its one look-up is what stepping through menus gives, and what it samples from."""
    target = training_targets()[name]
    fast = fresh(target)
    slow = TablePolicy(target.space, target.problems, moves_of(target))
    fast.logits = slow.logits = torch.randn(slow.logits.shape, generator=generator(2), dtype=torch.float64)
    rows = cat_rollouts([enumerate_objects(target.space, m) for m in range(len(target.problems))])
    x, y = fast.score(rows), slow.score(rows)
    assert torch.allclose(x.log_q, y.log_q) and torch.allclose(x.log_stop.exp(), y.log_stop.exp())
    for m in range(len(target.problems)):
        r = enumerate_objects(target.space, m)
        assert float(object_log_q(fast.score(r), r).exp().sum()) == pytest.approx(1.0)
    drawn = fast.sample(torch.zeros(50, dtype=torch.long), generator(0))
    again = fast.score(drawn)
    assert torch.allclose(again.log_q, drawn.log_q) and torch.allclose(again.log_stop.exp(), drawn.log_stop.exp())


def test_total_variation_of_the_posterior_itself_is_zero() -> None:
    for name, backward in (("sets", True), ("tool", True), ("paths of sets", False)):
        target = training_targets()[name]
        policy: Table = fresh(target)
        r, log_p = posterior_paths(target, 0, backward)
        node = policy.at(r)
        mass = torch.zeros_like(policy.logits)
        row, i = (torch.arange(r.moves.shape[1]) < r.n[:, None]).nonzero().unbind(1)
        mass = mass.index_put((node[row, i], r.moves[row, i]), log_p[row].exp(), accumulate=True)
        mass.index_put_((node[torch.arange(len(r)), r.n], policy.moves + r.stop), log_p.exp(), accumulate=True)
        policy.logits = torch.where(mass > 0, mass.log(), -100.0)
        assert total_variation(target, policy, backward) < 1e-9
        assert math.isclose(float(log_p.exp().sum()), 1.0)
    r, with_pb = posterior_paths(training_targets()["sets"], 0)
    assert (with_pb.exp() - posterior_paths(training_targets()["sets"], 0, False)[1].exp()).abs().sum() > 0.1


def test_values_belong_to_paths() -> None:
    """Two orders of one set: their prefixes differ, and under a prior over paths so do their values."""
    for name, every in (("sets", True), ("paths of sets", False)):
        target = training_targets()[name]
        rows = enumerate_objects(target.space, 0)
        found, scored = with_terms(target, cat_rollouts([rows, rows]), every)
        want = target.log_gamma(rows, every)
        got = target.log_gamma(found, every)
        assert scored == len(rows) and torch.allclose(got, torch.cat([want, want])), name


def test_what_others_converge_to() -> None:
    """REINFORCE without entropy climbs to the mode, and annotations are imitated; neither is the posterior."""
    (tv, off, _), (_, mode, _) = show("reinforce", **SHORT)
    assert tv == "total variation" and off > 0.3 and mode > 0.9
    (_, off, _), (_, annotated, _) = show("mle", steps=60, samples=8, lr=0.3)
    assert off > 0.3 and annotated > 0.9


def test_rows_name_objective_mixture_and_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "train", lambda target, *_: fresh(target))
    row = bench.objective_row("db", "sets", "replay")
    assert (row.name, row.method, row.metric) == ("sets", "db", "total variation, replay")
    assert row.holds is False and row.value > CAUGHT  # an untrained table misses the bar


def test_one_seed_is_not_special() -> None:
    target = training_targets()["sets"]
    assert max(total_variation(target, train(target, "vargrad", seed=s, **SHORT)) for s in (1, 2)) < BAR
