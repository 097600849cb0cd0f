"""Every method over graphs against enumeration, and the faults that must show."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from retrodict.errors import InputError
from retrodict.numerics import NEG_INF
from retrodict.rng import generator
from retrodict.spaces.dags import Dags, acyclic, all_dags, graph_codes, parent_masks
from retrodict.structures import mcmc_order, priors, scores
from retrodict.structures.bootstrap import bootstrap_graphs, climb, gains
from retrodict.structures.exact import enumerated
from retrodict.structures.intervene import expected_gain
from retrodict.structures.mcmc_order import draw_graphs, extensions, log_order, log_zeta, order_mcmc
from retrodict.structures.mcmc_structure import apply, log_ratio, neighbours, structure_mcmc
from retrodict.structures.methods import choose, graph_posterior
from retrodict.structures.modular import LocalTable, Modular, combined, tabulate
from retrodict.structures.posterior import GraphPosterior, difference, expected_shd, log_scores, sampled
from retrodict.structures.subsets import subset_marginals
from retrodict.testing.waves import WAVES, waves


def rough(d: int, scale: float, seed: int = 0, zeros: float = 0.0) -> LocalTable:
    """Random local terms, some of them forbidden (never the empty parent set)."""
    gen = generator(seed)
    table = scale * torch.randn(d, 2**d, generator=gen, dtype=torch.float64)
    drop = torch.rand(d, 2**d, generator=gen) < zeros
    drop[:, 0] = False
    return LocalTable(table.masked_fill(drop, NEG_INF), "rough")


def orders(d: int) -> torch.Tensor:
    return torch.tensor(list(itertools.permutations(range(d))))


# -- the answer -----------------------------------------------------------------------------------------------------


def test_expected_distance_is_the_mean_over_graphs() -> None:
    found = enumerated(scores.bge(waves(4)), tuple("abcd"))
    assert found.graphs is not None and found.weights is not None
    for truth in (all_dags(4)[301], all_dags(4)[0], all_dags(4)[540]):
        differ = (found.graphs != truth) | (found.graphs != truth).transpose(1, 2)
        each = torch.triu(differ, 1).flatten(1).sum(1).double()
        assert expected_shd(found.marginals, truth) == pytest.approx(float(found.weights @ each), abs=1e-9)
    m = found.metrics(all_dags(4)[301])
    assert m["edges"] == pytest.approx(WAVES[4][2], abs=1e-6) and 0 <= m["brier"] <= 1


def test_quality_of_a_perfect_and_of_an_empty_answer() -> None:
    truth = all_dags(3)[20]
    perfect = GraphPosterior(tuple("abc"), "x", truth.double(), exact=True)
    blank = GraphPosterior(tuple("abc"), "x", torch.zeros(3, 3).double(), exact=True)
    assert perfect.metrics(truth) | {"edges": 0} == {"e_shd": 0, "auroc": 1, "brier": 0, "ece": 0, "edges": 0}
    m = blank.metrics(truth)
    assert (m["e_shd"], m["auroc"], m["brier"]) == (int(truth.sum()), 0.5, pytest.approx(int(truth.sum()) / 6))
    even = subset_marginals(priors.edges(6, 0.3)).metrics(torch.ones(6, 6, dtype=torch.bool).triu(1))
    assert even["auroc"] == 0.5  # all alike but for rounding
    assert math.isnan(perfect.metrics(torch.zeros(3, 3, dtype=torch.bool))["auroc"])


def test_samples_are_weighed_within_and_over_runs() -> None:
    graphs = all_dags(3)[torch.tensor([0, 1, 1, 24])]
    found = sampled("abc", "x", graphs, torch.tensor([0.0, 0.0, math.log(2), math.log(4)]), torch.tensor([0, 0, 1, 1]))
    assert found.weights is not None and sorted(found.weights.tolist()) == pytest.approx([1 / 8, 3 / 8, 4 / 8])
    assert found.runs is not None
    assert torch.allclose(found.runs[0], (graphs[0].double() + graphs[1].double()) / 2)
    assert torch.allclose(found.runs[1], (graphs[1].double() + 2 * graphs[3].double()) / 3)
    assert found.top(1)[0][1] == pytest.approx(0.5) and torch.equal(found.top(1)[0][0], graphs[3])
    low, high = found.interval()
    assert (low <= found.marginals).all() and (high >= found.marginals).all()
    drawn = found.sample(4000, 0)
    assert float((drawn == graphs[3]).flatten(1).all(1).double().mean()) == pytest.approx(0.5, abs=0.04)
    one = sampled("abc", "x", graphs[:1], torch.zeros(1), torch.zeros(1, dtype=torch.int64))
    assert one.interval()[1].min() == 1 and one.interval()[0].max() == 0


# -- sums over subsets ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("d", [2, 3, 4, 5])
def test_subset_sums_are_enumeration(d: int) -> None:
    for score in (scores.bge(waves(d)), rough(d, 1.0), rough(d, 60.0, 1), rough(d, 500.0, 2), rough(d, 4.0, 3, 0.6)):
        exact, found = enumerated(score), subset_marginals(score)
        assert float((exact.marginals - found.marginals).abs().max()) < 1e-9
        assert found.log_z == pytest.approx(exact.log_z, abs=1e-9)


def test_subset_sums_count_the_dags_of_more_nodes() -> None:
    assert math.exp(subset_marginals(priors.uniform(6)).log_z or 0) == pytest.approx(3_781_503, abs=1e-3)
    seven = subset_marginals(priors.uniform(7))
    assert math.exp(seven.log_z or 0) == pytest.approx(1_138_779_265, rel=1e-12)
    assert (seven.marginals[0, 1:] - seven.marginals[1, 0]).abs().max() < 1e-12


def test_planted_sinks_counted_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without alternating signs a graph counts once for each set of its sinks."""
    from retrodict.structures import subsets

    right = subsets._products

    def unsigned(a, u, sets):
        return {t: abs(x) if t else x for t, x in right(a, u, sets).items()}

    monkeypatch.setattr(subsets, "_products", unsigned)
    found, exact = subset_marginals(scores.bge(waves(4))), enumerated(scores.bge(waves(4)))
    assert found.log_z != pytest.approx(exact.log_z, abs=0.1) and difference(found, exact)[1] > 0.01


