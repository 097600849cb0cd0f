"""EM where everything can be enumerated: Fisher's identity, monotone likelihood, weights and versions respected."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import retrodict as rd
from retrodict.errors import InputError
from retrodict.numerics import NEG_INF
from retrodict.particles import Particles
from retrodict.policies.lm import LMPolicy
from retrodict.records import Problem
from retrodict.targets.choice import Choice, answer_ids
from retrodict.training.em import em, evidence_log_p, grow_likelihood, likelihood_of, m_step, restricted, weighted_rows
from retrodict.training.fit import ascend
from retrodict.training.replay import Replay

ANSWERS = ("a", "bc", "cab")


def target(choice: bool = False) -> rd.Target:
    """Three problems over strings of at most three characters; Y follows the stop's text."""
    lm = rd.TabularLM.random(".abc", order=3, seed=3)
    code = lm.tokenizer.encode
    data = [Problem(tuple(code(x)), tuple(code(y)), name=x) for x, y in (("ab", "bc"), ("c", "a"), ("ba", "cab"))]
    made = rd.posterior(lm, data, stop=".", max_tokens=3, min_tokens=1, lookahead=None)
    return restricted(made, answer_ids(lm, ANSWERS)) if choice else made


def with_table(t: rd.Target, seed: int) -> rd.Target:
    """The target whose likelihood is another, trainable table."""
    t = grow_likelihood(t)
    with torch.no_grad():
        table = likelihood_of(t).lm.parameters()["table"]  # pyright: ignore[reportAttributeAccessIssue]
        table += torch.randn(table.shape, generator=torch.Generator().manual_seed(seed), dtype=table.dtype)
    likelihood_of(t).lm.refresh()  # pyright: ignore[reportAttributeAccessIssue]
    return t


def said(table: Tensor, order: int, before: list[int], text: list[int]) -> Tensor:
    """log p(text | before), read off a table one character at a time."""
    v, total = table.shape[1], table.new_zeros(())
    for i, c in enumerate(text):
        history = ([v] * order + before + text[:i])[-order:]
        row = sum(h * (v + 1) ** k for k, h in enumerate(history))
        total = total + table[row].log_softmax(-1)[c]
    return total


def marginals(t: rd.Target, rows: Any, choice: bool) -> Tensor:
    """log p(Y | X) of each problem by brute force, with gradient in the likelihood's table."""
    prior, like = t.prior.lm.table, likelihood_of(t).lm.table  # pyright: ignore[reportOptionalMemberAccess, reportAttributeAccessIssue]
    joint: list[list[Tensor]] = [[] for _ in t.problems]
    for p, z, n in zip(rows.problem.tolist(), rows.moves.tolist(), rows.n.tolist(), strict=True):
        x, y, z = list(t.problems[p].context), list(t.problems[p].evidence), z[:n]
        stopped = z if n == 3 else [*z, 0]  # at the limit the stop is forced: log p = 0
        value = said(like, 3, [*x, *z, 0], y)
        if choice:
            norm = [said(like, 3, [*x, *z, 0], list(a)) for a in likelihood_of(t).answers]  # pyright: ignore[reportAttributeAccessIssue]
            value = value - torch.stack(norm).logsumexp(0)
        joint[p].append(said(prior, 3, x, stopped).detach() + value)
    return torch.stack([torch.stack(j).logsumexp(0) for j in joint])


def gradient(t: rd.Target, particles: Particles) -> Tensor:
    """What an M-step ascends, at the present table."""
    rows, weights = weighted_rows(particles)
    term: Any = likelihood_of(t)
    table = term.lm.parameters()["table"]
    table.grad = None
    ascend(term.lm, lambda i: evidence_log_p(term, rows.take(i), grad=True), torch.arange(len(rows)), weights, 7)
    return -table.grad


def unweighted(p: Particles) -> Particles:
    """The planted bug: every object counts the same."""
    return replace(p, log_w=torch.where(p.log_w > NEG_INF, 0.0, p.log_w))


