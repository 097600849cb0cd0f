"""The space of DAGs: counts, closures, orders and limits, against recomputation and the tables of OEIS."""

from __future__ import annotations

import math

import pytest
import torch
from jaxtyping import Bool
from torch import Tensor

from retrodict.errors import InputError
from retrodict.rng import generator
from retrodict.spaces.dags import (
    Dags,
    acyclic,
    adjacency,
    all_dags,
    closure,
    graph_codes,
    markov_classes,
    mask_to_adjacency,
    parent_masks,
    rollouts_of,
)
from retrodict.spaces.enumerate import enumerate_objects
from retrodict.testing.laws import check_space, random_rollouts

BY_EDGES = {
    2: [1, 2],
    3: [1, 6, 12, 6],
    4: [1, 12, 60, 152, 186, 108, 24],
    5: [1, 20, 180, 940, 3050, 6180, 7960, 6540, 3330, 960, 120],
}
CLASSES = {2: 2, 3: 11, 4: 185, 5: 8782}

LIMITED = {
    "free": Dags(4),
    "required": Dags(4, required=((2, 1), (1, 0))),
    "forbidden": Dags(4, forbidden=((0, 1), (0, 2), (3, 0))),
    "one parent": Dags(4, max_parents=1),
    "two edges": Dags(4, max_edges=2),
    "all": Dags(4, required=((0, 3),), forbidden=((2, 1),), max_parents=2, max_edges=4, names=("a", "b", "c", "d")),
}


@pytest.mark.parametrize("d", BY_EDGES)
def test_counts_of_graphs_and_classes(d: int) -> None:
    graphs = all_dags(d)
    assert graphs.flatten(1).sum(1).bincount().tolist() == BY_EDGES[d]  # OEIS A003024 by edges
    assert len(graph_codes(graphs).unique()) == len(graphs)
    assert int(markov_classes(graphs).max()) + 1 == CLASSES[d]  # OEIS A007984


def by_search(graph: Tensor) -> list[list[bool]]:
    """T[i][j], j is i or an ancestor of i, by walking the parents of one graph."""
    d, out = len(graph), []
    for i in range(d):
        seen, todo = {i}, [i]
        while todo:
            for j in graph[:, todo.pop()].nonzero().flatten().tolist():
                if j not in seen:
                    seen.add(j)
                    todo.append(j)
        out.append([j in seen for j in range(d)])
    return out


def random_dags(d: int, n: int, seed: int = 0) -> Bool[Tensor, "n d d"]:
    gen = generator(seed)
    order = torch.rand(n, d, generator=gen).argsort(1)
    upper = (torch.rand(n, d, d, generator=gen) < 0.3).triu(1)
    return upper.gather(1, order[:, :, None].expand(-1, -1, d)).gather(2, order[:, None, :].expand(-1, d, -1))


@pytest.mark.parametrize("d", [1, 2, 5, 20])
def test_closure_is_that_of_a_search(d: int) -> None:
    graphs = random_dags(d, 8)
    assert closure(graphs).tolist() == [by_search(g) for g in graphs]
    assert bool(acyclic(graphs).all())
    assert torch.equal(mask_to_adjacency(parent_masks(graphs)), graphs)


@pytest.mark.parametrize("d", [3, 20])
def test_steps_keep_the_closure_and_the_menu(d: int) -> None:
    space, gen = Dags(d), generator(1)
    s = space.start(torch.zeros(16, dtype=torch.long))
    for _ in range(min(12, space.max_moves)):
        menu = space.menu(s)
        assert menu.legal is not None
        for k in (0, 7):  # legal is what leaves the graph acyclic, edge by edge
            for move in torch.randint(d * d, (6,), generator=gen).tolist():
                grown = s.graph[k].flatten().clone()
                new = not grown[move]
                grown[move] = True
                assert bool(menu.legal[k, move]) == (new and bool(acyclic(grown.view(1, d, d))))
        move = torch.multinomial(menu.legal.float(), 1, generator=gen).squeeze(1)
        s = space.step(s, move)
        assert torch.equal(s.ancestors, closure(s.graph))


@pytest.mark.parametrize("name", ["required", "all"])
def test_laws_of_a_space(name: str) -> None:
    check_space(LIMITED[name], 1)


@pytest.mark.parametrize("name", ["free", "required", "all"])
def test_every_graph_once_under_p_b(name: str) -> None:
    space = LIMITED[name] if name != "free" else Dags(3)
    paths = enumerate_objects(space, 0)
    keys, mass, count = space.keys(paths), {}, {}
    for key, log_pb, n in zip(keys, paths.log_pb.sum(1).tolist(), paths.n.tolist(), strict=True):
        mass[key] = mass.get(key, 0.0) + math.exp(log_pb)
        count[key] = (count.get(key, (0, 0))[0] + 1, n)
    assert len(mass) == len(space.enumerate())
    assert max(abs(m - 1) for m in mass.values()) < 1e-12
    assert all(orders == math.factorial(n) for orders, n in count.values())  # every order of a graph's edges is legal


@pytest.mark.parametrize("space", LIMITED.values(), ids=LIMITED)
def test_lists_of_graphs_and_their_rollouts(space: Dags) -> None:
    graphs = space.enumerate()
    rows = rollouts_of(space, graphs)
    assert torch.equal(space.graphs(rows), graphs)
    assert torch.equal(space.graphs(rows), adjacency(rows, 4, space.required))
    assert len(set(space.keys(rows))) == len(graphs)
    reached = {k for k in space.keys(random_rollouts(space, torch.zeros(200, dtype=torch.long), generator(0)))}
    assert reached <= set(space.keys(rows))
    assert int(rows.n.max()) <= space.max_moves


def test_words() -> None:
    space = Dags(3, required=((2, 0),), names=("rain", "wet", "cloud"))
    shown = space.show(rollouts_of(space, space.enumerate()))
    assert shown[0] == "cloud -> rain" and "rain -> wet, cloud -> rain" in shown
    assert Dags(2).show(rollouts_of(Dags(2), all_dags(2)))[0] == "no edges"


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"required": ((0, 1), (1, 2), (2, 0), (0, 3))}, "0 -> 1, 1 -> 2, 2 -> 0 lie on a cycle"),
        ({"required": ((1, 1),)}, "1 -> 1 lie on a cycle"),
        ({"required": ((0, 1),), "forbidden": ((0, 1),), "names": tuple("abcd")}, "a -> b is both required and"),
        ({"required": ((0, 3), (1, 3)), "max_parents": 1}, r"2 parents are required \(0 -> 3, 1 -> 3\)"),
        ({"required": ((0, 3), (1, 3)), "max_edges": 1}, r"2 edges are required \(0 -> 3, 1 -> 3\)"),
        ({"required": ((0, 4),)}, "outside 0 to 3"),
        ({"names": ("a", "b")}, "4 different words"),
    ],
)
def test_contradictions_are_named(given: dict, says: str) -> None:
    with pytest.raises(InputError, match=says):
        Dags(4, **given)


def test_too_large_to_list_or_to_hold() -> None:
    with pytest.raises(InputError, match="too many to list.*sampler"):
        Dags(6).enumerate()
    with pytest.raises(InputError, match="1 to 57 nodes"):
        Dags(100)
