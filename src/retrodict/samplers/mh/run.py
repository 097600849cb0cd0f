"""Metropolis-Hastings on complete strings: many chains in one batch.

The stationary law is the posterior exactly; finitely many steps leave a bias towards the start, which the report's
chain agreement shows. There is no evidence estimate. ``kernels.py`` has the moves, ``chains.py`` the step.
"""

from __future__ import annotations

import time

import torch
from torch import Tensor

from retrodict.errors import InputError, nearest
from retrodict.numerics import NEG_INF
from retrodict.particles import Particles
from retrodict.policies.base import FiniteStepper
from retrodict.records import Rollouts, Trace, cat_rollouts
from retrodict.rng import generator
from retrodict.samplers.common import OnStep, device_of, finish, meter, positive, proposal, rows_for
from retrodict.samplers.mh.chains import begin, step
from retrodict.samplers.mh.kernels import KERNELS, Proposes
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
    start: Rollouts | Particles | None = None,
    on_step: OnStep | None = None,
) -> Particles:
    """n chains a problem, ``steps`` steps each; ``keep`` states of the second half of every chain are returned.

    Args:
        target: the stationary law.
        policy: the proposal; default the prior, masked where the target has a hard constraint.
        n: chains a problem.
        seed: one seed, one result.
        steps: steps of each chain.
        kernel: ``suffix`` (redo the tail from a uniform cut), ``block`` (redo a stretch, keep both sides) or
            ``independence`` (redo everything).
        keep: states kept of each chain, evenly spaced over its second half (fewer where there are not that many).
        start: where the chains begin: n rows a problem, problem-major, or a weighted sample, from which n a problem
            are drawn; default draws from the policy.
        on_step: progress callback.
    """
    positive(n=n, steps=steps, keep=keep)
    rule, kept_at = kernel_of(kernel), kept_steps(steps, keep)
    began, tokens = time.perf_counter(), meter(target)
    policy = proposal(target, policy)
    device = device_of(target, policy)
    gen = generator(seed, device)
    problem = rows_for(target, n, device)
    now = begin(target, policy, problem, gen, start)
    kept, accepted, moved = [], 0.0, torch.zeros(len(problem), dtype=torch.bool, device=device)
    for t in range(1, steps + 1):
        now, yes = step(target, policy, rule, now, gen)
        accepted += float(yes.sum())
        moved |= yes
        if t in kept_at:
            kept.append(now.rows)
        if on_step is not None:
            on_step(t, steps)
    rows, log_w = by_chain(target, kept, n)
    counts = {"proposals": float(steps * len(problem)), "accepted": accepted, "chains_moved": float(moved.sum())}
    settings = {"n": n, "steps": steps, "kernel": kernel, "keep": len(kept_at), "seed": seed}
    trace = Trace("mh", settings, counts=counts, notes=noisy(target))
    return finish(target, rows, log_w, None, trace, began, tokens)


def kernel_of(name: str) -> Proposes:
    """A kernel by name. Raises InputError for an unknown one."""
    if name not in KERNELS:
        raise InputError(f"unknown kernel {name!r}{nearest(name, KERNELS)}")
    return KERNELS[name]


def kept_steps(steps: int, keep: int) -> set[int]:
    """The steps after which states are kept: at most ``keep``, evenly spaced over the second half, and the last."""
    keep = min(keep, steps - steps // 2 + 1)
    if keep == 1:
        return {steps}
    return {int(x) for x in torch.linspace(max(steps // 2, 1), steps, keep).round().tolist()}


def by_chain(target: Target, kept: list[Rollouts], n: int) -> tuple[Rollouts, Tensor]:
    """Kept states of n chains a problem, chain after chain, and their equal weights ``[m, n * states]``."""
    m, states = len(target.problems), len(kept)
    rows = cat_rollouts(kept)
    order = torch.arange(states * m * n, device=rows.n.device).view(states, m, n).permute(1, 2, 0).flatten()
    rows = rows.take(order)
    return rows, torch.where(target.log_gamma(rows) > NEG_INF, 0.0, NEG_INF).view(m, n * states)


def noisy(target: Target) -> tuple[str, ...]:
    """What a reader should know about factors that are estimates."""
    logs = [name for name, term in target.factors.items() if term.noise == "log"]
    return tuple(f"the factor {name!r} is noisy in its logarithm: the chain's law has E[exp(estimate)] of it, not "
                 "exp(E[estimate])" for name in logs)  # fmt: skip
