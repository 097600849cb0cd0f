"""EM on a transformer: the likelihood is an adapter of the prior's own weights, and the prior stays what it was."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("peft")

from tiny_llama import tiny_llama  # noqa: E402

import retrodict as rd  # noqa: E402
from retrodict.records import Problem  # noqa: E402
from retrodict.targets.choice import answer_ids  # noqa: E402
from retrodict.training.em import (  # noqa: E402
    em,
    evidence_log_p,
    grow_likelihood,
    likelihood_of,
    m_step,
    restricted,
    weighted_rows,  # noqa: E402
)
from retrodict.training.fit import ascend  # noqa: E402


@pytest.fixture
def target() -> Any:
    """Two problems in float64, their evidence one of two answers of different lengths."""
    lm = tiny_llama(torch.float64)
    code = lm.tokenizer.encode
    data = [Problem(tuple(code("one")), tuple(code(" yes"))), Problem(tuple(code("two")), tuple(code(" no")))]
    return rd.posterior(lm, data, stop=".", max_tokens=3, min_tokens=1, lookahead=None)


@pytest.mark.parametrize("choice", [False, True])
def test_the_m_step_moves_the_likelihood_and_not_the_prior(target: Any, choice: bool) -> None:
    if choice:
        target = restricted(target, answer_ids(target.prior.lm, (" yes", " no")))
    particles = rd.importance(target, n=12, seed=0, runs=1)
    rows, w = weighted_rows(particles)
    t = grow_likelihood(target)
    term: Any = likelihood_of(t)
    assert torch.allclose(term(rows), likelihood_of(target)(rows), atol=1e-10)  # B = 0: it starts as the base
    prior = t.factors["prior"](rows)
    before, version = float((w * evidence_log_p(term, rows)).sum()), t.version
    m_step(term, particles, steps=20, lr=1e-2, micro=5)
    assert float((w * evidence_log_p(term, rows)).sum()) > before + 0.1
    assert torch.equal(t.factors["prior"](rows), prior) and t.version != version
    assert torch.allclose(term(rows), evidence_log_p(term, rows), atol=1e-9)  # by the packed pass, on the new weights


def test_the_gradient_is_that_of_finite_differences(target: Any) -> None:
    t = grow_likelihood(target)
    term: Any = likelihood_of(t)
    particles = rd.importance(target, n=6, seed=1, runs=1)
    rows, w = weighted_rows(particles)
    m_step(term, particles, steps=2, lr=1e-2)  # B leaves 0
    parameters, gen = term.lm.parameters(), torch.Generator().manual_seed(0)
    way = {n: torch.randn(p.shape, generator=gen, dtype=p.dtype) for n, p in parameters.items()}
    for p in parameters.values():
        p.grad = None
    ascend(term.lm, lambda i: evidence_log_p(term, rows.take(i), grad=True), torch.arange(len(rows)), w, 4)
    slope = -sum(float((parameters[n].grad * way[n]).sum()) for n in way)

    def at(h: float) -> float:
        with torch.no_grad():
            for n, p in parameters.items():
                p += h * way[n]
        term.lm.refresh()
        value = float((w * evidence_log_p(term, rows)).sum())
        with torch.no_grad():
            for n, p in parameters.items():
                p -= h * way[n]
        return value

    h = 1e-5
    assert abs(slope) > 1e-3
    assert (at(h) - at(-h)) / (2 * h) == pytest.approx(slope, rel=1e-3)


def test_two_adapters_of_one_model(target: Any) -> None:
    policy, t = em(target, rounds=2, e_steps=2, m_steps=2, draws=3, m_rank=2, samples=3, rank=2, evaluate=4)
    lm = target.prior.lm
    assert sorted(lm.adapters) == ["amortized", "likelihood"]
    assert policy.lm.adapter == "amortized" and likelihood_of(t).lm.adapter == "likelihood"  # pyright: ignore[reportAttributeAccessIssue]
    assert t.prior is not None and t.prior.lm.adapter is None  # pyright: ignore[reportAttributeAccessIssue]
    assert all(p.abs().sum() > 0 for n, p in policy.parameters().items() if ".lora_B." in n)
