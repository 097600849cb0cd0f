"""Sampling-importance-resampling EM: imitate the behaviour's own samples, weighed towards the target.

    L = - sum_k W_k log q(z_k),   W_k proportional to gamma(z_k) P_B / b(z_k) within a problem, held fixed

The E-step of reweighted wake-sleep (Bornschein and Bengio 2015, arXiv:1406.2751) and of BoLT (Ruan et al. 2025). Bias:
weights of K samples are self-normalised, so the gradient is that of KL(posterior, q) up to O(1/K); takes true zeros.
"""

from __future__ import annotations

import torch
from torch import Tensor

from retrodict.numerics import NEG_INF, at_end
from retrodict.objectives.groups import groups, total
from retrodict.objectives.mle import mle, object_log_q
from retrodict.records import Rollouts, Scores


def sir(scores: Scores, rollouts: Rollouts, log_gamma: Tensor) -> tuple[Tensor, dict[str, float]]:
    """Weighted negative log-likelihood; a problem whose weights are all zero is left out (``dead`` says how many)."""
    log_gamma = log_gamma if log_gamma.dim() == 1 else at_end(log_gamma, rollouts.n, rollouts.stop)
    inside = torch.arange(rollouts.log_b.shape[1], device=rollouts.n.device) <= rollouts.n[:, None]
    log_b = torch.where(inside, rollouts.log_b, 0.0).double().sum(1)
    log_w = log_gamma.double() + rollouts.log_pb.double().sum(1) - log_b
    of, count = groups(rollouts.problem)
    top = log_w.new_full((len(count),), NEG_INF).scatter_reduce(0, of, log_w, "amax")
    alive = top > NEG_INF
    w = torch.where(alive[of], (log_w - torch.where(alive, top, 0.0)[of]).exp(), 0.0)
    dead = int((~alive).sum())
    if dead == len(count):
        return 0.0 * object_log_q(scores, rollouts).sum(), {"loss": 0.0, "dead": float(dead), "ess": 0.0}
    rows = alive[of].nonzero().squeeze(1)
    mass, square = total(w, of, len(count)), total(w.square(), of, len(count))
    ess = (mass.square() / square)[alive].mean()
    some = Scores(scores.log_q[rows], scores.log_stop[rows])
    loss, metrics = mle(some, rollouts.take(rows), weights=w[rows])
    return loss, metrics | {"dead": float(dead), "ess": float(ess)}
