"""Topic models against enumeration, the recursion over counts, and collapsed Gibbs."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

import retrodict as rd
from retrodict.errors import InputError
from retrodict.latent.lda import LDA, document_problems, log_evidence, log_urn, padded, predictive, topic_target
from retrodict.latent.lda_corpus import VOCABULARY, corpus, true_log_phi
from retrodict.latent.lda_gibbs import collapsed_gibbs
from retrodict.latent.topic_policy import TopicPolicy
from retrodict.policies.base import FiniteStepper
from retrodict.rng import generator
from retrodict.training.learn import learn
from retrodict.training.threads import one_thread


@pytest.fixture(autouse=True)
def _one():
    with one_thread():
        yield


WORDS = 7
DOCUMENTS = [(0, 1, 2, 3, 4), (1, 2, 6), (5,), (3, 3, 3, 0)]


def model(documents=DOCUMENTS, topics: int = 3, **given) -> LDA:
    return LDA(documents, topics, WORDS, alpha=0.4, beta=0.2, seed=2, **given)


def test_the_recursion_over_counts_is_the_sum_over_topics():
    for topics in (1, 2, 3):
        m = model(topics=topics)
        assert torch.allclose(m.log_evidence(), rd.exact(m.target).log_z.squeeze(1), atol=1e-9)


def test_expected_counts_are_those_of_the_posterior():
    m = model()
    counts, mean = m.expected_counts()
    rows = rd.exact(m.target)
    seen = torch.zeros_like(counts)
    for p, z, n, w in zip(rows.objects.problem.tolist(), rows.objects.moves.tolist(), rows.objects.n.tolist(),
                          rows.weights.flatten().tolist(), strict=True):  # fmt: skip
        for i in range(n):
            seen[z[i], DOCUMENTS[p][i]] += w
    assert torch.allclose(counts, seen, atol=1e-6)
    assert mean == pytest.approx(float(m.log_evidence().mean()))
    other = model()
    m.exact_step()
    other.m_step(rows)
    assert torch.allclose(m.log_phi, other.log_phi, atol=1e-6)


def test_exact_em_never_lowers_its_objective():
    m, last = model(), -math.inf
    for _ in range(12):
        value = float(m.log_evidence().sum() + m.beta * m.log_phi.sum())
        assert value > last - 1e-9
        last = value
        m.exact_step()


def test_the_urn_is_the_prior():
    counts = torch.tensor([2.0, 0.0, 1.0], dtype=torch.float64)
    a = 0.4
    by_hand = math.log((a / (3 * a)) * ((1 + a) / (1 + 3 * a)) * (a / (2 + 3 * a)))
    assert float(log_urn(counts, a)) == pytest.approx(by_hand)
    m = model()
    rows = m.target.prior.sample(torch.arange(4), generator(0))
    assert rows.n.tolist() == [5, 3, 1, 4]
    counts = torch.stack([torch.bincount(z[:n], minlength=3) for z, n in zip(rows.moves, rows.n, strict=True)]).double()
    assert torch.allclose(m.target.factors["prior"](rows).double(), log_urn(counts, a), atol=1e-6)
    value, se = rd.importance(m.target, n=500, runs=8, seed=0).evidence
    assert float(((value - m.log_evidence()) / se).abs().max()) < 4.5


def joint(z: tuple[int, ...], documents, topics: int, words: int, alpha: float, beta: float) -> float:
    """log p(z, w) of a corpus with theta and phi integrated out."""
    flat = [(d, w) for d, document in enumerate(documents) for w in document]
    of_doc, of_topic = torch.zeros(len(documents), topics).double(), torch.zeros(topics, words).double()
    for k, (d, w) in zip(z, flat, strict=True):
        of_doc[d, k] += 1
        of_topic[k, w] += 1
    return float(log_urn(of_doc, alpha).sum() + log_urn(of_topic, beta).sum())


def test_collapsed_gibbs_against_enumeration_on_two_documents():
    documents, alpha, beta = [(0, 1, 0, 2), (2, 2, 1, 0)], 0.5, 0.3
    states = list(itertools.product(range(2), repeat=8))
    p = torch.tensor([joint(z, documents, 2, 3, alpha, beta) for z in states]).softmax(0)

    def distance(beta: float) -> float:
        z = collapsed_gibbs(documents, 2, 3, alpha=alpha, beta=beta, sweeps=250, burn_in=50, thin=4, chains=200).z
        code = (z * 2 ** torch.arange(7, -1, -1)).sum(1)
        return float((torch.bincount(code, minlength=256) / len(code) - p).abs().sum() / 2)

    assert distance(beta) < 0.075  # 10,000 draws of 256 states: 0.05 by chance
    assert distance(1.5) > 0.2  # planted: another prior of the topics


def test_scoring_at_once_is_scoring_step_by_step():
    m = model()
    q = TopicPolicy(m, seed=1)
    q.net["out.weight"].data.normal_(generator=generator(1))
    rows = q.sample(torch.arange(4).repeat_interleave(5), generator(0))
    slow, fast = FiniteStepper.score(q, rows), q.score(rows, grad=True)
    assert torch.allclose(slow.log_q.double(), fast.log_q.double(), atol=1e-5)
    assert torch.equal(slow.log_stop.double(), fast.log_stop.double())
    assert torch.allclose(rows.log_q.double(), fast.log_q.double(), atol=1e-5)
    fast.log_q.sum().backward()
    assert float(q.net["in.weight"].grad.abs().sum()) > 0
    order = torch.tensor([2, 0, 1])  # topics may be renamed
    renamed = TopicPolicy(LDA(DOCUMENTS, 3, WORDS, alpha=0.4, log_phi=m.log_phi[order]), seed=1)
    renamed.net = q.net
    again = rd.exact(m.target).objects
    inverse = order.argsort()
    swapped = type(again)(**{**vars(again), "moves": inverse[again.moves]})
    assert torch.allclose(q.score(again).log_q.sum(1), renamed.score(swapped).log_q.sum(1), atol=1e-4)


def total_variation(q: TopicPolicy, target) -> float:
    """Mean over documents of the exact total variation between q and the posterior."""
    rows = rd.exact(target)
    inside = torch.arange(rows.objects.moves.shape[1]) < rows.objects.n[:, None]
    law = torch.where(inside, q.on(target.problems).score(rows.objects).log_q, 0.0).double().sum(1).exp()
    w = rows.weights
    return float(((law.view_as(w) - w).abs() * (w > 0)).sum(1).mean() / 2)


def test_vargrad_learns_the_topics_of_new_documents():
    log_phi, alpha = true_log_phi(0.2), 0.3
    train, test = corpus(120, 6, alpha, seed=1), corpus(15, 6, alpha, seed=2)
    m = LDA(train, 3, len(VOCABULARY), alpha=alpha, log_phi=log_phi)
    q = TopicPolicy(m, hidden=16)
    fresh = topic_target(log_phi, alpha, document_problems(test))
    before = total_variation(q, fresh)
    rd.amortize(m.target, q, objective="vargrad", steps=60, samples=4, per_step=24, lr=2e-2, clip=5.0, evaluate=1)
    assert total_variation(q, fresh) < 0.02 < before


def test_amortized_em_follows_exact_em():
    docs, test = corpus(60, 8, seed=1), corpus(60, 8, seed=2)
    best, m = (LDA(docs, 3, len(VOCABULARY), seed=1) for _ in range(2))
    start = m.held_out(test)
    learn(best, rounds=10)
    q = TopicPolicy(m, hidden=16)
    learn(m, q, rounds=10, e_steps=2, draws=8, objective="vargrad", samples=4, per_step=16, lr=1e-2, sleep=0.3,
          dreams=32)  # fmt: skip
    assert best.held_out(test) > start + 0.1
    assert abs(m.held_out(test) - best.held_out(test)) < 0.02
    one = predictive(m.log_phi[None], test, m.alpha)
    assert one == pytest.approx(m.held_out(test))


def test_bad_documents_are_refused_in_one_line():
    with pytest.raises(InputError, match="document 1 has no words"):
        LDA([(0,), ()], 2, 3)
    with pytest.raises(InputError, match="document 0 holds word 3, and the 3 words are numbered from 0"):
        LDA([(0, 3)], 2, 3)
    with pytest.raises(InputError, match="alpha and beta above 0"):
        LDA([(0,)], 2, 3, alpha=0.0)
    with pytest.raises(InputError, match="take fewer topics or shorter documents"):
        log_evidence(torch.zeros(6, 3).double().log_softmax(1), padded([(0,) * 20], 3), 0.5)
    with pytest.raises(InputError, match="burn_in < sweeps"):
        collapsed_gibbs([(0, 1)], 2, 2, sweeps=10, burn_in=10)
    with pytest.raises(InputError, match="holds word 9"):
        model().of(document_problems([(9,)]))
