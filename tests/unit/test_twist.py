"""The learned twist: one formula by two ways, the shared pass, the bank, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest
import torch

from retrodict.errors import InputError
from retrodict.guides.twist import TwistGuide
from retrodict.models.tabular import TabularLM
from retrodict.models.tiny import TinyLM
from retrodict.numerics import at_end
from retrodict.objectives.table import TWISTS
from retrodict.policies.guided import GuidedPolicy
from retrodict.policies.lm import LMPolicy
from retrodict.policies.twisted import TwistedPolicy
from retrodict.rng import generator
from retrodict.samplers.importance import importance
from retrodict.samplers.smc import smc
from retrodict.spaces.enumerate import enumerate_objects
from retrodict.spaces.strings import Strings
from retrodict.targets.algebra import Target
from retrodict.targets.ready import continuation, infill, of_length
from retrodict.testing.targets import Case
from retrodict.testing.twists import random_twist, twist_cases
from retrodict.training.amortize import amortize
from retrodict.training.twist import (
    LIMIT,
    Banked,
    fill,
    fit_twist,
    load_twist,
    save_twist,
    twist_for,
    with_twist,
)


def story(limit: str = "own_stop", tokens: int = 4) -> Target:
    lm = TabularLM.random(".ab ", order=3, seed=1)
    return infill(lm, "ab", "ba", stop=".", max_tokens=tokens, limit=limit, join="", lookahead=None)


@pytest.mark.parametrize("case", twist_cases(False), ids=lambda c: c.name)
def test_one_pass_scores_what_stepping_draws(case: Case) -> None:
    policy = TwistedPolicy(cast(TwistGuide, case.target.guide))
    policy.guide.power = 0.8
    rows = enumerate_objects(case.target.space, 0)
    rows = rows.take(torch.randperm(len(rows), generator=generator(0))[:200])
    rows = rows.take((case.target.log_gamma(rows) > -1e9).nonzero().squeeze(1))  # a dead end's q means nothing
    once, stepped = policy.score(rows), GuidedPolicy.score(policy, rows)
    inside = torch.arange(rows.moves.shape[1]) < rows.n[:, None]
    assert torch.allclose(once.log_q[inside], stepped.log_q[inside], atol=1e-5)
    assert torch.allclose(
        at_end(once.log_stop, rows.n, rows.stop), at_end(stepped.log_stop, rows.n, rows.stop), atol=1e-5
    )


def test_a_new_head_is_one_look_at_what_is_allowed() -> None:
    """psi = 1: under ``force`` one look is the mass of all symbols, which is one."""
    target = continuation(TabularLM.random(".ab ", order=2, seed=1), "a", stop=".", max_tokens=3)
    twist = twist_for(target)
    s, c = target.space.start(torch.zeros(2, dtype=torch.long)), twist.start(torch.zeros(2, dtype=torch.long))
    assert twist.log_psi(c, s).abs().max() < 1e-12
    assert twist.log_end(c, s).abs().max() == 0 and twist.log_next(c, s)[:, 1:].abs().max() == 0


def test_psi_is_bounded() -> None:
    twist = twist_for(story())
    with torch.no_grad():
        twist.head.parameters()["level"].fill_(1e6)
    c = twist.start(torch.zeros(1, dtype=torch.long))
    found = twist.log_next(c, twist.space.start(torch.zeros(1, dtype=torch.long)))[:, 1:] - twist.level
    assert found.abs().max() <= twist.head.bound + 1e-4


# -- the shared pass --------------------------------------------------------------------------------------------------


class Alone(TwistGuide):
    """A twist that never sees another's pass."""

    def reads(self, policy: Any) -> bool:
        """Never."""
        return False


@pytest.mark.parametrize("model", [TabularLM, TinyLM])
def test_the_prior_runs_once(model: type) -> None:
    lm = model.random(".ab ", order=3, seed=1) if model is TabularLM else TinyLM(".ab ", seed=3, dtype=torch.float64)
    target = infill(lm, "ab", "ba", stop=".", max_tokens=4, join="", lookahead=None)
    seen = random_twist(target)
    alone = Alone(seen.prior, seen.head, seen.inner, seen.beta, seen.level)
    found = [smc(target.with_guide(g), n=8, runs=2, seed=0, ess_threshold=0.9) for g in (seen, alone)]
    assert found[0].keys == found[1].keys and torch.allclose(found[0].log_w, found[1].log_w)
    assert found[0].trace.counts["forwards"] < found[1].trace.counts["forwards"]


def test_another_proposal_leaves_the_twist_its_own_pass() -> None:
    target = story()
    other = LMPolicy(TabularLM.random(".ab ", order=2, seed=7), cast(Strings, target.space), target.problems)
    p = smc(target.with_guide(random_twist(target)), other, n=8, runs=2, seed=0)
    assert bool(p.log_w.isfinite().any())


