"""Scores of data against enumeration, independent formulas and the law that a Markov class has one score."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from retrodict.errors import InputError
from retrodict.rng import generator
from retrodict.spaces.dags import Dags, all_dags, markov_classes, parent_masks
from retrodict.structures import modular, priors, scores
from retrodict.structures.data import Table
from retrodict.structures.modular import LocalCache, LocalTable, Modular, combined, tabulate
from retrodict.structures.posterior import log_scores
from retrodict.testing.waves import WAVES, waves


def categories(n: int = 60, sizes: tuple[int, ...] = (2, 3, 2, 4), seed: int = 0) -> Table:
    gen = generator(seed)
    x = torch.stack([torch.randint(k, (n,), generator=gen) for k in sizes], 1)
    x[:, 1] = (x[:, 0] + x[:, 1] // 2) % sizes[1]
    x[:, 3] = (2 * x[:, 2] + x[:, 3] // 2) % sizes[3]
    return Table(x, tuple("abcd"), tuple(tuple(map(str, range(k))) for k in sizes))


def spread_in_classes(score: Modular, d: int) -> float:
    graph = all_dags(d)
    value, of = log_scores(score, parent_masks(graph)), markov_classes(graph)
    top = torch.full((int(of.max()) + 1,), -math.inf, dtype=torch.float64).scatter_reduce(0, of, value, "amax")
    low = torch.full_like(top, math.inf).scatter_reduce(0, of, value, "amin")
    return float((top - low).max())


@pytest.mark.parametrize("d", WAVES)
def test_bge_gives_the_exact_values_of_the_reference(d: int) -> None:
    value = log_scores(scores.bge(waves(d)), parent_masks(all_dags(d)))
    log_z = torch.logsumexp(value, 0)
    p = (value - log_z).exp()
    found = (log_z, p.max(), (p * all_dags(d).flatten(1).sum(1)).sum(), -(p * (value - log_z)).sum())
    assert torch.stack(found).tolist() == pytest.approx(WAVES[d], abs=1e-6)


def test_bge_is_the_per_node_formula() -> None:
    """structures.md section 1, node by node with its own determinants."""
    table, d = waves(4), 4
    x = table.values.numpy()
    n, a_w, t = len(x), d + 2, 0.5
    r = t * np.eye(d) + (x - x.mean(0)).T @ (x - x.mean(0)) + n / (n + 1) * np.outer(x.mean(0), x.mean(0))
    found = tabulate(scores.bge(table))
    for j in range(d):
        for mask in range(2**d):
            if mask >> j & 1:
                assert found[j, mask] == -math.inf
                continue
            pa = [i for i in range(d) if mask >> i & 1]
            p, both = len(pa), [*pa, j]
            logdet = np.linalg.slogdet(r[np.ix_(pa, pa)])[1] if pa else 0.0
            want = (0.5 * math.log(1 / (n + 1))
                    + math.lgamma((n + a_w - d + p + 1) / 2) - math.lgamma((a_w - d + p + 1) / 2)
                    - n / 2 * math.log(math.pi) + 0.5 * (a_w - d + 2 * p + 1) * math.log(t)
                    + 0.5 * (n + a_w - d + p) * logdet
                    - 0.5 * (n + a_w - d + p + 1) * np.linalg.slogdet(r[np.ix_(both, both)])[1])  # fmt: skip
            assert float(found[j, mask]) == pytest.approx(want, abs=1e-9)


@pytest.mark.parametrize("d", [2, 3, 4])
def test_equal_inside_every_markov_class(d: int) -> None:
    table = categories()
    assert table.levels is not None
    some = Table(table.values[:, :d], table.names[:d], table.levels[:d])
    for score in (
        scores.bge(waves(d)),
        scores.bdeu(some),
        scores.bdeu(some, 10.0),
        scores.bic(some),
        scores.bic(waves(d)),
    ):
        assert spread_in_classes(score, d) < 1e-9


def test_planted_one_pseudo_count_a_cell_is_not_score_equivalent() -> None:
    """K2 (1 a cell, whatever the number of parents) in place of ess/(q r)."""
    table = categories(sizes=(2, 3, 2, 4))
    assert table.levels is not None
    sizes = [len(x) for x in table.levels]

    def local(child: torch.Tensor, parents: torch.Tensor) -> torch.Tensor:
        return torch.tensor([urn(table, j, m, 1.0, 1.0 * sizes[j]) for j, m in
                             zip(child.tolist(), parents.tolist(), strict=True)], dtype=torch.float64)  # fmt: skip

    k2 = LocalTable(tabulate(LocalCache(4, local, "k2")), "k2")
    assert spread_in_classes(k2, 4) > 0.1


def urn(table: Table, j: int, mask: int, cell: float, state: float) -> float:
    """log p(x_j | parents) row by row: the next level's probability is (cell + n_ik) / (state + n_i)."""
    seen: dict[tuple[int, ...], dict[int, int]] = {}
    total = 0.0
    for row in table.values.tolist():
        counts = seen.setdefault(tuple(row[i] for i in range(table.d) if mask >> i & 1), {})
        total += math.log((cell + counts.get(row[j], 0)) / (state + sum(counts.values())))
        counts[row[j]] = counts.get(row[j], 0) + 1
    return total


