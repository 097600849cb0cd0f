"""Policies over graphs trained through the loop as it is, against enumeration; and P_B ignored is seen."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from retrodict.objectives.residual import residual
from retrodict.objectives.table import objective
from retrodict.records import Problem, Scores
from retrodict.rng import generator
from retrodict.spaces.dags import Dags
from retrodict.structures.law import Law, graph_law, posterior_law, total_variation
from retrodict.structures.target import graph_target
from retrodict.structures.train import amortize_graphs, graph_policy
from retrodict.testing.graphs import Flows, NoBackward, graph_toy
from retrodict.testing.laws import random_rollouts

QUICK: dict[str, Any] = {"steps": 60, "samples": 48, "lr": 1e-2, "evaluate": 2}
BAR = 0.05


def train(target: Any, name: str, hidden: int = 256, **more: Any) -> Any:
    return amortize_graphs(target, graph_policy(target, hidden=hidden), objective=name, **{**QUICK, **more})


@pytest.mark.parametrize("space", [Dags(4), Dags(4, required=((1, 0),), max_edges=3)], ids=["free", "limits"])
def test_residuals_are_zero_at_the_exact_flows(space: Dags) -> None:
    target = graph_toy(4, 2, space=space)
    flows = Flows(target)
    rows = random_rollouts(space, torch.zeros(60, dtype=torch.long), generator(0))
    scores, log_gamma = flows.score(rows), target.log_gamma(rows, True)
    a, mask, _ = residual(scores, rows, log_gamma)
    assert float((a[mask] - flows.log_z).abs().max()) < 1e-10
    norm = torch.full((60,), flows.log_z, dtype=torch.float64)
    for name in ("db", "tb", "subtb", "vargrad", "pooled"):
        loss, _ = objective(name)(Scores(scores.log_q, scores.log_stop, log_norm=norm), rows, log_gamma)
        assert abs(float(loss)) < 1e-18, name


@pytest.mark.parametrize("name", ["db", "tb", "subtb"])
def test_training_reaches_the_posterior(name: str) -> None:
    """Modified detailed balance credits one edge a step and takes twice the steps. VarGrad and pooled are below."""
    target = graph_toy(3, 2)
    policy = train(
        target, name, **{"db": {"steps": 130}, "subtb": {"steps": 80}, "tb": {"lr_log_z": 0.3}}.get(name, {})
    )
    assert total_variation(graph_law(policy), posterior_law(target)) < BAR


def test_p_b_ignored_is_seen() -> None:
    """The posterior of graphs weighted by their number of orders, and not that of graphs."""
    bug, truth = graph_toy(3, 2, space=NoBackward(3)), posterior_law(graph_toy(3, 2))
    orders = truth.log_p + torch.lgamma(truth.graphs.flatten(1).sum(1).double() + 1)
    wrong = Law(truth.graphs, orders - orders.logsumexp(0))
    assert total_variation(wrong, truth) > 0.3
    found = graph_law(train(bug, "vargrad"))
    assert total_variation(found, truth) > 5 * BAR
    assert total_variation(found, wrong) < BAR


def test_required_edges_and_limits() -> None:
    target = graph_toy(4, 1, space=Dags(4, required=((0, 1), (1, 2)), max_parents=2, max_edges=4))
    assert total_variation(graph_law(train(target, "pooled")), posterior_law(target)) < BAR


def test_one_policy_for_several_data_sets() -> None:
    """Amortized over data: two posteriors, told apart by the features alone, under a mixture with replay."""
    scores = [next(iter(graph_toy(2, seed).factors.values())).scores[0] for seed in (0, 5)]  # pyright: ignore[reportAttributeAccessIssue]
    problems = [Problem((), name=str(m), row={"features": torch.eye(2)[m].expand(2, 2, 2)}) for m in range(2)]
    target = graph_target(Dags(2), {"data": scores}, problems=problems)
    assert total_variation(posterior_law(target, 0), posterior_law(target, 1)) > 0.3
    policy = train(target, "pooled", samples=32, tempered=0.75, replay=0.25)
    assert max(total_variation(graph_law(policy, m), posterior_law(target, m)) for m in range(2)) < BAR


def test_stopped_and_resumed_is_never_stopped(tmp_path: Path) -> None:
    target = graph_toy(3, 0)
    run = partial(amortize_graphs, target, steps=6, samples=16, tempered=0.5, replay=0.25, evaluate=2, save_every=2)
    whole = run(graph_policy(target, hidden=8))

    def stop(metrics: dict[str, Any]) -> None:
        if metrics["step"] == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(graph_policy(target, hidden=8), folder=tmp_path, on_metrics=stop)
    again = run(graph_policy(target, hidden=8), folder=tmp_path, resume=True)
    assert all(torch.equal(whole.parameters()[k], w) for k, w in again.parameters().items())
    assert total_variation(graph_law(whole), graph_law(again)) == 0
    assert again.about["settings"]["steps"] == 6 and again.about["evaluation"]["n"] == 2
