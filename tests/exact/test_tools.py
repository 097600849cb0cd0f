"""A tool inside the latent, against enumeration by a pencil that shares no code with the space or the scoring."""

from __future__ import annotations

from dataclasses import replace
from typing import cast

import pytest
import torch
from abacus import (
    ALPHABET,
    FREE_MOVES,
    LM,
    PROBLEMS,
    ROOM,
    SPACES,
    by_pencil,
    every_space,
    space,
    target_on,
    truth,
)
from torch import Tensor

from retrodict.guides.mask import TokenMask
from retrodict.models.tiny import TinyLM
from retrodict.numerics import NEG_INF
from retrodict.objectives.db import db
from retrodict.objectives.pooled import pooled
from retrodict.objectives.residual import residual
from retrodict.objectives.subtb import subtb
from retrodict.policies.base import FiniteStepper
from retrodict.policies.guided import GuidedPolicy
from retrodict.policies.lm import LMPolicy
from retrodict.records import FORCED, FREE, MUST_MOVE, Rollouts, Scores
from retrodict.rng import generator
from retrodict.samplers.exact import exact
from retrodict.spaces.enumerate import enumerate_objects
from retrodict.spaces.strings import Strings
from retrodict.spaces.tools import Tool, ToolStrings
from retrodict.targets.ready import from_prior
from retrodict.testing import (
    Case,
    TableGuide,
    check_exact,
    check_guide,
    check_policy,
    check_space,
    check_target,
    enumerate_target,
)

# -- the space, and what enumeration says -----------------------------------------------------------------------------


@every_space
def test_enumeration_equals_the_pencil(name: str) -> None:
    case, tables = truth(name)
    for e, hand in zip(tables, by_pencil(case.target), strict=True):
        got = dict(zip(case.target.space.keys(e.paths), e.log_gamma.tolist(), strict=True))
        assert set(got) == set(hand) and len(got) == len(e.paths)
        assert got == pytest.approx(hand, abs=1e-9)
        assert (e.paths.kind == FORCED).any()


@every_space
def test_laws(name: str) -> None:
    case, _ = truth(name)
    s = cast(ToolStrings, case.target.space)
    check_space(s, 2)
    check_policy(cast(FiniteStepper, case.target.prior), 2)
    check_target(case.target)
    soft, mask = TableGuide(s, seed=5), TokenMask([1, 2, 3], 4)
    check_guide(soft, s, 2)
    check_policy(GuidedPolicy(cast(FiniteStepper, case.target.prior), soft), 2, rows=24)
    check_policy(GuidedPolicy(cast(FiniteStepper, case.target.prior), mask), 2, rows=24)


def test_laws_on_a_transformer() -> None:
    """With a key-value cache that insertions go into; a batch has rows that are free and rows that are forced."""
    tiny = TinyLM(ALPHABET, seed=3, dtype=torch.float64)
    s = replace(cast(ToolStrings, space()), tokenizer=tiny.tokenizer)
    target = target_on(s, tiny)
    check_policy(cast(FiniteStepper, target.prior), 2)
    check_target(target)


@pytest.mark.parametrize("name", ["force", "exact_prefix", "min length"])
def test_prior_mass_is_one_under_force(name: str) -> None:
    """p of all strings sums to one, insertions free: also at L, inside which nothing may stop. (A minimal length is
    a condition that p does not renormalise for.)"""
    target = from_prior(LM, PROBLEMS, SPACES[name]())
    log_z = exact(target).log_z
    assert log_z is not None
    if name == "min length":
        assert (log_z < -1e-3).all()
    else:
        assert log_z.abs().max() < 1e-9


def test_where_one_may_stop() -> None:
    """Nowhere inside an insertion, under p, q and the menu; and the limit counts free moves."""
    case, (e, _) = truth("force")
    rows, prior = e.paths, cast(LMPolicy, case.target.prior)
    t = rows.moves.shape[1]
    inside = torch.cat([rows.kind == FORCED, torch.zeros(len(rows), 1, dtype=torch.bool)], 1)
    assert inside[:, 1:].any() and t == FREE_MOVES + ROOM
    assert not (rows.can_stop & inside).any()
    for raw in (False, True):
        scores = prior.score(rows, raw=raw)
        assert (scores.log_stop[inside] == NEG_INF).all()
        assert (scores.log_q[rows.kind == FORCED] == 0).all()
    assert ((rows.kind == FREE).sum(1) <= FREE_MOVES).all()
    over = (rows.kind == FREE).sum(1) == FREE_MOVES
    last = rows.kind[torch.arange(len(rows)), (rows.n - 1).clamp_min(0)]
    assert (over & (last == FORCED)).any()  # an answer to the last free move is still written
    assert (prior.score(rows).log_stop[over, rows.n[over], 0] == 0).all()


def test_room_silences_the_tool() -> None:
    s = cast(ToolStrings, space())
    rows = enumerate_objects(s, 0)
    put = (rows.kind == FORCED).sum(1)
    assert put.max() == ROOM
    text = dict(zip(s.show(rows), put.tolist(), strict=True))
    assert text["11=1."] == 1 and text["1=2=."] == 2
    assert text["1=2==."] == 2  # the second answer takes two tokens, and one is left
    assert text["1=2=1=1."] == 3  # the second answer takes that one


