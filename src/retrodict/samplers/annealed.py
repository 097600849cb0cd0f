"""Annealed importance sampling with resampling: a population led from the policy to the target.

    log gamma_b = log q + b (log gamma P_B - log q),   0 = b_0 < ... < b_K = 1,   w = gamma P_B / q

Draw from q. At each rung weigh by the increment *at the state that is there*, resample where the ESS is low, and move
with a kernel that leaves gamma_(b_k) alone:

    log W += (b_k - b_(k-1)) log w(x_(k-1)),      x_k ~ K_(b_k)(x_(k-1), .),      Z-hat = prod of mean increments

Z-hat is unbiased for any ladder and any number of moves, and mean W f(x_K) is for gamma(f); log Z-hat is biased low,
weighted averages O(1/n). Neal 2001 (no resampling: ``ess_threshold=0``); Del Moral, Doucet and Jasra 2006, section
3.3.2.3 (resampling before the move, which has no weight of its own). No resampling on the last rung.
"""

from __future__ import annotations

import time

import torch

from retrodict.errors import InputError, nearest
from retrodict.numerics import NEG_INF, ess, log_mean_exp, normalise
from retrodict.particles import Particles
from retrodict.policies.base import FiniteStepper
from retrodict.records import Trace
from retrodict.rng import generator
from retrodict.samplers.common import OnStep, device_of, finish, meter, positive, proposal, rows_for
from retrodict.samplers.mh.chains import Chains, begin, scaled, step
from retrodict.samplers.mh.run import kernel_of
from retrodict.samplers.resampling import RESAMPLERS
from retrodict.samplers.tempering import ladder
from retrodict.targets.algebra import Target


def annealed(
    target: Target,
    policy: FiniteStepper | None = None,
    *,
    n: int,
    seed: int,
    runs: int = 4,
    rungs: int = 8,
    steps: int = 1,
    kernel: str = "suffix",
    ess_threshold: float = 0.5,
    resampling: str = "systematic",
    on_step: OnStep | None = None,
) -> Particles:
    """n particles a run and problem, led over ``rungs`` exponents; all runs and problems advance in one batch.

    Args:
        target: what to draw from.
        policy: where the particles begin and what proposes their moves; default as for :func:`mh`.
        n: particles of one population.
        seed: one seed, one result.
        runs: independent populations of each problem (for the interval of the evidence).
        rungs: exponents after 0, the last of which is 1; with 1 this is importance sampling, then a move.
        steps: Metropolis-Hastings steps at each rung.
        kernel: what a step redoes, see :func:`mh`.
        ess_threshold: resample where ESS < threshold * n; 0 never.
        resampling: ``systematic | stratified | residual | multinomial``.
        on_step: progress callback.
    """
    positive(n=n, runs=runs, rungs=rungs, steps=steps)
    if resampling not in RESAMPLERS:
        raise InputError(f"unknown resampling {resampling!r}{nearest(resampling, RESAMPLERS)}")
    if not 0 <= ess_threshold <= 1:
        raise InputError(f"ess_threshold is a share of n between 0 and 1, not {ess_threshold}")
    rule = kernel_of(kernel)
    began, tokens = time.perf_counter(), meter(target)
    policy = proposal(target, policy)
    device = device_of(target, policy)
    gen = generator(seed, device)
    m, pops = len(target.problems), len(target.problems) * runs
    now = begin(target, policy, rows_for(target, runs * n, device), gen, None)
    log_w = torch.zeros(pops, n, dtype=torch.float64, device=device)
    levels, accepted, ess_of, did, parents = ladder(rungs).tolist(), 0.0, [], [], []
    root = torch.arange(n, device=device).repeat(pops, 1)
    for k in range(1, rungs + 1):
        log_w = log_w + increment(now, levels[k - 1], levels[k]).view(pops, n)
        ess_of.append(ess(log_w))
        pick = (ess_of[-1] < ess_threshold * n) & (ess_of[-1] > 0) & (k < rungs)
        did.append(pick)
        index = torch.arange(n, device=device).repeat(pops, 1)
        parents.append(index)
        if pick.any():
            index[pick] = RESAMPLERS[resampling](normalise(log_w[pick]), gen)
            root = root.gather(1, index)
            now = now.take((index + n * torch.arange(pops, device=device)[:, None]).flatten())
            log_w = torch.where(pick[:, None], log_mean_exp(log_w)[:, None], log_w)
        for _ in range(steps):
            now, yes = step(target, policy, rule, now, gen, levels[k])
            accepted += float(yes.sum())
        if on_step is not None:
            on_step(k, rungs)
    counts = {"proposals": float(rungs * steps * pops * n), "accepted": accepted}
    settings = {"n": n, "runs": runs, "rungs": rungs, "steps": steps, "kernel": kernel, "seed": seed,
                "ess_threshold": ess_threshold, "resampling": resampling}  # fmt: skip
    live = log_w > NEG_INF
    roots = torch.tensor([len(r[k].unique()) for r, k in zip(root, live, strict=True)])
    trace = Trace("annealed", settings, torch.stack(ess_of).cpu(), torch.stack(did).cpu(), roots,
                  torch.stack(parents).cpu(), counts=counts)  # fmt: skip
    log_z = log_mean_exp(log_w.view(m, runs, n))
    return finish(target, now.rows, log_w.view(m, runs * n), log_z, trace, began, tokens)


def increment(now: Chains, last: float, b: float) -> torch.Tensor:
    """log gamma_b - log gamma_last, at the present states."""
    return scaled(now.log_w, b - last)
