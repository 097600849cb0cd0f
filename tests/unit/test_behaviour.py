"""What is drawn from: tempered and explored draws have the density they record, and weights divide by it."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import cast

import pytest
import torch

from retrodict.diagnostics.divergence import z_score
from retrodict.errors import InputError
from retrodict.models.tabular import TabularLM
from retrodict.numerics import NEG_INF, at_end
from retrodict.policies.base import FiniteStepper, behaviour_of, explored, over_menu, rollout
from retrodict.policies.guided import GuidedPolicy
from retrodict.policies.lm import LMPolicy
from retrodict.records import CHOOSE, MUST_MOVE, MUST_STOP, Menu, Rollouts
from retrodict.rng import generator
from retrodict.samplers.common import log_b_of, log_pb_of, rows_for
from retrodict.spaces.enumerate import enumerate_objects
from retrodict.targets.ready import including
from retrodict.testing.oracle import enumerate_target as oracle
from retrodict.testing.oracle import log_path, per_run, z_objects
from retrodict.testing.targets import Case, cases

BEHAVIOUR = {"temperature": 1.7, "epsilon": 0.25}
CASES = {c.name: c for c in cases()}
NAMES = ["infill, force", "infill, own_stop", "of length, exact", "batch of problems", "two stops, likelihood^0.5",
         "until, force", "sets"]  # fmt: skip


def policy_of(case: Case) -> FiniteStepper:
    return case.policy or cast(FiniteStepper, case.target.prior)


def pencil(policy: FiniteStepper, paths: Rollouts, temperature: float, epsilon: float) -> list[float]:
    """log b of each path, state by state and move by move: probabilities, powers and shares, in Python floats."""
    out = []
    for row in range(len(paths)):
        one = paths.take(torch.tensor([row]))
        n, total = int(one.n), 0.0
        s, c = policy.space.start(one.problem), policy.start(one.problem)
        for i in range(n + 1):
            menu = policy.space.menu(s)
            move_lp, stop_lp = policy.log_probs(c, s, menu)
            taken = int(one.moves[0, i]) if i < n else move_lp.shape[1] + int(one.stop)
            if int(menu.must) == CHOOSE:
                q = [math.exp(x) ** (1 / temperature) for x in torch.cat([move_lp, stop_lp], 1)[0].tolist()]
                assert menu.legal is not None
                free = [*menu.legal[0].tolist(), *[bool(menu.can_stop)] * stop_lp.shape[1]]
                total += math.log((1 - epsilon) * q[taken] / sum(q) + epsilon * free[taken] / sum(free))
            if i < n:
                move = one.moves[:, i]
                c, s = policy.step(c, s, move), policy.space.step(s, move)
        out.append(total)
    return out


@pytest.mark.parametrize("name", NAMES)
def test_log_b_is_the_density_of_what_is_drawn(name: str) -> None:
    """Every path's recorded log b equals the pencil's, and the pencil's sum to one."""
    case = CASES[name]
    policy, target = policy_of(case), case.target
    rows = policy.sample(rows_for(target, 400, torch.device("cpu")), generator(0), BEHAVIOUR)
    assert rows.behaviour == BEHAVIOUR
    seen = {}
    for p, moves, n, stop, b in zip(*(x.tolist() for x in (rows.problem, rows.moves, rows.n, rows.stop,
                                                             log_b_of(rows))), strict=True):  # fmt: skip
        seen[(p, *moves[:n], -1 - stop)] = b
    for p in range(len(target.problems)):
        paths = enumerate_objects(target.space, p)
        law = pencil(policy, paths, **BEHAVIOUR)
        assert math.isclose(sum(map(math.exp, law)), 1.0, abs_tol=1e-5)
        truth = {(p, *m[:n], -1 - s): b for m, n, s, b in zip(paths.moves.tolist(), paths.n.tolist(),
                                                              paths.stop.tolist(), law, strict=True)}  # fmt: skip
        mine = {k: b for k, b in seen.items() if k[0] == p}
        assert len(mine) > 3 and max(abs(b - truth[k]) for k, b in mine.items()) < 1e-5
    assert torch.allclose(log_path(policy, rows), _log_q(rows), atol=1e-5), "log_q is the policy's own, untempered"


def _log_q(rows: Rollouts) -> torch.Tensor:
    inside = torch.arange(rows.moves.shape[1]) < rows.n[:, None]
    return torch.where(inside, rows.log_q.double(), 0.0).sum(1) + at_end(rows.log_stop.double(), rows.n, rows.stop)


def gates(case: Case, rows: Rollouts, runs: int) -> tuple[float, float, float]:
    """Largest |z| of: E_b[q / b] = 1; E_b[1[x] q / b] = q(x) over objects x; E_b[gamma P_B / b] = Z."""
    target, worst = case.target, [0.0, 0.0, 0.0]
    rows = target.terms(rows)
    log_b = log_b_of(rows)
    own = (_log_q(rows) - log_b).exp()
    weight = (target.log_gamma(rows) + log_pb_of(target, rows) - log_b).exp()
    for p, e in enumerate(oracle(target, policy_of(case))):
        mine = (rows.problem == p).nonzero().squeeze(1)
        keys = target.space.keys(rows.take(mine))
        q = own[mine].view(runs, -1)
        for i, x in enumerate((q.mean(1), weight[mine].view(runs, -1).mean(1) / e.z)):
            flat = float((x - 1).abs().max()) < 1e-5  # no spread, no z
            worst[2 * i] = max(worst[2 * i], 0.0 if flat else abs(float(z_score(x, 1.0))))
        worst[1] = max(worst[1], z_objects(per_run(e, keys, q), e.law(e.log_base), q.shape[1])[0])
    return worst[0], worst[1], worst[2]


