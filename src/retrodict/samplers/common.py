"""What samplers share: the seed, the default proposal, and how an answer is put together."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from retrodict.errors import InputError
from retrodict.guides.base import BaseGuide, hard_part, parts
from retrodict.numerics import NEG_INF, at_end
from retrodict.particles import Particles
from retrodict.policies.awrs import AWRS
from retrodict.policies.base import FiniteStepper, rollout
from retrodict.policies.guided import GuidedPolicy
from retrodict.policies.tempered import TemperedPolicy
from retrodict.protocols import Policy
from retrodict.records import Rollouts, Trace, cat_rollouts
from retrodict.targets.algebra import Target

OnStep = Callable[[int, int], None]
"""Called as (done, of) while a sampler works; it may show progress but must not change anything."""

BATCH = 512
"""Rows drawn at once by samplers without interaction."""
P = TypeVar("P", bound=Policy)


def proposal(target: Target, policy: P | None, soft: bool = False) -> P:
    """The policy to draw from: the caller's, or the prior, bent by the target's guide.

    Only hard factors of the guide bend it, unless ``soft``: then all that list their moves do. Where one of them is a
    test (a predicate on text) tokens are drawn by weighted rejection, otherwise they are masked.
    """
    found: Any = policy
    if found is None:
        if target.prior is None:
            raise InputError("this target has no prior to draw from; give a policy")
        guide = target.guide if soft else hard_part(target.guide)
        found = target.prior
        if guide is not None:
            tests = any(getattr(g, "by_test", False) for g, _ in parts(guide))
            found = AWRS(found, guide) if tests else GuidedPolicy(found, guide)
    if found.space is not target.space and found.space != target.space:
        raise InputError("the policy draws from another space than the target's; build both from one space")
    return found


def base_of(policy: P) -> P:
    """What a guided policy bends; any other policy itself."""
    found: Any = policy
    return found.base if isinstance(policy, GuidedPolicy) else found


def model_of(policy: FiniteStepper) -> FiniteStepper:
    """The policy whose raw log-probabilities and carry are those of ``policy``: what is bent, what is tempered."""
    base = base_of(policy)
    tempered = isinstance(base, TemperedPolicy) and not isinstance(base.base, GuidedPolicy)
    return base.base if tempered else base  # pyright: ignore[reportAttributeAccessIssue]


def prior_name(target: Target, policy: FiniteStepper) -> str | None:
    """The name of the prior's term where the policy's own model is that prior: p is then read off q's pass."""
    prior = target.prior
    if prior is None or "prior" not in target.factors:
        return None
    base = model_of(policy)
    same = base is prior or (
        type(base) is type(prior)
        and getattr(base, "version", 0) == getattr(prior, "version", 1)
        and base.problems is prior.problems
        and base.space == prior.space
    )
    return "prior" if same else None


def device_of(target: Target, policy: Policy | None) -> torch.device:
    """Where the model is."""
    for p in (policy, target.prior):
        lm = getattr(p.base if isinstance(p, GuidedPolicy) else p, "lm", None)
        if lm is not None:
            return lm.device
    return torch.device("cpu")


def positive(**values: int) -> None:
    """Raise InputError for a count below one."""
    for name, value in values.items():
        if value < 1:
            raise InputError(f"{name} must be at least 1, not {value}")


def draw(
    target: Target,
    policy: Policy,
    problem: Tensor,
    gen: torch.Generator,
    behaviour: Mapping[str, Any] | None = None,
    on_step: OnStep | None = None,
    batch: int = BATCH,
) -> Rollouts:
    """Independent draws, one a row of ``problem``, in batches."""
    parts = []
    for i in range(0, len(problem), batch):
        parts.append(fresh(target, policy, problem[i : i + batch], gen, behaviour))
        if on_step is not None:
            on_step(min(i + batch, len(problem)), len(problem))
    return cat_rollouts(parts)


def fresh(
    target: Target,
    policy: Policy,
    problem: Tensor,
    gen: torch.Generator,
    behaviour: Mapping[str, Any] | None = None,
    prefix: tuple[Rollouts, Tensor] | None = None,
) -> Rollouts:
    """One batch of draws, with every term that the drawing passes give for nothing: the prior off q's own pass, the
    likelihood off the caches of the strings that end. Policies that draw whole objects (vectors) do so."""
    if not isinstance(policy, FiniteStepper):
        assert prefix is None
        return policy.sample(problem, gen, behaviour)
    name, base = prior_name(target, policy), model_of(policy)
    cheap = {f: t for f, t in target.factors.items() if hasattr(t, "at_end")}

    def at_end(c: Any, index: Tensor, rows: Tensor, stop: Tensor) -> dict[str, Tensor]:
        carry = c.base if isinstance(policy, GuidedPolicy) else c
        values = {f: t.at_end(base, carry, index, rows, stop) for f, t in cheap.items()}  # pyright: ignore[reportAttributeAccessIssue]
        return {f: v for f, v in values.items() if v is not None}

    rows = rollout(policy, problem, gen, behaviour=behaviour, record_raw=name, prefix=prefix, at_end=at_end)
    return rows.with_terms({}, {f: t.version for f, t in target.factors.items() if f in rows.terms})


