"""Metropolis-Hastings kernels on complete strings: where to cut, and the acceptance ratio.

suffix: cut c uniform on 0..n; keep the first c moves, draw the rest (and the stop) anew from q;

    accept with  min(1, gamma'/gamma * q(tail) / q(tail') * (n+1)/(n'+1))

where n+1 is the number of cuts of the present string: the length correction that released code leaves out.
independence: cut at 0 always, no length correction.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from retrodict.numerics import NEG_INF


@dataclass(frozen=True)
class Kernel:
    """How to propose: ``cut`` draws where to cut strings of n moves; ``log_cut`` is its log-probability, given n."""

    cut: Callable[[Int[Tensor, " b"], torch.Generator], Int[Tensor, " b"]]
    log_cut: Callable[[Int[Tensor, " b"]], Float[Tensor, " b"]]


def _uniform_cut(n: Int[Tensor, " b"], gen: torch.Generator) -> Int[Tensor, " b"]:
    u = torch.rand(len(n), generator=gen, device=n.device, dtype=torch.float64)
    return torch.minimum((u * (n + 1)).long(), n)


def log_accept(
    log_gamma: Float[Tensor, " b"],
    log_gamma_new: Float[Tensor, " b"],
    log_tail: Float[Tensor, " b"],
    log_tail_new: Float[Tensor, " b"],
    log_cut: Float[Tensor, " b"],
    log_cut_new: Float[Tensor, " b"],
) -> Float[Tensor, " b"]:
    """log of the acceptance ratio (may exceed 0). A string of density zero accepts anything, and is never moved to."""
    ratio = log_gamma_new - log_gamma + log_tail - log_tail_new + log_cut_new - log_cut
    ratio = torch.where(log_gamma == NEG_INF, torch.zeros_like(ratio), ratio)
    return torch.where(log_gamma_new == NEG_INF, torch.full_like(ratio, NEG_INF), ratio)


SUFFIX = Kernel(_uniform_cut, lambda n: -torch.log1p(n.double()))
INDEPENDENCE = Kernel(
    lambda n, gen: torch.zeros_like(n), lambda n: torch.zeros(len(n), dtype=torch.float64, device=n.device)
)

KERNELS: dict[str, Kernel] = {"suffix": SUFFIX, "independence": INDEPENDENCE}
