"""Identities of the objectives on made-up rollouts, and what they refuse."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from retrodict.errors import InputError
from retrodict.objectives import OBJECTIVES, db, grpo, mle, objective, pooled, ppo, residual, subtb, tb, vargrad
from retrodict.objectives.mle import object_log_q
from retrodict.records import FORCED, FREE, PAD, Rollouts, Scores
from retrodict.rng import generator

D = torch.float64
NEG_INF = float("-inf")
Batch = tuple[Scores, Rollouts, Tensor]


def batch(b: int = 6, t: int = 4, s: int = 1, seed: int = 0, first: int = 0) -> Batch:
    """Random rows of two problems that may stop from ``first`` moves on; move 1 of each long row is forced."""
    gen = generator(seed)
    n = torch.tensor([t - k % (t - first + 1) for k in range(b)])
    kind = torch.where(torch.arange(t) < n[:, None], FREE, PAD).to(torch.int8)
    kind[:, 1] = torch.where(n > 1, FORCED, kind[:, 1])
    can = (torch.arange(t + 1) >= first).expand(b, -1) & (torch.arange(t + 1) <= n[:, None])
    log_q, log_pb = (-torch.rand(b, t, generator=gen, dtype=D) for _ in range(2))
    log_stop = (-torch.rand(b, t + 1, s, generator=gen, dtype=D)).masked_fill(~can[:, :, None], NEG_INF)
    log_gamma = torch.randn(b, t + 1, s, generator=gen, dtype=D).masked_fill(~can[:, :, None], NEG_INF)
    log_pb = torch.where(kind != PAD, log_pb, 0.0)
    stop = torch.arange(b) % s
    log_b = torch.cat([torch.where(kind == FREE, log_q, 0.0), log_q.new_zeros(b, 1)], 1)
    log_b[torch.arange(b), n] = log_stop[torch.arange(b), n, stop]
    rollouts = Rollouts(
        problem=torch.arange(b) % 2, moves=torch.zeros(b, t, dtype=torch.long), kind=kind, n=n, stop=stop,
        can_stop=can, log_q=log_q, log_stop=log_stop, log_b=log_b, log_pb=log_pb,
    )  # fmt: skip
    return Scores(log_q, log_stop, log_norm=torch.zeros(b, dtype=D)), rollouts, log_gamma


@pytest.mark.parametrize("s", [1, 2])
def test_residual_is_its_formula(s: int) -> None:
    scores, r, log_gamma = batch(s=s)
    a, mask, final = residual(scores, r, log_gamma)
    for k in range(len(r)):
        path = 0.0
        for i in range(int(r.n[k]) + 1):
            for e in range(s):
                want = float(log_gamma[k, i, e]) - path - float(scores.log_stop[k, i, e])
                assert mask[k, i, e] and abs(float(a[k, i, e]) - want) < 1e-12
            if i < r.n[k]:
                path += (float(scores.log_q[k, i]) if r.kind[k, i] == FREE else 0.0) - float(r.log_pb[k, i])
        assert not mask[k, int(r.n[k]) + 1 :].any()
        assert float(final[k]) == float(a[k, r.n[k], r.stop[k]])
    whole = log_gamma[torch.arange(len(r)), r.n, r.stop]
    ends, only, again = residual(scores, r, whole)
    assert torch.equal(again, final) and torch.equal(only.sum((1, 2)), torch.ones(len(r), dtype=torch.long))
    assert float(ends[~only].abs().sum()) == 0


@pytest.mark.parametrize("s", [1, 2])
@pytest.mark.parametrize("lam", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("first", [0, 2])
def test_subtb_is_its_double_loop(s: int, lam: float, first: int) -> None:
    scores, r, log_gamma = batch(s=s, first=first)
    a, mask, _ = residual(scores, r, log_gamma)
    each = []
    for k in range(len(r)):
        points = [] if r.can_stop[k, 0] else [(0, 0.0)]  # log_norm is 0
        points += [(i, float(a[k, i, e])) for i in range(a.shape[1]) for e in range(s) if mask[k, i, e]]
        top = bottom = 0.0
        for x, (i, u) in enumerate(points):
            for j, v in points[x + 1 :]:
                weight = lam ** max(j - i - 1, 0)
                top, bottom = top + weight * (u - v) ** 2, bottom + weight
        each.append(top / bottom if bottom else 0.0)
    want = (sum(each[::2]) / len(each[::2]) + sum(each[1::2]) / len(each[1::2])) / 2
    assert abs(float(subtb(scores, r, log_gamma, lam=lam)[0]) - want) < 1e-9


def test_subtb_at_one_is_a_variance_and_pooled_of_one_row() -> None:
    scores, r, log_gamma = (x.take(torch.tensor([0])) if isinstance(x, Rollouts) else x for x in batch())
    one = Scores(scores.log_q[:1], scores.log_stop[:1])
    n = int(r.n[0]) + 1
    same = pooled(one, r, log_gamma[:1])[0] * 2 * n / (n - 1)
    assert torch.allclose(subtb(one, r, log_gamma[:1])[0], same)


def test_db_pairs_states_that_may_stop() -> None:
    scores, r, log_gamma = batch()
    skip = dataclasses.replace(r, can_stop=r.can_stop & (torch.arange(5) != 1) | (torch.arange(5) == r.n[:, None]))
    a, mask, _ = residual(scores, skip, log_gamma)
    each = []
    for k in range(len(r)):
        v = a[k, :, 0][mask[k, :, 0]]
        each.append(float((v[1:] - v[:-1]).square().mean()) if len(v) > 1 else 0.0)
    want = (sum(each[::2]) / 3 + sum(each[1::2]) / 3) / 2
    assert abs(float(db(scores, skip, log_gamma)[0]) - want) < 1e-9


@pytest.mark.parametrize("name", ["vargrad", "pooled"])
def test_a_problem_s_own_constant_does_not_matter(name: str) -> None:
    scores, r, log_gamma = batch()
    plain = objective(name)(scores, r, log_gamma)[0]
    shifted = log_gamma + 7.0 * r.problem[:, None, None]
    assert torch.allclose(objective(name)(scores, r, shifted)[0], plain)


@pytest.mark.parametrize("name", sorted(OBJECTIVES))
def test_gradients_are_finite_and_leave_forced_moves_alone(name: str) -> None:
    scores, r, log_gamma = batch(s=2)
    log_q, log_stop = scores.log_q.clone().requires_grad_(), scores.log_stop.clone().requires_grad_()
    live = Scores(log_q, log_stop, log_norm=scores.log_norm)
    loss, metrics = objective(name)(live, r, log_gamma)
    loss.backward()
    assert log_q.grad is not None and log_stop.grad is not None
    assert log_q.grad.isfinite().all() and log_stop.grad.isfinite().all() and float(log_q.grad.abs().sum()) > 0
    assert float(log_q.grad[r.kind != FREE].abs().sum()) == 0
    assert metrics and all(isinstance(v, float) for v in metrics.values())


def test_behaviour_density_never_enters_a_squared_error() -> None:
    scores, r, log_gamma = batch()
    other = dataclasses.replace(r, log_b=r.log_b * 3, log_q=r.log_q * 5)
    for name in ("pooled", "subtb", "vargrad", "tb", "db", "rtb"):
        assert torch.equal(objective(name)(scores, r, log_gamma)[0], objective(name)(scores, other, log_gamma)[0])


def test_ppo_starts_as_policy_gradient_and_clips() -> None:
    scores, r, log_gamma = batch()
    loss, metrics = ppo(scores, r, log_gamma)
    assert metrics["clipped"] == 0 and abs(float(loss)) < 1e-12  # leave-one-out advantages sum to 0
    moved, found = ppo(dataclasses.replace(scores, log_q=scores.log_q + 1.0), r, log_gamma)
    assert found["clipped"] > 0 and float(moved) != float(loss)


def test_mle_weights() -> None:
    scores, r, _ = batch()
    w = torch.tensor([1.0, 2.0, 0.0, 0.0, 0.0, 0.0], dtype=D)
    log_q = object_log_q(scores, r)
    assert torch.allclose(mle(scores, r, weights=w)[0], -(log_q[0] + log_q[1]) / 2)
    with pytest.raises(InputError, match="above 0 for every problem"):
        mle(scores, r, weights=torch.zeros(6, dtype=D))


def test_refusals() -> None:
    scores, r, log_gamma = batch()
    zero = log_gamma.clone()
    zero[0, r.n[0]] = NEG_INF
    for name in ("pooled", "subtb", "vargrad", "tb", "db", "rtb", "reinforce"):
        with pytest.raises(InputError, match="floor="):
            objective(name)(scores, r, zero)
    whole = log_gamma[torch.arange(6), r.n, r.stop]
    for refuse in (pooled, subtb, db):
        with pytest.raises(InputError, match="vargrad"):
            refuse(scores, r, whole)
    lone = r.take(torch.arange(1))
    single = Scores(scores.log_q[:1], scores.log_stop[:1])
    for pair in (vargrad, grpo, ppo):
        with pytest.raises(InputError, match="at least 2"):
            pair(single, lone, whole[:1])
    with pytest.raises(InputError, match="log Z"):
        tb(single, lone, whole[:1])
    with pytest.raises(InputError, match="probability 0"):
        tb(dataclasses.replace(scores, log_q=torch.full_like(scores.log_q, NEG_INF)), r, log_gamma)
    with pytest.raises(InputError, match="did you mean 'vargrad'"):
        objective("vargrd")
