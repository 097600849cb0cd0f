"""An exact planner on sampled maps, and the answers it gives to a story's questions.

One walks along open links, each step costs ``COST``, and one may collect the reward of one place and then is done:

    V(i) = max( R(i), max_{j: i-j open} V(j) - COST )              value iteration, exact after d - 1 sweeps

since an optimal walk repeats no place (every step costs). Over n maps sampled from a posterior an answer a has

    E[U(a)]  = 1/n sum_w U_w(a)                    expected utility
    P(best)  = 1/n sum_w 1[a optimal in w]         the vote (a way is optimal where it is open and none is shorter)

both unbiased over independent draws of worlds, exact where the worlds are all of them with their weights. U_w is, by
kind of question: ``first``, V_w(a) - COST where the step is open and -COST where it is not; ``way``, 1 where every
step of the path is open, else 0; ``worth``, max(0, R_w(a) - COST * distance), 0 where there is no way. Source: Bellman
1957; answers by posterior expected utility as in any decision under uncertainty (DeGroot 1970, ch. 8).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from retrodict.numerics import NEG_INF

COST = 1.0
"""What a step costs, in the unit of rewards."""


@dataclass(frozen=True)
class Worlds:
    """n worlds with weights that sum to one: what is open at the end of the story, and what each place pays."""

    open: Bool[Tensor, "n d d"]
    reward: Float[Tensor, "n d"]
    weight: Float[Tensor, " n"]


def values(open_: Bool[Tensor, "n d d"], reward: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
    """V of every place of every world, by value iteration."""
    v = reward.double()
    for _ in range(reward.shape[1] - 1):
        on = torch.where(open_, v[:, None, :], NEG_INF).amax(2) - COST
        v = torch.maximum(v, on)
    return v


def distances(open_: Bool[Tensor, "n d d"]) -> Float[Tensor, "n d d"]:
    """Steps between all places of every world (Floyd and Warshall); infinite where there is no way."""
    d = open_.shape[1]
    steps = torch.where(open_, 1.0, torch.inf).double()
    steps[:, range(d), range(d)] = 0.0
    for k in range(d):
        steps = torch.minimum(steps, steps[:, :, k, None] + steps[:, None, k, :])
    return steps


def first_step_values(open_: Bool[Tensor, "n d d"], reward: Float[Tensor, "n d"], start: int) -> Float[Tensor, "n d"]:
    """Utility of entering each place first: V - COST, or -COST where it cannot be entered; -inf for staying."""
    q = torch.where(open_[:, start], values(open_, reward), 0.0) - COST
    q[:, start] = NEG_INF
    return q


def solve(open_: Bool[Tensor, "d d"], reward: Float[Tensor, " d"], start: int) -> tuple[float, tuple[int, ...]]:
    """The value of one world and an optimal plan: the places entered in order, the last of which is opened."""
    v = values(open_[None], reward[None])[0]
    here, plan = start, []
    while v[here] > reward[here]:
        here = int(torch.where(open_[here], v, NEG_INF).argmax())
        plan.append(here)
    return float(v[start]), tuple(plan)


def walk_utility(w: Worlds, start: int, plan: Sequence[int]) -> Float[Tensor, " n"]:
    """What a fixed plan brings in each world: R at its end less its steps, or, at a closed step, what was spent."""
    going = torch.ones(len(w.open), dtype=torch.bool)
    spent, here = torch.zeros(len(w.open), dtype=torch.float64), start
    for there in plan:
        spent = spent + torch.where(going, COST, 0.0)
        going = going & w.open[:, here, there]
        here = there
    return torch.where(going, w.reward[:, here].double(), 0.0) - spent


@dataclass(frozen=True)
class Answers:
    """Expected utility and probability of being optimal of each option."""

    utility: Float[Tensor, " k"]
    best: Float[Tensor, " k"]


def answer(w: Worlds, start: int, kind: str, paths: Sequence[Sequence[int]]) -> Answers:
    """What the worlds say about a question's options (``stories.Question``)."""
    if kind == "way":
        u = torch.stack([_is_open(w.open, start, p) for p in paths], 1)
        steps = distances(w.open)[:, start][:, [p[-1] for p in paths]]
        best = u & (steps == torch.tensor([len(p) for p in paths]))
        return Answers(w.weight @ u.double(), w.weight @ best.double())
    if kind == "first":
        u = first_step_values(w.open, w.reward, start)[:, [p[0] for p in paths]]
    else:
        at = [p[0] for p in paths]
        u = (w.reward[:, at] - COST * distances(w.open)[:, start][:, at]).clamp_min(0.0)
    return Answers(w.weight @ u, w.weight @ (u == u.amax(1, keepdim=True)).double())


def _is_open(open_: Bool[Tensor, "n d d"], start: int, path: Sequence[int]) -> Bool[Tensor, " n"]:
    here = torch.tensor([start, *path[:-1]])
    return open_[:, here, torch.tensor(list(path))].all(1)


@dataclass(frozen=True)
class Plan:
    """A plan (the places entered), its expected utility and its probability of being optimal."""

    places: tuple[int, ...]
    utility: float
    best: float


def plans(w: Worlds, start: int) -> list[Plan]:
    """Every plan that is optimal in some world, by expected utility, the best first."""
    seen: dict[tuple[bytes, bytes], tuple[int, ...]] = {}
    for open_, reward in zip(w.open, w.reward, strict=True):
        key = (open_.numpy().tobytes(), reward.numpy().tobytes())
        if key not in seen:
            seen[key] = solve(open_, reward, start)[1]
    top = values(w.open, w.reward)[:, start]
    out = []
    for plan in dict.fromkeys(seen.values()):
        u = walk_utility(w, start, plan)
        out.append(Plan(plan, float(w.weight @ u), float(w.weight @ (u >= top - 1e-9).double())))
    return sorted(out, key=lambda p: (-p.utility, p.places))
