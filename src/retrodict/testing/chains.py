"""The transition matrix of a Metropolis-Hastings kernel on an enumerated space, from the sampler's own rule."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from retrodict.numerics import NEG_INF
from retrodict.policies.base import FiniteStepper
from retrodict.rng import generator
from retrodict.samplers.mh.kernels import Kernel, log_accept
from retrodict.testing.oracle import Exact

Rule = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]


def tails(policy: FiniteStepper, exact: Exact) -> Float[Tensor, "paths t1"]:
    """log q of each path's moves from i on and of its stop, for i = 0..t; 0 past the end."""
    paths = exact.paths
    scores, n = policy.score(paths), paths.n
    t = torch.arange(paths.moves.shape[1] + 1)
    stop = scores.log_stop.double()[torch.arange(len(n)), n, paths.stop]
    moves = torch.cat([scores.log_q.double(), torch.zeros(len(n), 1)], 1)
    each = torch.where(t < n[:, None], moves, torch.where(t == n[:, None], stop[:, None], 0.0))
    return each.flip(1).cumsum(1).flip(1)


def transition(
    policy: FiniteStepper, exact: Exact, kernel: Kernel, accept: Rule = log_accept
) -> Float[Tensor, "paths paths"]:
    """P[x, y]: cut x where the kernel may, redraw the tail from the policy, accept by the rule, or stay.

    A kernel's ``log_cut`` depends on the length alone, so its cuts are uniform on their support, which is found by
    drawing.
    """
    paths = exact.paths
    count, width = len(paths), paths.moves.shape[1]
    tail = tails(policy, exact)
    log_gamma = exact.log_gamma + exact.log_pb
    n = paths.n
    gen = generator(0)
    out = torch.zeros(count, count, dtype=torch.float64)
    same = torch.cat([torch.ones(count, count, 1, dtype=torch.bool),
                      (paths.moves[:, None] == paths.moves[None]).cumprod(2).bool()], 2)  # fmt: skip
    support = {k: kernel.cut(torch.full((256 * (k + 1),), k), gen).unique().tolist() for k in n.unique().tolist()}
    log_cut = kernel.log_cut(n).double()
    for k, cuts in support.items():
        rows = (n == k).nonzero().squeeze(1)
        for c in cuts:
            propose = torch.where(same[rows, :, c] & (n >= c) & (c <= width), tail[:, c], NEG_INF).exp() / len(cuts)
            i, j = propose.nonzero().unbind(1)
            x = rows[i]
            ratio = accept(log_gamma[x], log_gamma[j], tail[x, c], tail[j, c], log_cut[x], log_cut[j])
            out.index_put_((x, j), propose[i, j] * ratio.clamp_max(0.0).exp(), accumulate=True)
    return out + torch.diag(1 - out.sum(1))


def invariance(policy: FiniteStepper, exact: Exact, matrix: Float[Tensor, "paths paths"]) -> float:
    """max |sigma P - sigma| of the posterior sigma over paths."""
    sigma = (exact.log_gamma + exact.log_pb - exact.z.log()).exp()
    return float((sigma @ matrix - sigma).abs().max())


def law_after(exact: Exact, matrix: Float[Tensor, "paths paths"], steps: int) -> Float[Tensor, " objects"]:
    """Exact law of a chain that starts at a draw of the proposal, after ``steps`` steps."""
    law = exact.log_q.double().exp()
    for _ in range(steps):
        law = law @ matrix
    return exact.law(law.log())