def test_constraints_hold_in_every_method() -> None:
    space = Dags(4, required=((0, 3),), forbidden=((1, 2), (2, 1)), max_parents=2)
    score = combined({"data": scores.bge(waves(4)), "hard": priors.hard(space)})
    exact = enumerated(score)
    assert exact.graphs is not None and exact.weights is not None
    inside = {tuple(x) for x in space.enumerate().flatten(1).tolist()}
    assert {
        tuple(g) for g, w in zip(exact.graphs.flatten(1).tolist(), exact.weights.tolist(), strict=True) if w
    } == inside
    for method in ("subsets", "order", "structure"):
        found = graph_posterior(score, method=method, space=space, chains=64, steps=150, seed=1)
        assert found.marginals[0, 3] == pytest.approx(1.0) and found.marginals[1, 2] == 0 == found.marginals[2, 1]
        assert difference(exact, found)[0] < 0.05


# -- chains over graphs ---------------------------------------------------------------------------------------------


def test_neighbours_are_the_graphs_one_legal_change_away() -> None:
    graph = all_dags(4)[::3]
    open_ = neighbours(graph)
    known = set(graph_codes(all_dags(4)).tolist())
    for g, may in zip(graph, open_, strict=True):
        for i, j in itertools.permutations(range(4), 2):
            add, cut, turn = g.clone(), g.clone(), g.clone()
            add[i, j], cut[i, j] = True, False
            turn[i, j], turn[j, i] = False, True
            legal = [bool(~g[i, j]) and int(graph_codes(add[None])) in known, bool(g[i, j]),
                     bool(g[i, j]) and int(graph_codes(turn[None])) in known]  # fmt: skip
            assert may[:, i, j].tolist() == legal
        assert not may[:, torch.arange(4), torch.arange(4)].any()


def kernel(score: Modular, ratio=log_ratio) -> torch.Tensor:
    """The chain's transition matrix over all graphs, from its own parts."""
    graph, d = all_dags(score.d), score.d
    place = {c: k for k, c in enumerate(graph_codes(graph).tolist())}
    value, open_ = log_scores(score, parent_masks(graph)), neighbours(graph).flatten(1)
    n = open_.sum(1)
    out = torch.zeros(len(graph), len(graph), dtype=torch.float64)
    for move in range(3 * d * d):
        rows = open_[:, move].nonzero()[:, 0]
        there = apply(graph[rows], torch.full_like(rows, move))
        assert acyclic(there).all()
        to = torch.tensor([place[c] for c in graph_codes(there).tolist()], dtype=torch.int64)
        accept = ratio(value[rows], value[to], n[rows], n[to]).clamp_max(0.0).exp()
        out.index_put_((rows, to), accept / n[rows], accumulate=True)
    return out + torch.diag(1 - out.sum(1))


