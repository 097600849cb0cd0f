"""GRPO (Shao et al. 2024, arXiv:2402.03300) and RLOO (Ahmadian et al. 2024, arXiv:2402.14740), one step on policy.

    L = - mean A log q,    GRPO: A = (R - mean R) / sd R,    RLOO: A = R - mean of the others' R,    within a problem

R as in ``reinforce``. Bias: RLOO's gradient is REINFORCE's. GRPO's mean and sd are of the same samples: a problem
weighs 1 / sd R, and at beta = 1, where R nears a constant, dividing keeps the noise as large as the signal was.
"""

from __future__ import annotations

import torch
from torch import Tensor

from retrodict.objectives.groups import groups, mean, others, variance
from retrodict.objectives.mle import object_log_q
from retrodict.objectives.reinforce import rewards
from retrodict.records import Rollouts, Scores


def grpo(
    scores: Scores,
    rollouts: Rollouts,
    log_gamma: Tensor,
    beta: float = 0.0,
    log_prior: Tensor | None = None,
    rloo: bool = False,
) -> tuple[Tensor, dict[str, float]]:
    """Mean over problems of the surrogate with group advantages; needs two samples a problem."""
    log_q = object_log_q(scores, rollouts)
    r = rewards(log_q, rollouts, log_gamma, beta, log_prior)
    of, count = groups(rollouts.problem, least=2, name="grpo")
    sd = variance(r, of, count).sqrt().clamp_min(torch.finfo(r.dtype).eps ** 0.5)
    advantage = r - others(r, of, count) if rloo else (r - mean(r, of, count)[of]) / sd[of]
    loss = -mean(advantage * log_q, of, count).mean()
    return loss, {"loss": float(loss.detach()), "reward": float(mean(r, of, count).mean())}


def rloo(
    scores: Scores, rollouts: Rollouts, log_gamma: Tensor, beta: float = 0.0, log_prior: Tensor | None = None
) -> tuple[Tensor, dict[str, float]]:
    """``grpo(..., rloo=True)``: leave-one-out advantages, no division."""
    return grpo(scores, rollouts, log_gamma, beta, log_prior, rloo=True)
