"""Every object of a small space, by walking its menus: the oracle."""

from __future__ import annotations

import torch
from torch import Tensor

from retrodict.errors import InputError
from retrodict.protocols import Space
from retrodict.records import FREE, MUST_STOP, PAD, Rollouts, cat_rollouts

MAX_OBJECTS = 2_000_000


def enumerate_objects(space: Space, problem: int, max_objects: int = MAX_OBJECTS) -> Rollouts:
    """One Rollouts row for each path to an object of the space, for problem ``problem``.

    Paths are complete: the sum over rows of exp(log_pb) counts each object once. Raises InputError, saying how large
    the space is (a lower bound), where it has more than ``max_objects``.
    """
    s = space.start(torch.tensor([problem]))
    moves = torch.zeros(1, 0, dtype=torch.long)
    log_pb = torch.zeros(1, 0)
    parts, total = [], 0
    for t in range(space.max_moves + 1):
        menu = space.menu(s)
        stop_rows = menu.can_stop.nonzero().squeeze(1).repeat_interleave(space.n_stops)
        if len(stop_rows):
            ids = torch.arange(space.n_stops).repeat(len(stop_rows) // space.n_stops)
            if space.n_stops > 1:  # a forced stop is the first id
                keep = (ids == 0) | (menu.must[stop_rows] != MUST_STOP)
                stop_rows, ids = stop_rows[keep], ids[keep]
            parts.append(_rows(problem, moves[stop_rows], log_pb[stop_rows], ids, space.n_stops))
            total += len(stop_rows)
        open_rows = (menu.must != MUST_STOP).nonzero().squeeze(1)
        if not len(open_rows):
            break
        if menu.legal is None:
            raise InputError("this space does not list its moves (Menu.legal is None); it cannot be enumerated")
        row, move = menu.legal[open_rows].nonzero().unbind(1)
        if total + len(row) > max_objects:
            branch = len(row) / len(open_rows)
            about = branch**space.max_moves
            raise InputError(
                f"too large to enumerate: over {total + len(row):,} objects after {t + 1} of {space.max_moves} moves, "
                f"about {about:.1e} in all (limit {max_objects:,}); use a sampler, or fewer tokens or moves"
            )
        s = space.step(space.take(s, open_rows[row]), move)
        moves = torch.cat([moves[open_rows[row]], move[:, None]], 1)
        log_pb = torch.cat([log_pb[open_rows[row]], space.log_pb(s)[:, None]], 1)
    return cat_rollouts(parts)


def _rows(problem: int, moves: Tensor, log_pb: Tensor, stop: Tensor, n_stops: int) -> Rollouts:
    b, t = moves.shape
    zeros = torch.zeros(b, t)
    return Rollouts(
        problem=torch.full((b,), problem),
        moves=moves,
        kind=torch.full((b, t), FREE if t else PAD, dtype=torch.int8),
        n=torch.full((b,), t),
        stop=stop,
        can_stop=torch.ones(b, t + 1, dtype=torch.bool),
        log_q=zeros,
        log_stop=torch.zeros(b, t + 1, n_stops),
        log_b=torch.zeros(b, t + 1),
        log_pb=log_pb,
    )
