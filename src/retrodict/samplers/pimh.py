"""Particle-independent Metropolis-Hastings: whole SMC runs as proposals.

A state is one object of one run, and that run's Z-hat. Run SMC anew, draw one of its particles by their weights, and

    accept with  min(1, Z-hat' / Z-hat)

Since E[Z-hat sum_i W_i f(x_i)] = gamma(f), the stationary law of the object is the posterior exactly, at any number of
particles (Andrieu, Doucet and Holenstein 2010, section 2.4.2): this takes the O(1/n) bias of SMC's weighted averages
away, step by step. The proposals do not depend on the state, so all chains' runs of a step advance in one batch. A
chain may begin at a given object: its run is then conditional SMC around it, and a chain that begins at an exact draw
(with ``resampling="multinomial"``, as conditional SMC does) is exact at once.
"""

from __future__ import annotations

import time

import torch
from jaxtyping import Float
from torch import Tensor

from retrodict.numerics import NEG_INF
from retrodict.particles import Particles
from retrodict.policies.base import FiniteStepper
from retrodict.records import Rollouts, Trace, cat_rollouts
from retrodict.rng import child_seed, generator
from retrodict.samplers.common import OnStep, finish, meter, positive
from retrodict.samplers.mh.kernels import log_accept
from retrodict.samplers.mh.run import by_chain, kept_steps, noisy
from retrodict.samplers.smc import conditional_smc, smc
from retrodict.targets.algebra import Target


def pimh(
    target: Target,
    policy: FiniteStepper | None = None,
    *,
    n: int,
    seed: int,
    runs: int = 4,
    steps: int = 16,
    keep: int = 8,
    ess_threshold: float = 0.5,
    resampling: str = "systematic",
    start: Rollouts | None = None,
    on_step: OnStep | None = None,
) -> Particles:
    """``runs`` chains a problem; each proposal is one object of a new SMC run of n particles.

    Args:
        target: the stationary law.
        policy: what SMC proposes from; default as for :func:`smc`.
        n: particles of one SMC run.
        seed: one seed, one result.
        runs: independent chains a problem.
        steps: SMC runs offered to each chain after its first.
        keep: states kept of each chain, evenly spaced over its second half.
        ess_threshold: of SMC.
        resampling: of SMC.
        start: objects to begin at, one a problem or one a chain (problem-major).
        on_step: progress callback.
    """
    positive(n=n, runs=runs, steps=steps, keep=keep)
    began, tokens = time.perf_counter(), meter(target)
    gen, kept_at = generator(seed), kept_steps(steps, keep)

    def propose(t: int) -> tuple[Rollouts, Float[Tensor, " chains"]]:
        p = smc(target, policy, n=n, seed=child_seed(seed, t), runs=runs, ess_threshold=ess_threshold,
                resampling=resampling)  # fmt: skip
        return one_each(p, gen)

    if start is None:
        now, log_z = propose(0)
    else:
        first = conditional_smc(target, policy, exact=start, n=n, seed=child_seed(seed, 0), runs=runs,
                                ess_threshold=ess_threshold)  # fmt: skip
        held = torch.arange(first.m * runs) * n  # slot 0 of each population
        assert first.log_z is not None
        now, log_z = first.objects.take(held), first.log_z.flatten()
    chains = len(log_z)
    kept, accepted, moved = [], 0.0, torch.zeros(chains, dtype=torch.bool)
    for t in range(1, steps + 1):
        new, log_new = propose(t)
        yes = torch.rand(chains, generator=gen, dtype=torch.float64).log() < log_ratio(log_z, log_new)
        now = cat_rollouts([now, new]).take(torch.where(yes, chains, 0) + torch.arange(chains))
        log_z = torch.where(yes, log_new, log_z)
        accepted += float(yes.sum())
        moved |= yes
        if t in kept_at:
            kept.append(now)
        if on_step is not None:
            on_step(t, steps)
    rows, log_w = by_chain(target, kept, runs)
    counts = {"proposals": float(steps * chains), "accepted": accepted, "chains_moved": float(moved.sum())}
    settings = {"n": n, "runs": runs, "chains": runs, "steps": steps, "keep": len(kept_at), "seed": seed,
                "ess_threshold": ess_threshold, "resampling": resampling}  # fmt: skip
    trace = Trace("pimh", settings, counts=counts, notes=noisy(target))
    return finish(target, rows, log_w, None, trace, began, tokens)


def log_ratio(log_z: Float[Tensor, " chains"], log_z_new: Float[Tensor, " chains"]) -> Float[Tensor, " chains"]:
    """log of Z-hat' / Z-hat; a run that died out is never moved to."""
    return log_accept(log_z, log_z_new, torch.zeros_like(log_z))


def one_each(p: Particles, gen: torch.Generator) -> tuple[Rollouts, Float[Tensor, " chains"]]:
    """One particle of every run, drawn by the weights within the run, and the run's log Z-hat."""
    assert p.log_z is not None
    n = p.k // p.log_z.shape[1]
    log_w = p.log_w.view(-1, n)
    weights = torch.where((log_w == NEG_INF).all(1, keepdim=True), 1.0, (log_w - log_w.amax(1, keepdim=True)).exp())
    pick = torch.multinomial(weights, 1, generator=gen).squeeze(1)
    return p.objects.take(torch.arange(len(log_w)) * n + pick), p.log_z.flatten()