@pytest.mark.parametrize("name", NAMES)
def test_weights_under_any_behaviour_are_unbiased(name: str) -> None:
    case = CASES[name]
    rows = policy_of(case).sample(rows_for(case.target, 20_000, torch.device("cpu")), generator(1), BEHAVIOUR)
    assert max(gates(case, rows, 500)) < 4.5


def test_planted_log_b_without_its_temperature() -> None:
    """The sum E_b[q / b] = 1 alone cannot see it (the ratio is then 1 in every row); objects and Z do."""
    case = CASES["infill, force"]
    rows = policy_of(case).sample(rows_for(case.target, 20_000, torch.device("cpu")), generator(1), BEHAVIOUR)
    end = at_end(rows.log_stop, rows.n, rows.stop)
    plain = torch.cat([rows.log_q, torch.zeros(len(rows), 1)], 1).scatter(1, rows.n[:, None], end[:, None])
    total, objects, evidence = gates(case, replace(rows, log_b=plain), 500)
    assert total < 4.5 and objects > 8 and evidence > 8


def test_planted_exploration_that_never_stops() -> None:
    """epsilon uniform over the moves alone, recorded as if it were over moves and stops."""
    case = CASES["infill, own_stop"]
    policy = policy_of(case)
    rows = policy.sample(rows_for(case.target, 20_000, torch.device("cpu")), generator(2), BEHAVIOUR)
    honest = max(gates(case, rows, 500))

    def moves_only(log_move, log_stop, menu, epsilon):  # noqa: ANN001, ANN202
        return explored(log_move, log_stop, replace(menu, can_stop=torch.zeros_like(menu.can_stop)), epsilon)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("retrodict.policies.base.explored", moves_only)
        wrong = policy.sample(rows_for(case.target, 20_000, torch.device("cpu")), generator(2), BEHAVIOUR)
    paths = case.target.space.keys(wrong)
    law = dict(zip(case.target.space.keys(e := enumerate_objects(case.target.space, 0)),
                   pencil(policy, e, **BEHAVIOUR), strict=True))  # fmt: skip
    said = torch.tensor([law[k] for k in paths], dtype=torch.float64)
    log_b = torch.zeros_like(wrong.log_b).scatter(1, wrong.n[:, None], said[:, None].to(wrong.log_b.dtype))
    assert honest < 4.5 < 8 < gates(case, replace(wrong, log_b=log_b), 500)[1]


def test_forced_moves_and_stops_stay_forced() -> None:
    legal = torch.tensor([[False, True, True]]).expand(3, -1)
    menu = Menu(legal, torch.tensor([True, True, False]), torch.tensor([CHOOSE, MUST_STOP, MUST_MOVE]),
                torch.tensor([0, 0, 2]))  # fmt: skip
    raw = torch.tensor([0.2, 0.3, 0.1]).log().expand(3, -1), torch.tensor([0.2, 0.2]).log().expand(3, -1)
    move, stop = explored(*over_menu(*raw, menu), menu, 0.2)
    assert torch.allclose(move[0].exp(), torch.tensor([0.0, 0.8 * 0.375 + 0.05, 0.8 * 0.125 + 0.05]))
    assert torch.allclose(stop[0].exp(), torch.tensor([0.25, 0.25]))
    assert (move[1] == NEG_INF).all() and stop[1].tolist() == [0.0, NEG_INF]
    assert move[2].tolist() == [NEG_INF, NEG_INF, 0.0] and (stop[2] == NEG_INF).all()
    plain = over_menu(*raw, menu)
    assert explored(*plain, menu, 0.0)[0] is plain[0], "no exploration costs nothing"
    every = explored(*over_menu(*raw, replace(menu, legal=None)), replace(menu, legal=None), 0.5)
    assert torch.allclose(every[0][0].exp().sum() + every[1][0].exp().sum(), torch.ones(()))


def test_a_mask_in_q_is_explored_and_paid_for() -> None:
    """epsilon reaches what a guide keeps q from; there log q = -inf and log b is finite."""
    lm = TabularLM.random(".ab ", order=2, seed=1)
    target = including(lm, "a ", contain=["ab"], avoid=["ba"], stop=".", max_tokens=4)
    policy = GuidedPolicy(cast(LMPolicy, target.prior), target.guide)
    rows = rollout(policy, torch.zeros(500, dtype=torch.long), generator(0), behaviour={"epsilon": 0.5})
    outside = _log_q(rows) == NEG_INF
    assert outside.any() and not outside.all() and log_b_of(rows).isfinite().all()
    assert (target.log_gamma(target.terms(rows))[outside] == NEG_INF).all(), "a hard guide masks only what gamma does"


def test_bad_behaviours_are_named() -> None:
    assert behaviour_of(None) == (1.0, 0.0) and behaviour_of({"epsilon": 0.5}) == (1.0, 0.5)
    for wrong, words in {
        "temprature": "unknown behaviour 'temprature'; did you mean 'temperature'",
        "top_k": "unknown behaviour 'top_k'; choose one of epsilon, temperature",
    }.items():
        with pytest.raises(InputError, match=words):
            behaviour_of({wrong: 1.0})
    for value in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(InputError, match="temperature must be positive"):
            behaviour_of({"temperature": value})
    for value in (-0.1, 1.0, math.nan):
        with pytest.raises(InputError, match="epsilon must be at least 0 and below 1"):
            behaviour_of({"epsilon": value})
