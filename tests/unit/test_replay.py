"""Replay: what is kept, what is drawn and how often, what a file holds, and what a person may write."""

from __future__ import annotations

import math
import random
from collections import Counter
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import cast

import pytest
import torch
from torch import Tensor

from retrodict.errors import InputError
from retrodict.models.tabular import TabularLM
from retrodict.models.tiny import TinyLM
from retrodict.numerics import NEG_INF, at_end
from retrodict.particles import Particles
from retrodict.policies.base import rollout
from retrodict.policies.lm import LMPolicy
from retrodict.records import FORCED, FREE, PAD, Problem, Rollouts, cat_rollouts
from retrodict.rng import generator
from retrodict.samplers.importance import importance
from retrodict.spaces.enumerate import enumerate_objects
from retrodict.spaces.stops import Stops
from retrodict.spaces.strings import Strings
from retrodict.spaces.tools import Tool, with_tool
from retrodict.targets.algebra import Target
from retrodict.targets.ready import infill, posterior, until
from retrodict.testing import SetPolicy, set_target
from retrodict.training.distance import DISTANCES, bag_distance, edit_distance
from retrodict.training.replay import Replay, written
from retrodict.training.shelf import ROWS, joined

LM = TabularLM.random(".ab ", order=2, seed=1)


def target_of(n: int = 3) -> Target:
    pairs = [((1,), (2,)), ((2, 1), (1, 3)), ((3,), (2, 2))]
    return posterior(LM, [Problem(x, y) for x, y in pairs[:n]], stop=".", max_tokens=4)


def policy_of(target: Target) -> LMPolicy:
    return cast(LMPolicy, target.prior)


def drawn(target: Target, rows: int = 24, seed: int = 0, prefixes: bool = True) -> tuple[Rollouts, Tensor, list]:
    """Rows of all problems with their terms, log gamma and keys."""
    problem = torch.arange(rows) % len(target.problems)
    out = target.terms(policy_of(target).sample(problem, generator(seed)), prefixes)
    return out, target.log_gamma(out), target.space.keys(out)


def line(ids: list[list[int]], problem: int = 0, tag: float = 0.0, log_b: float = -1.0) -> Rollouts:
    """Rows put together by hand, with one whole-object term ``tag``."""
    b, t = len(ids), max(map(len, ids))
    n = torch.tensor([len(z) for z in ids])
    moves = torch.tensor([[*z, *[0] * (t - len(z))] for z in ids]).view(b, t)
    return Rollouts(
        problem=torch.full((b,), problem), moves=moves, kind=torch.full((b, t), FREE, dtype=torch.int8), n=n,
        stop=torch.zeros(b, dtype=torch.long), can_stop=torch.ones(b, t + 1, dtype=torch.bool),
        log_q=torch.zeros(b, t), log_stop=torch.zeros(b, t + 1, 1), log_b=torch.full((b, t + 1), log_b),
        log_pb=torch.zeros(b, t), terms={"tag": torch.full((b,), tag)}, versions={"tag": "v1"},
    )  # fmt: skip


def put(buffer: Replay, ids: list[list[int]], values: list[float], step: int = 0, **kwargs) -> int:
    keys = [(*z, -1) for z in ids]
    return buffer.add(line(ids, **kwargs), torch.tensor(values, dtype=torch.float64), keys, step)


def held(buffer: Replay, problem: int = 0) -> dict[tuple[int, ...], float]:
    """Objects of a problem and their log gamma."""
    shelf = buffer._shelves.get(problem)
    return {} if shelf is None else dict(zip(shelf.keys, shelf.log_gamma, strict=True))


def equal(a: Rollouts, b: Rollouts) -> bool:
    """To the bit."""
    pairs = [(getattr(a, f), getattr(b, f)) for f in ROWS] + [(a.terms[k], b.terms[k]) for k in a.terms]
    same = (a.terms.keys(), a.versions, a.behaviour) == (b.terms.keys(), b.versions, b.behaviour)
    return same and all(x.dtype == y.dtype and torch.equal(x, y) for x, y in pairs)


