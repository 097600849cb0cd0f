"""Policies over graphs: scoring at once against step by step, gradients, the exact law, features, nets."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from retrodict.errors import InputError
from retrodict.numerics import NEG_INF
from retrodict.policies.base import FiniteStepper
from retrodict.policies.graph import GraphAttention, GraphMLP, GraphPolicy
from retrodict.records import MUST_STOP, Problem
from retrodict.rng import generator
from retrodict.spaces.dags import Dags
from retrodict.structures.data import Table
from retrodict.structures.law import graph_law
from retrodict.structures.train import data_features, graph_policy, sample_graphs
from retrodict.testing.graphs import graph_toy
from retrodict.testing.laws import check_policy, random_rollouts
from retrodict.training.threads import one_thread

LIMITS = Dags(4, required=((0, 3),), forbidden=((2, 1),), max_parents=2, max_edges=4)


def random_policy(space: Dags, net: str = "mlp", problems: int = 1, features: int = 0) -> GraphPolicy:
    """A policy far from uniform."""
    rows = [
        {"features": torch.randn(space.d, space.d, features, generator=generator(m, "cpu", 9))} for m in range(problems)
    ]
    made = [Problem((), name=str(m), row=r if features else {}) for m, r in enumerate(rows)]
    kinds: dict[str, Any] = {
        "mlp": lambda: GraphMLP(space.d, features, 16),
        "attention": lambda: GraphAttention(space.d, features, 8),
    }
    net_of = kinds[net]()
    for name, w in net_of.parameters.items():
        w.data += 0.5 * torch.randn(w.shape, generator=generator(len(name)))
    return GraphPolicy(space, made, net_of)


@pytest.mark.parametrize(
    ("space", "net", "features"),
    [(Dags(3), "mlp", 0), (LIMITS, "mlp", 2), (Dags(3), "attention", 2), (Dags(8, required=((1, 5),)), "mlp", 0)],
    ids=["free", "limits, features", "attention", "large"],
)
def test_scoring_at_once_is_scoring_by_steps(space: Dags, net: str, features: int) -> None:
    policy = random_policy(space, net, 2, features)
    rows = random_rollouts(space, torch.tensor([0, 1] * 10), generator(3))
    found, want = policy.score(rows), FiniteStepper.score(policy, rows)
    assert torch.allclose(found.log_q, want.log_q, atol=1e-5)
    assert torch.equal(found.log_stop == NEG_INF, want.log_stop == NEG_INF)
    assert torch.allclose(found.log_stop.clamp_min(-1e3), want.log_stop.clamp_min(-1e3), atol=1e-5)
    own = policy.sample(rows.problem, generator(4))
    again = policy.score(own)
    assert torch.allclose(own.log_q, again.log_q, atol=1e-5) and torch.allclose(own.log_stop, again.log_stop, atol=1e-5)
    if features:  # what it reads moves it
        other = policy.score(rows.take(torch.arange(20).roll(1)))
        assert not torch.allclose(found.log_q[0].sum(), policy.score(rows.take(torch.tensor([0]))).log_q.sum() + 1)
        assert not torch.equal(found.log_stop[0, 0], other.log_stop[0, 0])


def test_gradients_are_those_of_the_steps() -> None:
    policy = random_policy(Dags(3))
    rows = random_rollouts(policy.space, torch.zeros(12, dtype=torch.long), generator(5))
    inside = torch.arange(rows.moves.shape[1] + 1) <= rows.n[:, None]

    def gradient(by_steps: bool) -> list[torch.Tensor]:
        for w in policy.parameters().values():
            w.grad = None
        with torch.enable_grad():
            scorer: Any = FiniteStepper.score.__wrapped__  # pyright: ignore[reportFunctionMemberAccess]
            s = scorer(policy, rows) if by_steps else policy.score(rows, grad=True)
            (s.log_q.sum() + s.log_stop[:, :, 0][inside].square().sum()).backward()
        return [w.grad.clone() for w in policy.parameters().values() if w.grad is not None]

    one, two = gradient(True), gradient(False)
    assert len(one) == len(two) == len(policy.parameters())
    assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(one, two, strict=True))


def test_nothing_to_add_is_a_sure_stop() -> None:
    policy = random_policy(LIMITS)
    rows = random_rollouts(LIMITS, torch.zeros(60, dtype=torch.long), generator(6))
    s = LIMITS.replay(rows, rows.n)
    menu = LIMITS.menu(s)
    moves, stop = policy.log_probs(s.problem, s, menu)
    full = menu.must == MUST_STOP
    assert bool(full.any()) and not bool(full.all())
    assert bool((stop[full] == 0).all()) and bool((moves[full] == NEG_INF).all())
    total = torch.logaddexp(moves.logsumexp(1), stop[:, 0])
    assert torch.allclose(total, torch.zeros_like(total), atol=1e-5)


@pytest.mark.parametrize("net", ["mlp", "attention"])
def test_laws_of_a_policy(net: str) -> None:
    with torch.no_grad():
        check_policy(random_policy(Dags(3), net), 1, rows=24)


@pytest.mark.parametrize("space", [Dags(3), LIMITS], ids=["free", "limits"])
def test_the_exact_law_is_that_of_draws(space: Dags) -> None:
    policy, n = random_policy(space), 4000
    law = graph_law(policy)
    assert float(law.log_p.exp().sum()) == pytest.approx(1, abs=1e-9)
    drawn = sample_graphs(policy, n, 1)
    share = (drawn[:, None] == law.graphs).flatten(2).all(2).double().mean(0)
    error = (law.log_p.exp() * (1 - law.log_p.exp()) / n).sqrt()
    assert bool(((share - law.log_p.exp()).abs() < 5 * error + 1e-9).all())


class Leaky(GraphPolicy):
    """Planted: stops with the chance of sigmoid(u), and yet adds edges as if it never did."""

    def log_probs(self, c: Any, s: Any, menu: Any, raw: bool = False) -> Any:
        moves, stop = super().log_probs(c, s, menu, raw)
        return moves - moves.logsumexp(1, keepdim=True).clamp_min(-1e3), stop


def test_a_law_that_does_not_sum_to_one_is_refused() -> None:
    honest = random_policy(Dags(3))
    with pytest.raises(InputError, match="sum to"):
        graph_law(Leaky(honest.space, honest.problems, honest.net))


def test_features_of_data() -> None:
    x = torch.randn(50, 3, generator=generator(0), dtype=torch.float64)
    x[:, 1] += 2 * x[:, 0]
    told = data_features(Table(x, ("a", "b", "c")))
    want = torch.corrcoef(x.T)
    assert torch.allclose(told[:, :, 0].double(), want, atol=1e-6)
    assert told[0, 0, 2] == pytest.approx(math.log(50) / 10, abs=1e-6)
    assert torch.equal(told[:, :, 1], told[:, :, 1].T) or torch.allclose(told[:, :, 1], told[:, :, 1].T, atol=1e-6)


def test_refusals_and_threads() -> None:
    target = graph_toy(3)
    with pytest.raises(InputError, match="unknown net 'gnn'"):
        graph_policy(target, "gnn")
    with pytest.raises(InputError, match="does not divide into 3 heads"):
        GraphAttention(3, width=8, heads=3)
    with pytest.raises(InputError, match="features of one shape"):
        GraphPolicy(Dags(3), [Problem((), row={"features": torch.zeros(2, 2, 1)})], GraphMLP(3, 1))
    before = torch.get_num_threads()
    with one_thread():
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == before
    assert graph_policy(target).version != "" and graph_policy(target, seed=1).parameters().keys()
