"""PPO's clipped surrogate (Schulman et al. 2017, arXiv:1707.06347), with KL to a prior inside the reward.

    L = - mean min(rho_i A, clip(rho_i, 1 - eps, 1 + eps) A),    rho_i = q(action_i) / b(action_i),  the stop included

b is the recorded behaviour, A = R - mean of the others' R (R as in ``reinforce``, its log q from the recorded b).
Bias: the clip cuts the gradient of actions that moved far from b. Without a critic A is the same along a trajectory.
"""

from __future__ import annotations

import torch
from torch import Tensor

from retrodict.objectives.groups import groups, mean, others
from retrodict.objectives.reinforce import rewards
from retrodict.records import FREE, Rollouts, Scores


def ppo(
    scores: Scores,
    rollouts: Rollouts,
    log_gamma: Tensor,
    beta: float = 0.0,
    log_prior: Tensor | None = None,
    clip: float = 0.2,
) -> tuple[Tensor, dict[str, float]]:
    """Mean over problems of the mean over a trajectory's actions; needs two samples a problem."""
    row = torch.arange(len(rollouts), device=rollouts.n.device)
    free = torch.cat([rollouts.kind == FREE, torch.zeros_like(rollouts.can_stop[:, :1])], 1)
    free[row, rollouts.n] = True  # the stop
    log_q = torch.cat([scores.log_q, scores.log_q.new_zeros(len(row), 1)], 1)
    log_q = log_q.index_put((row, rollouts.n), scores.log_stop[row, rollouts.n, rollouts.stop])
    log_b = torch.where(free, rollouts.log_b, 0.0)
    r = rewards(log_b.sum(1), rollouts, log_gamma, beta, log_prior)
    of, count = groups(rollouts.problem, least=2, name="ppo")
    advantage = (r - others(r, of, count))[:, None]
    ratio = torch.where(free, log_q - log_b, 0.0).exp()
    gain = torch.minimum(ratio * advantage, ratio.clamp(1 - clip, 1 + clip) * advantage)
    each = torch.where(free, gain, 0.0).sum(1) / free.sum(1)
    loss = -mean(each, of, count).mean()
    clipped = ((ratio - 1).abs() > clip)[free].float().mean()
    return loss, {"loss": float(loss.detach()), "reward": float(mean(r, of, count).mean()), "clipped": float(clipped)}