# -- the bank ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", ["force", "own_stop", "exact"])
def test_a_cut_row_is_a_row_of_the_shorter_target(limit: str) -> None:
    target = story(limit)
    policy = TwistedPolicy(random_twist(target))
    assert target.prior is not None
    banked = Banked(policy, fill(target, policy, target.prior, 64, 0), cut=1.0)
    seen = set()
    for k in range(8):
        rows = banked.sample(torch.zeros(32, dtype=torch.long), generator(k))
        top = int(rows.terms[LIMIT][0])
        seen.add(top)
        short = story(limit, top)
        assert int(rows.n.max()) <= top
        assert torch.allclose(rows.terms["gamma"], short.log_gamma(rows_of(rows)), atol=1e-5)
        twist = twist_for(short, policy.guide.head)
        want, got = TwistedPolicy(twist).score(rows_of(rows)), banked.score(rows)
        level = policy.guide.level[0] - twist.level[0]
        inside = torch.arange(rows.moves.shape[1] + 1) <= rows.n[:, None]
        assert want.log_psi is not None and got.log_psi is not None
        assert torch.allclose((got.log_psi - level)[inside], want.log_psi[inside], atol=1e-4)
        assert torch.allclose(got.log_q, want.log_q, atol=1e-4)
    assert len(seen) > 2


def rows_of(rows: Any) -> Any:
    from dataclasses import replace

    return replace(rows, terms={}, versions={})


def test_what_is_kept_stands_for_the_rest() -> None:
    target = story()
    policy = TwistedPolicy(twist_for(target), top=2)
    rows = enumerate_objects(target.space, 0)
    whole, some = TwistedPolicy(policy.guide).seen(rows), policy.seen(rows)
    assert some.move.shape[2] == 2
    assert torch.allclose(whole.move.logsumexp(-1), some.move.logsumexp(-1))


def test_one_seed_one_twist_and_resumed_is_never_stopped(tmp_path: Path) -> None:
    target = story()
    plan: dict[str, Any] = {"rows": 32, "samples": 8, "evaluate": 4, "rank": 4, "hidden": 8, "lr": 0.01}
    first, again = (fit_twist(target, steps=6, **plan) for _ in range(2))
    for k, x in first.parameters().items():
        assert torch.equal(x, again.parameters()[k])

    class Stop(Exception):
        pass

    def stop(metrics: dict[str, Any]) -> None:
        if metrics["step"] == 3:
            raise Stop

    with pytest.raises(Stop):
        fit_twist(target, steps=6, folder=tmp_path, save_every=2, on_metrics=stop, **plan)
    resumed = fit_twist(target, steps=6, folder=tmp_path, save_every=2, resume=True, **plan)
    for k, x in first.parameters().items():
        assert torch.equal(x, resumed.parameters()[k])
    assert (tmp_path / "round-0" / "metrics.jsonl").read_text().count("\n") == 6


@pytest.mark.parametrize("objective", [*TWISTS, "sir"])
def test_a_fitted_twist_narrows_the_evidence(objective: str) -> None:
    target = story()
    policy = fit_twist(target, objective=objective, rows=256, steps=60, samples=64, lr=0.03, rank=8, hidden=16)
    plain = smc(target, n=16, runs=60, seed=0).log_z
    twisted = (importance(target, policy, n=16, runs=60, seed=0) if objective == "sir" else
               smc(with_twist(target, policy), n=16, runs=60, seed=0)).log_z  # fmt: skip
    assert plain is not None and twisted is not None
    assert float(twisted.std()) < 0.5 * float(plain.std())


# -- files and refusals -----------------------------------------------------------------------------------------------


def test_saved_and_loaded_is_the_same(tmp_path: Path) -> None:
    target = story()
    policy = TwistedPolicy(random_twist(target))
    path = save_twist(policy, tmp_path / "twist.safetensors")
    with pytest.raises(InputError, match="power"):
        with_twist(target, policy, power=0)
    found = [smc(with_twist(target, p), n=8, runs=2, seed=0).log_z for p in (policy, load_twist(target, path))]
    assert found[0] is not None and found[1] is not None and torch.equal(found[0], found[1])


def test_a_twist_of_another_kind_is_refused(tmp_path: Path) -> None:
    target = story()
    path = save_twist(TwistedPolicy(random_twist(target)), tmp_path / "twist.safetensors")
    other = infill(
        TabularLM.random(".ab ", order=3, seed=2), "ab", "ba", stop=".", max_tokens=4, lookahead=None, join=""
    )
    with pytest.raises(InputError, match="fit one for it"):
        load_twist(other, path)
    with pytest.raises(InputError, match="moves = 4"):
        load_twist(story(tokens=6), path)
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(InputError, match=r"twist\.safetensors"):
        load_twist(target, path)


def test_twist_objectives_need_a_twist() -> None:
    target = of_length(TabularLM.random(".ab ", order=2, seed=1), "a", tokens=2, stop=".")
    with pytest.raises(InputError, match="fits a twist"):
        amortize(target, objective="ctl", steps=1, samples=4, evaluate=2)  # pyright: ignore[reportArgumentType]