# -- distances ----------------------------------------------------------------------------------------------------


def levenshtein(a: tuple[int, ...], b: tuple[int, ...]) -> int:
    """The recursion as it is written in textbooks."""

    @cache
    def d(i: int, j: int) -> int:
        if not i or not j:
            return i + j
        return min(d(i - 1, j) + 1, d(i, j - 1) + 1, d(i - 1, j - 1) + (a[i - 1] != b[j - 1]))

    return d(len(a), len(b))


def test_edit_distance_is_the_textbook_recursion() -> None:
    rng = random.Random(0)
    for k in (2, 3, 50):
        for _ in range(400):
            a, b = (tuple(rng.randrange(k) for _ in range(rng.randrange(14))) for _ in range(2))
            assert edit_distance(a, b) == levenshtein(a, b) == edit_distance(b, a), (a, b)
    long = list(range(100))
    assert edit_distance(long, [*long[:50], 999, *long[50:]]) == 1.0 and edit_distance(long, long[::-1]) == 100.0
    assert edit_distance([1, 2], [1, 2]) == 0.0 == edit_distance([], []) and edit_distance([], [1, 1]) == 2.0


def test_bag_distance_ignores_order_and_counts_repeats() -> None:
    assert bag_distance([1, 2, 3], [3, 1, 2]) == 0.0 and bag_distance([1, 1, 2], [1, 2, 4]) == 2.0
    rng = random.Random(1)
    for _ in range(200):
        a, b = (tuple(rng.randrange(4) for _ in range(rng.randrange(9))) for _ in range(2))
        assert bag_distance(a, b) == bag_distance(b, a) <= 2 * edit_distance(a, b) and bag_distance(a, b) <= len(a + b)


# -- what is kept -------------------------------------------------------------------------------------------------


def test_an_object_is_kept_once_and_refreshed() -> None:
    buffer = Replay(8)
    assert put(buffer, [[1, 2], [1, 2], [3]], [-1.0, -1.0, -2.0], step=1, tag=1.0, log_b=-5.0) == 2
    assert put(buffer, [[1, 2]], [-3.0], step=7, tag=9.0, log_b=-6.0) == 0 and len(buffer) == 2
    assert held(buffer) == {(1, 2, -1): -3.0, (3, -1): -2.0} and buffer.staleness(9) == (2 + 8) / 2
    rows = buffer._shelves[0].rows
    assert rows.terms["tag"].tolist() == [9.0, 1.0], "the terms are the new ones"
    assert rows.log_b[0].tolist() == [-5.0] * 3, "log_b is that of the first draw"


def test_problems_do_not_share_a_buffer() -> None:
    buffer = Replay(2)
    for p in (4, 1):
        put(buffer, [[1], [2], [3]], [-1.0, -2.0, -3.0], problem=p)
    assert buffer.sizes() == {1: 2, 4: 2} and list(buffer.sizes()) == [1, 4]


def test_another_path_to_the_same_object_replaces_the_row() -> None:
    """log_b and prefix values belong to a path: they may not be mixed with another's."""
    target = set_target(3)
    policy = SetPolicy(target.space, target.problems)  # pyright: ignore[reportArgumentType]
    buffer = Replay(100)
    paths = target.terms(enumerate_objects(target.space, 0), every_prefix=True)
    paths = replace(paths, log_b=torch.arange(len(paths) * paths.log_b.shape[1]).view(len(paths), -1) * 1.0)
    buffer.add(paths, target.log_gamma(paths), target.space.keys(paths))
    assert len(buffer) == 8
    rows, _ = buffer.draw(torch.zeros(200, dtype=torch.long), generator(0))
    fresh = replace(rows, terms={})
    wanted = target.terms(fresh, every_prefix=True).terms["table"]
    inside = torch.arange(wanted.shape[1]) <= rows.n[:, None]
    assert torch.equal(rows.terms["table"][inside], wanted[inside])
    first = {(*m[:n], -1): b[:n] for m, n, b in zip(paths.moves.tolist(), paths.n.tolist(), paths.log_b.tolist(),
                                                    strict=True)}  # fmt: skip
    for m, n, b in zip(rows.moves.tolist(), rows.n.tolist(), rows.log_b.tolist(), strict=True):
        assert b[:n] == first[(*m[:n], -1)]
    assert policy.score(rows).log_q.shape == rows.log_q.shape


