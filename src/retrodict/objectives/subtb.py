"""Modified sub-trajectory balance, SubTB(lambda) (Madan et al. 2023, arXiv:2209.12782; Hu et al. 2024, 2310.04363).

    L = sum_{i<j} lambda^(j-i-1) (a_i - a_j)^2 / sum_{i<j} lambda^(j-i-1),        within a trajectory

over states that may stop; two stop ids of one state weigh as neighbours do. Where the root may not stop, a_0 := log
Z_phi. At lambda = 1 this is 2 n / (n - 1) Var(a_i). Bias: none at the optimum. O(n^2) in the length, none of it in
the model.
"""

from __future__ import annotations

import torch
from torch import Tensor

from retrodict.objectives.anchor import anchored
from retrodict.objectives.groups import groups, mean, summary
from retrodict.records import Rollouts, Scores


def subtb(scores: Scores, rollouts: Rollouts, log_gamma: Tensor, lam: float = 1.0) -> tuple[Tensor, dict[str, float]]:
    """Mean over problems of the mean over trajectories; a trajectory with one a_i alone counts 0."""
    a, mask, i, final = anchored("subtb", scores, rollouts, log_gamma)
    gap = (i[None, :] - i[:, None] - 1).clamp_min(0)
    pair = (mask[:, :, None] & mask[:, None, :]).triu(1)
    weight = torch.where(pair, torch.as_tensor(lam, dtype=a.dtype, device=a.device) ** gap, 0.0)
    square = (a[:, :, None] - a[:, None, :]).square()
    each = (weight * square).sum((1, 2)) / weight.sum((1, 2)).clamp_min(torch.finfo(a.dtype).tiny)
    of, count = groups(rollouts.problem)
    loss = mean(each, of, count).mean()
    return loss, summary(loss, final, of, count)
