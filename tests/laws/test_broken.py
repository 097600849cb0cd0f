"""Laws that could not fail would prove nothing: each check names what is wrong with a part broken on purpose."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from retrodict.models.tabular import TabularLM
from retrodict.models.tiny import TinyLM
from retrodict.particles import Particles
from retrodict.policies.base import rollout
from retrodict.policies.lm import LMPolicy
from retrodict.records import MUST_STOP, Menu, Rollouts
from retrodict.samplers.importance import importance
from retrodict.spaces.strings import Strings, StringState
from retrodict.targets.algebra import Target
from retrodict.targets.prior import Prior
from retrodict.testing import (
    TableGuide,
    cases,
    check_guide,
    check_model,
    check_policy,
    check_sampler,
    check_space,
    check_target,
)
from retrodict.testing.bugs import NoBackward

TARGET: Target = next(c.target for c in cases(quick=True) if c.name == "infill, own_stop")
SPACE = cast(Strings, TARGET.space)
LM = cast(TabularLM, cast(LMPolicy, TARGET.prior).lm)


def test_space_without_backward_probability() -> None:
    with pytest.raises(AssertionError, match="backward probabilities .* off by 5"):
        check_space(NoBackward(3))


def test_space_that_takes_wrong_rows() -> None:
    class First(Strings):
        def take(self, s: StringState, index: Tensor) -> StringState:
            return super().take(s, torch.zeros_like(index))

    first = First(SPACE.vocab_size, SPACE.stops, 4, "own_stop", 1, tokenizer=SPACE.tokenizer)
    with pytest.raises(AssertionError, match="take gathers"):
        check_space(first)


def test_policy_that_pays_for_its_forced_stop() -> None:
    class Pays(LMPolicy):
        def log_probs(self, c: Any, s: Any, menu: Menu, raw: bool = False) -> tuple[Tensor, Tensor]:
            move, stop = super().log_probs(c, s, menu, raw)
            return move, stop if raw else stop * 0.9 - 1e-3 * (menu.must == MUST_STOP)[:, None]

    with pytest.raises(AssertionError, match=r"score equals the sum of steps"):
        check_policy(Pays(LM, SPACE, TARGET.problems))


def test_policy_whose_log_q_is_tempered() -> None:
    class Leaks(LMPolicy):
        def sample(self, problem: Tensor, gen: torch.Generator, behaviour: Any = None) -> Rollouts:
            r = rollout(self, problem, gen, behaviour=behaviour)
            return replace(r, log_q=r.log_b[:, : r.moves.shape[1]])

    with pytest.raises(AssertionError, match=r"score equals the sum of steps \(moves\)"):
        check_policy(Leaks(LM, SPACE, TARGET.problems))


def test_policy_that_forgets_its_minimal_length() -> None:
    class Early(LMPolicy):
        def score(self, rollouts: Rollouts, raw: bool = False) -> Any:
            return super().score(replace(rollouts, can_stop=torch.ones_like(rollouts.can_stop)), raw)

    with pytest.raises(AssertionError, match="score equals the sum of steps"):
        check_policy(Early(LM, SPACE, TARGET.problems))


def test_guide_whose_look_ahead_is_late() -> None:
    class Late(TableGuide):
        def log_next(self, c: Tensor, s: StringState) -> Tensor:
            return self.psi[s.n, : self.v]

    with pytest.raises(AssertionError, match="log_next is psi of the next state after 0 moves"):
        check_guide(Late(SPACE), SPACE)


def test_hard_guide_that_excludes_what_it_accepts() -> None:
    class Both(TableGuide):
        hard = True

        def log_psi(self, c: Tensor, s: StringState) -> Tensor:
            return torch.where(c == 1, float("-inf"), 0.0)

        def log_next(self, c: Tensor, s: StringState) -> None:
            return None

        def log_end(self, c: Tensor, s: StringState) -> Tensor:
            return torch.zeros(len(c), 1)

        def score(self, rollouts: Rollouts) -> Tensor:
            return torch.zeros(len(rollouts))

    with pytest.raises(AssertionError, match="psi excludes no object that is accepted"):
        check_guide(Both(SPACE), SPACE)


def _with_prior(prior: Any) -> Target:
    return replace(TARGET, factors={**TARGET.factors, "prior": prior})


def test_term_that_depends_on_its_batch() -> None:
    @dataclass(frozen=True)
    class Centred(Prior):
        def __call__(self, rollouts: Rollouts, every_prefix: bool = False) -> Tensor:
            value = super().__call__(rollouts, every_prefix)
            return value if every_prefix else value - value.mean()

    with pytest.raises(AssertionError, match="batch equals one by one"):
        check_target(_with_prior(Centred(cast(LMPolicy, TARGET.prior))))


def test_term_whose_prefixes_are_not_objects() -> None:
    @dataclass(frozen=True)
    class Shifted(Prior):
        def __call__(self, rollouts: Rollouts, every_prefix: bool = False) -> Tensor:
            value = super().__call__(rollouts, every_prefix)
            if every_prefix:
                inner = torch.arange(value.shape[1]) < rollouts.n[:, None]
                value = torch.where(inner[:, :, None], value - 1.0, value)
            return value

    with pytest.raises(AssertionError, match="prefix 1, stop 0 is the object that ends there: off by 1 "):
        check_target(_with_prior(Shifted(cast(LMPolicy, TARGET.prior))))


def test_model_that_reads_its_padding() -> None:
    class Reads(TinyLM):
        def encode(self, prompts: Any, room: int = 0) -> Any:
            longest = max(map(len, prompts))
            return super().encode([[0] * (longest - len(p)) + list(p) for p in prompts], room)

    with pytest.raises(AssertionError, match="padding is irrelevant"):
        check_model(Reads(dtype=torch.float64))


def test_model_that_scores_one_token_late() -> None:
    class LateLM(TabularLM):
        def score(self, prompts: Any, moves: Tensor, n: Tensor, stops: Any = (), legal: Any = None) -> Any:
            log_p, log_stop, mass = super().score(prompts, moves, n, stops, legal)
            return log_p.roll(1, 1), log_stop, mass

    lm = LateLM.random(".ab ", order=2)
    with pytest.raises(AssertionError, match=r"score equals stepping \(moves\)"):
        check_model(lm)


def test_sampler_with_a_seed_of_its_own() -> None:
    calls = iter(range(100))

    def stubborn(target: Target, policy: Any = None, *, n: int, seed: int) -> Particles:
        return importance(target, policy, n=n, seed=next(calls))

    with pytest.raises(AssertionError, match="one seed, one result"):
        check_sampler(stubborn, TARGET)


def test_sampler_whose_evidence_is_not_its_mean_weight() -> None:
    def logs(target: Target, policy: Any = None, *, n: int, seed: int) -> Particles:
        p = importance(target, policy, n=n, seed=seed)
        return replace(p, log_z=p.log_w.view(1, 4, -1).mean(2))  # the mean of logs: a lower bound, not an estimate

    with pytest.raises(AssertionError, match="the mean of Z-hat over runs is the mean weight"):
        check_sampler(logs, TARGET)
