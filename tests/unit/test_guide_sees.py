"""A guide that shares the base policy's pass: the same answer as with a pass of its own, and no second pass."""

from __future__ import annotations

import pytest
import torch
from jaxtyping import Float, Int
from torch import Tensor

from retrodict.guides.base import BaseGuide, ProductGuide
from retrodict.models.tabular import TabularLM
from retrodict.policies.guided import GuidedPolicy
from retrodict.policies.lm import LMCarry, LMPolicy
from retrodict.records import Rollouts
from retrodict.samplers.importance import importance
from retrodict.samplers.smc import smc
from retrodict.spaces.strings import StringState
from retrodict.targets.algebra import Target
from retrodict.targets.ready import continuation


class NextLetter(BaseGuide):
    """log psi = half the log-probability of the likeliest next token; by its own pass."""

    def __init__(self, policy: LMPolicy) -> None:
        self.policy = policy

    def start(self, problem: Int[Tensor, " b"]) -> LMCarry:
        return self.policy.start(problem)

    def start_at(self, rollouts: Rollouts, upto: Int[Tensor, " b"]) -> LMCarry:
        return self.policy.start_at(rollouts, upto)

    def step(self, c: LMCarry, s: StringState, move: Int[Tensor, " b"]) -> LMCarry:
        return self.policy.step(c, s, move)

    def take(self, c: LMCarry, index: Tensor) -> LMCarry:
        return self.policy.take(c, index)

    def log_psi(self, c: LMCarry, s: StringState) -> Float[Tensor, " b"]:
        return 0.5 * c.log_p[c.rows].amax(-1)

    def log_next(self, c: LMCarry, s: StringState) -> Float[Tensor, "b v"]:
        return 0.5 * c.log_p[c.rows]


class SharedLetter(NextLetter):
    """The same, off the pass of a policy over its model; it has none of its own to fall back on."""

    def reads(self, policy: object) -> bool:
        return isinstance(policy, LMPolicy) and policy.lm is self.policy.lm

    def see(self, c: LMCarry | None, carry: LMCarry) -> LMCarry:
        return carry

    def start(self, problem: Int[Tensor, " b"]) -> None:
        return None

    def start_at(self, rollouts: Rollouts, upto: Int[Tensor, " b"]) -> None:
        return None

    def step(self, c: LMCarry, s: StringState, move: Int[Tensor, " b"]) -> LMCarry:
        return c

    def take(self, c: LMCarry, index: Tensor) -> LMCarry:
        return c


def story(kind: type[NextLetter], product: bool) -> Target:
    lm = TabularLM.random(".ab ", order=3, seed=1)
    target = continuation(lm, "a", temperature=0.6, stop=".", max_tokens=5)
    assert isinstance(target.prior, LMPolicy)
    guide = kind(target.prior)
    return target.with_guide(ProductGuide(guide, BaseGuide()) if product else guide)


@pytest.mark.parametrize("product", [False, True])
def test_smc_with_a_shared_pass_is_smc_with_a_pass_of_its_own(product: bool) -> None:
    own = smc(story(NextLetter, product), n=12, runs=3, seed=0, ess_threshold=0.9)
    shared = smc(story(SharedLetter, product), n=12, runs=3, seed=0, ess_threshold=0.9)
    assert own.keys == shared.keys and torch.equal(own.log_w, shared.log_w)
    assert shared.trace.counts["forwards"] < own.trace.counts["forwards"]


def test_a_guided_policy_shows_its_pass_too() -> None:
    found = []
    for kind in (NextLetter, SharedLetter):
        target = story(kind, False)
        assert target.prior is not None and target.guide is not None
        found.append(importance(target, GuidedPolicy(target.prior, target.guide), n=16, runs=2, seed=0))
    assert found[0].keys == found[1].keys and torch.equal(found[0].log_w, found[1].log_w)


def test_another_model_is_not_shown() -> None:
    """With a proposal of another model the guide sees the prior's pass, not the proposal's."""
    other = TabularLM.random(".ab ", order=2, seed=7, scale=0.5)
    found = []
    for kind in (NextLetter, SharedLetter):
        target = story(kind, False)
        policy = LMPolicy(other, target.prior.space, target.problems)  # pyright: ignore[reportOptionalMemberAccess]
        found.append(smc(target, policy, n=12, runs=2, seed=0))
    assert found[0].keys == found[1].keys and torch.equal(found[0].log_w, found[1].log_w)
