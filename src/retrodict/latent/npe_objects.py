"""Latents as a simulator hands them out, one array for all, and as trajectories of their space.

| space | array | path |
|---|---|---|
| Vectors(d) | real ``[b, d]`` | the one move |
| Subsets | true for members ``[b, atoms]`` | members in an order drawn at random |
| Dags | adjacency ``[b, d, d]`` | edges in an order drawn at random |
| one path an object, all of one length (Assignments, Trees) | the moves ``[b, max_moves]`` | these moves |

A random order is a draw from P_B of a space whose last move may have been any (log P_B = -log n): fitting q to such
paths by maximum likelihood makes q(path) tend to p(object) P_B(path | object), so that all orders are covered.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Bool, Int, Shaped
from torch import Tensor

from retrodict.errors import InputError
from retrodict.numerics import NEG_INF
from retrodict.records import FREE, MUST_STOP, Rollouts
from retrodict.spaces.dags import Dags, edges_to_graph
from retrodict.spaces.sets import Subsets
from retrodict.spaces.vectors import Vectors


def shape_of(space: Any) -> tuple[int, ...]:
    """The shape of one latent's array."""
    if isinstance(space, Vectors):
        return (space.dim,)
    if isinstance(space, Subsets):
        return (space.atoms,)
    return (space.d, space.d) if isinstance(space, Dags) else (space.max_moves,)


def objects_of(space: Any, rollouts: Rollouts) -> Shaped[Tensor, "b ..."]:
    """The arrays of finished trajectories."""
    if isinstance(space, Vectors):
        return space.points(rollouts)
    if isinstance(space, Subsets):
        return space.members(rollouts)
    return space.graphs(rollouts) if isinstance(space, Dags) else rollouts.moves


def rollouts_of(
    space: Any, objects: Shaped[Tensor, "b ..."], problem: Int[Tensor, " b"], gen: torch.Generator
) -> Rollouts:
    """One path to each object, drawn from P_B.

    Raises InputError for another shape, or for a row that is no object of the space (the first is named).
    """
    if tuple(objects.shape[1:]) != shape_of(space):
        raise InputError(f"a latent of {type(space).__name__} has shape {list(shape_of(space))}, and these have "
                         f"{list(objects.shape[1:])}")  # fmt: skip
    if isinstance(space, Vectors):
        return space.record(problem, objects[:, None], torch.zeros(len(objects), 1))
    if isinstance(space, Subsets):
        return walk(space, problem, *shuffled(objects.bool(), gen))
    if isinstance(space, Dags):
        fixed = edges_to_graph(space.required, space.d)
        missing = (fixed & ~objects.bool()).flatten(1).any(1).nonzero().squeeze(1)
        if len(missing):
            raise InputError(f"latent row {int(missing[0])} lacks a required edge of its space")
        return walk(space, problem, *shuffled((objects.bool() & ~fixed).flatten(1), gen))
    return walk(space, problem, objects.long(), torch.full((len(objects),), space.max_moves))


def shuffled(members: Bool[Tensor, "b a"], gen: torch.Generator) -> tuple[Int[Tensor, "b t"], Int[Tensor, " b"]]:
    """The members of each row in an order drawn at random (0 past the last), and how many there are."""
    n = members.sum(1)
    order = torch.rand(members.shape, generator=gen).masked_fill(~members, 2.0).argsort(1)
    t = int(n.max()) if len(n) else 0
    return torch.where(torch.arange(t) < n[:, None], order[:, :t], 0), n


def walk(space: Any, problem: Int[Tensor, " b"], moves: Int[Tensor, "b t"], n: Int[Tensor, " b"]) -> Rollouts:
    """The record of given moves in a space that lists them, with log q = 0: what a policy scores.

    Raises InputError where the space forbids a move or the stop after the last; the row is named.
    """
    b, t = moves.shape
    can_stop, log_pb = torch.zeros(b, t + 1, dtype=torch.bool), torch.zeros(b, t, dtype=torch.float64)
    rows, s, bad = torch.arange(b), space.start(problem), torch.zeros(b, dtype=torch.bool)
    for i in range(t + 1):
        menu = space.menu(s)
        can_stop[rows, i] = menu.can_stop
        on = n[rows] > i
        bad[rows] |= ~on & ~menu.can_stop
        move = moves[rows, i] if i < t else torch.zeros_like(rows)
        inside = (move >= 0) & (move < menu.legal.shape[1])
        legal = menu.legal.gather(1, torch.where(inside, move, 0)[:, None]).squeeze(1)
        bad[rows] |= on & ~(inside & legal & (menu.must != MUST_STOP))
        keep = (on & ~bad[rows]).nonzero().squeeze(1)
        if not len(keep):
            break
        rows = rows[keep]
        s = space.step(space.take(s, keep), moves[rows, i])
        log_pb[rows, i] = space.log_pb(s).double()
    if bool(bad.any()):
        row = int(bad.nonzero()[0])
        raise InputError(f"{int(bad.sum())} latents are no objects of {type(space).__name__}, the first is row {row}: "
                         f"its moves are {moves[row, : n[row]].tolist()}")  # fmt: skip
    log_stop = torch.where(can_stop, 0.0, NEG_INF)[:, :, None].repeat(1, 1, space.n_stops)
    kind = (torch.arange(t) < n[:, None]).to(torch.int8) * FREE
    zeros = torch.zeros(b, t)
    return Rollouts(problem=problem, moves=moves, kind=kind, n=n, stop=torch.zeros_like(n), can_stop=can_stop,
                    log_q=zeros, log_stop=log_stop, log_b=torch.zeros(b, t + 1), log_pb=log_pb)  # fmt: skip
