"""Pairs (theta, x) from a simulator, checked before anything learns from them.

A simulator is one function ``simulate(n, seed) -> (theta, x)``, or a prior ``prior(n, seed) -> theta`` and a function
``simulate(theta, seed) -> x``. Theta is an array of latents (``latent.npe_objects``), x any numbers, one row each.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from retrodict.errors import InputError
from retrodict.rng import child_seed


@dataclass(frozen=True)
class Simulations:
    """n pairs of a latent and its data; ``dropped`` were left out because they were not finite."""

    theta: Shaped[Tensor, "n ..."]
    x: Float[Tensor, "n ..."]
    dropped: int = 0

    def __len__(self) -> int:
        return len(self.x)

    def take(self, index: Int[Tensor, " k"]) -> Simulations:
        """Rows ``index``."""
        return Simulations(self.theta[index], self.x[index], self.dropped)


def simulate(
    simulator: Callable[..., Any], n: int, seed: int = 0, *,
    prior: Callable[[int, int], Tensor] | None = None, drop_invalid: bool = False,
) -> Simulations:  # fmt: skip
    """n simulations.

    Args:
        simulator: ``(n, seed) -> (theta, x)``; with ``prior``, ``(theta, seed) -> x``.
        n: how many.
        seed: one seed, one result; both functions are given a seed of their own made from it.
        prior: ``(n, seed) -> theta``.
        drop_invalid: leave out those with NaN or infinite numbers. The posterior is then that of a simulator which
            never fails: right where failing depends on x alone, wrong where it depends on theta.

    Raises:
        InputError: numbers that are not finite (how many, and which row first); other numbers of rows than asked for.
    """
    if n < 1:
        raise InputError(f"n must be at least 1, not {n}")
    if prior is None:
        made = simulator(n, child_seed(seed, 0))
        if not (isinstance(made, tuple) and len(made) == 2):
            raise InputError("a simulator gives (theta, x); one that takes theta needs prior= beside it")
        theta, x = made
    else:
        theta = prior(n, child_seed(seed, 0))
        x = simulator(theta, child_seed(seed, 1))
    return checked(theta, x, n, drop_invalid)


def checked(theta: Any, x: Any, n: int, drop_invalid: bool = False) -> Simulations:
    """Simulations from what a simulator gave, see :func:`simulate`."""
    theta, x = torch.as_tensor(theta), torch.as_tensor(x)
    if theta.dim() == 0 or x.dim() == 0 or len(theta) != n or len(x) != n:
        raise InputError(f"a simulator asked for {n} rows must give {n} of theta and of x, not arrays of shape "
                         f"{list(theta.shape)} and {list(x.shape)}")  # fmt: skip
    if x.dim() == 1:
        x = x[:, None]
    x = x if x.is_floating_point() else x.float()
    wrong = {name: ~v.isfinite().flatten(1).all(1) for name, v in (("x", x), ("theta", theta)) if v.is_floating_point()}
    bad = torch.stack(list(wrong.values())).any(0)
    if not bool(bad.any()):
        return Simulations(theta, x)
    row, share = int(bad.nonzero()[0]), f"{int(bad.sum()):,} of {n:,} simulations hold NaN or infinite numbers"
    where = " and ".join(name for name, rows in wrong.items() if rows[row])
    if bool(bad.all()):
        raise InputError(f"{share}, so there is nothing to learn from; try the simulator on one latent by hand")
    if not drop_invalid:
        raise InputError(f"{share}, the first is row {row} (in {where}); mend the simulator, or leave them out with "
                         "drop_invalid=True")  # fmt: skip
    keep = (~bad).nonzero().squeeze(1)
    return Simulations(theta[keep], x[keep], int(bad.sum()))
