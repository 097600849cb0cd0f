"""Posteriors over graphs as targets: the values of all prefixes, against the sum over nodes of each graph alone."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from retrodict.errors import InputError
from retrodict.numerics import NEG_INF
from retrodict.records import Problem
from retrodict.rng import generator
from retrodict.spaces.dags import Dags, all_dags, parent_masks, rollouts_of
from retrodict.structures.law import graph_law, jensen_shannon, log_evidence, posterior_law, total_variation
from retrodict.structures.modular import LocalTable
from retrodict.structures.scores import bge
from retrodict.structures.target import graph_target
from retrodict.testing.graphs import Flows, graph_toy
from retrodict.testing.laws import random_rollouts
from retrodict.testing.laws_values import check_target
from retrodict.testing.waves import WAVES, waves


def table(d: int, seed: int, holes: float = 0.0) -> LocalTable:
    gen = generator(seed)
    values = torch.randn(d, 2**d, generator=gen, dtype=torch.float64)
    gone = torch.rand(d, 2**d, generator=gen) < holes
    gone[:, 0] = False
    return LocalTable(values.masked_fill(gone, NEG_INF), f"{seed}")


def one_by_one(score: LocalTable, graph: Tensor) -> float:
    return sum(float(score.table[j, int(parent_masks(graph[None])[0, j])]) for j in range(len(graph)))


@pytest.mark.parametrize("d", WAVES)
def test_evidence_of_the_fixed_data(d: int) -> None:
    target = graph_target(Dags(d), {"data": bge(waves(d))})
    law = posterior_law(target)
    p = law.log_p.exp()
    found = (
        log_evidence(target),
        float(p.max()),
        float(p @ law.graphs.flatten(1).sum(1).double()),
        -float(p @ law.log_p),
    )
    assert found == pytest.approx(WAVES[d], abs=1e-6)
    if d == 3:
        edges = torch.tensor([[0, 0.472116, 0.113272], [0.393666, 0, 0.444374], [0.110395, 0.519948, 0]])
        assert torch.allclose(law.edge_marginals.float(), edges, atol=1e-6)


@pytest.mark.parametrize("holes", [0.0, 0.3])
@pytest.mark.parametrize(
    "space", [Dags(4), Dags(4, required=((3, 1), (0, 1)), max_parents=3)], ids=["free", "required"]
)
def test_values_of_every_prefix(space: Dags, holes: float) -> None:
    score = table(4, 1, holes)
    term = graph_target(space, {"table": score}).factors["table"]
    rows = random_rollouts(space, torch.zeros(12, dtype=torch.long), generator(2))
    found = term(rows, True)
    for b in range(len(rows)):
        for i in range(found.shape[1]):
            graph = space.replay(rows, torch.full_like(rows.n, i)).graph[b]
            want = one_by_one(score, graph) if i <= int(rows.n[b]) else -math.inf
            assert float(found[b, i, 0]) == pytest.approx(want, abs=1e-12)
    assert torch.equal(term(rows), found[torch.arange(12), rows.n, 0])


def test_a_forbidden_parent_set_on_the_way_is_no_end() -> None:
    """Without node 0 as a parent, node 2 is forbidden; the order 1 -> 2, 0 -> 2 passes through -inf and recovers."""
    score = table(3, 3)
    values = score.table.clone()
    values[2, 0b10] = NEG_INF
    space = Dags(3)
    rows = random_rollouts(space, torch.zeros(300, dtype=torch.long), generator(0))
    here = (rows.n >= 2) & (rows.moves[:, 0] == 5) & (rows.moves[:, 1] == 2)
    value = graph_target(space, {"t": LocalTable(values, "holes")}).factors["t"](
        rows.take(here.nonzero().squeeze(1)), True
    )
    assert len(value) and bool((value[:, 1] == NEG_INF).all()) and bool(value[:, 2].isfinite().all())


def test_tempered_factors_and_several_data_sets() -> None:
    problems = [Problem((), name="one"), Problem((), name="two")]
    prior, data = table(3, 4), [table(3, 5), table(3, 6)]
    target = graph_target(Dags(3), {"lm": prior, "data": data}, {"lm": 0.3}, problems)
    graphs = all_dags(3)
    for m in range(2):
        rows = rollouts_of(Dags(3), graphs, m)
        want = [0.3 * one_by_one(prior, g) + one_by_one(data[m], g) for g in graphs]
        assert target.log_gamma(rows).tolist() == pytest.approx(want, abs=1e-12)
    alone = target.on([problems[1]])
    assert torch.equal(alone.log_gamma(rollouts_of(Dags(3), graphs)), target.log_gamma(rollouts_of(Dags(3), graphs, 1)))
    check_target(target)
    with pytest.raises(InputError, match="no score of this data"):
        target.on([Problem((), name="three")])


@pytest.mark.parametrize("space", [Dags(3), Dags(4, required=((2, 0),), max_parents=2)], ids=["d = 3", "limits"])
def test_exact_flows_have_the_posterior_as_their_law(space: Dags) -> None:
    target = graph_toy(space.d, 7, space=space)
    flows = Flows(target)
    law, truth = graph_law(flows), posterior_law(target)
    assert flows.log_z == pytest.approx(log_evidence(target), abs=1e-10)
    assert total_variation(law, truth) < 1e-12
    assert jensen_shannon(law, truth) < 1e-12


def test_distances() -> None:
    a, b = posterior_law(graph_toy(3, 1)), posterior_law(graph_toy(3, 2))
    p, q = a.log_p.exp(), b.log_p.exp()
    m = (p + q) / 2
    want = float((p * (p / m).log() + q * (q / m).log()).sum()) / 2
    assert jensen_shannon(a, b) == pytest.approx(want, abs=1e-12)
    assert total_variation(a, b) == pytest.approx(float((p - q).clamp_min(0).sum()), abs=1e-12)


def test_refusals() -> None:
    with pytest.raises(InputError, match="needs a factor"):
        graph_target(Dags(3), {})
    with pytest.raises(InputError, match="over 3 variables, and the space over 4"):
        graph_target(Dags(4), {"t": table(3, 0)})
    with pytest.raises(InputError, match="2 scores for 1 problems"):
        graph_target(Dags(3), {"t": [table(3, 0), table(3, 1)]})
    with pytest.raises(InputError, match="no factor 'x' to temper"):
        graph_target(Dags(3), {"t": table(3, 0)}, {"x": 1.0})
