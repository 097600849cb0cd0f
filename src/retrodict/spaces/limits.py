"""Length limits: what happens at L free moves is part of the target, and said.

``force``      at L the stop is forced, log p = 0: the model truncated at L, total mass one.
``own_stop``   only strings that stop on their own within L count: log p(stop) is paid at L too.
``exact``      exactly L moves, then the stop, paid for.
``exact_prefix``  exactly L moves, no stop.
q must stop at L in all of them, with log q = 0, or it leaks mass at zero loss.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from retrodict.numerics import NEG_INF

Limit = str
"""One of LIMITS; checked where a space is made, so that a recipe's typo gets a sentence."""

LIMITS: tuple[str, ...] = ("force", "own_stop", "exact", "exact_prefix")


def free_stop(limit: Limit) -> bool:
    """Whether the stop at L costs nothing under p."""
    return limit in ("force", "exact_prefix")


def forced_log_p(limit: Limit, raw: Float[Tensor, "... s"]) -> Float[Tensor, "... s"]:
    """log p of the stop at L: only the first stop id remains; free, or at the model's own price."""
    first = torch.zeros_like(raw) if free_stop(limit) else raw
    only = torch.zeros(raw.shape[-1], dtype=torch.bool, device=raw.device)
    only[0] = True
    return torch.where(only, first, torch.full_like(raw, NEG_INF))


def may_stop(limit: Limit, n: Tensor, low: int, high: int) -> Bool[Tensor, "..."]:
    """Whether n moves may be followed by a stop that is an action."""
    return n == high if limit.startswith("exact") else n >= low
