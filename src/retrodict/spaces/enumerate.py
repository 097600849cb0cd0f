"""Every object of a small space, by walking its menus: the oracle."""

from __future__ import annotations

import torch
from torch import Tensor

from retrodict.errors import InputError
from retrodict.protocols import Space
from retrodict.records import FORCED, FREE, MUST_MOVE, MUST_STOP, Rollouts, cat_rollouts

MAX_OBJECTS = 2_000_000


def enumerate_objects(space: Space, problem: int, max_objects: int = MAX_OBJECTS) -> Rollouts:
    """One Rollouts row for each path to an object of the space, for problem ``problem``.

    Paths are complete: the sum over rows of exp(log_pb) counts each object once. Raises InputError, saying how large
    the space is (a lower bound), where it has more than ``max_objects``.
    """
    s = space.start(torch.tensor([problem]))
    moves = torch.zeros(1, 0, dtype=torch.long)
    kind = torch.zeros(1, 0, dtype=torch.int8)
    could = torch.zeros(1, 0, dtype=torch.bool)
    log_pb = torch.zeros(1, 0)
    parts, total = [], 0
    for t in range(space.max_moves + 1):
        menu = space.menu(s)
        could = torch.cat([could, menu.can_stop[:, None]], 1)
        stop_rows = menu.can_stop.nonzero().squeeze(1).repeat_interleave(space.n_stops)
        if len(stop_rows):
            ids = torch.arange(space.n_stops).repeat(len(stop_rows) // space.n_stops)
            if space.n_stops > 1:  # a forced stop is the first id
                keep = (ids == 0) | (menu.must[stop_rows] != MUST_STOP)
                stop_rows, ids = stop_rows[keep], ids[keep]
            z, how, may, pb = (x[stop_rows] for x in (moves, kind, could, log_pb))
            parts.append(_rows(problem, z, how, may, pb, ids, space.n_stops))
            total += len(stop_rows)
        open_rows = (menu.must != MUST_STOP).nonzero().squeeze(1)
        if not len(open_rows):
            break
        if menu.legal is None:
            raise InputError("this space does not list its moves (Menu.legal is None); it cannot be enumerated")
        some = open_rows[:: 1 + len(open_rows) // 1000]  # what is far too large is refused before it is built
        moves_of = menu.legal[some].sum(1).masked_fill(menu.must[some] == MUST_MOVE, 1)
        branch = float(moves_of.sum()) / len(some)
        if total + branch * len(open_rows) > 2 * max_objects:
            raise _too_large(total + branch * len(open_rows), branch, t + 1, space.max_moves, max_objects)
        legal, put = menu.legal[open_rows], menu.must[open_rows] == MUST_MOVE
        if menu.forced is not None and put.any():
            only = torch.zeros_like(legal).scatter(1, menu.forced[open_rows, None], True)
            legal = torch.where(put[:, None], only, legal)
        row, move = legal.nonzero().unbind(1)
        if total + len(row) > max_objects:
            raise _too_large(total + len(row), branch, t + 1, space.max_moves, max_objects)
        s = space.step(space.take(s, open_rows[row]), move)
        parent = open_rows[row]
        how = torch.where(put[row], FORCED, FREE).to(torch.int8)
        moves = torch.cat([moves[parent], move[:, None]], 1)
        kind = torch.cat([kind[parent], how[:, None]], 1)
        could = could[parent]
        log_pb = torch.cat([log_pb[parent], space.log_pb(s)[:, None]], 1)
    return cat_rollouts(parts)


def _too_large(seen: float, branch: float, t: int, max_moves: int, max_objects: int) -> InputError:
    about = max(seen, branch**max_moves)
    return InputError(
        f"too large to enumerate: over {seen:,.0f} objects after {t} of {max_moves} moves, about {about:.1e} in all "
        f"(limit {max_objects:,}); use a sampler, or fewer tokens or moves"
    )


def _rows(
    problem: int, moves: Tensor, kind: Tensor, could: Tensor, log_pb: Tensor, stop: Tensor, n_stops: int
) -> Rollouts:
    b, t = moves.shape
    zeros = torch.zeros(b, t)
    return Rollouts(
        problem=torch.full((b,), problem),
        moves=moves,
        kind=kind,
        n=torch.full((b,), t),
        stop=stop,
        can_stop=could,
        log_q=zeros,
        log_stop=torch.zeros(b, t + 1, n_stops),
        log_b=torch.zeros(b, t + 1),
        log_pb=log_pb,
    )
