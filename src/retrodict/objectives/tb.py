"""Trajectory balance (Malkin et al. 2022, arXiv:2201.13259).

    L = mean (log Z_phi(problem) - a)^2,        a = log gamma + log P_B - log q

log Z_phi is learned through ``scores.log_norm``. Bias: none at the optimum, where a = log Z for every object, whatever
the behaviour. On policy, with log Z_phi fixed, the gradient in q is 2 grad KL(q, target).
"""

from __future__ import annotations

from torch import Tensor

from retrodict.errors import InputError
from retrodict.objectives.groups import groups, mean, summary
from retrodict.objectives.residual import residual
from retrodict.records import Rollouts, Scores


def tb(scores: Scores, rollouts: Rollouts, log_gamma: Tensor) -> tuple[Tensor, dict[str, float]]:
    """Mean over problems of the mean squared distance of a to the learned log Z."""
    if scores.log_norm is None:
        raise InputError("tb needs a learned log Z (scores.log_norm); vargrad needs none")
    _, _, a = residual(scores, rollouts, log_gamma)
    of, count = groups(rollouts.problem)
    loss = mean((scores.log_norm - a).square(), of, count).mean()
    return loss, summary(loss, a, of, count)
