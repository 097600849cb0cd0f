"""Per problem means per problem: sums over the rows of each problem, never over a mixed batch."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from retrodict.errors import InputError


def groups(problem: Int[Tensor, " b"], least: int = 1, name: str = "") -> tuple[Int[Tensor, " b"], Int[Tensor, " m"]]:
    """(which group each row is in, rows of each group); InputError where a problem has fewer than ``least`` rows."""
    _, of, count = problem.unique(return_inverse=True, return_counts=True)
    if least > 1 and bool((count < least).any()):
        raise InputError(f"{name} compares samples of one problem: draw at least {least} for each, or use tb")
    return of, count


def total(x: Float[Tensor, " b"], of: Int[Tensor, " b"], m: int) -> Float[Tensor, " m"]:
    """Sum of x over each group."""
    return x.new_zeros(m).index_add(0, of, x)


def mean(x: Float[Tensor, " b"], of: Int[Tensor, " b"], count: Tensor) -> Float[Tensor, " m"]:
    """Mean of x over each group."""
    return total(x, of, len(count)) / count


def variance(x: Float[Tensor, " b"], of: Int[Tensor, " b"], count: Tensor) -> Float[Tensor, " m"]:
    """Mean squared distance of x to its group's mean (by subtraction first, so that nothing cancels)."""
    return mean((x - mean(x, of, count)[of]).square(), of, count)


def others(x: Float[Tensor, " b"], of: Int[Tensor, " b"], count: Tensor) -> Float[Tensor, " b"]:
    """For each row the mean over the other rows of its group: a baseline that leaves the gradient unbiased."""
    rest = (count - 1).clamp_min(1)
    return (total(x, of, len(count))[of] - x) / rest[of]


def summary(loss: Tensor, a: Float[Tensor, " b"], of: Int[Tensor, " b"], count: Tensor) -> dict[str, float]:
    """What each objective reports: the loss, and mean and variance of the final a, averaged over problems."""
    with torch.no_grad():
        found = torch.stack([loss.detach(), mean(a, of, count).mean(), variance(a, of, count).mean()]).tolist()
    return dict(zip(("loss", "mean_a", "var_a"), found, strict=True))