def test_bdeu_is_the_urn_that_predicts_row_after_row() -> None:
    table, ess = categories(), 2.5
    assert table.levels is not None
    score = scores.bdeu(table, ess)
    for j, mask in [(0, 0), (0, 0b1110), (1, 0b1), (3, 0b100), (3, 0b111), (2, 0b1010)]:
        q = math.prod(len(table.levels[i]) for i in range(4) if mask >> i & 1)
        want = urn(table, j, mask, ess / (q * len(table.levels[j])), ess / q)
        assert float(score.gather(torch.tensor([j]), torch.tensor([mask]))) == pytest.approx(want, abs=1e-9)


def test_bic_is_that_of_a_regression_or_of_frequencies() -> None:
    x = waves(4).values.numpy()
    n, pa = len(x), [0, 3]
    design = np.column_stack([np.ones(n), x[:, pa]])
    rest = x[:, 2] - design @ np.linalg.lstsq(design, x[:, 2], rcond=None)[0]
    want = -n / 2 * (math.log(2 * math.pi * (rest**2).mean()) + 1) - 4 / 2 * math.log(n)  # 2 slopes, mean, variance
    found = scores.bic(waves(4)).gather(torch.tensor([2]), torch.tensor([0b1001]))
    assert float(found) == pytest.approx(want, abs=1e-9)
    table = categories()
    value = table.values.tolist()
    want = -math.log(len(value)) / 2 * (2 * 4) * (3 - 1)
    for a in range(2):
        for d in range(4):
            column = [row[1] for row in value if (row[0], row[3]) == (a, d)]
            want += sum(column.count(k) * math.log(column.count(k) / len(column)) for k in set(column))
    found = scores.bic(table).gather(torch.tensor([1]), torch.tensor([0b1001]))
    assert float(found) == pytest.approx(want, abs=1e-9)


@pytest.mark.parametrize("score", [scores.bge, scores.bic, scores.bdeu])
def test_rows_where_the_child_was_set_are_dropped_for_it_alone(score) -> None:
    table = categories(80) if score is scores.bdeu else waves(4)
    mark = torch.zeros(len(table), 4, dtype=torch.bool)
    mark[:7, 1] = True
    found = score(Table(table.values, table.names, table.levels, mark))
    kept, whole = score(table.rows(torch.arange(7, len(table)))), score(table)
    child, parents = torch.tensor([1, 1, 0, 2]), torch.tensor([0b101, 0, 0b1010, 0b11])
    want = torch.where(child == 1, kept.gather(child, parents), whole.gather(child, parents))
    assert torch.allclose(found.gather(child, parents), want, atol=1e-9, rtol=0)
    mark[:, 3] = True  # never seen unset: its parents do not matter
    if score is not scores.bic:
        free = score(Table(table.values, table.names, table.levels, mark)).gather(
            torch.tensor([3, 3]), torch.tensor([0, 7])
        )
        assert free.abs().max() < 1e-9