def test_structure_chain_is_in_detailed_balance() -> None:
    score = scores.bge(waves(3))
    p, found = kernel(score), enumerated(score).weights
    assert found is not None
    flow = found[:, None] * p
    assert (flow - flow.T).abs().max() < 1e-12 and (found @ p - found).abs().max() < 1e-12
    assert (torch.linalg.matrix_power(p, 400) - found).abs().max() < 1e-6  # from any graph to any other


def test_planted_neighbourhood_sizes_left_out() -> None:
    score = scores.bge(waves(3))
    p, found = kernel(score, lambda old, new, n_old, n_new: new - old), enumerated(score).weights
    assert found is not None and (found @ p - found).abs().max() > 1e-3


def test_chains_reach_the_exact_answer() -> None:
    score = scores.bge(waves(4))
    exact = enumerated(score)
    for found in (structure_mcmc(score, chains=256, steps=200, burn_in=50, seed=0),
                  order_mcmc(score, chains=64, steps=200, burn_in=30, seed=0)):  # fmt: skip
        assert found.runs is not None
        se = found.runs.std(0) / math.sqrt(len(found.runs))
        assert ((found.marginals - exact.marginals).abs() <= 4.5 * se + 2e-3).all() and se.max() < 0.02
        assert found.counts["rhat"] < 1.05 and not found.notes
        assert found.weights is not None and float(found.weights.sum()) == pytest.approx(1.0)


# -- chains over orders ---------------------------------------------------------------------------------------------


def test_extensions_are_the_orders_that_a_graph_fits() -> None:
    graph = all_dags(4)
    place = orders(4).argsort(1)  # place of each node
    fits = torch.stack([((p[:, None] < p[None, :]) | ~graph).flatten(1).all(1) for p in place]).sum(0)
    assert torch.equal(extensions(parent_masks(graph)), fits.double())


def test_an_order_weighs_all_its_graphs() -> None:
    score = rough(4, 3.0, 5, 0.3)
    graph = all_dags(4)
    value = log_scores(score, parent_masks(graph))
    ahead = log_zeta(tabulate(score))
    for order in orders(4)[[0, 7, 13, 23]]:
        p = order.argsort()
        fits = ((p[:, None] < p[None, :]) | ~graph).flatten(1).all(1)
        assert float(log_order(ahead, order[None])) == pytest.approx(float(value[fits].logsumexp(0)), abs=1e-9)


def law_of_orders(score: Modular, log_weight) -> torch.Tensor:
    """Edge marginals that perfect order sampling gives: sum over orders and their graphs, with the graphs' weights."""
    d, graph = score.d, all_dags(score.d)
    place = orders(d).argsort(1)
    fits = torch.stack([((p[:, None] < p[None, :]) | ~graph).flatten(1).all(1) for p in place])
    value = log_scores(score, parent_masks(graph))
    joint = torch.where(fits, value, NEG_INF)  # w(order) p(graph | order)
    p = torch.softmax(joint.logsumexp(0) + log_weight(parent_masks(graph)), 0)
    return (p @ graph.flatten(1).double()).view(d, d)


def test_weights_turn_the_order_prior_into_the_uniform_one_and_without_them_it_shows() -> None:
    score = scores.bge(waves(4))
    exact = enumerated(score).marginals
    assert (law_of_orders(score, lambda m: -extensions(m).log()) - exact).abs().max() < 1e-12
    assert (law_of_orders(score, lambda m: torch.zeros(len(m)).double()) - exact).abs().max() > 0.05


def test_planted_order_prior_left_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    score = scores.bge(waves(4))
    exact = enumerated(score).marginals
    monkeypatch.setattr(mcmc_order, "extensions", lambda m: torch.ones(len(m), dtype=torch.float64))
    found = order_mcmc(score, chains=160, steps=200, burn_in=30, seed=0)
    assert found.runs is not None
    se = found.runs.std(0) / math.sqrt(160)
    assert ((found.marginals - exact).abs() / se.clamp_min(1e-3)).max() > 8


def test_drawn_parents_have_their_probabilities() -> None:
    score, order = rough(4, 1.5, 9, 0.2), torch.tensor([2, 0, 3, 1])
    n = 20_000
    masks = draw_graphs(tabulate(score), order.expand(n, -1), generator(3))
    before = {2: 0, 0: 0b100, 3: 0b101, 1: 0b1101}
    for j in range(4):
        inside = torch.arange(16) & ~before[j] == 0
        p = torch.softmax(tabulate(score)[j].masked_fill(~inside, NEG_INF), 0)
        seen = torch.bincount(masks[:, j], minlength=16) / n
        assert ((seen - p).abs() <= 4.5 * (p * (1 - p) / n).sqrt()).all()