def test_a_cut_inside_an_insertion_is_finished_off_the_record() -> None:
    s = cast(ToolStrings, space())
    ids = [2, 1, 3, 1, 3]  # 1 = [2 =] 2
    s0, kinds = s.start(torch.zeros(1, dtype=torch.long)), []
    for i, token in enumerate(ids):
        menu = s.menu(s0)
        kinds.append(FORCED if int(menu.must[0]) == MUST_MOVE else FREE)
        assert kinds[-1] == FREE or int(menu.forced[0]) == token, i  # pyright: ignore[reportOptionalSubscript]
        s0 = s.step(s0, torch.tensor([token]))
    assert kinds == [FREE, FREE, FORCED, FORCED, FREE]
    rows = enumerate_objects(s, 0)
    row = s.keys(rows).index((*ids, -1))
    record = rows.take(torch.tensor([row]))
    quiet = replace(s, tool=Tool(_refuse, room=ROOM))
    for cut in range(len(ids) + 1):
        state = quiet.replay(record, torch.tensor([cut]))
        assert int(state.planned[0]) == (4 if cut in (2, 3) else cut)
        assert int(state.free[0]) == min(cut, 2) + (cut == 5)
        menu = quiet.menu(state)
        assert (int(menu.must[0]) == MUST_MOVE) == (cut in (2, 3))
        if cut in (2, 3):
            state = quiet.step(state, record.moves[:, cut])
            assert state.tokens[0, :4].tolist() == ids[:4] and not bool(menu.can_stop[0])


def _refuse(text: str) -> str:
    raise RuntimeError("no tool runs here")


def test_scoring_runs_no_tool() -> None:
    """Neither the pass of a model, nor the replay that guided policies score by, nor the terms."""
    target = target_on(space())
    rows = target.prior.sample(torch.arange(64) % 2, generator(0))  # pyright: ignore[reportOptionalMemberAccess]
    assert (rows.kind == FORCED).any()
    quiet = replace(cast(ToolStrings, target.space), tool=Tool(_refuse, room=ROOM))
    again = target_on(quiet)
    prior = cast(LMPolicy, again.prior)
    assert torch.equal(again.log_gamma(rows), target.log_gamma(rows))
    bent = GuidedPolicy(prior, TableGuide(quiet, seed=5))
    honest = GuidedPolicy(cast(LMPolicy, target.prior), TableGuide(cast(Strings, target.space), seed=5))
    assert torch.equal(bent.score(rows).log_q, honest.score(rows).log_q)
    assert torch.equal(bent.score(rows).log_stop, honest.score(rows).log_stop)


# -- samplers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, method",
    [
        ("short, force", m)
        for m in (
            "ancestral",
            "importance",
            "importance, draws at T = 1.5",
            "mh, suffix",
            "mh, independence",
            "best of 3",
            "smc, systematic",
            "conditional smc",
        )
    ]
    + [("short, own_stop", m) for m in ("importance", "mh, suffix")]
    + [("short, until", m) for m in ("smc, systematic", "mh, suffix")],
)
def test_samplers_are_exact(name: str, method: str) -> None:
    case, tables = truth(name)
    check_exact(case, method, 100, tables)


@pytest.mark.parametrize("method", ["smc, systematic", "mh, suffix"])
def test_guided_samplers_are_exact(method: str) -> None:
    """A random twist bends proposals and weighs prefixes, within insertions too."""
    case, tables = truth("short, force")
    bent = case.target.with_guide(TableGuide(cast(Strings, case.target.space), seed=7))
    assert all(torch.equal(a.log_gamma, b.log_gamma) for a, b in zip(tables, enumerate_target(bent), strict=True))
    check_exact(Case("tool, twisted", bent), method, 100, enumerate_target(bent))


# -- objectives -------------------------------------------------------------------------------------------------------


def prior_as_posterior(rows: Rollouts) -> tuple[Scores, Tensor]:
    """Where gamma is p itself under the limit "force", q = p is the optimum and log Z = 0."""
    target = from_prior(LM, PROBLEMS, space())
    rows = target.terms(rows, every_prefix=True)
    return cast(LMPolicy, target.prior).score(rows), target.log_gamma(rows, every_prefix=True)


def test_objectives_jump_over_insertions() -> None:
    """At the optimum every a_i is log Z, and all losses are 0; no a_i comes from inside an insertion."""
    rows = from_prior(LM, PROBLEMS, space()).prior.sample(torch.arange(200) % 2, generator(0))  # pyright: ignore[reportOptionalMemberAccess]
    scores, log_gamma = prior_as_posterior(rows)
    a, mask, _ = residual(scores, rows, log_gamma)
    inside = torch.cat([rows.kind == FORCED, torch.zeros(len(rows), 1, dtype=torch.bool)], 1)
    assert not mask[inside].any() and mask[~inside].any() and a.abs().max() < 1e-9
    for objective in (pooled, subtb, db):
        assert float(objective(scores, rows, log_gamma)[0]) < 1e-15