def test_rows_outside_the_support_are_left_out() -> None:
    buffer = Replay(4)
    assert put(buffer, [[1], [2]], [NEG_INF, -1.0]) == 1 and list(held(buffer)) == [(2, -1)]
    assert put(buffer, [[2]], [NEG_INF]) == 0 and len(buffer) == 0 and buffer.sizes() == {}
    for bad in (math.nan, math.inf):
        with pytest.raises(InputError, match="log gamma of row 1 is"):
            put(buffer, [[1], [2]], [0.0, bad])
    with pytest.raises(InputError, match="2 rows, 1 log gammas and 2 keys"):
        put(buffer, [[1], [2]], [0.0])
    assert len(buffer) == 0, "a refused batch leaves no row behind"


@pytest.mark.parametrize("priority", ["uniform", "reward"])
def test_over_capacity_the_smallest_leave(priority: str) -> None:
    buffer = Replay(2, priority=priority)
    assert put(buffer, [[1], [2], [3], [4]], [-4.0, -1.0, -3.0, -2.0]) == 2
    assert held(buffer) == {(2, -1): -1.0, (4, -1): -2.0}
    assert put(buffer, [[5], [6]], [-9.0, -1.5], step=1) == 1 and list(held(buffer)) == [(2, -1), (6, -1)]
    assert put(buffer, [[7]], [-1.5], step=2) == 1 and list(held(buffer)) == [(2, -1), (7, -1)], "of equals the older"


def test_over_capacity_the_oldest_leave_under_recency() -> None:
    buffer = Replay(2, priority="recency")
    put(buffer, [[1], [2]], [-1.0, -2.0], step=0)
    put(buffer, [[3]], [-9.0], step=1)
    assert list(held(buffer)) == [(1, -1), (3, -1)]
    put(buffer, [[1]], [-1.0], step=2)  # seen again: young again
    put(buffer, [[4]], [-9.0], step=3)
    assert list(held(buffer)) == [(1, -1), (4, -1)]


def test_near_duplicates_keep_the_better_one() -> None:
    base = [1, 2, 3, 4, 5, 6, 7]
    near, far = [1, 2, 3, 4, 5, 6, 8], [9, 9, 9, 4, 5, 6, 7]  # 1 and 3 edits of 8 + 8 tokens, the stop counted
    buffer = Replay(8, distance=edit_distance, tolerance=0.15)
    assert put(buffer, [base], [-2.0]) == 1
    assert put(buffer, [near], [-3.0]) == 0 and put(buffer, [near], [-2.0]) == 0, "no better than what is there"
    assert put(buffer, [far], [-9.0]) == 1, "3 edits are not below 0.15 * 16"
    assert put(buffer, [near], [-1.0]) == 1 and held(buffer) == {(*far, -1): -9.0, (*near, -1): -1.0}
    between = [9, 2, 3, 4, 5, 6, 7]  # 2 edits from both, better than one of them
    assert put(buffer, [between], [-5.0]) == 0 and len(buffer) == 2
    assert put(buffer, [between], [0.0]) == 1 and list(held(buffer)) == [(*between, -1)], "both near ones leave"
    assert put(Replay(8, tolerance=0.15), [base, near], [-2.0, -3.0]) == 1, "edit distance unless told otherwise"
    assert put(Replay(8), [base, near], [-2.0, -3.0]) == 2, "without a tolerance nothing is compared"