# -- the bootstrap, and the table of methods ------------------------------------------------------------------------


def test_gains_are_differences_of_scores() -> None:
    score = scores.bge(waves(4))
    for g in all_dags(4)[[0, 77, 300, 542]]:
        open_, gain = neighbours(g[None])[0], gains(score, g)
        moves = open_.flatten().nonzero()[:, 0]
        there = log_scores(score, parent_masks(apply(g.expand(len(moves), 4, 4), moves)))
        assert torch.allclose(gain.flatten()[moves], there - log_scores(score, parent_masks(g[None])), atol=1e-9)


def test_climbing_ends_where_nothing_improves_and_the_bootstrap_counts_ends() -> None:
    score = scores.bge(waves(4))
    graph, value = climb(score, generator(0))
    best = log_scores(score, parent_masks(apply(graph.expand(48, 4, 4), torch.arange(48))))
    assert (best[neighbours(graph[None])[0].flatten()] <= value + 1e-8).all()
    found = bootstrap_graphs(waves(4), scores.bge, replicates=6)
    assert found.runs is not None and len(found.runs) == 6 and found.notes
    assert torch.allclose(found.runs.mean(0), found.marginals)
    with pytest.raises(InputError, match="at least 2"):
        bootstrap_graphs(waves(4), scores.bge, replicates=1)


def test_methods_and_their_refusals() -> None:
    assert [choose(d) for d in (3, 5, 6, 14, 15, 37)] == ["exact", "exact", "order", "order", "structure", "structure"]
    big = priors.fair(13)
    for call, words in [
        (lambda: enumerated(priors.fair(6)), "too many graphs to list .* order or structure"),
        (lambda: subset_marginals(big), "use the method order or structure"),
        (lambda: order_mcmc(priors.fair(15)), "too many parent sets"),
        (lambda: graph_posterior(big, method="ordr"), "did you mean 'order'"),
        (lambda: structure_mcmc(big, chains=0), "chains, steps and thin must be 1 or more"),
        (lambda: structure_mcmc(priors.hard(Dags(3, required=((0, 1),)))), "density zero; give start="),
        (lambda: enumerated(combined({"a": priors.hard(Dags(3, required=((0, 1),))),
                                      "b": priors.hard(Dags(3, forbidden=((0, 1),)))})), "exclude each other"),
        (lambda: subset_marginals(combined({"a": priors.hard(Dags(3, required=((0, 1),))),
                                            "b": priors.hard(Dags(3, forbidden=((0, 1),)))})), "exclude each other"),
        (lambda: subset_marginals(priors.fair(3)).sample(1, 0), "no graphs"),
    ]:  # fmt: skip
        with pytest.raises(InputError, match=words):
            call()


# -- the next experiment --------------------------------------------------------------------------------------------


def test_an_experiment_tells_a_direction_that_data_cannot() -> None:
    chain = all_dags(2)
    known = GraphPosterior(("a", "b"), "x", torch.zeros(2, 2).double(), chain, torch.tensor([0.5, 0.25, 0.25]).double())
    assert expected_gain(known).tolist() == pytest.approx(
        [0.5 * math.log(2)] * 2
    )  # either end tells a -> b from b -> a
    sure = GraphPosterior(("a", "b"), "x", torch.zeros(2, 2).double(), chain, torch.tensor([0.2, 0.8, 0.0]).double())
    assert expected_gain(sure).abs().max() < 1e-12
    line = torch.zeros(3, 3, 3, dtype=torch.bool)  # a - b - c, no collider: three graphs of one class
    line[0, 0, 1] = line[0, 1, 2] = line[1, 2, 1] = line[1, 1, 0] = line[2, 1, 0] = line[2, 1, 2] = True
    three = GraphPosterior(tuple("abc"), "x", torch.zeros(3, 3).double(), line, torch.full((3,), 1 / 3).double())
    third = math.log(3) - 2 / 3 * math.log(2)  # an end tells one graph from the other two; the middle tells all
    assert expected_gain(three).tolist() == pytest.approx([third, math.log(3), third])
    with pytest.raises(InputError, match="no graphs to tell apart"):
        expected_gain(subset_marginals(priors.fair(3)))