def test_a_cache_gives_what_the_table_gives() -> None:
    full = scores.bge(waves(5))
    asked = []

    def local(child: torch.Tensor, parents: torch.Tensor) -> torch.Tensor:
        asked.append(len(child))
        return full.gather(child, parents)

    cache = LocalCache(5, local, "1")
    child, parents = torch.tensor([0, 1, 0, 4]), torch.tensor([0b110, 0b1, 0b110, 0b1111])
    assert torch.equal(cache.gather(child, parents), full.gather(child, parents))
    assert torch.equal(cache.gather(child.flip(0), parents.flip(0)), full.gather(child, parents).flip(0))
    assert asked == [3]
    more = cache.gather(torch.tensor([2, 0]), torch.tensor([0, 0b110]))
    assert torch.equal(more, full.gather(torch.tensor([2, 0]), torch.tensor([0, 0b110]))) and asked == [3, 1]


def test_a_cache_that_grows_keeps_every_value(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(modular, "FRESH", 5)
    full, gen = scores.bge(waves(5)), generator(1)
    cache = LocalCache(5, full.gather, "1")
    for _ in range(40):
        child = torch.randint(5, (7,), generator=gen)
        parents = torch.randint(32, (7,), generator=gen) & ~(2**child)
        assert torch.equal(cache.gather(child, parents), full.gather(child, parents))
    assert len(cache.old.keys) > 50 and len(cache.fresh.keys) < 20
    assert len(cache.old.keys.unique()) == len(cache.old.keys)


def test_combined_tempers_and_keeps_what_is_forbidden() -> None:
    a, b = scores.bge(waves(3)), priors.hard(Dags(3, forbidden=((0, 1),), required=((2, 1),)))
    both = combined({"data": a, "rules": b}, {"data": 0.5})
    child, parents = torch.tensor([1, 1, 1, 0]), torch.tensor([0b100, 0b101, 0, 0b10])
    want = torch.where(torch.tensor([True, False, False, True]), 0.5 * a.gather(child, parents), -math.inf)
    assert torch.equal(both.gather(child, parents), want)
    assert float(combined({"rules": b}, {"rules": 0.0}).gather(child, parents).abs().max()) == 0
    with pytest.raises(InputError, match="3, 4"):
        combined({"a": a, "b": priors.fair(4)})


def test_priors_by_their_own_words() -> None:
    graph = all_dags(4)
    size, d = graph.flatten(1).sum(1).double(), 4
    p = 2 * 0.9 / 3
    assert torch.allclose(
        log_scores(priors.erdos_renyi(4, 0.9), parent_masks(graph)), size * math.log(p) + (6 - size) * math.log(1 - p)
    )
    assert torch.allclose(log_scores(priors.edges(4, 0.3), parent_masks(graph)), size * math.log(0.3))
    table = tabulate(priors.fair(d))[0]
    count = torch.tensor([bin(m).count("1") for m in range(16)])
    weight = table.exp()
    assert [float(weight[(count == k) & (table > -math.inf)].sum()) for k in range(d)] == pytest.approx([1.0] * d)
    hard = priors.hard(Dags(4, required=((0, 3),), forbidden=((1, 2),), max_parents=2))
    want = graph[:, 0, 3] & ~graph[:, 1, 2] & (graph.sum(1).amax(1) <= 2)
    assert torch.equal(log_scores(hard, parent_masks(graph)) == 0, want)


def test_what_cannot_be_scored_is_refused_in_one_line() -> None:
    flat, cells = waves(3), categories()
    for call, word in [
        (lambda: scores.bge(cells), "use bdeu or bic"),
        (lambda: scores.bdeu(flat), "use bge or bic"),
        (lambda: scores.bdeu(cells, 0.0), "positive equivalent sample size"),
        (lambda: scores.bge(flat, alpha_w=4.0), "alpha_w > d"),
        (lambda: scores.bic(flat.rows(torch.arange(3))), "more than 3 rows"),
        (lambda: scores.bic(Table(flat.values[:, [0, 0, 1]], ("a", "b", "c"))), "linear combinations"),
        (lambda: priors.edges(3, 0.0), "forbid edges in the space"),
        (lambda: priors.erdos_renyi(3, 2.0), "less than 1"),
    ]:
        with pytest.raises(InputError, match=word) as told:
            call()
        assert "\n" not in str(told.value)