def test_distances_are_asked_for_only_where_needed() -> None:
    asked = []

    def spy(a, b) -> float:
        asked.append((tuple(a), tuple(b)))
        return 99.0

    buffer = Replay(50, distance=spy, tolerance=0.2)
    put(buffer, [[1], [2], [3]], [-1.0, -2.0, -3.0])
    assert len(asked) == 3
    put(buffer, [[1], [2], [3]], [-1.0, -2.0, -3.0])
    assert len(asked) == 3, "what is known by its key is compared with nothing"


# -- what is drawn ------------------------------------------------------------------------------------------------


def shares(buffer: Replay, n: int = 40_000) -> dict[int, float]:
    rows, _ = buffer.draw(torch.zeros(n, dtype=torch.long), generator(3))
    return {k: v / n for k, v in Counter(rows.moves[:, 0].tolist()).items()}


def test_priorities_have_the_frequencies_they_promise() -> None:
    values = [0.0, -1.0, -2.0]
    for alpha in (0.0, 1.0, 2.5):
        buffer = Replay(8, priority="reward", alpha=alpha)
        put(buffer, [[1], [2], [3]], [v - 700.0 for v in values])  # no overflow, no underflow of the sum
        weights = [math.exp(alpha * v) for v in values]
        for i, w in enumerate(weights):
            assert abs(shares(buffer).get(i + 1, 0.0) - w / sum(weights)) < 0.011
    buffer = Replay(8)
    put(buffer, [[1], [2], [3]], values)
    assert all(abs(x - 1 / 3) < 0.011 for x in shares(buffer).values())
    buffer = Replay(8, priority="recency")
    put(buffer, [[1]], [0.0], step=1)
    put(buffer, [[2], [3]], [0.0, 0.0], step=5)
    got = shares(buffer)  # 1 / (1 + 2), 1, 1
    assert abs(got[1] - 1 / 7) < 0.011 and abs(got[2] - 3 / 7) < 0.011 and abs(got[3] - 3 / 7) < 0.011


def test_a_draw_serves_the_problems_that_have_rows_and_costs_no_rewards() -> None:
    target = target_of()
    rows, log_gamma, keys = drawn(target)
    keep = (rows.problem != 1).nonzero().squeeze(1)
    buffer = Replay(50)
    assert buffer.add(rows.take(keep), log_gamma[keep], [keys[i] for i in keep.tolist()], step=3)
    ask = torch.tensor([2, 1, 0, 0, 7, 2])
    got, served = buffer.draw(ask, generator(0))
    assert served.tolist() == [0, 2, 3, 5] and got.problem.tolist() == [2, 0, 0, 2]
    assert got.behaviour == {"source": "replay"} and got.moves.shape[1] == int(got.n.max())
    known = {(p, *k): v for p, k, v in zip(rows.problem.tolist(), keys, log_gamma.tolist(), strict=True)}
    before = LM.tokens_run
    sharp = target.with_betas(likelihood=0.3, prior=2.0)
    values, tempered = target.log_gamma(got, every_prefix=False), sharp.log_gamma(got)
    assert len(sharp.log_gamma(got, every_prefix=True)) == 4
    assert LM.tokens_run == before, "nothing was scored again"
    for p, k, v in zip(got.problem.tolist(), target.space.keys(got), values.tolist(), strict=True):
        assert known[(p, *k)] == v
    fresh = sharp.log_gamma(replace(got, terms={}, versions={}))
    assert torch.allclose(fresh, tempered, atol=1e-5)


def test_one_seed_one_draw_whatever_else_is_asked_for() -> None:
    target = target_of()
    rows, log_gamma, keys = drawn(target)
    buffer = Replay(50, priority="reward")
    buffer.add(rows, log_gamma, keys)
    ask = torch.arange(30) % 3
    a, b, c = (buffer.draw(ask, generator(s))[0] for s in (1, 1, 2))
    assert equal(a, b) and not torch.equal(a.n, c.n)
    some = torch.where(torch.arange(30) % 2 == 0, ask, 9)
    d, served = buffer.draw(some, generator(1))
    assert target.space.keys(d) == [target.space.keys(a)[i] for i in served.tolist()]


