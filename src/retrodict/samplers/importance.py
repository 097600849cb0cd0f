"""Importance sampling and its relatives: one independent draw a particle.

    w = gamma(z) P_B / b(z),   E[w f(z)] = sum_z gamma(z) f(z),   Z-hat = mean w

unbiased for Z; self-normalised averages are biased O(1/n). b is the density drawn from (behaviour temperature and
mask included), gamma the target.
"""

from __future__ import annotations

import time
from typing import Any

import torch

from retrodict.errors import InputError, nearest
from retrodict.numerics import NEG_INF, at_end, log_mean_exp, safe_sub
from retrodict.particles import Particles
from retrodict.protocols import Policy
from retrodict.records import Trace
from retrodict.rng import generator
from retrodict.samplers.common import (
    OnStep,
    base_of,
    device_of,
    draw,
    finish,
    log_b_of,
    log_pb_of,
    meter,
    positive,
    proposal,
    rows_for,
)
from retrodict.targets.algebra import Target


def importance(
    target: Target,
    policy: Policy | None = None,
    *,
    n: int,
    seed: int,
    runs: int = 4,
    temperature: float = 1.0,
    on_step: OnStep | None = None,
) -> Particles:
    """n draws a run and problem, weighted; ``runs`` independent runs give the interval.

    Args:
        target: what to draw from, in proportion.
        policy: the proposal; default the prior, masked where the target has a hard constraint.
        n: draws a run and problem.
        seed: one seed, one result.
        runs: independent runs.
        temperature: of the behaviour (b), not of the target.
        on_step: progress callback.
    """
    positive(n=n, runs=runs)
    began, tokens = time.perf_counter(), meter(target)
    policy = proposal(target, policy)
    device = device_of(target, policy)
    gen = generator(seed, device)
    rollouts = draw(target, policy, rows_for(target, n * runs, device), gen, {"temperature": temperature}, on_step)
    rollouts = target.terms(rollouts)
    log_w = safe_sub(target.log_gamma(rollouts) + log_pb_of(target, rollouts), log_b_of(rollouts))
    m = len(target.problems)
    log_z = log_mean_exp(log_w.view(m, runs, n))
    settings = {"n": n, "runs": runs, "seed": seed, "temperature": temperature}
    trace = Trace("importance", settings, counts={"proposals": float(m * n * runs)})
    return finish(target, rollouts, log_w.view(m, runs * n), log_z, trace, began, tokens)


def ancestral(
    target: Target,
    policy: Policy | None = None,
    *,
    n: int,
    seed: int,
    temperature: float = 1.0,
    on_step: OnStep | None = None,
) -> Particles:
    """n plain draws from the policy (default: the prior itself), unweighted: the baseline everyone starts from.

    Draws are from the policy, not from the target; there is no evidence estimate.
    """
    positive(n=n)
    began, tokens = time.perf_counter(), meter(target)
    policy = base_of(proposal(target, policy)) if policy is None else policy
    device = device_of(target, policy)
    rollouts = draw(target, policy, rows_for(target, n, device), generator(seed, device),
                    {"temperature": temperature}, on_step)  # fmt: skip
    rollouts = target.terms(rollouts)
    m = len(target.problems)
    trace = Trace("ancestral", {"n": n, "seed": seed, "temperature": temperature})
    return finish(target, rollouts, torch.zeros(m, n), None, trace, began, tokens)


def rejection(
    target: Target,
    policy: Policy | None = None,
    *,
    n: int,
    seed: int,
    runs: int = 4,
    log_bound: float | None = None,
    on_step: OnStep | None = None,
) -> Particles:
    """n proposals a run; each is kept with probability gamma / (M q). What is kept is exact.

    Z-hat = M * (share kept), unbiased. Rejected proposals stay in the record with weight zero.

    Args:
        target: what to draw from.
        policy: the proposal; default as for importance sampling.
        n: proposals (not acceptances) a run and problem.
        seed: one seed, one result.
        runs: independent runs.
        log_bound: log M >= log gamma/q everywhere. Default 0, right where the proposal is the prior and every other
            factor is at most one (probabilities, constraints).
        on_step: progress callback.

    Raises:
        InputError: a draw exceeds the bound; the message says by how much.
    """
    positive(n=n, runs=runs)
    began, tokens = time.perf_counter(), meter(target)
    policy = proposal(target, policy)
    device = device_of(target, policy)
    gen = generator(seed, device)
    m, log_m = len(target.problems), log_bound or 0.0
    rollouts = target.terms(draw(target, policy, rows_for(target, n * runs, device), gen, None, on_step))
    log_w = safe_sub(target.log_gamma(rollouts) + log_pb_of(target, rollouts), log_b_of(rollouts))
    worst = float(log_w.max()) - log_m
    if worst > 1e-4:
        raise InputError(f"gamma/q exceeds the bound by {worst:.2f} nats; give log_bound >= {float(log_w.max()):.2f}")
    coin = torch.rand(len(log_w), generator=gen, device=device, dtype=torch.float64).log()
    kept = torch.where(coin < log_w - log_m, torch.full_like(log_w, log_m), NEG_INF)
    accepted = float((kept > NEG_INF).sum())
    settings = {"n": n, "runs": runs, "seed": seed, "log_bound": log_m}
    trace = Trace("rejection", settings, counts={"proposals": float(m * n * runs), "accepted": accepted})
    return finish(target, rollouts, kept.view(m, -1), log_mean_exp(kept.view(m, runs, n)), trace, began, tokens)


def best_of_n(
    target: Target,
    policy: Policy | None = None,
    *,
    n: int,
    seed: int,
    draws: int = 8,
    by: str | None = None,
    on_step: OnStep | None = None,
) -> Particles:
    """The best of n draws, ``draws`` times: the usual baseline. Its law is not the posterior, and is known exactly:
    P(score <= s) = F(s)^n with F the policy's distribution of the score; ties go to the first.

    ``by`` names the factor to rank by; default everything but the prior (all of gamma where there is nothing else).
    """
    positive(n=n, draws=draws)
    if by is not None and by not in target.factors:
        raise InputError(f"no factor {by!r} to rank by{nearest(by, target.factors)}")
    began, tokens = time.perf_counter(), meter(target)
    policy = base_of(proposal(target, policy)) if policy is None else policy
    device = device_of(target, policy)
    rows = rows_for(target, n * draws, device)
    rollouts = target.terms(draw(target, policy, rows, generator(seed, device), None, on_step))
    score = rank_score(target, rollouts, by).view(-1, n)
    best = score.argmax(1) + torch.arange(len(score), device=device) * n
    m = len(target.problems)
    trace = Trace(
        "best_of_n", {"n": n, "draws": draws, "seed": seed, "by": by}, counts={"proposals": float(m * n * draws)}
    )
    return finish(target, rollouts.take(best), torch.zeros(m, draws), None, trace, began, tokens)


def rank_score(target: Target, rollouts: Any, by: str | None) -> torch.Tensor:
    """What best-of-n ranks by."""
    names = [by] if by else [f for f in target.factors if f != "prior"] or list(target.factors)
    rollouts = target.terms(rollouts)
    total = torch.zeros(len(rollouts), dtype=torch.float64, device=rollouts.n.device)
    for name in names:
        value = rollouts.terms[name]
        value = at_end(value, rollouts.n, rollouts.stop) if value.dim() > 1 else value
        total = total + target.betas[name] * value.double()
    return total
