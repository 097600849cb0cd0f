"""Stories: families, unique answers, changes that change the answer; the planner against plain search."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from retrodict.errors import InputError
from retrodict.rng import generator
from retrodict.structures.planner import (
    COST,
    Worlds,
    answer,
    distances,
    first_step_values,
    plans,
    solve,
    values,
    walk_utility,
)
from retrodict.structures.stories import CONDITIONS, FAMILIES, graph, story
from retrodict.structures.stories_words import RENDERERS


def walks(open_, start: int):
    """Every walk that repeats no place, the empty one included."""
    d = len(open_)
    for t in range(d):
        for path in itertools.permutations([i for i in range(d) if i != start], t):
            stops = (start, *path)
            if all(open_[a, b] for a, b in itertools.pairwise(stops)):
                yield path


def brute(open_, reward, start: int) -> float:
    """The best value of any walk."""
    return max(float(reward[(start, *p)[-1]]) - COST * len(p) for p in walks(open_, start))


def random_worlds(n: int, d: int, seed: int) -> Worlds:
    gen = generator(seed)
    a = torch.rand(n, d, d, generator=gen) < 0.35
    a = (a | a.transpose(1, 2)) & ~torch.eye(d, dtype=torch.bool)
    reward = torch.randint(0, 6, (n, d), generator=gen).double()
    weight = torch.rand(n, generator=gen, dtype=torch.float64)
    return Worlds(a, reward, weight / weight.sum())


def test_value_iteration_equals_search_over_walks():
    w = random_worlds(30, 5, 0)
    v, far = values(w.open, w.reward), distances(w.open)
    for k in range(30):
        for i in range(5):
            assert float(v[k, i]) == brute(w.open[k], w.reward[k], i)
            steps = {p[-1]: len(p) for p in sorted(walks(w.open[k], i), key=len, reverse=True) if p}
            assert all(float(far[k, i, j]) == steps.get(j, 0 if i == j else math.inf) for j in range(5))
        value, plan = solve(w.open[k], w.reward[k], 0)
        assert value == float(v[k, 0]) and plan in set(walks(w.open[k], 0))
        assert float(w.reward[k, (0, *plan)[-1]]) - COST * len(plan) == value


def test_plans_are_weighed_over_worlds():
    w = random_worlds(12, 4, 1)
    found = plans(w, 0)
    assert found[0].utility == max(p.utility for p in found)
    for p in found:
        u, best = 0.0, 0.0
        for k in range(12):
            here, spent, going = 0, 0.0, True
            for there in p.places:
                spent += COST if going else 0.0
                going = going and bool(w.open[k, here, there])
                here = there
            mine = (float(w.reward[k, here]) if going else 0.0) - spent
            u += float(w.weight[k]) * mine
            best += float(w.weight[k]) * (mine == brute(w.open[k], w.reward[k], 0))
        assert math.isclose(p.utility, u, abs_tol=1e-12) and math.isclose(p.best, best, abs_tol=1e-12)
    assert float(walk_utility(w, 0, ()).sum()) == float(w.reward[:, 0].sum())


def test_votes_of_first_steps():
    w = random_worlds(12, 4, 2)
    found = answer(w, 0, "first", [(1,), (2,), (3,)])
    q = first_step_values(w.open, w.reward, 0)[:, 1:]
    wins = (q == q.max(1, keepdim=True).values).double()
    assert torch.allclose(found.best, (w.weight[:, None] * wins).sum(0))
    assert torch.allclose(found.utility, (w.weight[:, None] * q).sum(0))


def test_a_way_is_optimal_where_it_is_open_and_none_is_shorter():
    w, paths = random_worlds(20, 4, 3), [(1, 3), (2, 3), (3,)]
    found = answer(w, 0, "way", paths)
    for i, path in enumerate(paths):
        may, best = 0.0, 0.0
        for k in range(20):
            every = {p for p in walks(w.open[k], 0) if p and p[-1] == 3}
            may += float(w.weight[k]) * (path in every)
            best += float(w.weight[k]) * (path in every and len(path) == min(map(len, every)))
        assert math.isclose(float(found.utility[i]), may, abs_tol=1e-12)
        assert math.isclose(float(found.best[i]), best, abs_tol=1e-12)


@pytest.mark.parametrize("family", FAMILIES)
def test_families(family):
    for d in (4, 5, 6, 9):
        a = graph(family, d, generator(1))
        assert torch.equal(a, a.T) and not bool(a.diagonal().any())
        assert bool(distances(a[None]).isfinite().all())
        links, degrees = int(a.sum()) // 2, a.sum(1)
        if family in ("line", "tree"):
            assert links == d - 1
        if family in ("line", "ring"):
            assert int(degrees.max()) == 2 and links == d - 1 + (family == "ring")


@pytest.mark.parametrize("condition", CONDITIONS)
@pytest.mark.parametrize("family", FAMILIES)
def test_true_answers_and_changes(family, condition):
    """On the true map the planner answers every question, and a change makes the former answer wrong."""
    for renderer in RENDERERS:
        s = story(family, condition, unsaid=0.1, vague=0.2, renderer=renderer, seed=7)
        w = Worlds(s.after[None], s.reward[None], torch.ones(1, dtype=torch.float64))
        for q in s.questions:
            u = answer(w, s.start, q.kind, q.paths).utility
            assert sum(q.right) == 1 and q.right[int(u.argmax())] and len(set(q.options)) == len(q.options) > 1
        assert (condition == "detour") == (not torch.equal(s.before, s.after))
        assert s == s and story(family, condition, unsaid=0.1, vague=0.2, renderer=renderer, seed=7).text == s.text


def test_unsaid_and_vague_shares():
    full = story("ring", vague=0.0, seed=3)
    less = story("ring", vague=0.0, unsaid=0.5, seed=3)
    assert [x.kind for x in full.said].count("link") == 6 and [x.kind for x in less.said].count("link") == 3
    unclear = story("ring", vague=1.0, seed=3)
    assert all(len(x.pairs) > 1 for x in unclear.said if x.kind == "link")
    for x in unclear.said:
        assert x.kind != "link" or any(bool(full.before[i, j]) for i, j in x.pairs)


@pytest.mark.parametrize("kwargs, match", [
    ({"family": "star"}, "unknown family 'star'"), ({"condition": "plane"}, "did you mean 'plain'"),
    ({"places": 3}, "at least 4 places"), ({"places": 11}, "10 names"), ({"renderer": "room"}, "did you mean 'rooms'"),
    ({"unsaid": 0.9, "vague": 0.2}, "together at most 1"),
])  # fmt: skip
def test_what_cannot_be_told(kwargs, match):
    with pytest.raises(InputError, match=match):
        story(**kwargs)