def test_an_empty_buffer_gives_no_rows() -> None:
    rows, served = Replay().draw(torch.tensor([0, 1]), generator(0))
    assert len(rows) == 0 == len(served) and rows.moves.shape == (0, 0) and rows.log_stop.shape == (0, 1, 1)
    assert rows.behaviour == {"source": "replay"} and Replay().staleness(5) == 0.0 and len(Replay()) == 0
    buffer = Replay()
    put(buffer, [[1]], [0.0])
    assert len(buffer.draw(torch.tensor([3]), generator(0))[0]) == 0
    assert len(buffer.draw(torch.tensor([], dtype=torch.long), generator(0))[0]) == 0
    assert buffer.add(rows, torch.zeros(0), []) == 0


# -- terms of different shapes and versions -----------------------------------------------------------------------


def test_whole_and_prefix_values_of_a_term_become_whole() -> None:
    target = target_of(1)
    a, gamma_a, keys_a = drawn(target, 6, 0, prefixes=True)
    b, gamma_b, keys_b = drawn(target, 6, 5, prefixes=False)
    assert a.terms["likelihood"].dim() == 3
    b = replace(b, terms={f: at_end(v, b.n, b.stop) if v.dim() == 3 else v for f, v in b.terms.items()})
    both = joined([a, b])
    assert set(both.terms) == {"prior", "likelihood"} and all(v.shape == (12,) for v in both.terms.values())
    assert torch.equal(target.log_gamma(both), torch.cat([gamma_a, gamma_b]))
    extra = b.with_terms({"likelihood": b.terms["likelihood"], "score": torch.zeros(6)})
    assert "score" not in joined([a, extra]).terms
    buffer = Replay(50)
    buffer.add(a, gamma_a, keys_a)
    buffer.add(b, gamma_b, keys_b)
    got, _ = buffer.draw(torch.zeros(50, dtype=torch.long), generator(0))
    assert torch.allclose(target.log_gamma(got), target.log_gamma(replace(got, terms={})), atol=1e-5)
    assert target.log_gamma(got, every_prefix=True).dim() == 3, "prefix values are scored where they are asked for"


def test_a_term_of_another_version_is_scored_again_and_never_believed() -> None:
    buffer = Replay(50)
    put(buffer, [[1], [2]], [-1.0, -2.0], tag=1.0)
    new = line([[3]], tag=5.0)
    buffer.add(replace(new, versions={"tag": "v2"}), torch.tensor([-1.0]), [(3, -1)])
    rows, _ = buffer.draw(torch.zeros(20, dtype=torch.long), generator(0))
    assert "tag" not in rows.terms and "tag" not in rows.versions
    same = line([[4]], tag=5.0)
    apart = Replay(50)
    put(apart, [[1]], [-1.0], tag=1.0)
    apart.add(replace(same, versions={"tag": "v2"}, problem=torch.tensor([1])), torch.tensor([-1.0]), [(4, -1)])
    assert apart.draw(torch.tensor([0]), generator(0))[0].terms["tag"].tolist() == [1.0]
    assert apart.draw(torch.tensor([1]), generator(0))[0].versions == {"tag": "v2"}
    assert "tag" not in apart.draw(torch.tensor([0, 1]), generator(0))[0].terms


def test_rescoring_gives_priorities_of_now() -> None:
    target = target_of()
    rows, log_gamma, keys = drawn(target)
    buffer = Replay(50, priority="reward")
    buffer.add(rows, log_gamma, keys, step=4)
    sharp, before, log_b = target.with_betas(likelihood=3.0), LM.tokens_run, buffer._shelves[0].rows.log_b
    buffer.rescore(lambda r: (sharp.terms(r), sharp.log_gamma(r)))
    assert LM.tokens_run == before and buffer.staleness(4) == 0.0
    for p, key, value in zip(rows.problem.tolist(), keys, sharp.log_gamma(rows).tolist(), strict=True):
        assert held(buffer, p)[key] == value
    assert torch.equal(buffer._shelves[0].rows.log_b, log_b)
    was = held(buffer)
    with pytest.raises(InputError, match="is nan"):
        buffer.rescore(lambda r: (r, torch.full((len(r),), math.nan)))
    assert held(buffer) == was, "a failure leaves the buffer as it was"
    buffer.rescore(lambda r: (r, torch.full((len(r),), NEG_INF)))
    assert len(buffer) == 0


