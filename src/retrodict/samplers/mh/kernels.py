"""Metropolis-Hastings kernels on complete strings: what to redo, and the acceptance ratio.

suffix: cut c uniform on 0..n; keep the first c moves, draw the rest (and the stop) anew from q;

    accept with  min(1, gamma'/gamma * q(tail) / q(tail') * (n+1)/(n'+1))

where n+1 is the number of cuts of the present string: the length correction that released code leaves out. With q the
prior and gamma = p exp(r / beta) this is QUEST (Faria et al. 2024, arXiv 2406.00049); with q the prior at temperature
1/alpha and gamma = p^alpha it is power sampling (Karan and Du 2025, arXiv 2510.14901), over full tails.
independence: cut at 0 always, no length correction.
block: redo a stretch of moves and keep what stands right of it (``block.py``).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from retrodict.numerics import NEG_INF
from retrodict.policies.base import FiniteStepper
from retrodict.records import Rollouts
from retrodict.samplers.common import fresh, log_b_of
from retrodict.samplers.mh.block import Block
from retrodict.targets.algebra import Target


@runtime_checkable
class Proposes(Protocol):
    """A kernel: from present strings to proposals, and log of q(back) / q(there) (-inf where one cannot be made).

    ``now`` is a record under the policy itself: its ``log_b`` is the policy's log q of every move and of the stop.
    So must the new record be.
    """

    def propose(
        self, target: Target, policy: FiniteStepper, now: Rollouts, gen: torch.Generator
    ) -> tuple[Rollouts, Float[Tensor, " b"]]: ...


@dataclass(frozen=True)
class Kernel:
    """Redo the tail: ``cut`` draws where to cut strings of n moves; ``log_cut`` is its log-probability, given n."""

    cut: Callable[[Int[Tensor, " b"], torch.Generator], Int[Tensor, " b"]]
    log_cut: Callable[[Int[Tensor, " b"]], Float[Tensor, " b"]]

    def propose(
        self, target: Target, policy: FiniteStepper, now: Rollouts, gen: torch.Generator
    ) -> tuple[Rollouts, Float[Tensor, " b"]]:
        """Keep the moves before the cut, draw the others and the stop from the policy."""
        cut = self.cut(now.n, gen)
        new = fresh(target, policy, now.problem, gen, prefix=(now, cut))
        tails = log_b_of(now, cut) - log_b_of(new, cut)
        return new, tails + self.log_cut(new.n) - self.log_cut(now.n)


def _uniform_cut(n: Int[Tensor, " b"], gen: torch.Generator) -> Int[Tensor, " b"]:
    u = torch.rand(len(n), generator=gen, device=n.device, dtype=torch.float64)
    return torch.minimum((u * (n + 1)).long(), n)


def log_accept(
    log_gamma: Float[Tensor, " b"], log_gamma_new: Float[Tensor, " b"], log_back: Float[Tensor, " b"]
) -> Float[Tensor, " b"]:
    """log of the acceptance ratio (may exceed 0); ``log_back`` is log of q(back) / q(there).

    A string of density zero accepts anything that can be proposed, and is never moved to.
    """
    ratio = log_gamma_new - log_gamma + log_back
    ratio = torch.where(log_gamma == NEG_INF, torch.zeros_like(ratio), ratio)
    dead = (log_gamma_new == NEG_INF) | (log_back == NEG_INF)
    return torch.where(dead, torch.full_like(ratio, NEG_INF), ratio)


SUFFIX = Kernel(_uniform_cut, lambda n: -torch.log1p(n.double()))
INDEPENDENCE = Kernel(
    lambda n, gen: torch.zeros_like(n), lambda n: torch.zeros(len(n), dtype=torch.float64, device=n.device)
)
BLOCK = Block()

KERNELS: dict[str, Proposes] = {"suffix": SUFFIX, "independence": INDEPENDENCE, "block": BLOCK}
