"""VarGrad, the log-variance of one problem's samples (Richter et al. 2020, arXiv:2010.10436; Zhang et al. 2023).

    L = mean_k (a_k - mean_k a)^2,        k over the samples of one problem, minus the mean of a

log Z is never learned: the mean of a stands for it. Bias: none at the optimum. On policy the expected gradient with K
samples is 2 (K - 1) / K grad KL(q, target).
"""

from __future__ import annotations

from torch import Tensor

from retrodict.objectives.groups import groups, summary, variance
from retrodict.objectives.residual import residual
from retrodict.records import Rollouts, Scores


def vargrad(scores: Scores, rollouts: Rollouts, log_gamma: Tensor) -> tuple[Tensor, dict[str, float]]:
    """Mean over problems of the variance of a among a problem's samples, of which there must be two."""
    _, _, a = residual(scores, rollouts, log_gamma)
    of, count = groups(rollouts.problem, least=2, name="vargrad")
    loss = variance(a, of, count).mean()
    return loss, summary(loss, a, of, count)