def log_b_of(rollouts: Rollouts, start: Tensor | None = None) -> Float[Tensor, " b"]:
    """log density of each object's path under the behaviour that drew it, from move ``start`` on (0 by default)."""
    t = torch.arange(rollouts.log_b.shape[1], device=rollouts.n.device)
    inside = t <= rollouts.n[:, None]
    if start is not None:
        inside = inside & (t >= start[:, None])
    return torch.where(inside, rollouts.log_b.double(), 0.0).sum(1)


def log_pb_of(target: Target, rollouts: Rollouts) -> Float[Tensor, " b"]:
    """Sum of log backward probabilities; 0 where the target has a prior: its paths carry their own."""
    if target.prior is not None:
        return torch.zeros(len(rollouts), dtype=torch.float64, device=rollouts.n.device)
    t = torch.arange(rollouts.log_pb.shape[1], device=rollouts.n.device)
    return torch.where(t < rollouts.n[:, None], rollouts.log_pb.double(), 0.0).sum(1)


def why_zero(target: Target, rollouts: Rollouts) -> str:
    """Which factor (or the proposal) made every weight zero."""
    if (target.log_gamma(rollouts) > NEG_INF).any():
        return "none of the proposals was accepted; draw more, or give a lower log_bound if a smaller one still holds"
    rollouts = target.terms(rollouts)
    share = {}
    for name in target.factors:
        value = rollouts.terms[name]
        value = at_end(value, rollouts.n, rollouts.stop) if value.dim() > 1 else value
        share[name] = (value == NEG_INF).float().mean().item()
    name = max(share, key=lambda k: share[k])
    if share[name] == 1:
        return f"the factor {name!r} is zero on every sample"
    return "no one factor is zero everywhere; together they are: " + ", ".join(
        f"{n} on {s:.0%}" for n, s in share.items()
    )


def finish(
    target: Target,
    rollouts: Rollouts,
    log_w: Float[Tensor, "m k"],
    log_z: Float[Tensor, "m r"] | None,
    trace: Trace,
    began: float,
    tokens: tuple[int, int, int] = (0, 0, 0),
) -> Particles:
    """Put the answer together; say which factor zeroed a problem's weights."""
    notes = [*trace.notes, *(target.guide.remarks(rollouts) if isinstance(target.guide, BaseGuide) else ())]
    dead = (log_w == NEG_INF).all(1)
    k = log_w.shape[1]
    for p in dead.nonzero().flatten().tolist():
        rows = rollouts.take(torch.arange(p * k, (p + 1) * k, device=rollouts.n.device))
        notes.append(f"problem {target.problems[p].name or p}: every weight is zero: {why_zero(target, rows)}")
    model = _lm(target)
    counts = {**trace.counts, "seconds": time.perf_counter() - began}
    if model is not None:
        counts["tokens"] = model.tokens_run - tokens[0]
        counts["forwards"] = model.forwards - tokens[1]
    if (checks := _checks(target)) is not None:
        counts["checks"] = checks - tokens[2]
    rollouts = rollouts.to("cpu")
    space = target.space
    return Particles(
        objects=rollouts,
        log_w=log_w.double().cpu(),
        log_z=None if log_z is None else log_z.double().cpu(),
        shown=tuple(space.show(rollouts)),
        keys=tuple(space.keys(rollouts)),
        trace=replace(trace, counts=counts, notes=tuple(notes)),
        names=tuple(p.name or str(i) for i, p in enumerate(target.problems)),
    )


def _lm(target: Target) -> Any:
    return getattr(base_of(target.prior), "lm", None) if target.prior is not None else None


def _checks(target: Target) -> int | None:
    """Texts that the target's tests were asked about so far; None where it has none."""
    tests = [] if target.guide is None else [g for g, _ in parts(target.guide) if hasattr(g, "checks")]
    return sum(g.checks for g in tests) if tests else None  # pyright: ignore[reportAttributeAccessIssue]


def meter(target: Target) -> tuple[int, int, int]:
    """Tokens and forwards run so far by the target's model, and texts its tests were asked about."""
    model, checks = _lm(target), _checks(target) or 0
    return (0, 0, checks) if model is None else (model.tokens_run, model.forwards, checks)


def rows_for(target: Target, per_problem: int, device: torch.device) -> Tensor:
    """Problem index of each row, problem-major."""
    return torch.arange(len(target.problems), device=device).repeat_interleave(per_problem)
