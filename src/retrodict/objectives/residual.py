"""The one kernel of every GFlowNet objective: how far log gamma - log q is from a constant, at each possible end.

    a_i = log gamma(s_i stop) + sum_{k<=i} log P_B(k) - sum_{k<=i} log q(move_k) - log q(stop | s_i)

at every state s_i that may stop, one a_i for each stop id that q may take there; a is its value at the final state.
At the optimum a = log Z everywhere. Forced moves count 0, and a forced stop comes with log q = 0 in the scores.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from retrodict.errors import InputError
from retrodict.numerics import NEG_INF, at_end
from retrodict.records import FREE, Rollouts, Scores

Residuals = tuple[Float[Tensor, "b t1 s"], Bool[Tensor, "b t1 s"], Float[Tensor, " b"]]


def path_log_q(scores: Scores, rollouts: Rollouts) -> Float[Tensor, "b t1"]:
    """log q of the first i moves, i = 0..t, in float32 or better; forced moves and padding count 0."""
    log_q = scores.log_q.to(torch.promote_types(scores.log_q.dtype, torch.float32))
    moves = torch.where(rollouts.kind == FREE, log_q, 0.0)
    return torch.cat([moves.new_zeros(len(moves), 1), moves.cumsum(1)], 1)


def residual(scores: Scores, rollouts: Rollouts, log_gamma: Tensor, *, backward: bool = True) -> Residuals:
    """a ``[b, t+1, s]`` (0 outside the mask), the mask, and the final a ``[b]``.

    A whole-object ``log_gamma [b]`` has a_i at the final states only. ``backward=False`` leaves P_B out, for targets
    whose prior is over paths. Raises InputError where the residual is not finite: a squared error would be infinite.
    """
    path = path_log_q(scores, rollouts)
    if backward:
        back = torch.cat([rollouts.log_pb.new_zeros(len(path), 1), rollouts.log_pb.cumsum(1)], 1)
        path = path - back
    i = torch.arange(path.shape[1], device=path.device)
    mask = (rollouts.can_stop & (i <= rollouts.n[:, None]))[:, :, None] & (scores.log_stop > NEG_INF)
    end = torch.zeros_like(mask)
    end[torch.arange(len(end), device=end.device), rollouts.n, rollouts.stop] = True
    if log_gamma.dim() == 1:
        mask, log_gamma = end, log_gamma[:, None, None].expand(mask.shape)
    mask = mask | end
    if (log_gamma[mask] == NEG_INF).any():
        raise InputError("log gamma is -inf, and a squared error cannot learn it: give the factor floor= nats")
    a = torch.where(mask, log_gamma - path[:, :, None] - scores.log_stop, 0.0)
    if not a.isfinite().all():
        raise InputError("a residual is not finite: q gives probability 0 to a recorded move, or log gamma is NaN")
    return a, mask, at_end(a, rollouts.n, rollouts.stop)


def need_prefixes(name: str, log_gamma: Tensor) -> None:
    """Refuse whole-object values where an objective lives on those of every prefix."""
    if log_gamma.dim() == 1:
        raise InputError(f"{name} needs log gamma of every prefix, and this target values whole objects: use vargrad")
