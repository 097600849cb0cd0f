"""The library's own spaces, policies, guides, targets, models and samplers keep the laws that ship with it."""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch

from retrodict.guides.base import ProductGuide
from retrodict.guides.mask import TokenMask
from retrodict.models.tabular import TabularLM
from retrodict.models.tiny import TinyLM
from retrodict.policies.base import FiniteStepper
from retrodict.policies.guided import GuidedPolicy
from retrodict.samplers.table import SAMPLERS
from retrodict.spaces.strings import Strings
from retrodict.testing import (
    Case,
    TableGuide,
    cases,
    check_guide,
    check_model,
    check_policy,
    check_sampler,
    check_space,
    check_target,
    enumerate_target,
    log_bound,
)
from retrodict.testing.laws_values import CONSTANT

CASES = cases()
BY_NAME = {c.name: c for c in CASES}
every_case = pytest.mark.parametrize("case", CASES, ids=[c.name for c in CASES])
string_case = pytest.mark.parametrize("case", [c for c in CASES if c.target.prior], ids=lambda c: c.name)


@every_case
def test_space(case: Case) -> None:
    check_space(case.target.space, len(case.target.problems))


@every_case
def test_policy(case: Case) -> None:
    check_policy(cast(FiniteStepper, case.policy or case.target.prior), len(case.target.problems))


@every_case
def test_target(case: Case) -> None:
    check_target(case.target)


@string_case
def test_guides(case: Case) -> None:
    target, m = case.target, len(case.target.problems)
    space = cast(Strings, target.space)
    mask = TokenMask([1, space.vocab_size - 1], space.vocab_size)
    soft = TableGuide(space, seed=5)
    for guide in filter(None, (target.guide, mask, soft, ProductGuide(mask, soft))):
        if isinstance(guide, ProductGuide):
            assert not guide.hard  # 0, and positive where it is not: neither law of signs applies
            continue
        check_guide(guide, space, m)


@string_case
def test_guided_policies(case: Case) -> None:
    target, m = case.target, len(case.target.problems)
    space, prior = cast(Strings, target.space), cast(FiniteStepper, target.prior)
    mask, soft = TokenMask([1, space.vocab_size - 1], space.vocab_size), TableGuide(space, seed=5)
    for guide in filter(None, (target.guide, mask, soft, ProductGuide(mask, soft))):
        check_policy(GuidedPolicy(prior, guide), m, rows=24)


@pytest.mark.parametrize(
    "lm",
    [
        TabularLM.random(".ab ", order=3, seed=1),
        TabularLM.random(".ab", order=1, seed=2),
        TinyLM(dtype=torch.float64),
        TinyLM(),
        TinyLM(".abc", seed=4, kv_heads=4, layers=3),
        TinyLM(".abc", seed=5, heads=4, kv_heads=1, head_dim=4),
    ],
    ids=lambda lm: f"{lm.name}, {getattr(lm, 'accum', torch.float64)}",
)
def test_model(lm: Any) -> None:
    for seed in (0, 1):
        check_model(lm, seed=seed)
    check_model(lm, rows=1)


SAMPLED = [
    "infill, own_stop",
    "batch of problems",
    "short words",
    "until, force",
    "sets",
    "transformer",
    "tempered, force",
]


@pytest.mark.parametrize("name", SAMPLED)
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_sampler(sampler: str, name: str) -> None:
    case = BY_NAME[name]
    settings: dict[str, Any] = {"n": 8}
    if sampler == "rejection":
        bound = log_bound(enumerate_target(case.target, case.policy))
        settings = {"n": 400, "log_bound": bound, "moved": {"log_bound": bound + CONSTANT}}
    elif sampler == "smc":
        settings["ess_threshold"] = 0.0
    elif sampler in ("mh", "tempering"):
        settings["steps"] = 4
    elif sampler == "pimh":
        settings |= {"steps": 2, "ess_threshold": 0.0}
    elif sampler == "best_of_n" and set(case.target.factors) == {"prior"}:
        settings["by"] = "prior"
    check_sampler(SAMPLERS[sampler], case.target, case.policy, random=sampler != "exact", **settings)
