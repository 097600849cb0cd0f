"""Maximum likelihood: supervised fine-tuning, and the reward-weighted (SIR) EM step (Dayan and Hinton 1997).

    L = - sum_k w_k log q(z_k),        w normalised within each problem (equal without ``weights``)

Bias: it fits what the samples stand for. With posterior samples, or importance weights of many, that is the posterior
(KL(target, q)); with a handful of annotations it is those annotations. ``log_gamma`` is not used.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from retrodict.errors import InputError
from retrodict.numerics import at_end
from retrodict.objectives.groups import groups, total
from retrodict.objectives.residual import path_log_q
from retrodict.records import Rollouts, Scores


def object_log_q(scores: Scores, rollouts: Rollouts) -> Float[Tensor, " b"]:
    """log q of each whole trajectory, its stop included."""
    return at_end(path_log_q(scores, rollouts)[:, :, None] + scores.log_stop, rollouts.n, rollouts.stop)


def mle(
    scores: Scores, rollouts: Rollouts, log_gamma: Tensor | None = None, weights: Float[Tensor, " b"] | None = None
) -> tuple[Tensor, dict[str, float]]:
    """Mean over problems of the weighted negative log-likelihood. Rows of weight zero do not count."""
    log_q = object_log_q(scores, rollouts)
    of, count = groups(rollouts.problem)
    w = torch.ones_like(log_q) if weights is None else weights.to(log_q.dtype)
    mass = total(w, of, len(count))
    if not bool((mass > 0).all()) or bool((w < 0).any()):
        raise InputError("mle: weights must be >= 0, with one above 0 for every problem")
    loss = -total(torch.where(w > 0, w * log_q, 0.0), of, len(count)).div(mass).mean()
    return loss, {"loss": float(loss.detach())}