# -- on disk ------------------------------------------------------------------------------------------------------


def full_buffer(**settings) -> tuple[Replay, Target]:
    target = target_of()
    buffer = Replay(6, model="m1", target="t1", **settings)
    for step in range(4):
        buffer.add(*drawn(target, 24, step), step=step)
    odd = line([[3, 1]], problem=9, tag=2.0)  # another layout: other terms, other dtypes
    buffer.add(odd, torch.tensor([-1.25]), [(3, 1, -(2**70))], step=2)
    return buffer, target


@pytest.mark.parametrize("settings", [{}, {"priority": "reward", "alpha": 0.5}, {"priority": "recency"},
                                      {"distance": bag_distance, "tolerance": 0.1}])  # fmt: skip
def test_a_file_draws_as_the_buffer_does(tmp_path: Path, settings: dict) -> None:
    buffer, target = full_buffer(**settings)
    path = buffer.save(tmp_path / "deep" / "replay.safetensors")
    back = Replay.load(path, model="m1", target="t1")
    assert [f.name for f in path.parent.iterdir()] == ["replay.safetensors"]
    assert (back.sizes(), back.staleness(7)) == (buffer.sizes(), buffer.staleness(7))
    names = ("capacity", "priority", "alpha", "tolerance", "distance", "model", "target")
    assert all(getattr(back, f) == getattr(buffer, f) for f in names)
    ask = torch.tensor([0, 1, 2, 9]).repeat(10)
    for seed in range(3):
        for which in (ask, ask[ask < 9], ask[ask == 9]):
            assert equal(buffer.draw(which, generator(seed))[0], back.draw(which, generator(seed))[0])
    for x in (buffer, back):  # and goes on alike
        x.add(*drawn(target, 24, 99), step=99)
    assert equal(buffer.draw(ask, generator(5))[0], back.draw(ask, generator(5))[0])
    Replay(3, model="m1", target="t1").save(path)
    assert len(Replay.load(path, model="m1", target="t1")) == 0


def test_a_distance_of_ones_own_is_given_again(tmp_path: Path) -> None:
    def mine(a, b) -> float:
        return abs(len(a) - len(b))

    path = Replay(distance=mine, tolerance=0.1).save(tmp_path / "r")
    with pytest.raises(InputError, match="give it as distance="):
        Replay.load(path, model="", target="")
    assert Replay.load(path, model="", target="", distance=mine).distance is mine


def test_a_file_of_another_model_or_target_is_refused_with_both_names(tmp_path: Path) -> None:
    path = full_buffer()[0].save(tmp_path / "r")
    with pytest.raises(InputError, match="model 'm1', and this run's model is 'm2'"):
        Replay.load(path, model="m2", target="t1")
    with pytest.raises(InputError, match="target 't1', and this run's target is ''"):
        Replay.load(path, model="m1", target="")


