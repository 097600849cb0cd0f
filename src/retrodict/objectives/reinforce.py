"""REINFORCE with a leave-one-out baseline (Williams 1992; Kool et al. 2019), and entropy or KL to a prior.

    L = - mean (R - mean of the others' R) log q,        R = log gamma + log P_B - beta (log q - log p), held fixed

Bias: at beta = 1 without ``log_prior`` its gradient is that of KL(q, target), on policy only; at beta = 0 it looks for
the mode of gamma and not for the posterior; with ``log_prior`` it aims at p gamma^(1 / beta). Zeros need ``floor=``.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from retrodict.errors import InputError
from retrodict.numerics import at_end
from retrodict.objectives.groups import groups, mean, others
from retrodict.objectives.mle import object_log_q
from retrodict.records import Rollouts, Scores


def rewards(
    log_q: Float[Tensor, " b"], rollouts: Rollouts, log_gamma: Tensor, beta: float, log_prior: Tensor | None
) -> Float[Tensor, " b"]:
    """R of each row, without gradient."""
    value = log_gamma if log_gamma.dim() == 1 else at_end(log_gamma, rollouts.n, rollouts.stop)
    value = value + rollouts.log_pb.sum(1)
    if beta:
        value = value - beta * (log_q if log_prior is None else log_q - log_prior)
    if not bool(value.isfinite().all()):
        raise InputError("a reward is not finite: give the factor floor= nats")
    return value.detach()


def reinforce(
    scores: Scores, rollouts: Rollouts, log_gamma: Tensor, beta: float = 0.0, log_prior: Tensor | None = None
) -> tuple[Tensor, dict[str, float]]:
    """Mean over problems of the policy-gradient surrogate; a lone sample has baseline 0."""
    log_q = object_log_q(scores, rollouts)
    r = rewards(log_q, rollouts, log_gamma, beta, log_prior)
    of, count = groups(rollouts.problem)
    advantage = r - torch.where(count[of] > 1, others(r, of, count), 0.0)
    loss = -mean(advantage * log_q, of, count).mean()
    return loss, {"loss": float(loss.detach()), "reward": float(mean(r, of, count).mean())}
