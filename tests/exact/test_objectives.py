"""Objectives on enumerated targets: 0 at the exact posterior, more elsewhere, and trained to it; bugs must not pass."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from retrodict.errors import InputError
from retrodict.numerics import NEG_INF, at_end
from retrodict.objectives import OBJECTIVES, pooled, residual, rtb, tb, vargrad
from retrodict.objectives.mle import object_log_q
from retrodict.records import PAD, Rollouts, Scores, cat_rollouts
from retrodict.rng import generator
from retrodict.spaces.enumerate import enumerate_objects
from retrodict.testing.targets import cases

D = torch.float64
BALANCE = ("pooled", "subtb", "vargrad", "tb", "db")
NAMES = (
    "tempered, force",
    "infill, own_stop",
    "infill, exact",
    "batch of problems",
    "sets",
    "two stops, likelihood^0.5",
)
Loss = Callable[[Scores, Rollouts, Tensor], Tensor]


class Table:
    """Every path of a target, and a policy with one row of logits for each prefix of each problem."""

    def __init__(self, name: str) -> None:
        target = CASES[name].target
        self.rollouts = r = cat_rollouts([enumerate_objects(target.space, m) for m in range(len(target.problems))])
        with torch.no_grad():
            self.log_gamma = target.log_gamma(r, every_prefix=True).to(D)
        b, t = r.moves.shape
        self.v, s = int(r.moves.max()) + 1, target.space.n_stops
        ids: dict[tuple[int, ...], int] = {}
        self.node = torch.zeros(b, t + 1, dtype=torch.long)
        for k, (m, z, n) in enumerate(zip(r.problem.tolist(), r.moves.tolist(), r.n.tolist(), strict=True)):
            for i in range(n + 1):
                self.node[k, i] = ids.setdefault((m, *z[:i]), len(ids))
        self.legal = torch.zeros(len(ids), self.v + s, dtype=torch.bool)
        self.mass = torch.zeros(len(ids), self.v + s, dtype=D)  # what q* sends through each action
        self.log_target = at_end(self.log_gamma, r.n, r.stop) + r.log_pb.sum(1)
        row, at = (r.kind != PAD).nonzero().unbind(1)
        for node, action, k in (
            (self.node[row, at], r.moves[row, at], row),
            (self.node[torch.arange(b), r.n], self.v + r.stop, torch.arange(b)),
        ):
            self.legal[node, action] = True
            self.mass.index_put_((node, action), self.log_target[k].exp(), accumulate=True)
        m = len(target.problems)
        log_z = torch.stack([self.log_target[r.problem == i].logsumexp(0) for i in range(m)])
        self.log_z = log_z[r.problem]

    def best(self) -> Tensor:
        """Logits of the exact posterior: log of the summed gamma of what lies beyond each action."""
        return self.mass.log().masked_fill(~self.legal, 0.0)

    def some(self, seed: int = 0, scale: float = 1.0) -> Tensor:
        """Random logits."""
        return scale * torch.randn(self.legal.shape, generator=generator(seed), dtype=D)

    def scores(self, logits: Tensor, log_norm: Tensor | None = None) -> Scores:
        """Teacher-forced log q of every path under the table."""
        r, t = self.rollouts, self.rollouts.moves.shape[1]
        log_p = logits.masked_fill(~self.legal, NEG_INF).log_softmax(-1)
        log_q = log_p[self.node[:, :t], r.moves]
        inside = torch.arange(t + 1) <= r.n[:, None]
        log_stop = torch.where(inside[:, :, None], log_p[self.node][:, :, self.v :], NEG_INF)
        norm = self.log_z if log_norm is None else log_norm
        return Scores(torch.where(r.kind != PAD, log_q, 0.0), log_stop, log_norm=norm)

    def distance(self, logits: Tensor) -> float:
        """The largest total variation over problems, between paths of q and of the posterior."""
        with torch.no_grad():
            q = object_log_q(self.scores(logits), self.rollouts).exp()
        gap = (q - (self.log_target - self.log_z).exp()).abs() / 2
        problem = self.rollouts.problem
        return float(torch.zeros(int(problem.max()) + 1, dtype=D).index_add(0, problem, gap).max())

    def train(self, loss: Loss, steps: int = 500, lr: float = 1.0) -> Tensor:
        """Adam on all paths at once, the learning rate falling to 0; returns the logits."""
        logits = torch.zeros(self.legal.shape, dtype=D, requires_grad=True)
        m = int(self.rollouts.problem.max()) + 1
        norm = torch.zeros(m, dtype=D, requires_grad=True)
        adam = torch.optim.Adam([logits, norm], lr=lr)
        plan = torch.optim.lr_scheduler.CosineAnnealingLR(adam, steps)
        for _ in range(steps):
            adam.zero_grad()
            value = loss(self.scores(logits, norm[self.rollouts.problem]), self.rollouts, self.log_gamma)
            value.backward()
            adam.step()
            plan.step()
        return logits.detach()


CASES = {c.name: c for c in cases()}
MADE: dict[str, Table] = {}


def table(name: str) -> Table:
    """One Table a target."""
    return MADE.setdefault(name, Table(name))


def of(name: str) -> Loss:
    """The loss of an objective."""
    return lambda s, r, g: OBJECTIVES[name](s, r, g)[0]


@pytest.mark.parametrize("name", NAMES)
def test_q_star_is_the_zero_of_every_objective(name: str) -> None:
    x = table(name)
    assert x.distance(x.best()) < 1e-12
    a, mask, final = residual(x.scores(x.best()), x.rollouts, x.log_gamma)
    assert float((a - x.log_z[:, None, None])[mask].abs().max()) < 1e-9
    assert torch.equal(final, at_end(a, x.rollouts.n, x.rollouts.stop))
    for objective in BALANCE:
        assert float(of(objective)(x.scores(x.best()), x.rollouts, x.log_gamma)) < 1e-18, objective
        off = of(objective)(x.scores(x.best() + x.some(1, 0.3)), x.rollouts, x.log_gamma)
        assert float(off) > 1e-3, objective


@pytest.mark.parametrize("objective", BALANCE)
@pytest.mark.parametrize("name", ["infill, own_stop", "tempered, force", "sets"])
def test_training_reaches_the_posterior(name: str, objective: str) -> None:
    x = table(name)
    assert x.distance(torch.zeros_like(x.best())) > 0.1
    assert x.distance(x.train(of(objective))) < 1e-2


@pytest.mark.parametrize("name", ["batch of problems", "two stops, likelihood^0.5"])
def test_the_default_trains_on_the_corners(name: str) -> None:
    x = table(name)
    assert x.distance(x.train(of("pooled"))) < 1e-2


@pytest.mark.parametrize("name", ["sets", "infill, own_stop"])
def test_tb_on_policy_is_twice_the_gradient_of_kl(name: str) -> None:
    x = table(name)
    logits = x.some(3).requires_grad_()
    log_q = object_log_q(x.scores(logits), x.rollouts)
    (kl,) = torch.autograd.grad((log_q.exp() * (log_q - x.log_target)).sum(), logits)
    q, scores = log_q.detach().exp(), x.scores(logits)
    total = torch.zeros((), dtype=D)
    for i in range(len(x.rollouts)):
        k = torch.tensor([i])
        one = Scores(scores.log_q[k], scores.log_stop[k], log_norm=x.log_z[k] + 0.7)  # any constant will do
        total = total + q[i] * tb(one, x.rollouts.take(k), x.log_gamma[k])[0]
    (grad,) = torch.autograd.grad(total, logits)
    assert torch.allclose(grad, 2 * kl, atol=1e-10)


def test_vargrad_on_policy_is_the_gradient_of_kl() -> None:
    """Two samples: the expected gradient over all pairs of draws is 2 (K - 1) / K = 1 times that of KL."""
    x = table("sets")
    logits = x.some(3).requires_grad_()
    log_q = object_log_q(x.scores(logits), x.rollouts)
    (kl,) = torch.autograd.grad((log_q.exp() * (log_q - x.log_target)).sum(), logits)
    q, scores, b = log_q.detach().exp(), x.scores(logits), len(x.rollouts)
    total = torch.zeros((), dtype=D)
    for i in range(b):
        for j in range(b):
            k = torch.tensor([i, j])
            pair = Scores(scores.log_q[k], scores.log_stop[k])
            total = total + q[i] * q[j] * vargrad(pair, x.rollouts.take(k), x.log_gamma[k])[0]
    (grad,) = torch.autograd.grad(total, logits)
    assert torch.allclose(grad, kl, atol=1e-10)


def test_the_baselines_and_kl() -> None:
    """REINFORCE and RLOO at beta = 1 follow KL(q, target); MLE on posterior weights KL(target, q)."""
    x = table("sets")
    logits = x.some(3).requires_grad_()
    log_q = object_log_q(x.scores(logits), x.rollouts)
    (kl,) = torch.autograd.grad((log_q.exp() * (log_q - x.log_target)).sum(), logits)
    q, scores, b = log_q.detach().exp(), x.scores(logits), len(x.rollouts)
    for name in ("reinforce", "rloo"):
        total = torch.zeros((), dtype=D)
        for i in range(b):
            for j in range(b):
                k = torch.tensor([i, j])
                pair = Scores(scores.log_q[k], scores.log_stop[k])
                loss = OBJECTIVES[name](pair, x.rollouts.take(k), x.log_gamma[k], beta=1.0)[0]
                total = total + q[i] * q[j] * loss
        (grad,) = torch.autograd.grad(total, logits, retain_graph=True)
        assert torch.allclose(grad, kl, atol=1e-10), name
    post = (x.log_target - x.log_z).exp()
    best = x.train(lambda s, r, g: OBJECTIVES["mle"](s, r, g, weights=post)[0])
    assert x.distance(best) < 1e-2
    mode = x.train(lambda s, r, g: -(object_log_q(s, r).exp() * x.log_target).sum())
    assert x.distance(mode) > 0.3  # what REINFORCE without entropy climbs to


def test_rtb_counts_paths_by_its_prior() -> None:
    """Sets under a prior over paths that is not uniform: the posterior over paths is p r, and P_B has no part in it."""
    x = table("sets")
    with torch.no_grad():
        log_prior = object_log_q(x.scores(x.some(5)), x.rollouts)
    reward = at_end(x.log_gamma, x.rollouts.n, x.rollouts.stop)
    path = log_prior + reward
    mass = torch.zeros_like(x.mass)
    r, b = x.rollouts, len(x.rollouts)
    row, at = (r.kind != PAD).nonzero().unbind(1)
    mass.index_put_((x.node[row, at], r.moves[row, at]), path[row].exp(), accumulate=True)
    mass.index_put_((x.node[torch.arange(b), r.n], x.v + r.stop), path.exp(), accumulate=True)
    best = mass.log().masked_fill(~x.legal, 0.0)
    norm = path.logsumexp(0).expand(b)
    for scores in (x.scores(best, norm), dataclasses.replace(x.scores(best), log_norm=None)):
        assert float(rtb(scores, r, path)[0]) < 1e-18
        assert float(rtb(dataclasses.replace(scores, log_q=scores.log_q * 1.1), r, path)[0]) > 1e-4
    assert float(tb(x.scores(best, norm), r, path)[0]) > 0.1  # with P_B: planted


# -- planted bugs ----------------------------------------------------------------------------------------------------


def test_bug_plus_mean_in_vargrad() -> None:
    x = table("infill, own_stop")

    def planted(s: Scores, r: Rollouts, g: Tensor) -> Tensor:
        a = residual(s, r, g)[2]
        return (a + a.mean()).square().mean()

    assert float(planted(x.scores(x.best()), x.rollouts, x.log_gamma)) > 0.1
    assert x.distance(x.train(planted)) > 0.05


def test_bug_batch_wide_mean() -> None:
    x = table("batch of problems")

    def planted(s: Scores, r: Rollouts, g: Tensor) -> Tensor:
        return vargrad(s, dataclasses.replace(r, problem=torch.zeros_like(r.problem)), g)[0]

    assert float(planted(x.scores(x.best()), x.rollouts, x.log_gamma)) > 0.01
    assert x.distance(x.train(planted)) > 0.02


LEAK = -1.5
"""log q(stop) at the limit, of a model that was never told that it must stop there."""


@pytest.mark.parametrize("objective", ["subtb", "pooled", "vargrad"])
def test_bug_forced_stop_left_free(objective: str) -> None:
    """At L the policy may go on, as far as its scores know: loss near 0 at a wrong distribution."""
    x = table("infill, force")
    top = int(x.rollouts.n.max())

    def leaky(s: Scores) -> Scores:
        free = torch.where((torch.arange(top + 1) == top)[None, :, None], s.log_stop + LEAK, s.log_stop)
        return dataclasses.replace(s, log_stop=free)

    wrong = x.train(lambda s, r, g: of(objective)(leaky(s), r, g))
    assert float(of(objective)(leaky(x.scores(x.best())), x.rollouts, x.log_gamma)) > 1e-3
    assert (
        float(pooled(leaky(x.scores(wrong)), x.rollouts, x.log_gamma)[0]) < 1e-3
    )  # every a is the same: it looks done
    assert x.distance(wrong) > 0.02
    assert x.distance(x.train(of(objective))) < 1e-2


def test_bug_backward_probability_missing() -> None:
    x = table("sets")

    def planted(s: Scores, r: Rollouts, g: Tensor) -> Tensor:
        return pooled(s, dataclasses.replace(r, log_pb=torch.zeros_like(r.log_pb)), g)[0]

    assert float(planted(x.scores(x.best()), x.rollouts, x.log_gamma)) > 0.05
    assert x.distance(x.train(planted)) > 0.1


@pytest.mark.parametrize("objective", BALANCE)
def test_bug_stop_term_dropped(objective: str) -> None:
    x = table("infill, own_stop")
    s = x.scores(x.best())
    s = dataclasses.replace(s, log_stop=torch.where(s.log_stop > NEG_INF, 0.0, s.log_stop))
    assert float(of(objective)(s, x.rollouts, x.log_gamma)) > 0.05


@pytest.mark.parametrize("objective", ["subtb", "db"])
def test_bug_no_anchor_under_a_min_length(objective: str) -> None:
    x = table("tempered, force")
    bare = dataclasses.replace(x.scores(x.best()), log_norm=None)
    with pytest.raises(InputError, match="pooled"):
        of(objective)(bare, x.rollouts, x.log_gamma)

    def planted(s: Scores, r: Rollouts, g: Tensor) -> Tensor:  # the anchor follows the first a_i: it says nothing
        a = residual(s, r, g)[0][:, 1, 0]
        return of(objective)(dataclasses.replace(s, log_norm=a), r, g)

    first = x.best()
    first[x.node[:, 0]] = 3 * first[x.node[:, 0]] + 1.0  # another first move
    assert float(planted(x.scores(first), x.rollouts, x.log_gamma)) < 1e-18
    assert float(of(objective)(x.scores(first), x.rollouts, x.log_gamma)) > 1e-3
