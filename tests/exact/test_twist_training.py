"""Twist objectives against enumeration: their gradients, their optimum, and what training to it does to Z-hat."""

from __future__ import annotations

import math

import pytest
import torch

from retrodict.objectives.table import TWISTS, objective
from retrodict.policies.twisted import TwistedPolicy
from retrodict.rng import generator
from retrodict.samplers.importance import importance
from retrodict.samplers.smc import smc
from retrodict.targets.algebra import Target
from retrodict.targets.ready import including
from retrodict.testing.oracle import enumerate_target
from retrodict.testing.twists import (
    _story,
    all_rows,
    ctl_gradient,
    gradient,
    gradient_gates,
    optimal,
    raw_negatives,
    set_table,
    table_twist,
    unweighted_positives,
)
from retrodict.training.amortize import amortize
from retrodict.training.twist import twist_for

LIMITS = ("force", "own_stop", "exact")


def noise(twist: object, scale: float = 0.7) -> torch.Tensor:
    return scale * torch.randn(twist.head.psi.shape, generator=generator(3), dtype=torch.float64)  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize("limit", LIMITS)
def test_ctl_gradient_is_the_enumerated_one(limit: str) -> None:
    target = _story(limit)
    twist = table_twist(target)
    set_table(twist, noise(twist))
    rows, scores, log_gamma = all_rows(target, twist)
    loss, _ = TWISTS["ctl"](scores, rows, log_gamma)
    want = ctl_gradient(target, twist)
    assert float((gradient(twist, loss) - want).abs().max()) < 1e-7 < float(want.norm())
    for planted in (unweighted_positives, raw_negatives):
        loss, _ = planted(scores, rows, log_gamma)
        assert float((gradient(twist, loss) - want).norm() / want.norm()) > 0.1


@pytest.mark.parametrize("limit", LIMITS)
@pytest.mark.parametrize("name", TWISTS)
def test_the_optimal_twist_is_stationary(limit: str, name: str) -> None:
    target = _story(limit)
    twist = table_twist(target)
    set_table(twist, optimal(target))
    rows, scores, log_gamma = all_rows(target, twist)
    loss, _ = objective(name)(scores, rows, log_gamma)
    assert float(gradient(twist, loss).abs().max()) < 1e-12
    set_table(twist, optimal(target) + noise(twist, 0.3))
    rows, scores, log_gamma = all_rows(target, twist)
    loss, _ = objective(name)(scores, rows, log_gamma)
    assert float(gradient(twist, loss).abs().max()) > 1e-6


def test_planted_bugs_show_in_sampled_gradients() -> None:
    honest = gradient_gates(TWISTS["ctl"], 20)[0]
    assert honest.holds
    assert min(gradient_gates(b, 20)[0].value for b in (unweighted_positives, raw_negatives)) > 8


@pytest.mark.parametrize("limit", LIMITS)
def test_the_optimal_twist_leaves_no_noise(limit: str) -> None:
    target = _story(limit)
    twist = table_twist(target)
    set_table(twist, optimal(target))
    truth = float(enumerate_target(target)[0].z.log())
    for p in (smc(target.with_guide(twist), n=4, runs=20, seed=0, ess_threshold=0.9),
              importance(target, TwistedPolicy(twist), n=4, runs=20, seed=0)):  # fmt: skip
        assert p.log_z is not None
        assert float((p.log_z - truth).abs().max()) < 1e-9


def constrained() -> Target:
    from retrodict.models.tabular import TabularLM

    lm = TabularLM.random(".ab ", order=3, seed=1)
    return including(lm, "a ", contain=["ab"], avoid=["ba"], stop=".", max_tokens=4, limit="own_stop")


def variance(target: Target, policy: TwistedPolicy | None = None) -> float:
    """E (Z-hat / Z - 1)^2 over runs of eight particles: of SMC, or of importance sampling from a policy."""
    z = float(enumerate_target(target)[0].z)
    if policy is None:
        log_z = smc(target, n=8, runs=200, seed=1).log_z
    else:
        log_z = importance(target, policy, n=8, runs=200, seed=1).log_z
    assert log_z is not None
    return float((log_z[0] - math.log(z)).exp().sub(1).square().mean())


@pytest.mark.parametrize("name", [*TWISTS, "sir"])
@pytest.mark.parametrize("which", ["infill", "constraint"])
def test_training_takes_the_noise_out(name: str, which: str) -> None:
    """On all rows at exact weights: the variance of Z-hat falls at least tenfold (DPG: of importance sampling)."""
    target = _story("own_stop") if which == "infill" else constrained()
    twist = table_twist(target)
    policy = TwistedPolicy(twist)
    before = variance(target, policy if name == "sir" else None)
    set_table(twist, torch.full_like(twist.head.psi, -1.0))  # FUDGE's psi is a chance
    rows, _, log_gamma = all_rows(target, twist)
    seen, adam = policy.seen(rows), torch.optim.Adam([twist.head.psi], lr=0.1, betas=(0.9, 0.99))
    for _ in range(200):
        adam.zero_grad()
        objective(name)(policy.scores(seen, rows), rows, log_gamma)[0].backward()
        adam.step()
    after = variance(target, policy) if name == "sir" else variance(target.with_guide(twist))
    assert after < 0.1 * before


def test_the_loop_learns_a_twist() -> None:
    """By ``amortize``, from the twist's own samples."""
    target = _story("own_stop")
    twist = twist_for(target, rank=4, hidden=32)
    amortize(target, TwistedPolicy(twist), objective="ctl", steps=50, samples=64, lr=0.05, lr_end=0.1, evaluate=2)  # pyright: ignore[reportArgumentType]
    assert variance(target.with_guide(twist)) < 0.1 * variance(target)
