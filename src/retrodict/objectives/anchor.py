"""The a_i of each trajectory in a line, headed by log Z_phi where the root may not stop.

Differences within a trajectory say nothing of states before the first that may stop: without the anchor the loss is 0
at a wrong distribution (min length, exact length).
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from retrodict.errors import InputError
from retrodict.objectives.residual import need_prefixes, residual
from retrodict.records import Rollouts, Scores

Line = tuple[Float[Tensor, "b e"], Bool[Tensor, "b e"], Int[Tensor, " e"], Float[Tensor, " b"]]


def anchored(name: str, scores: Scores, rollouts: Rollouts, log_gamma: Tensor) -> Line:
    """a ``[b, e]`` with e = 1 + (t+1) s, the mask, each entry's state i, and the final a ``[b]``."""
    need_prefixes(name, log_gamma)
    a, mask, final = residual(scores, rollouts, log_gamma)
    closed = ~rollouts.can_stop[:, 0]
    if scores.log_norm is None and bool(closed.any()):
        raise InputError(f"{name}: the root may not stop, so a learned log Z must anchor it; or use pooled")
    root = final.new_zeros(len(final)) if scores.log_norm is None else scores.log_norm
    root = torch.where(closed, root, 0.0).to(a.dtype)
    i = torch.arange(a.shape[1], device=a.device).repeat_interleave(a.shape[2])
    line = torch.cat([root[:, None], a.flatten(1)], 1)
    return line, torch.cat([closed[:, None], mask.flatten(1)], 1), torch.cat([i[:1], i]), final
