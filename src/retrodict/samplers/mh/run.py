"""Metropolis-Hastings on complete strings: many chains in one batch.

The stationary law is the posterior exactly; finitely many steps leave a bias towards the start, which the report's
chain agreement shows. There is no evidence estimate. Where objects are reached by several paths the chain moves on
paths, with gamma P_B as its law, so that objects keep gamma.
"""

from __future__ import annotations

import time

import torch

from retrodict.errors import InputError, nearest
from retrodict.numerics import NEG_INF
from retrodict.particles import Particles
from retrodict.policies.base import FiniteStepper
from retrodict.records import Rollouts, Trace, cat_rollouts
from retrodict.rng import generator
from retrodict.samplers.common import (
    OnStep,
    device_of,
    draw,
    finish,
    fresh,
    log_b_of,
    log_pb_of,
    meter,
    positive,
    proposal,
    rows_for,
)
from retrodict.samplers.mh.kernels import KERNELS, log_accept
from retrodict.targets.algebra import Target


def mh(
    target: Target,
    policy: FiniteStepper | None = None,
    *,
    n: int,
    seed: int,
    steps: int = 50,
    kernel: str = "suffix",
    keep: int = 8,
    start: Rollouts | None = None,
    on_step: OnStep | None = None,
) -> Particles:
    """n chains a problem, ``steps`` steps each; ``keep`` states of the second half of every chain are returned.

    Args:
        target: the stationary law.
        policy: the proposal; default the prior, masked where the target has a hard constraint.
        n: chains a problem.
        seed: one seed, one result.
        steps: steps of each chain.
        kernel: ``suffix`` (redo the tail from a uniform cut) or ``independence`` (redo everything).
        keep: states kept of each chain, evenly spaced over its second half (fewer where there are not that many).
        start: where the chains begin (n rows a problem, problem-major); default draws from the policy.
        on_step: progress callback.
    """
    positive(n=n, steps=steps, keep=keep)
    if kernel not in KERNELS:
        raise InputError(f"unknown kernel {kernel!r}{nearest(kernel, KERNELS)}")
    keep = min(keep, steps - steps // 2 + 1)
    began, tokens = time.perf_counter(), meter(target)
    policy = proposal(target, policy)
    device = device_of(target, policy)
    gen = generator(seed, device)
    problem = rows_for(target, n, device)
    now = draw(target, policy, problem, gen) if start is None else start
    now = target.terms(now)
    log_gamma = target.log_gamma(now) + log_pb_of(target, now)
    at_least = {int(x) for x in torch.linspace(steps // 2, steps, keep).round().tolist()} if keep > 1 else {steps}
    kept, accepted, moved = [], 0.0, torch.zeros(len(problem), dtype=torch.bool, device=device)
    rule = KERNELS[kernel]
    for t in range(1, steps + 1):
        cut = rule.cut(now.n, gen)
        new = target.terms(fresh(target, policy, problem, gen, prefix=(now, cut)))
        log_new = target.log_gamma(new) + log_pb_of(target, new)
        ratio = log_accept(log_gamma, log_new, log_b_of(now, cut), log_b_of(new, cut), rule.log_cut(now.n),
                           rule.log_cut(new.n))  # fmt: skip
        coin = torch.rand(len(ratio), generator=gen, device=device, dtype=torch.float64).log()
        yes = coin < ratio
        accepted += float(yes.sum())
        moved |= yes
        index = torch.where(yes, len(problem), 0) + torch.arange(len(problem), device=device)
        now = cat_rollouts([now, new]).take(index)
        log_gamma = torch.where(yes, log_new, log_gamma)
        if t in at_least:
            kept.append(now)
        if on_step is not None:
            on_step(t, steps)
    m, states = len(target.problems), len(kept)
    rows = cat_rollouts(kept)
    order = torch.arange(states * m * n, device=device).view(states, m, n).permute(1, 2, 0).flatten()
    rows = rows.take(order)
    log_w = torch.where(target.log_gamma(rows) > NEG_INF, 0.0, NEG_INF).view(m, n * states)
    counts = {"proposals": float(steps * m * n), "accepted": accepted, "chains_moved": float(moved.sum())}
    settings = {"n": n, "chains": n, "steps": steps, "kernel": kernel, "keep": keep, "seed": seed}
    return finish(target, rows, log_w, None, Trace("mh", settings, counts=counts), began, tokens)
