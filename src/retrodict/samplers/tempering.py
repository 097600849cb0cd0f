"""Parallel tempering: chains at several exponents of one ladder, which swap states.

    log gamma_b = log q + b (log gamma P_B - log q),   0 = b_1 < ... < b_R = 1

Rung 0 is the policy itself (the prior, where it proposes), so it never sticks; rung 1 is the target. With w = gamma P_B
/ q, a swap of neighbouring states x at b and x' at b' is accepted with

    min(1, (w(x') / w(x))^(b - b'))

After every step the even and the odd pairs of neighbours take turns (Okabe et al. 2001; Syed et al. 2022, arXiv
1905.02939: better than pairs at random). The joint law of all rungs is the product of the gamma_b, left invariant
exactly; the states of rung 1 are returned. Swendsen and Wang 1986; Geyer 1991.
"""

from __future__ import annotations

import time

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from retrodict.errors import InputError
from retrodict.particles import Particles
from retrodict.policies.base import FiniteStepper
from retrodict.records import Rollouts, Trace
from retrodict.rng import generator
from retrodict.samplers.common import OnStep, device_of, finish, meter, positive, proposal, rows_for
from retrodict.samplers.mh.chains import Chains, begin, joined, scaled, step
from retrodict.samplers.mh.kernels import Proposes, log_accept
from retrodict.samplers.mh.run import by_chain, kept_steps, kernel_of, noisy
from retrodict.targets.algebra import Target


def ladder(gaps: int) -> Float[Tensor, " gaps1"]:
    """Exponents (k / gaps)^2 from 0 to 1: dense where gamma_b is near q, whose weights vary most."""
    return (torch.arange(gaps + 1, dtype=torch.float64) / gaps).square()


def log_swap(
    log_w: Float[Tensor, " p"], other: Float[Tensor, " p"], b: Float[Tensor, " #p"], b_other: Float[Tensor, " #p"]
) -> Float[Tensor, " p"]:
    """log of the ratio for swapping states of log-weights ``log_w`` (at b) and ``other`` (at ``b_other``)."""
    before, after = scaled(log_w, b) + scaled(other, b_other), scaled(other, b) + scaled(log_w, b_other)
    return log_accept(before, after, torch.zeros_like(before))


def tempering(
    target: Target,
    policy: FiniteStepper | None = None,
    *,
    n: int,
    seed: int,
    steps: int = 50,
    rungs: int = 4,
    kernel: str = "suffix",
    keep: int = 8,
    start: Rollouts | Particles | None = None,
    on_step: OnStep | None = None,
) -> Particles:
    """n ladders a problem, ``steps`` steps each; ``keep`` states of the second half of every cold chain are returned.

    Args:
        target: the stationary law of the cold chains.
        policy: the proposal, and the law of rung 0; default the prior, masked where the target has a hard constraint.
        n: ladders a problem.
        seed: one seed, one result.
        steps: steps of each chain; after each, half the pairs of neighbours may swap.
        rungs: chains of a ladder, 2 or more.
        kernel: what a step redoes, see :func:`mh`.
        keep: states kept of each cold chain.
        start: where the cold chains begin, see :func:`mh`; the other rungs begin at draws of the policy.
        on_step: progress callback.
    """
    positive(n=n, steps=steps, keep=keep)
    if rungs < 2:
        raise InputError(f"a ladder has at least 2 rungs, not {rungs}; for one chain alone use mh")
    rule, kept_at = kernel_of(kernel), kept_steps(steps, keep)
    began, tokens = time.perf_counter(), meter(target)
    policy = proposal(target, policy)
    device = device_of(target, policy)
    gen = generator(seed, device)
    problem = rows_for(target, n, device)
    b = len(problem)
    levels = ladder(rungs - 1).to(device)
    warm = begin(target, policy, problem.repeat(rungs - 1), gen, None)
    now = joined([warm, begin(target, policy, problem, gen, start)])  # rung r has rows r b to (r + 1) b
    cold = torch.arange((rungs - 1) * b, rungs * b, device=device)
    kept, accepted, swaps, swapped = [], 0.0, 0, 0
    for t in range(1, steps + 1):
        now, yes, offered, taken = sweep(target, policy, rule, now, levels, t, gen)
        accepted += float(yes[cold].sum())
        swaps, swapped = swaps + offered, swapped + taken
        if t in kept_at:
            kept.append(now.rows.take(cold))
        if on_step is not None:
            on_step(t, steps)
    rows, log_w = by_chain(target, kept, n)
    counts = {"proposals": float(steps * b), "accepted": accepted, "swaps": float(swaps), "swapped": float(swapped)}
    settings = {"n": n, "steps": steps, "rungs": rungs, "kernel": kernel, "keep": len(kept_at), "seed": seed}
    trace = Trace("tempering", settings, counts=counts, notes=noisy(target))
    return finish(target, rows, log_w, None, trace, began, tokens)


def sweep(
    target: Target, policy: FiniteStepper, kernel: Proposes, now: Chains, levels: Float[Tensor, " r"], t: int,
    gen: torch.Generator,
) -> tuple[Chains, Bool[Tensor, " rows"], int, int]:  # fmt: skip
    """One step of every rung, then swaps of the pairs whose turn ``t`` is; which steps were accepted, how many swaps
    were offered and how many taken."""
    rungs, b = len(levels), len(now.log_q) // len(levels)
    now, yes = step(target, policy, kernel, now, gen, levels.repeat_interleave(b))
    lower = torch.arange(t % 2 if rungs > 2 else 0, rungs - 1, 2, device=levels.device)
    at = (lower[:, None] * b + torch.arange(b, device=lower.device)).flatten()
    log_w, cool = now.log_w, lower.repeat_interleave(b)
    ratio = log_swap(log_w[at], log_w[at + b], levels[cool], levels[cool + 1])
    done = torch.rand(len(ratio), generator=gen, device=ratio.device, dtype=torch.float64).log() < ratio
    index = torch.arange(len(log_w), device=lower.device)
    index[at[done]], index[at[done] + b] = at[done] + b, at[done]
    return now.take(index), yes, len(at), int(done.sum())
