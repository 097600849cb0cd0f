"""Assignments and real vectors as spaces, and the small network over any coded space."""

import math

import pytest
import torch

import retrodict as rd
from retrodict.errors import InputError
from retrodict.policies.net import NetPolicy
from retrodict.policies.vectors import VectorPolicy
from retrodict.records import Problem, Rollouts
from retrodict.rng import generator
from retrodict.spaces.enumerate import enumerate_objects
from retrodict.spaces.sets import Subsets
from retrodict.spaces.vectors import Assignments, Vectors
from retrodict.targets.algebra import Target


class Table:
    """log f of each assignment and problem, read off a table ``[m, size, size]``."""

    name, noise, version, prefixes = "table", "none", "1", False

    def __init__(self, values: torch.Tensor) -> None:
        self.values = values

    def __call__(self, rollouts: Rollouts, every_prefix: bool = False) -> torch.Tensor:
        return self.values[rollouts.problem, rollouts.moves[:, 0], rollouts.moves[:, 1]]


def problems(m: int) -> list[Problem]:
    return [Problem((), name=str(i), row={"features": torch.eye(m)[i]}) for i in range(m)]


def target(m: int = 3) -> Target:
    values = torch.randn(m, 2, 3, generator=generator(1), dtype=torch.float64)
    return Target(Assignments((2, 3)), problems(m), {"table": Table(values)})


def test_every_assignment_is_listed_once():
    rows = enumerate_objects(Assignments((2, 3, 1)), 0)
    assert sorted(Assignments((2, 3, 1)).keys(rows)) == [(a, b, 0, -1) for a in range(2) for b in range(3)]


def test_states_that_differ_have_codes_that_differ():
    space = Assignments((2, 3))
    s = space.start(torch.zeros(1, dtype=torch.long))
    codes = [space.features(s)]
    for a in range(2):
        one = space.step(s, torch.tensor([a]))
        codes += [space.features(one)] + [space.features(space.step(one, torch.tensor([b]))) for b in range(3)]
    assert len({tuple(c[0].tolist()) for c in codes}) == 9
    assert codes[0].shape == (1, space.n_features)


def test_replay_is_stepping():
    space, gen = Assignments((2, 3)), generator(0)
    policy = NetPolicy(space, problems(3))
    rows = policy.sample(torch.tensor([0, 1, 2, 2]), gen)
    s = space.start(rows.problem)
    for i in range(3):
        assert torch.equal(space.replay(rows, torch.full((4,), i)).values, s.values)
        if i < 2:
            s = space.step(s, rows.moves[:, i])


class Coded(Subsets):
    """Sets, coded by their members: objects that end at different times, reached by several paths."""

    n_moves, n_features = 3, 3

    def features(self, s):  # noqa: ANN001, ANN201
        return s.members.float()


@pytest.mark.parametrize("space", [Assignments((2, 3)), Coded(3)])
def test_scoring_all_prefixes_at_once_is_scoring_step_by_step(space: Assignments | Subsets):
    policy = NetPolicy(space, problems(2), seed=3)
    for w in policy.parameters().values():
        w.data += 0.3 * torch.randn(w.shape, generator=generator(5))
    rows = policy.sample(torch.arange(2).repeat(8), generator(0))
    once, steps = policy.score(rows), super(NetPolicy, policy).score(rows)
    torch.testing.assert_close(once.log_q, steps.log_q)
    torch.testing.assert_close(once.log_stop, steps.log_stop)
    torch.testing.assert_close(once.log_q, rows.log_q)


def test_one_policy_is_trained_on_many_problems():
    t = target()
    exact = rd.exact(t)
    policy = rd.amortize(t, NetPolicy(t.space, t.problems), objective="vargrad", steps=150, samples=32, lr=1e-2,
                         lr_end=0.01, evaluate=2)  # fmt: skip
    rows = exact.objects
    log_q = policy.score(rows).log_q.sum(1).view(3, 6)
    assert 0.5 * (log_q.exp() - exact.weights).abs().sum(1).max() < 0.02


def test_features_of_another_size_are_refused():
    with pytest.raises(InputError, match="reads 3 features of a problem, and these have 2"):
        NetPolicy(Assignments((2, 3)), problems(3)).on(problems(2))


class Walk(VectorPolicy):
    """A Gaussian walk of known density."""

    def __init__(self, dim: int, steps: int) -> None:
        self.space, self.problems = Vectors(dim, steps), [Problem((), name="walk")]

    def propose(self, problem, at, i, gen, temperature):  # noqa: ANN001, ANN201
        return at + math.sqrt(temperature) * torch.randn(at.shape, generator=gen)

    def log_move(self, problem, at, i, move, temperature=1.0):  # noqa: ANN001, ANN201
        return torch.distributions.Normal(at, math.sqrt(temperature)).log_prob(move).sum(1)


def test_a_path_of_vectors_is_scored_as_it_was_drawn():
    policy = Walk(2, 3)
    rows = policy.sample(torch.zeros(5, dtype=torch.long), generator(0))
    torch.testing.assert_close(policy.score(rows).log_q, rows.log_q)
    assert torch.equal(rows.log_b[:, :3], rows.log_q) and bool((rows.log_b[:, 3] == 0).all())
    hot = policy.sample(torch.zeros(5, dtype=torch.long), generator(0), {"temperature": 4.0})
    torch.testing.assert_close(policy.score(hot).log_q, hot.log_q)
    assert not torch.allclose(hot.log_b[:, :3], hot.log_q)
    torch.testing.assert_close(policy.space.points(rows), rows.moves[:, 2])


def test_vectors_have_no_uniform_move():
    with pytest.raises(InputError, match="no uniform move"):
        Walk(2, 1).sample(torch.zeros(1, dtype=torch.long), generator(0), {"epsilon": 0.1})
