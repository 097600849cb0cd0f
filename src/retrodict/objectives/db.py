"""Modified detailed balance (Deleu et al. 2022, arXiv:2202.13903): consecutive states that may stop.

    L = mean (a_j - a_i)^2,        s_j the next state after s_i that may stop

Pairs jump over what the space puts in (tool answers, templates), and over a minimum length from the anchor a_0 := log
Z_phi. The stop ids of one state are neighbours too. Bias: none at the optimum; credit moves one state a step.
"""

from __future__ import annotations

import torch
from torch import Tensor

from retrodict.objectives.anchor import anchored
from retrodict.objectives.groups import groups, mean, summary
from retrodict.records import Rollouts, Scores


def db(scores: Scores, rollouts: Rollouts, log_gamma: Tensor) -> tuple[Tensor, dict[str, float]]:
    """Mean over problems of the mean over trajectories; a trajectory with one a_i alone counts 0."""
    a, mask, _, final = anchored("db", scores, rollouts, log_gamma)
    here = torch.arange(mask.shape[1], device=mask.device)
    last = torch.where(mask, here, -1).cummax(1).values[:, :-1]  # the latest entry before each one
    pair = mask[:, 1:] & (last >= 0)
    square = torch.where(pair, a[:, 1:] - a.gather(1, last.clamp_min(0)), 0.0).square()
    of, count = groups(rollouts.problem)
    loss = mean(square.sum(1) / pair.sum(1).clamp_min(1), of, count).mean()
    return loss, summary(loss, final, of, count)
