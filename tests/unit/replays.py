"""A small target and rows of it, for the tests of the replay buffer."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from retrodict.models.tabular import TabularLM
from retrodict.policies.lm import LMPolicy
from retrodict.records import FREE, Problem, Rollouts
from retrodict.rng import generator
from retrodict.targets.algebra import Target
from retrodict.targets.ready import posterior
from retrodict.training.replay import Replay
from retrodict.training.shelf import ROWS

LM = TabularLM.random(".ab ", order=2, seed=1)


def target_of(n: int = 3) -> Target:
    pairs = [((1,), (2,)), ((2, 1), (1, 3)), ((3,), (2, 2))]
    return posterior(LM, [Problem(x, y) for x, y in pairs[:n]], stop=".", max_tokens=4)


def policy_of(target: Target) -> LMPolicy:
    return cast(LMPolicy, target.prior)


def drawn(target: Target, rows: int = 24, seed: int = 0, prefixes: bool = True) -> tuple[Rollouts, Tensor, list]:
    """Rows of all problems with their terms, log gamma and keys."""
    problem = torch.arange(rows) % len(target.problems)
    out = target.terms(policy_of(target).sample(problem, generator(seed)), prefixes)
    return out, target.log_gamma(out), target.space.keys(out)


def line(ids: list[list[int]], problem: int = 0, tag: float = 0.0, log_b: float = -1.0) -> Rollouts:
    """Rows put together by hand, with one whole-object term ``tag``."""
    b, t = len(ids), max(map(len, ids))
    n = torch.tensor([len(z) for z in ids])
    moves = torch.tensor([[*z, *[0] * (t - len(z))] for z in ids]).view(b, t)
    return Rollouts(
        problem=torch.full((b,), problem), moves=moves, kind=torch.full((b, t), FREE, dtype=torch.int8), n=n,
        stop=torch.zeros(b, dtype=torch.long), can_stop=torch.ones(b, t + 1, dtype=torch.bool),
        log_q=torch.zeros(b, t), log_stop=torch.zeros(b, t + 1, 1), log_b=torch.full((b, t + 1), log_b),
        log_pb=torch.zeros(b, t), terms={"tag": torch.full((b,), tag)}, versions={"tag": "v1"},
    )  # fmt: skip


def put(buffer: Replay, ids: list[list[int]], values: list[float], step: int = 0, **kwargs) -> int:
    keys = [(*z, -1) for z in ids]
    return buffer.add(line(ids, **kwargs), torch.tensor(values, dtype=torch.float64), keys, step)


def held(buffer: Replay, problem: int = 0) -> dict[tuple[int, ...], float]:
    """Objects of a problem and their log gamma."""
    shelf = buffer._shelves.get(problem)
    return {} if shelf is None else dict(zip(shelf.keys, shelf.log_gamma, strict=True))


def equal(a: Rollouts, b: Rollouts) -> bool:
    """To the bit."""
    pairs = [(getattr(a, f), getattr(b, f)) for f in ROWS] + [(a.terms[k], b.terms[k]) for k in a.terms]
    same = (a.terms.keys(), a.versions, a.behaviour) == (b.terms.keys(), b.versions, b.behaviour)
    return same and all(x.dtype == y.dtype and torch.equal(x, y) for x, y in pairs)