def test_every_damaged_or_foreign_file_is_one_line(tmp_path: Path) -> None:
    path = full_buffer()[0].save(tmp_path / "r")
    data = path.read_bytes()
    bad = {"empty": b"", "text": b"not a file of tensors", "half": data[: len(data) // 2], "long": data + b"\0",
           "a bit": data[:-5] + bytes([data[-5] ^ 1]) + data[-4:],
           "a setting": data.replace(b'\\"capacity\\": 6', b'\\"capacity\\": 7')}  # fmt: skip
    for why, content in bad.items():
        assert content != data, why
        path.write_bytes(content)
        with pytest.raises(InputError) as e:
            Replay.load(path, model="m1", target="t1")
        assert str(path) in str(e.value) and "\n" not in str(e.value) and "save" in str(e.value), why
    importance(target_of(), n=4, seed=0).save(path)
    with pytest.raises(InputError, match="holds no replay buffer; give a file that Replay.save wrote"):
        Replay.load(path, model="m1", target="t1")
    full_buffer()[0].save(path)
    with pytest.raises(InputError, match="holds no particles"):
        Particles.load(path)
    with pytest.raises(InputError, match="cannot read"):
        Replay.load(tmp_path / "nowhere", model="m1", target="t1")


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = full_buffer()[0].save(tmp_path / "r")
    old = path.read_bytes()

    def full(*_) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(InputError, match="No space left"):
        Replay(3).save(path)
    assert path.read_bytes() == old and [f.name for f in tmp_path.iterdir()] == ["r"]


def test_bad_settings_are_one_line() -> None:
    for settings, words in (
        ({"capacity": 0}, "capacity of at least 1"),
        ({"priority": "rewards"}, "unknown priority 'rewards'; did you mean 'reward'"),
        ({"alpha": -1.0, "priority": "reward"}, "alpha must be 0 or more"),
        ({"alpha": 2.0}, "alpha sharpens priority 'reward'; under 'uniform' leave it out"),
        ({"tolerance": 1.0}, "tolerance is a share"),
        ({"distance": edit_distance}, "does nothing at tolerance 0"),
    ):
        with pytest.raises(InputError, match=words):
            Replay(**settings)
    assert set(DISTANCES) == {"edit", "bag"}


# -- what people wrote --------------------------------------------------------------------------------------------


def test_written_rows_are_those_a_rollout_would_have_recorded() -> None:
    """Every field but log_b's source: compare with drawn rows, replayed from their ids alone."""
    target = posterior(TabularLM.random(".!ab ", order=2, seed=2), [Problem((2,), (3,)), Problem((3, 4), (2,))],
                       stop=(0, 1), max_tokens=4, min_tokens=1, limit="own_stop")  # fmt: skip
    policy = policy_of(target)
    rows = rollout(policy, torch.ones(300, dtype=torch.long), generator(0))
    for stop in (0, 1):
        mine = rows.take((rows.stop == stop).nonzero().squeeze(1))
        ids = [m[:n] for m, n in zip(mine.moves.tolist(), mine.n.tolist(), strict=True)]
        got = written(policy, 1, ids, stop)
        t = got.moves.shape[1]
        assert got.behaviour == {"source": "written"} and t == max(map(len, ids))
        for f in ("problem", "n", "stop", "moves", "kind", "can_stop"):
            want = getattr(mine, f)
            assert torch.equal(getattr(got, f), want[:, : getattr(got, f).shape[1]] if want.dim() > 1 else want), f
        for f in ("log_q", "log_b", "log_pb", "log_stop"):
            want = getattr(mine, f)[:, : getattr(got, f).shape[1]]
            assert torch.allclose(getattr(got, f), want, atol=1e-5), f


def test_written_rows_seed_a_buffer() -> None:
    target = infill(LM, "ab", "ba", stop=".", max_tokens=4, join="")
    policy = policy_of(target)
    rows = target.terms(written(policy, 0, [[1, 2], [3], [1, 1, 1, 2]]), every_prefix=True)
    assert target.space.show(rows) == ["ab.", " .", "aaab."]
    assert rows.log_b[2, 4] == 0.0 and not rows.can_stop[:, 0].any(), "the stop at the limit is forced"
    buffer = Replay(50)
    assert buffer.add(rows, target.log_gamma(rows), target.space.keys(rows)) == 3
    joined_with = cat_rollouts(
        [
            buffer.draw(torch.zeros(3, dtype=torch.long), generator(0))[0],
            target.terms(policy.sample(torch.zeros(3, dtype=torch.long), generator(0)), True),
        ]
    )
    assert set(joined_with.terms) == {"prior", "likelihood"}


def test_written_rows_of_other_spaces() -> None:
    say = posterior(LM, [Problem((1,), (2, 1))], stop=until("b "), max_tokens=4)
    policy = policy_of(say)
    rows = written(policy, 0, [[1, 2, 3], [1, 1, 1, 1]])
    assert rows.can_stop.tolist() == [[False, False, False, True, False], [False] * 4 + [True]]
    with pytest.raises(InputError, match="latent 1 may not stop after 2 moves"):
        written(policy, 0, [[2, 3], [1, 2]])
    with pytest.raises(InputError, match="latent 0 is over after 2 moves"):
        written(policy, 0, [[2, 3, 1]])
    sets = set_target(3)
    pair = SetPolicy(sets.space, sets.problems)  # pyright: ignore[reportArgumentType]
    rows = written(pair, 0, [[0, 2], [], [2, 1, 0]])
    assert torch.allclose(rows.log_pb.double().exp()[0, :2], torch.tensor([1.0, 0.5]).double())
    assert rows.log_b.dtype == rows.log_pb.dtype == torch.float64
    with pytest.raises(InputError, match="latent 0 has 2 as move 1, which is not legal"):
        written(pair, 0, [[2, 2]])
    tiny = TinyLM(".ab ", seed=3, dtype=torch.float64)
    empty = written(policy_of(posterior(tiny, [Problem((1,), (2,))], stop=".", max_tokens=3)), 0, [[]])
    assert empty.moves.shape == (1, 0) and empty.log_b.shape == (1, 1) and float(empty.log_b[0, 0]) < 0


def test_what_a_tool_writes_is_not_an_action() -> None:
    lm = TabularLM.random(".=12", order=1, seed=1)
    base = Strings(4, Stops((0,), in_text=True), 4, tokenizer=lm.tokenizer)
    space = with_tool(base, Tool(lambda text: "12" if text.endswith("=") else None, "=", room=4))
    policy = LMPolicy(lm, space, [Problem((2,))])
    rows = written(policy, 0, [[2, 1, 2, 3], [3]])
    assert rows.kind.tolist() == [[FREE, FREE, FORCED, FORCED], [FREE, PAD, PAD, PAD]]
    assert (rows.log_q[0, 2:] == 0).all() and (rows.log_b[0, 2:4] == 0).all() and (rows.log_q[0, :2] < 0).all()
    assert not rows.can_stop[0, 2:4].any()
    with pytest.raises(InputError, match="latent 0 has 3 as move 2, where the space puts 2 in"):
        written(policy, 0, [[2, 1, 3, 3]])
    with pytest.raises(InputError, match="latent 0 may not stop after 3 moves"):
        written(policy, 0, [[2, 1, 2]])


def test_what_cannot_be_written_is_named() -> None:
    policy = policy_of(infill(LM, "ab", "ba", stop=".", max_tokens=4, join=""))
    for ids, stop, words in (
        ([], 0, "no latents"),
        ([[1], [1, 2, 1, 2, 1]], 0, "latent 1 has 5 moves, over the limit of 4"),
        ([[1], [1, 0]], 0, r"latent 1 has 0 \('\.'\) as move 1, which is not legal; a stop is no move"),
        ([[1, 77]], 0, "latent 0 has 77 as move 1, which is not legal"),
        ([[-1]], 0, "latent 0 has -1 as move 0, which is not legal"),
        ([[1], []], 0, "latent 1 may not stop after 0 moves"),
        ([[1]], 1, "latent 0 ends with stop 1; give one from 0 to 0"),
    ):
        with pytest.raises(InputError, match=words):
            written(policy, 0, ids, stop)
    two = posterior(TabularLM.random(".!ab ", order=2, seed=2), [Problem((2,))], stop=(0, 1), max_tokens=2)
    with pytest.raises(InputError, match="latent 0 is stopped by its space after 2 moves, which is stop 0 and not 1"):
        written(policy_of(two), 0, [[2, 3]], 1)
