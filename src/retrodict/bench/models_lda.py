"""``bench models``, topic models: an amortized posterior against exact sums and against collapsed Gibbs sampling.

A made-up corpus of three topics over 19 words, some of two topics; 300 documents of 8 to 16 words to learn from and as
many held out. log p(w | phi) is exact, by the recursion over topic counts (``latent.lda``), for every method.
"""

from __future__ import annotations

import time
from collections.abc import Iterator

import torch
from jaxtyping import Float
from torch import Tensor

from retrodict.bench.rows import Row, at_most, show_only
from retrodict.latent.lda import LDA, document_problems, predictive, topic_target
from retrodict.latent.lda_corpus import TOPICS, VOCABULARY, corpus, true_log_phi
from retrodict.latent.lda_gibbs import collapsed_gibbs
from retrodict.latent.topic_policy import TopicPolicy
from retrodict.rng import child_seed
from retrodict.samplers.exact import exact
from retrodict.targets.algebra import Target
from retrodict.training.amortize import amortize
from retrodict.training.learn import learn

SUITE, SHORT, NAME = "models", "topics, documents of 3 to 6 words", "topics, documents of 8 to 16 words"
METRIC, BAR = "held-out log p(w), nats a word", 0.02
K, V, ROUNDS = len(TOPICS), len(VOCABULARY), 40


def rows(seed: int = 0) -> Iterator[list[Row]]:
    """Inference with given topics, then learning of topics."""
    yield inference(seed)
    yield from learning(seed)


def document_distances(q: TopicPolicy, target: Target) -> Float[Tensor, " m"]:
    """Total variation between q and the posterior of each document, over all its assignments."""
    found = exact(target)
    z, w = found.objects, found.weights
    inside = torch.arange(z.moves.shape[1]) < z.n[:, None]
    law = torch.where(inside, q.on(target.problems).score(z).log_q, 0.0).double().sum(1).exp().view_as(w)
    return torch.where(found.log_w.isfinite(), (law - w).abs(), 0.0).sum(1) / 2


def inference(seed: int) -> list[Row]:
    """q(z | w) for documents it never saw, topics given and blurred so that words are ambiguous."""
    log_phi, alpha = true_log_phi(0.2), 0.3
    train, test = (corpus(n, 6, alpha, child_seed(seed, i)) for i, n in enumerate((1000, 100)))
    model = LDA(train, K, V, alpha=alpha, log_phi=log_phi)
    q, fresh = TopicPolicy(model, seed=seed), topic_target(log_phi, alpha, document_problems(test))
    before, began = float(document_distances(q, fresh).mean()), time.process_time()
    amortize(model.target, q, objective="vargrad", steps=250, samples=8, per_step=32, lr=2e-2, lr_end=0.01, clip=5.0,
             evaluate=1, seed=seed)  # fmt: skip
    seconds, away = time.process_time() - began, document_distances(q, fresh)
    metric = "total variation to p(z | w), new documents"
    return [
        show_only(SUITE, SHORT, "collapsed variational look-ahead (q untrained)", metric, before, "mean, exact"),
        at_most(SUITE, SHORT, "VarGrad", metric, float(away.mean()), BAR, f"mean; {seconds:.0f} processor seconds"),
        show_only(SUITE, SHORT, "VarGrad", f"worst {metric}", float(away.max()), f"of {len(test)} documents"),
    ]  # fmt: skip


def learning(seed: int) -> Iterator[list[Row]]:
    """Topics by exact EM, by amortized EM from the same start, and by collapsed Gibbs; a start of its own each."""
    train, test = corpus(300, seed=child_seed(seed, 3)), corpus(300, seed=child_seed(seed, 4))
    truth = LDA(train, K, V, log_phi=true_log_phi()).held_out(test)
    yield [show_only(SUITE, NAME, "the topics that made the corpus", METRIC, truth)]
    best = LDA(train, K, V, seed=seed)
    learn(best, rounds=ROUNDS)
    began, model = time.process_time(), LDA(train, K, V, seed=seed)
    learn(model, TopicPolicy(model, seed=seed), rounds=ROUNDS, e_steps=8, draws=4, objective="vargrad", samples=8,
          per_step=32, lr=1e-2, clip=5.0, sleep=0.25, dreams=64, seed=seed)  # fmt: skip
    amortized = time.process_time() - began
    began = time.process_time()
    chains = collapsed_gibbs(train, K, V, sweeps=150, burn_in=75, thin=15, chains=2, seed=seed)
    gibbs, seconds = predictive(chains.log_phi, test, best.alpha), time.process_time() - began
    value, exactly, note = model.held_out(test), best.held_out(test), "amortized EM"
    yield [
        show_only(SUITE, NAME, "exact EM", METRIC, exactly, "recursion over counts"),
        show_only(SUITE, NAME, "collapsed Gibbs", METRIC, gibbs, f"10 states; {seconds:.0f} processor seconds"),
        show_only(SUITE, NAME, note, METRIC, value, f"VarGrad and sleep; {amortized:.0f} processor seconds"),
        at_most(SUITE, NAME, note, "nats a word below exact EM", exactly - value, BAR),
        at_most(SUITE, NAME, note, "nats a word below collapsed Gibbs", gibbs - value, BAR),
    ]  # fmt: skip
