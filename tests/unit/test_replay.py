"""Replay: what is kept, what is drawn and how often, what a file holds, and what a person may write."""

from __future__ import annotations

import math
import random
from collections import Counter
from dataclasses import replace
from functools import cache

import pytest
import torch
from replays import LM, drawn, equal, held, line, put, target_of

from retrodict.errors import InputError
from retrodict.numerics import NEG_INF, at_end
from retrodict.rng import generator
from retrodict.spaces.enumerate import enumerate_objects
from retrodict.testing import SetPolicy, set_target
from retrodict.training.distance import bag_distance, edit_distance
from retrodict.training.replay import Replay
from retrodict.training.shelf import joined

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
