"""Relative trajectory balance (Venkatraman et al. 2024, arXiv:2405.20971): a prior over paths times a reward.

    L = (log Z + log q(tau) - log p(tau) - log r)^2,        log gamma = log p(tau) + log r

with log Z from ``scores.log_norm``, or the problem's mean of a where there is none (VarGrad). The prior already counts
paths, so there is no P_B: objects reached by several paths add up under p as under q. Bias: none at the optimum.
"""

from __future__ import annotations

from torch import Tensor

from retrodict.objectives.groups import groups, mean, summary, variance
from retrodict.objectives.residual import residual
from retrodict.records import Rollouts, Scores


def rtb(scores: Scores, rollouts: Rollouts, log_gamma: Tensor) -> tuple[Tensor, dict[str, float]]:
    """Mean over problems of TB, or of VarGrad without ``scores.log_norm``, on paths."""
    _, _, a = residual(scores, rollouts, log_gamma, backward=False)
    of, count = groups(rollouts.problem, least=1 if scores.log_norm is not None else 2, name="rtb without log Z")
    if scores.log_norm is None:
        loss = variance(a, of, count).mean()
    else:
        loss = mean((scores.log_norm - a).square(), of, count).mean()
    return loss, summary(loss, a, of, count)
