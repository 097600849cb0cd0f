"""Parsers that are trained, grammars that are learned: exact laws, exact EM, and bugs that would show."""

from __future__ import annotations

import pytest
import torch

import retrodict as rd
from retrodict.errors import InputError
from retrodict.latent.pcfg import PCFG, log_evidence, pcfg_target, simulate
from retrodict.latent.pcfg_learn import GrammarModel, amortize_parser, every_rule, jittered, most_likely, parser
from retrodict.latent.pcfg_trees import exact_trees, laws
from retrodict.rng import generator
from retrodict.spaces.vectors import Assignments
from retrodict.testing.pcfgs import ambiguous, distinct
from retrodict.training.learn import LatentModel, learn


def ambiguous_sentences(n: int, seed: int) -> list[tuple[int, ...]]:
    """Sentences of two trees or more."""
    pcfg = ambiguous()
    pool = distinct(pcfg, 12 * n, seed, longest=5)
    trees = pcfg_target(pcfg, pool).space.trees.tolist()  # pyright: ignore[reportAttributeAccessIssue]
    return [x for x, k in zip(pool, trees, strict=True) if k > 1][:n]


def test_a_parser_meets_the_posterior() -> None:
    """Exact total variation on the sentences it learned from; those it did not see come closer too."""
    pcfg, data = ambiguous(), ambiguous_sentences(20, seed=0)
    target = pcfg_target(pcfg, data[:12], longest=5)
    fresh = pcfg_target(pcfg, data[12:], longest=5)
    policy = parser(target, hidden=64)
    before = [float(laws(t, policy.on(t.problems)).total_variation.mean()) for t in (target, fresh)]
    amortize_parser(target, policy, steps=25, per_step=12, samples=24, lr=3e-2)
    seen, unseen = (laws(t, policy.on(t.problems)).total_variation for t in (target, fresh))
    assert before[0] > 0.1 and float(seen.mean()) < 0.02
    assert float(unseen.mean()) < 0.5 * before[1]


def small(seed: int, pseudo: float = 0.0) -> tuple[GrammarModel, list[tuple[int, ...]]]:
    data = simulate(ambiguous(), 40, generator(seed), 5)[0]
    return GrammarModel(jittered(ambiguous(), 1), data, pseudo=pseudo), data


def same(a: PCFG, b: PCFG, tol: float) -> bool:
    pairs = ((a.binary, b.binary), (a.lexical, b.lexical))
    return all(float((x.exp() - y.exp()).abs().max()) < tol for x, y in pairs)


def test_exact_em_never_lowers_the_likelihood() -> None:
    model, _ = small(0)
    values = [float(model.log_evidence().mean())]
    for _ in range(6):
        assert model.exact_step() == pytest.approx(values[-1], abs=1e-9)
        values.append(float(model.log_evidence().mean()))
    assert all(b >= a - 1e-9 for a, b in zip(values[:-1], values[1:], strict=True)) and values[-1] > values[0] + 1


def test_m_step_on_the_enumerated_posterior_is_the_exact_step() -> None:
    """And weights that are ignored give another grammar."""
    (model, _), (other, _), (third, _) = small(1), small(1), small(1)
    assert isinstance(model, LatentModel)
    answer = rd.exact(model.target)
    assert answer.evidence is not None and torch.allclose(answer.evidence[0], model.log_evidence(), atol=1e-9)
    model.m_step(answer)
    other.exact_step()
    assert same(model.pcfg, other.pcfg, 1e-9)
    equal = answer.log_w.clone()
    equal[equal > -torch.inf] = 0.0
    third.m_step(type(answer)(answer.objects, equal, None, answer.shown, answer.keys, answer.trace))
    assert not same(third.pcfg, other.pcfg, 0.02)


def test_m_step_says_what_it_reached() -> None:
    model, _ = small(2)
    particles = exact_trees(model.target, 4, seed=0)
    reached = model.m_step(particles)
    assert reached == pytest.approx(float(model.target.log_gamma(_bare(particles.objects)).mean()), abs=1e-9)


def _bare(rows):  # noqa: ANN001, ANN202
    from retrodict.training.trice import bare

    return bare(rows)


def test_learning_by_draws_and_by_a_parser() -> None:
    """From one start: two rounds of exact draws and of an amortized E-step come within 0.1 nats of exact EM."""
    held = simulate(ambiguous(), 300, generator(9), 5)[0]

    def value(model: GrammarModel) -> float:
        return float(log_evidence(model.pcfg, held).mean())

    exact, draws, amortized = (small(3, pseudo=0.1)[0] for _ in range(3))
    start = value(exact)
    learn(exact, rounds=2)
    learn(draws, rounds=2, e_step=lambda t, seed: exact_trees(t, 16, seed))
    policy = parser(amortized.target, hidden=64)
    learn(amortized, policy, rounds=2, e_steps=5, draws=16, weighted=True, sleep=0.34, dreams=64, objective="vargrad",
          samples=8, per_step=20, lr=5e-3)  # fmt: skip
    assert value(exact) > start + 0.5
    assert abs(value(draws) - value(exact)) < 0.1 and abs(value(amortized) - value(exact)) < 0.1


def test_starts() -> None:
    pcfg = every_rule(2, 3, ("a", "b"))
    total = torch.cat([pcfg.binary.flatten(1), pcfg.lexical], 1).exp().sum(1)
    assert torch.allclose(total, torch.ones(5, dtype=torch.float64))
    other = jittered(pcfg, seed=0, spread=0.5)
    assert not same(pcfg, other, 0.01) and other.labels == ("A", "B", "T1", "T2", "T3")
    unused = most_likely(pcfg, _zeros(pcfg))
    assert same(unused, pcfg, 1e-12)
    with pytest.raises(InputError, match="at least one symbol"):
        every_rule(0, 1, ("a",))
    with pytest.raises(InputError, match="0 or more, not -1"):
        GrammarModel(pcfg, [(0, 1)], pseudo=-1)
    with pytest.raises(InputError, match="Parses"):
        parser(rd.Target(Assignments((2,)), [], {}))


def _zeros(pcfg: PCFG):  # noqa: ANN202
    from retrodict.latent.pcfg import Counts

    return Counts(torch.zeros_like(pcfg.binary), torch.zeros_like(pcfg.lexical))
