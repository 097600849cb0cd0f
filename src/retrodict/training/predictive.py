"""Prediction by averaging over latents: the posterior predictive, and the votes that approximate it.

    p(Y | X) ~ (1/n) sum_k p(Y | X, Z_k),      Z_k ~ q(Z | X)           the most likely Y wins

The same n chains serve every candidate, so their differences are less noisy than each value. Sources: Hu et al. 2024,
section 4.2; voting over chains is self-consistency (Wang et al. 2023).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from retrodict.diagnostics.calibration import RiskCoverage, brier, calibration_error, risk_coverage
from retrodict.errors import InputError
from retrodict.numerics import log_mean_exp
from retrodict.protocols import Policy, Problems
from retrodict.rng import generator
from retrodict.samplers.common import positive
from retrodict.targets.choice import Answer, Choice, answer_ids, answers_log_p
from retrodict.targets.likelihood import Likelihood


@dataclass(frozen=True)
class Prediction:
    """What chains say about candidate answers, problem by problem.

    Attributes:
        log_p: log of the mean over chains of p(Y_c | X, Z_k), nats.
        se: its standard error (delta method), nats; infinite for one chain.
        votes: share of chains whose best candidate is c (ties are shared).
        chains: chains a problem.
    """

    log_p: Float[Tensor, "m c"]
    se: Float[Tensor, "m c"]
    votes: Float[Tensor, "m c"]
    chains: int

    @property
    def probability(self) -> Float[Tensor, "m c"]:
        """The predictive, normalised over the candidates."""
        return self.log_p.softmax(-1)

    @property
    def best(self) -> Int[Tensor, " m"]:
        """The most likely candidate of each problem."""
        return self.log_p.argmax(-1)


@torch.no_grad()
def predict(
    policy: Policy,
    likelihood: Likelihood | Choice,
    problems: Problems,
    candidates: Sequence[Answer] | None = None,
    *,
    n: int = 16,
    seed: int = 0,
    batch: int = 256,
) -> Prediction:
    """Score candidates after n chains of each problem.

    Args:
        policy: q(Z | X), which must not read Y.
        likelihood: p(Y | X, Z): a plain one, or one normalised over its answers (then each chain's are, too).
        problems: which need no evidence; policy and likelihood are moved to them.
        candidates: answers as text or ids, the same for all problems; those of a :class:`Choice` by default.
        n: chains a problem.
        seed: one seed, one result.
        batch: chains that are drawn and scored at once.
    """
    positive(n=n, batch=batch)
    if getattr(policy, "sees", "x") != "x":
        raise InputError(f"the policy reads {policy.sees!r}; to predict Y it must not read it: amortize with sees='x'")  # pyright: ignore[reportAttributeAccessIssue]
    if isinstance(likelihood, Choice):
        if candidates is not None and answer_ids(likelihood.lm, candidates) != likelihood.answers:
            raise InputError("this likelihood is normalised over its own answers; leave candidates out")
        ids = likelihood.answers
    elif candidates is None:
        raise InputError("give candidates=: the answers to choose from")
    else:
        ids = answer_ids(likelihood.lm, candidates)
    here: Any = policy.on(problems)  # pyright: ignore[reportAttributeAccessIssue]
    gen = generator(seed, likelihood.lm.device, 5)
    rows = torch.arange(len(problems), device=gen.device).repeat_interleave(n)
    found = []
    for part in rows.split(batch):
        drawn = here.sample(part, gen)
        value = answers_log_p(likelihood.lm, likelihood.space, problems, drawn, ids).double().cpu()
        found.append(value.log_softmax(-1) if isinstance(likelihood, Choice) else value)
    return averaged(torch.cat(found).view(len(problems), n, len(ids)))


def averaged(log_p: Float[Tensor, "m n c"]) -> Prediction:
    """The predictive from log p of each candidate after each chain."""
    n = log_p.shape[1]
    mean = log_mean_exp(log_p, 1)
    if n > 1:
        se = (log_p - mean[:, None]).exp().std(1) / math.sqrt(n)
    else:
        se = torch.full_like(mean, math.inf)
    top = (log_p == log_p.amax(-1, keepdim=True)).double()
    return Prediction(mean, se, (top / top.sum(-1, keepdim=True)).mean(1), n)


@dataclass(frozen=True)
class Grades:
    """How good probabilities of answers are: accuracy with its standard error, calibration, and risk when abstaining.

    ``log_loss`` is the mean of -log p(truth), nats; ``ece`` has ten bins of the winner's probability.
    """

    accuracy: float
    se: float
    ece: float
    brier: float
    log_loss: float
    risk: RiskCoverage


def grade(probability: Float[Tensor, "m c"], truth: Int[Tensor, " m"]) -> Grades:
    """Grades of predictive probabilities (or of shares of votes) against the true candidate of each problem."""
    p = probability.double().cpu()
    truth = truth.cpu()
    confidence, best = p.max(-1)
    correct = best == truth
    accuracy = float(correct.double().mean())
    loss = -p.gather(1, truth[:, None]).clamp_min(1e-300).log().mean()
    return Grades(accuracy, math.sqrt(accuracy * (1 - accuracy) / len(truth)), calibration_error(confidence, correct),
                  brier(confidence, correct), float(loss), risk_coverage(confidence, correct))  # fmt: skip


Extract = Callable[[str, Mapping[str, Any]], str | None]
"""(latent's text, data row) to the answer it gives, or None where it gives none."""


@dataclass(frozen=True)
class Majority:
    """The answer of most chains and its share of all; ``counts`` of every answer, the most frequent first."""

    answer: str | None
    share: float
    counts: Mapping[str, int]


@torch.no_grad()
def self_consistency(
    policy: Policy, problems: Problems, answer: Extract, *, n: int = 16, seed: int = 0, batch: int = 256
) -> list[Majority]:
    """The answer that most of n chains end with, for answers that cannot be listed. Of equals the first drawn wins."""
    positive(n=n, batch=batch)
    here: Any = policy.on(problems)  # pyright: ignore[reportAttributeAccessIssue]
    device = getattr(getattr(policy, "lm", None), "device", torch.device("cpu"))
    gen = generator(seed, device, 6)
    said: list[list[str]] = [[] for _ in problems]
    for part in torch.arange(len(problems), device=device).repeat_interleave(n).split(batch):
        drawn = here.sample(part, gen)
        for p, text in zip(part.tolist(), here.space.show(drawn), strict=True):
            found = answer(text, problems[p].row)
            if found is not None:
                said[p].append(found)
    out = []
    for answers in said:
        counts = Counter(answers).most_common()
        out.append(Majority(counts[0][0], counts[0][1] / n, dict(counts)) if counts else Majority(None, 0.0, {}))
    return out
