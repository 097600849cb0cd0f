"""The transition matrix of a Metropolis-Hastings kernel on an enumerated space, from the sampler's own rule."""

from __future__ import annotations

from collections import defaultdict

import torch
from jaxtyping import Float
from torch import Tensor

from retrodict.numerics import NEG_INF
from retrodict.policies.base import FiniteStepper
from retrodict.rng import generator
from retrodict.samplers.mh.block import Block
from retrodict.samplers.mh.kernels import Kernel, Proposes, log_accept
from retrodict.testing.oracle import Exact


def tails(policy: FiniteStepper, exact: Exact) -> Float[Tensor, "paths t1"]:
    """log q of each path's moves from i on and of its stop, for i = 0..t; 0 past the end."""
    paths = exact.paths
    scores, n = policy.score(paths), paths.n
    t = torch.arange(paths.moves.shape[1] + 1)
    stop = scores.log_stop.double()[torch.arange(len(n)), n, paths.stop]
    moves = torch.cat([scores.log_q.double(), torch.zeros(len(n), 1)], 1)
    each = torch.where(t < n[:, None], moves, torch.where(t == n[:, None], stop[:, None], 0.0))
    return each.flip(1).cumsum(1).flip(1)


def transition(policy: FiniteStepper, exact: Exact, kernel: Proposes) -> Float[Tensor, "paths paths"]:
    """P[x, y]: propose as the kernel does, accept by the rule, or stay."""
    if isinstance(kernel, Kernel):
        out = _redo_tails(policy, exact, kernel)
    elif isinstance(kernel, Block):
        out = _redo_blocks(policy, exact, kernel)
    else:
        raise TypeError(f"no enumerated matrix for a {type(kernel).__name__}")
    return out + torch.diag(1 - out.sum(1))


def _redo_tails(policy: FiniteStepper, exact: Exact, kernel: Kernel) -> Float[Tensor, "paths paths"]:
    """Cut x where the kernel may, redraw the tail from the policy.

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
            ratio = log_accept(log_gamma[x], log_gamma[j], tail[x, c] - tail[j, c] + log_cut[j] - log_cut[x])
            out.index_put_((x, j), propose[i, j] * ratio.clamp_max(0.0).exp(), accumulate=True)
    return out


def _redo_blocks(policy: FiniteStepper, exact: Exact, kernel: Block) -> Float[Tensor, "paths paths"]:
    """Replace each block of x by every other block that fits between the same sides.

    The chance of a block is written out here (a product over its moves, each renormalised over moves), not taken from
    the sampler. Paths that the policy cannot draw stay where they are.
    """
    paths, space = exact.paths, policy.space
    scores, t = policy.score(paths), paths.moves.shape[1]
    free = (1 - scores.log_stop.double()[:, :t].exp().sum(2)).log()
    drawn = torch.cat([torch.zeros(len(paths), 1), (scores.log_q.double() - free).cumsum(1)], 1)
    groups: dict[tuple[object, ...], list[tuple[int, int]]] = defaultdict(list)
    records = zip(paths.moves.tolist(), paths.n.tolist(), paths.stop.tolist(), strict=True)
    for x, (moves, n, stop) in enumerate(records):
        if exact.log_q[x] == NEG_INF:
            continue
        for i in range(n + 1):
            for j in range(i, min(i + kernel.width, n) + 1):
                groups[(*moves[:i], "gap", *moves[j:n], stop if j < n else "any")].append((x, j - i))
    log_gamma = exact.log_gamma + exact.log_pb
    log_count, out = kernel.log_count(paths.n), torch.zeros(len(paths), len(paths), dtype=torch.float64)
    for key, members in groups.items():
        at, (x, length) = key.index("gap"), torch.tensor(members).unbind(1)
        low, high = kernel.sizes(space, torch.tensor([len(key) - 2]))
        sizes = int(high - low) + 1
        log_q = drawn[x, at + length] - drawn[x, at]
        choices = sizes * (space.n_stops if key[-1] == "any" else 1)
        i, j = torch.cartesian_prod(torch.arange(len(x)), torch.arange(len(x))).view(-1, 2).unbind(1)
        back = log_q[i] - log_q[j] + log_count[x[i]] - log_count[x[j]]
        ratio = log_accept(log_gamma[x[i]], log_gamma[x[j]], back).clamp_max(0.0).exp()
        chance = (log_q[j] - Block.log_count(kernel, paths.n[x[i]])).exp() / choices
        out.index_put_((x[i], x[j]), chance * ratio, accumulate=True)
    return out.fill_diagonal_(0.0)


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