@pytest.mark.parametrize("choice", [False, True])
def test_the_m_step_ascends_log_p_of_the_evidence_at_the_exact_posterior(choice: bool) -> None:
    t = with_table(target(choice), 5)
    particles = rd.exact(t)
    value = marginals(t, weighted_rows(particles)[0], choice)
    assert torch.allclose(value.detach(), particles.evidence[0], atol=1e-9)  # pyright: ignore[reportOptionalSubscript]
    table = likelihood_of(t).lm.parameters()["table"]  # pyright: ignore[reportAttributeAccessIssue]
    (fisher,) = torch.autograd.grad(value.mean(), table)
    assert torch.allclose(gradient(t, particles), fisher, atol=1e-10)
    assert float((gradient(t, unweighted(particles)) - fisher).abs().max()) > 1e-2


@pytest.mark.parametrize("choice", [False, True])
def test_the_likelihood_never_falls_under_exact_e_steps(choice: bool) -> None:
    def evidence(t: rd.Target) -> Tensor:
        return rd.exact(t).evidence[0].mean()  # pyright: ignore[reportOptionalSubscript]

    t = with_table(target(choice), 6)
    start = found = evidence(t)
    bug = with_table(target(choice), 6)
    for seed in range(4):
        before = rd.exact(t)
        rows, w = weighted_rows(before)
        q = float((w * evidence_log_p(likelihood_of(t), rows)).sum())
        _, t = em(t, e_step=lambda x, _: rd.exact(x), m_steps=5, m_lr=0.3, seed=seed)
        gain = float((w * evidence_log_p(likelihood_of(t), rows)).sum()) - q
        assert gain > 0
        assert float(evidence(t) - found) >= gain - 1e-9  # log p(Y | X) rises by at least what M gained
        found = evidence(t)
        _, bug = em(bug, e_step=lambda x, _: unweighted(rd.exact(x)), m_steps=5, m_lr=0.3, seed=seed)
    assert float(found - start) > 0.5
    if not choice:  # with answers to choose from, both end near certainty
        assert float(evidence(bug)) < float(found) - 0.02


def test_answers_of_different_lengths_are_scored_as_whole_strings() -> None:
    t = with_table(target(choice=True), 7)
    rows = weighted_rows(rd.exact(t))[0]
    term = likelihood_of(t)
    value = term(rows)
    again = term(rows, every_prefix=True)
    at = torch.arange(len(rows))
    assert torch.allclose(value, again[at, rows.n, rows.stop])
    assert torch.allclose(value, evidence_log_p(term, rows).detach(), atol=1e-12)
    total = 0.0
    for a in term.answers:  # pyright: ignore[reportAttributeAccessIssue]
        other = replace(term, problems=[replace(p, evidence=a) for p in t.problems])
        total = total + other(rows).exp()
    assert torch.allclose(total, torch.ones(len(rows), dtype=torch.float64))  # pyright: ignore[reportArgumentType]


def test_with_gradient_and_by_the_packed_pass_are_one_number() -> None:
    lm = rd.TinyLM(".abc", seed=2, dtype=torch.float64)
    code = lm.tokenizer.encode
    data = [Problem(tuple(code(x)), tuple(code(y))) for x, y in (("ab", "bc"), ("c", "a"), ("ba", "cab"))]
    t = rd.posterior(lm, data, stop=".", max_tokens=3, lookahead=None)
    for each in (t, restricted(t, answer_ids(lm, ANSWERS))):
        rows = rd.ancestral(each, n=20, seed=0).objects
        assert torch.allclose(likelihood_of(each)(rows), evidence_log_p(likelihood_of(each), rows), atol=1e-9)


