"""``retrodict bench models --parts hmm``: a hidden Markov model learned by exact, sampled and amortized E-steps.

400 sequences of 7 symbols out of 4 from 3 hidden states, two starts, as many rounds for each method; 1,000 held-out
sequences. A datum is a whole sequence: its log-likelihood is by the forward algorithm, so nothing is estimated.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from retrodict.bench.rows import Row, at_most, show_only
from retrodict.latent.enumerated import distances
from retrodict.latent.hmm import HiddenMarkov, ffbs, log_evidence, path_policy, random_hmm, sample_paths
from retrodict.rng import generator
from retrodict.training.learn import learn

SUITE = "models"
NAME = "HMM, 3 states, 7 symbols"
GAP = 0.02
"""Nats of held-out log-likelihood a sequence, from exact EM."""
DISTANCE = 0.05
"""Mean total variation between the policy and the exact posterior of a held-out sequence."""
STATES, SYMBOLS, LENGTH, ROUNDS = 3, 4, 7, 60
STARTS = (10, 12)


def rows(seed: int = 0) -> Iterator[list[Row]]:
    """One list for each start."""
    truth = random_hmm(STATES, SYMBOLS, seed=0, scale=2.0)
    _, x = sample_paths(truth, 400, LENGTH, generator(seed, "cpu", 0))
    _, test = sample_paths(truth, 1000, LENGTH, generator(seed, "cpu", 1))
    at = float(log_evidence(truth, test).mean())
    yield [show_only(SUITE, NAME, "the truth", "held-out log-likelihood (nats a sequence)", at)]
    for start in STARTS:
        yield from_start(x, test, start, seed)


def from_start(x: torch.Tensor, test: torch.Tensor, start: int, seed: int) -> list[Row]:
    """Every method from one start."""

    def model() -> HiddenMarkov:
        return HiddenMarkov(x, random_hmm(STATES, SYMBOLS, seed=start))

    exact, sampled, joint, note = model(), model(), model(), f"start {start}"
    learn(exact, rounds=ROUNDS)
    learn(sampled, rounds=ROUNDS, e_step=ffbs(8), seed=seed)
    q = path_policy(joint, seed=seed)
    learn(joint, q, rounds=ROUNDS, e_steps=20, draws=8, weighted=True, objective="vargrad", samples=4, per_step=64,
          lr=1e-2, threshold=(0.1, 0.1, 1), seed=seed)  # fmt: skip
    best = float(log_evidence(exact.hmm, test).mean())
    each = {"exact EM (Baum-Welch)": exact, "sampled EM (posterior paths)": sampled, "amortized EM (VarGrad)": joint}
    out: list[Row] = []
    for method, m in each.items():
        value, held = float(log_evidence(m.hmm, test).mean()), (SUITE, NAME, method)
        out.append(show_only(*held, "held-out log-likelihood (nats a sequence)", value, note))
        if m is not exact:
            out.append(at_most(*held, "behind exact EM (nats a sequence)", best - value, GAP, note))
            out.append(show_only(*held, "behind exact EM (nats a symbol)", (best - value) / LENGTH, note))
    fresh = HiddenMarkov(test[:10], joint.hmm)
    far = distances(fresh.target, q.on(fresh.problems))
    held = (SUITE, NAME, "amortized EM (VarGrad)")
    out.append(at_most(*held, "mean total variation to exact posteriors", float(far.mean()), DISTANCE,
                       f"{note}; 10 held-out sequences, 6,561 paths each, exact law"))  # fmt: skip
    out.append(show_only(*held, "worst total variation", float(far.max()), note))
    return out
