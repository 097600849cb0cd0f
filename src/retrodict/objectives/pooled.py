"""Pooled sub-trajectory balance: one variance over every prefix of every sample of a problem. The default.

    L = Var { a_i : all states that may stop, of all trajectories of one problem }

SubTB(1) within a trajectory (Madan et al. 2023; Hu et al. 2024) and VarGrad between trajectories are its two parts, in
O(n). It needs no log Z and no root that may stop. Bias: none at the optimum; one sample a problem is enough.
"""

from __future__ import annotations

from torch import Tensor

from retrodict.objectives.groups import groups, summary, variance
from retrodict.objectives.residual import need_prefixes, residual
from retrodict.records import Rollouts, Scores


def pooled(scores: Scores, rollouts: Rollouts, log_gamma: Tensor) -> tuple[Tensor, dict[str, float]]:
    """Mean over problems of the variance of all their a_i."""
    need_prefixes("pooled", log_gamma)
    a, mask, final = residual(scores, rollouts, log_gamma)
    of, count = groups(rollouts.problem)
    row = of[:, None, None].expand(mask.shape)[mask]
    loss = variance(a[mask], row, row.bincount(minlength=len(count))).mean()
    return loss, summary(loss, final, of, count)