def test_terms_of_an_older_likelihood_are_scored_again() -> None:
    t = with_table(target(), 8)
    particles = rd.exact(t)
    rows = t.terms(particles.objects.take(torch.arange(5)))
    replay = Replay()
    replay.add(rows, t.log_gamma(rows), t.space.keys(rows), step=0)
    m_step(likelihood_of(t), particles, steps=2, lr=0.5)
    old, now = rows.terms["likelihood"], likelihood_of(t)(rows)
    assert float((old - now).abs().min()) > 1e-6
    assert torch.equal(t.terms(rows).terms["likelihood"], now)
    assert torch.equal(t.terms(rows).terms["prior"], rows.terms["prior"])
    drawn, _ = replay.draw(torch.zeros(20, dtype=torch.long), torch.Generator().manual_seed(0))
    assert torch.allclose(t.terms(drawn).terms["likelihood"], likelihood_of(t)(drawn))


def amortized(t: rd.Target, seed: int, **given: Any) -> tuple[Any, rd.Target, list[dict[str, Any]]]:
    """Two rounds with a table for q, and what was reported."""
    seen: list[dict[str, Any]] = []
    policy, out = em(t, rounds=2, e_steps=20, m_steps=5, draws=16, m_lr=0.2, seed=seed, on_metrics=seen.append,
                     samples=4, lr=0.2, evaluate=8, **given)  # fmt: skip
    return policy, out, seen


def test_em_with_an_amortized_e_step_learns_and_repeats_itself() -> None:
    first, again = amortized(target(), 3), amortized(target(), 3)
    other = amortized(target(), 4, weighted=True)
    tables = [likelihood_of(x[1]).lm.table for x in (first, again, other)]  # pyright: ignore[reportAttributeAccessIssue]
    assert torch.equal(tables[0], tables[1])
    assert not torch.equal(tables[0], tables[2])
    before = rd.exact(target()).evidence[0].mean()  # pyright: ignore[reportOptionalSubscript]
    for _, t, _ in (first, other):
        assert float(rd.exact(t).evidence[0].mean() - before) > 0.3  # pyright: ignore[reportOptionalSubscript]
    phases = [(m["round"], m["phase"]) for m in first[2]]
    assert phases == [(0, "e")] * 20 + [(0, "m")] * 5 + [(1, "e")] * 20 + [(1, "m")] * 5


def test_a_sampler_as_e_step_and_rows_drawn_by_weight() -> None:
    t = target()
    _, out = em(t, e_step=lambda x, seed: rd.importance(x, n=200, seed=seed, runs=1), m_steps=10, m_lr=0.2, m_batch=32)
    assert float((rd.exact(out).evidence[0] - rd.exact(t).evidence[0]).mean()) > 0.3  # pyright: ignore[reportOptionalSubscript]
    assert likelihood_of(t).lm.version != likelihood_of(out).lm.version
    assert isinstance(out.prior, LMPolicy) and out.prior.lm is t.prior.lm  # pyright: ignore[reportOptionalMemberAccess]


def test_what_cannot_be_learned_is_refused_in_one_line() -> None:
    t = target()
    lm = t.prior.lm  # pyright: ignore[reportOptionalMemberAccess, reportAttributeAccessIssue]
    with pytest.raises(InputError, match="no likelihood"):
        em(rd.continuation(lm, "ab"), e_step=lambda x, _: rd.exact(x))
    with pytest.raises(InputError, match="no policy"):
        em(t, e_step=lambda x, _: rd.exact(x), samples=4)
    with pytest.raises(InputError, match="no checkpoints"):
        em(t, folder="somewhere")
    with pytest.raises(InputError, match="give policy"):
        em(t, e_steps=0)
    with pytest.raises(InputError, match="weight zero"):
        m_step(likelihood_of(t), replace(rd.exact(t), log_w=torch.full_like(rd.exact(t).log_w, NEG_INF)), steps=1)
    with pytest.raises(InputError, match="nothing to train"):
        m_step(likelihood_of(t), rd.exact(t), steps=1)
    with pytest.raises(InputError, match="none of the answers"):
        restricted(t, answer_ids(lm, ("a", "b")))
    with pytest.raises(InputError, match="same tokens"):
        answer_ids(lm, ("a", "b", "a"))
    assert isinstance(restricted(t, answer_ids(lm, ANSWERS)).factors["likelihood"], Choice)
