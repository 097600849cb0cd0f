"""Menus, bending, tempering, and the record of what was drawn."""

from __future__ import annotations

import math
from typing import cast

import pytest
import torch

from retrodict.errors import InputError
from retrodict.guides.mask import TokenMask
from retrodict.models.tabular import TabularLM
from retrodict.numerics import NEG_INF
from retrodict.policies.base import choose, over_menu, rollout, tempered
from retrodict.policies.guided import GuidedPolicy, bend
from retrodict.policies.lm import LMPolicy
from retrodict.records import CHOOSE, FREE, MUST_MOVE, MUST_STOP, PAD, Menu, Problem
from retrodict.rng import generator
from retrodict.samplers.importance import importance
from retrodict.samplers.smc import smc
from retrodict.spaces.stops import Stops
from retrodict.spaces.strings import Strings
from retrodict.targets.ready import infill, posterior
from retrodict.testing import SetPolicy, Subsets, log_bound, set_target
from retrodict.testing.oracle import enumerate_target

LM = TabularLM.random(".ab ", order=2, seed=1)


def menu(must: int = CHOOSE, can: bool = True, forced: int | None = None) -> Menu:
    legal = torch.tensor([[False, True, True]])
    put = None if forced is None else torch.tensor([forced])
    return Menu(legal, torch.tensor([can]), torch.tensor([must]), put)


RAW_MOVE, RAW_STOP = torch.tensor([[0.2, 0.3, 0.1]]).log(), torch.tensor([[0.2, 0.2]]).log()


def test_menus_renormalise_moves_and_stops_together() -> None:
    move, stop = over_menu(RAW_MOVE, RAW_STOP, menu())
    assert torch.allclose(move.exp(), torch.tensor([[0.0, 0.375, 0.125]]))
    assert torch.allclose(stop.exp(), torch.tensor([[0.25, 0.25]]))
    move, stop = over_menu(RAW_MOVE, RAW_STOP, menu(can=False))
    assert torch.allclose(move.exp(), torch.tensor([[0.0, 0.75, 0.25]])) and (stop == NEG_INF).all()


def test_forced_stops_and_moves_are_free() -> None:
    move, stop = over_menu(RAW_MOVE, RAW_STOP, menu(MUST_STOP))
    assert (move == NEG_INF).all() and stop.tolist() == [[0.0, NEG_INF]]
    move, stop = over_menu(RAW_MOVE, RAW_STOP, menu(MUST_MOVE, can=False, forced=2))
    assert move.tolist() == [[NEG_INF, NEG_INF, 0.0]] and (stop == NEG_INF).all()


def test_bending_multiplies_and_renormalises() -> None:
    move, stop = over_menu(RAW_MOVE, RAW_STOP, menu())
    psi, end = torch.tensor([[9.0, 0.0, math.log(3.0)]]), torch.tensor([[NEG_INF, 0.0]])
    new, halt = bend(move, stop, menu(), psi, end)
    assert torch.allclose(new.exp(), torch.tensor([[0.0, 0.375, 0.375]])) and halt.exp().tolist()[0][0] == 0.0
    assert torch.allclose(new.exp().sum() + halt.exp().sum(), torch.ones(()))
    same, as_was = bend(move, stop, menu(), torch.full_like(psi, NEG_INF), torch.full_like(end, NEG_INF))
    assert torch.equal(same, move) and torch.equal(as_was, stop)  # a dead end keeps the policy; its weight is 0
    forced = over_menu(RAW_MOVE, RAW_STOP, menu(MUST_STOP))
    assert torch.equal(bend(*forced, menu(MUST_STOP), psi, end)[1], forced[1])
    assert bend(move, stop, menu(), None, end)[0] is move


def test_tempering() -> None:
    move, stop = over_menu(RAW_MOVE, RAW_STOP, menu())
    hot, halt = tempered(move, stop, 2.0)
    p = torch.cat([move, stop], 1).exp().sqrt()
    assert torch.allclose(torch.cat([hot, halt], 1).exp(), p / p.sum())
    assert tempered(move, stop, 1.0)[0] is move


def test_where_only_stops_are_left_one_stops() -> None:
    """The mass of the stops may round to just under one; the coin must not fall through to an illegal move."""
    rows = 200_000
    move, stop = torch.full((rows, 3), NEG_INF), torch.full((rows, 1), math.log(0.99))
    assert (choose(move, stop, generator(0))[1] == 0).all()


def test_choose_has_the_right_frequencies() -> None:
    move, stop = (x.expand(40_000, -1) for x in over_menu(RAW_MOVE, RAW_STOP, menu()))
    drawn, halt = choose(move, stop, generator(1))
    share = (
        torch.stack([((drawn == 1) & (halt < 0)), ((drawn == 2) & (halt < 0)), halt == 0, halt == 1]).float().mean(1)
    )
    assert (share - torch.tensor([0.375, 0.125, 0.25, 0.25])).abs().max() < 0.011


