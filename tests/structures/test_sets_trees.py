"""Sets and trees as spaces, and the pictures of all three: counts, paths, an inside algorithm, words, networkx."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from retrodict.errors import InputError
from retrodict.rng import generator
from retrodict.spaces.dags import Dags, edges_to_graph, rollouts_of
from retrodict.spaces.enumerate import enumerate_objects
from retrodict.spaces.sets import Subsets
from retrodict.spaces.trees import Trees
from retrodict.structures.draw import dot, drawing, save_picture, to_networkx
from retrodict.testing.laws import check_space

CATALAN = {1: 1, 2: 1, 3: 2, 4: 5, 5: 14, 6: 42}


@pytest.mark.parametrize("space", [Subsets(4, max_size=2), Trees(4)], ids=["sets", "trees"])
def test_laws(space: Any) -> None:
    check_space(space, 1)


@pytest.mark.parametrize(("atoms", "most", "count"), [(6, None, 64), (5, 2, 16), (4, 0, 1)])
def test_every_set_once(atoms: int, most: int | None, count: int) -> None:
    space = Subsets(atoms, max_size=most)
    assert len(space.enumerate()) == count
    paths = enumerate_objects(space, 0)
    mass: dict[tuple[int, ...], float] = {}
    for key, log_pb in zip(space.keys(paths), paths.log_pb.sum(1).tolist(), strict=True):
        mass[key] = mass.get(key, 0.0) + math.exp(log_pb)
    assert len(mass) == count and max(abs(m - 1) for m in mass.values()) < 1e-9
    assert {tuple(m) for m in space.members(paths).tolist()} == {tuple(m) for m in space.enumerate().tolist()}


@pytest.mark.parametrize("leaves", CATALAN)
def test_catalan(leaves: int) -> None:
    space = Trees(leaves)
    trees = space.enumerate()
    assert len(trees) == CATALAN[leaves] == len(set(space.show(trees)))
    assert bool((trees.n == 2 * leaves - 1).all())
    assert not bool(trees.can_stop[:, :-1].any())


def test_spans_and_the_inside_algorithm() -> None:
    """The sum over trees of a product over spans, by enumeration and by dynamic programming (CKY)."""
    leaves = 6
    score = torch.randn(leaves + 1, leaves + 1, leaves + 1, generator=generator(0), dtype=torch.float64)
    space = Trees(leaves)
    trees = space.enumerate()
    left, split, right = space.spans(trees).unbind(2)
    assert bool(((left < split) & (split < right)).all())
    found = score[left, split, right].sum(1).logsumexp(0)
    inside: dict[tuple[int, int], Tensor] = {(i, i + 1): torch.zeros((), dtype=torch.float64) for i in range(leaves)}
    for width in range(2, leaves + 1):
        for i in range(leaves - width + 1):
            k = i + width
            inside[i, k] = torch.stack(
                [score[i, j, k] + inside[i, j] + inside[j, k] for j in range(i + 1, k)]
            ).logsumexp(0)
    assert float(found) == pytest.approx(float(inside[0, leaves]), abs=1e-10)


def test_words() -> None:
    trees = Trees(3, ("a", "b", "c"))
    assert sorted(trees.show(trees.enumerate())) == ["((a b) c)", "(a (b c))"]
    sets = Subsets(2, names=("rain", "wet"))
    assert set(sets.show(enumerate_objects(sets, 0))) == {"{}", "{rain}", "{wet}", "{rain, wet}"}


def test_pictures(tmp_path: Path) -> None:
    space = Dags(3, names=("rain", 'the "wet"', "cloud"))
    rows = rollouts_of(space, edges_to_graph([(2, 0), (0, 1)], 3))
    picture = drawing(space, rows)
    assert '"2" -> "0";' in dot(picture) and '"1" [label="the \\"wet\\""];' in dot(picture)
    graph = to_networkx(picture)
    assert sorted(graph.edges) == [("0", "1"), ("2", "0")] and graph.nodes["2"]["label"] == "cloud"
    trees = Trees(3, ("a", "b", "c"))
    shown = trees.show(trees.enumerate()).index("((a b) c)")
    tree = to_networkx(drawing(trees, trees.enumerate(), shown))
    assert tree.number_of_nodes() == 5
    assert sorted(d["label"] for n, d in tree.nodes(data=True) if tree.out_degree(n) == 0) == ["a", "b", "c"]
    (root,) = [n for n in tree if tree.in_degree(n) == 0]
    assert sorted(tree.nodes[n]["label"] for n in tree.successors(root)) == ["", "c"]
    sets = Subsets(3)
    both = enumerate_objects(sets, 0)
    assert len(drawing(sets, both, len(both) - 1).arrows) == 3
    for name, made in (("graph.png", picture), ("tree.svg", drawing(trees, trees.enumerate()))):
        save_picture(made, tmp_path / name)
        assert (tmp_path / name).stat().st_size > 1000


def test_refusals() -> None:
    with pytest.raises(InputError, match="at least one leaf"):
        Trees(0)
    with pytest.raises(InputError, match="2 words for 3 leaves"):
        Trees(3, ("a", "b"))
    with pytest.raises(InputError, match="3 different words"):
        Subsets(3, ("a", "b"))
    with pytest.raises(InputError, match="too many to list"):
        Subsets(30).enumerate()
    with pytest.raises(InputError, match="no picture of _Odd"):
        drawing(_Odd(), rollouts_of(Dags(2), edges_to_graph([], 2)))


class _Odd:
    def keys(self, rollouts: Any) -> list[tuple[int, ...]]:
        return [(-1,)] * len(rollouts)