def test_the_record_of_a_rollout() -> None:
    target = infill(LM, "ab", "ba", stop=".", max_tokens=4, join="")
    policy = cast(LMPolicy, target.prior)
    r = rollout(policy, torch.zeros(200, dtype=torch.long), generator(2), record_raw="prior")
    inside = torch.arange(r.moves.shape[1]) < r.n[:, None]
    assert ((r.kind == FREE) == inside).all() and ((r.kind == PAD) == ~inside).all()
    assert (r.n >= 1).all() and not r.can_stop[:, 0].any()  # infill asks for a token
    assert r.behaviour == {} and set(r.terms) == {"prior", "prior.path"}
    assert (r.log_q[~inside] == 0).all()


def test_one_seed_one_result() -> None:
    target = infill(LM, "ab", "ba", stop=".", max_tokens=4, join="")
    policy, rows = cast(LMPolicy, target.prior), torch.zeros(50, dtype=torch.long)
    a, b, c = (policy.sample(rows, generator(s)) for s in (1, 1, 2))
    assert torch.equal(a.moves, b.moves) and a.moves.shape[1] and target.space.keys(a) != target.space.keys(c)
    with pytest.raises(ValueError, match="no rows"):
        policy.sample(rows[:0], generator(0))


def test_q_reads_its_own_prompt() -> None:
    data = [Problem((1, 2), (2,), q_prompt=(3,))]
    space = Strings(4, Stops((0,), in_text=True), 2, tokenizer=LM.tokenizer)
    x, xy = LMPolicy(LM, space, data), LMPolicy(LM, space, data, reads="q_prompt")
    zero = torch.zeros(1, dtype=torch.long)
    s = space.start(zero)
    first = [p.log_probs(p.start(zero), s, space.menu(s), raw=True)[0][0] for p in (x, xy)]
    assert torch.equal(first[0], LM.encode([[1, 2]])[1][0].log_softmax(-1))
    assert torch.equal(first[1], LM.encode([[3]])[1][0].log_softmax(-1))
    assert x.on([Problem((3,))]).prompts(zero) == [(3,)]


def test_rows_that_hold_the_same_string_are_run_once() -> None:
    lm = TabularLM.random(".ab ", order=2, seed=1)
    target = infill(lm, "ab", "ba", stop=".", max_tokens=4, join="", lookahead=None)
    before = lm.tokens_run
    rollout(cast(LMPolicy, target.prior), torch.zeros(500, dtype=torch.long), generator(0))
    assert lm.tokens_run - before <= 3 + 9 + 27 + 81  # distinct prefixes, not 500 rows


def test_a_policy_of_another_space_is_refused() -> None:
    target = posterior(LM, [Problem((1,), (2,))], stop=".", max_tokens=3)
    other = LMPolicy(LM, Strings(4, Stops((0,), in_text=True), 2, tokenizer=LM.tokenizer), target.problems)
    for sampler in (importance, smc):
        with pytest.raises(InputError, match="the policy draws from another space than the target's"):
            sampler(target, other, n=4, seed=0)
    with pytest.raises(InputError, match="this target has no prior to draw from; give a policy"):
        importance(set_target(2), n=4, seed=0)


def test_masked_proposals_pay_for_their_mask() -> None:
    """Importance weights under a mask: gamma / q with q renormalised, so the mean weight is the allowed mass."""
    target = posterior(LM, [Problem((1,))], stop=".", max_tokens=3)
    policy = GuidedPolicy(cast(LMPolicy, target.prior), TokenMask([1, 2], 4))
    (e,) = enumerate_target(target, policy)
    allowed = e.log_q > NEG_INF
    assert math.isclose(float(e.log_q.exp().sum()), 1.0, abs_tol=1e-9)
    p = importance(target, policy, n=4000, seed=0, runs=2)
    assert p.log_z is not None
    mass = float(e.log_gamma[allowed].exp().sum())
    assert abs(float(p.log_w.exp().mean()) - mass) < 0.02 < 1 - mass
    assert log_bound([e]) == math.inf  # what the mask excludes, no bound covers


def test_sets_in_any_order() -> None:
    target = set_target(3)
    (e,) = enumerate_target(target, SetPolicy(Subsets(3), target.problems))
    assert len(e.keys) == 8 and len(e.paths) == 1 + 3 + 6 + 6
    assert math.isclose(float(e.law(e.log_pb).sum()), 8.0, rel_tol=1e-9)
