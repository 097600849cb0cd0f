"""Laws of the parts that make objects: Space, Policy, Guide. For the library's own parts and for a user's.

Every check raises AssertionError saying which law broke and by how much, and returns nothing where all hold. They need
no oracle: a law is an equation between two ways of asking the same part. ``laws_values`` has Target, model, sampler.
"""

from __future__ import annotations

from dataclasses import is_dataclass, replace
from typing import Any, cast

import torch
from jaxtyping import Int
from torch import Tensor

from retrodict.errors import InputError
from retrodict.numerics import NEG_INF, at_end
from retrodict.policies.base import FiniteStepper, over_menu, rollout, tempered
from retrodict.protocols import Guide, Space, State
from retrodict.records import FORCED, MUST_MOVE, MUST_STOP, PAD, Menu, Rollouts
from retrodict.rng import generator
from retrodict.spaces.enumerate import enumerate_objects

ENUMERABLE = 20_000
"""Spaces up to this size are also checked object by object."""


def same(law: str, a: Tensor, b: Tensor, tol: float) -> None:
    """``a`` equals ``b`` within ``tol`` nats (or exactly, for -inf); the message names the law and the worst entry."""
    a, b = torch.broadcast_tensors(torch.as_tensor(a).double(), torch.as_tensor(b).double())
    off = torch.where(a == b, 0.0, (a - b).abs()).nan_to_num(nan=float("inf"))
    if off.numel() and float(off.max()) > tol:
        at = tuple(int(i) for i in torch.unravel_index(off.argmax(), off.shape))
        pair = f"{float(a[at]):.6g} against {float(b[at]):.6g}"
        raise AssertionError(f"{law}: off by {float(off.max()):.3g} at {at} ({pair}; allowed {tol:g})")


def holds(law: str, ok: Tensor | bool, says: str = "") -> None:
    """``ok`` is true everywhere; the message names the law and the first entry where it is not."""
    ok = torch.as_tensor(ok)
    if not bool(ok.all()):
        at = (~ok).nonzero()[0].tolist() if ok.dim() else []
        raise AssertionError(
            f"{law}: broken for {int((~ok).sum())} of {ok.numel()}, first at {at}{says and '; ' + says}"
        )


def tolerance(x: Tensor) -> float:
    """Rounding that is allowed: 1e-9 nats in float64, 1e-4 in float32."""
    return 1e-9 if x.dtype == torch.float64 else 1e-4


def random_rollouts(space: Space, problem: Int[Tensor, " b"], gen: torch.Generator) -> Rollouts:
    """Objects built by uniform choice among what each menu allows (log_q and log_b are left at zero)."""
    policy = _Uniform(space)
    return rollout(policy, problem, gen)


class _Uniform(FiniteStepper):
    """Uniform over legal moves and the stop: all that a law about a space may assume."""

    def __init__(self, space: Space) -> None:
        self.space, self.problems = space, []

    def start(self, problem: Tensor) -> Tensor:
        return problem

    def start_at(self, rollouts: Rollouts, upto: Tensor) -> Tensor:
        return rollouts.problem

    def step(self, c: Tensor, s: State, move: Tensor) -> Tensor:
        return c

    def take(self, c: Tensor, index: Tensor) -> Tensor:
        return c[index]

    def log_probs(self, c: Tensor, s: State, menu: Menu, raw: bool = False) -> tuple[Tensor, Tensor]:
        assert menu.legal is not None
        move = torch.zeros(menu.legal.shape, dtype=torch.float64)
        return over_menu(move, torch.zeros(len(move), self.space.n_stops, dtype=torch.float64), menu)


def same_menu(law: str, a: Menu, b: Menu) -> None:
    """Two menus allow the same."""
    holds(f"{law} (can_stop)", a.can_stop == b.can_stop)
    holds(f"{law} (must)", a.must == b.must)
    if a.legal is not None and b.legal is not None:
        holds(f"{law} (legal)", a.legal == b.legal)
    if a.forced is not None and b.forced is not None:
        put = a.must == MUST_MOVE
        holds(f"{law} (forced)", (a.forced == b.forced) | ~put)


def _small(space: Space) -> Rollouts | None:
    """The space's objects, where there are few of them."""
    try:
        return enumerate_objects(space, 0, ENUMERABLE)
    except InputError:
        return None


def check_space(space: Space, n_problems: int = 1, rows: int = 64, seed: int = 0) -> None:
    """Laws of a Space.

    1. It ends: within ``max_moves`` moves, at a stop that was on the menu; it is never stuck.
    2. Replaying a record up to any move gives the state that stepping gave (seen through menu and log_pb).
    3. ``take`` gathers: the menu of gathered states is the gathered menu, and so is every tensor of a dataclass state.
    4. Objects have one key each, and ``show`` one text a row.
    5. On small spaces: the paths that lead to an object have backward probabilities that sum to one.
    """
    gen = generator(seed)
    problem = torch.arange(rows) % n_problems
    record = random_rollouts(space, problem, gen)
    b, t = record.moves.shape[:2]
    holds("a rollout ends within max_moves", record.n <= space.max_moves)
    last = record.can_stop[torch.arange(b), record.n]
    holds("an object ends where the menu lets it", last)
    s = space.start(problem)
    index = torch.randint(b, (b,), generator=gen)
    for i in range(t + 1):
        on = record.n >= i
        upto = torch.full_like(record.n, i).minimum(record.n)
        menu, replayed = space.menu(s), space.menu(space.replay(record, upto))
        if bool(on.all()):
            same_menu(f"replay equals stepping after {i} moves", menu, replayed)
            taken = space.take(s, index)
            same_menu(f"take gathers after {i} moves", space.menu(taken), _take_menu(menu, index))
            for name, x in _tensors(s, b).items():
                holds(f"take gathers {name} after {i} moves", _tensors(taken, b).get(name, x) == x[index])
        free = (menu.must != MUST_STOP) & ~menu.can_stop & (menu.must != MUST_MOVE)
        if menu.legal is not None:
            holds("a state that may not stop has a move", menu.legal.any(1) | ~free)
        holds("a state that must stop may stop", menu.can_stop | (menu.must != MUST_STOP))
        keep = (record.n > i).nonzero().squeeze(1)
        if not len(keep):
            break
        record, index = record.take(keep), torch.randint(len(keep), (len(keep),), generator=gen)
        s = space.step(space.take(s, keep), record.moves[:, i])
        same(f"log_pb is what the record says of move {i}", space.log_pb(s), record.log_pb[:, i], 1e-6)
        again = space.replay(record, torch.full_like(record.n, i + 1))
        same(f"log_pb of a replayed state, move {i}", space.log_pb(again), space.log_pb(s), 1e-6)
        b = len(keep)
    paths = _small(space)
    if paths is None:
        return
    keys = space.keys(paths)
    holds("show gives one text a row", len(space.show(paths)) == len(paths))
    share: dict[tuple[int, ...], float] = {}
    inside = torch.arange(paths.moves.shape[1]) < paths.n[:, None]
    for key, log_pb in zip(keys, torch.where(inside, paths.log_pb, 0.0).sum(1).double().exp().tolist(), strict=True):
        share[key] = share.get(key, 0.0) + log_pb
    total = torch.tensor(list(share.values()), dtype=torch.float64)
    same("backward probabilities of an object's paths sum to one", total, torch.ones_like(total), 1e-5)


def _tensors(s: State, b: int) -> dict[str, Tensor]:
    fields = vars(s) if is_dataclass(s) else {}
    return {k: x for k, x in fields.items() if isinstance(x, Tensor) and x.dim() and len(x) == b}


def _take_menu(menu: Menu, index: Tensor) -> Menu:
    legal = None if menu.legal is None else menu.legal[index]
    return Menu(legal, menu.can_stop[index], menu.must[index], None if menu.forced is None else menu.forced[index])


def check_policy(policy: FiniteStepper, n_problems: int = 1, rows: int = 64, seed: int = 0) -> None:
    """Laws of a Stepper.

    1. ``score`` of a record equals the log-probabilities it was drawn with, move by move and stop by stop; and raw.
    2. The probabilities of all objects' paths sum to one (small spaces).
    3. A batch scores as its rows do one by one, in any order.
    4. The behaviour's temperature is in log_b and never in log_q; at T = 1 the two agree.
    5. Forced moves and forced stops have log q = 0.
    6. ``start_at`` equals stepping; redrawing a tail keeps the head and its record.
    """
    gen = generator(seed)
    space = policy.space
    problem = torch.arange(rows) % n_problems
    record = rollout(policy, problem, gen, record_raw="raw")
    tol = tolerance(record.log_q)
    _check_scores(policy, record, tol)
    for p in range(n_problems):
        paths = _small(space)
        if paths is None:
            break
        scored = policy.score(_on_problem(paths, p))
        total = (_moves(scored.log_q, paths) + at_end(scored.log_stop, paths.n, paths.stop)).double().exp().sum()
        same(f"q of all paths of problem {p} sums to one", total, torch.ones(()), 1e3 * tol)
    order = torch.randperm(rows, generator=gen)
    whole = policy.score(record)
    shuffled = policy.score(record.take(order))
    same("a batch scores the same in another order", _moves(shuffled.log_q, record.take(order)),
         _moves(whole.log_q, record)[order], tol)  # fmt: skip
    for i in range(min(rows, 5)):
        one = policy.score(record.take(torch.tensor([i])))
        n = int(record.n[i])
        same("batch equals one by one (moves)", one.log_q[0, :n], whole.log_q[i, :n], tol)
        same("batch equals one by one (stops)", one.log_stop[0, : n + 1], whole.log_stop[i, : n + 1], tol)
    hot = policy.sample(problem, gen, {"temperature": 2.0})
    _check_scores(policy, hot, tol, raw=False)
    _check_behaviour(policy, hot, 2.0, tol)
    plain = record.take(torch.arange(rows))
    same("log_b at T = 1 is log_q", torch.where(_inside(plain), plain.log_b[:, : plain.moves.shape[1]], 0.0),
         torch.where(_inside(plain), plain.log_q, 0.0), tol)  # fmt: skip
    same("log_b of the stop at T = 1 is log q(stop)", plain.log_b[torch.arange(rows), plain.n],
         at_end(plain.log_stop, plain.n, plain.stop), tol)  # fmt: skip
    _check_forced(policy, record)
    _check_heads(policy, record, gen, tol)


def _inside(r: Rollouts) -> Tensor:
    return torch.arange(r.moves.shape[1]) < r.n[:, None]


def _moves(log_q: Tensor, r: Rollouts) -> Tensor:
    return torch.where(_inside(r), log_q, 0.0).sum(1)


def _on_problem(r: Rollouts, p: int) -> Rollouts:
    return replace(r, problem=torch.full_like(r.problem, p))


def _check_scores(policy: FiniteStepper, record: Rollouts, tol: float, raw: bool = True) -> None:
    scores = policy.score(record)
    inside = _inside(record)
    until = torch.arange(record.moves.shape[1] + 1) <= record.n[:, None]
    same("score equals the sum of steps (moves)", torch.where(inside, scores.log_q, 0.0),
         torch.where(inside, record.log_q, 0.0), tol)  # fmt: skip
    same("score equals the sum of steps (stops)", scores.log_stop[until], record.log_stop[until], tol)
    stepped = FiniteStepper.score(policy, record)
    same("the one-pass score equals replaying (stops)", scores.log_stop[until], stepped.log_stop[until], tol)
    if not raw:
        return
    scores = policy.score(record, raw=True)
    path = torch.cat([scores.log_q.new_zeros(len(record), 1), torch.where(inside, scores.log_q, 0.0).cumsum(1)], 1)
    same("raw score equals the sum of raw steps (path)", path[until], record.terms["raw.path"][until], tol)
    same("raw score equals the sum of raw steps (stops)", (path[:, :, None] + scores.log_stop)[until],
         record.terms["raw"][until], tol)  # fmt: skip


def _check_behaviour(policy: FiniteStepper, record: Rollouts, temperature: float, tol: float) -> None:
    s, c, rows = policy.space.start(record.problem), policy.start(record.problem), torch.arange(len(record))
    for i in range(record.moves.shape[1] + 1):
        move_b, stop_b = tempered(*policy.log_probs(c, s, policy.space.menu(s)), temperature)
        ends = record.n[rows] == i
        stop = stop_b[ends].gather(1, record.stop[rows[ends], None]).squeeze(1)
        same("log_b of the stop is at the behaviour's temperature", record.log_b[rows[ends], i], stop, tol)
        on = (~ends).nonzero().squeeze(1)
        rows, move_b = rows[on], move_b[on]
        if not len(rows):
            return
        move = record.moves[rows, i]
        same(f"log_b of move {i} is at the behaviour's temperature", record.log_b[rows, i],
             move_b.gather(1, move[:, None]).squeeze(1), tol)  # fmt: skip
        c, s = policy.take(c, on), policy.space.take(s, on)
        c, s = policy.step(c, s, move), policy.space.step(s, move)


def _check_forced(policy: FiniteStepper, record: Rollouts) -> None:
    holds("moves past the end are padding", (record.kind == PAD) == ~_inside(record))
    put = record.kind == FORCED
    same("a forced move has log q = 0", torch.where(put, policy.score(record).log_q, 0.0), torch.zeros(()), 0.0)
    menu = policy.space.menu(policy.space.replay(record, record.n))
    must = menu.must == MUST_STOP
    stop = policy.score(record).log_stop[torch.arange(len(record)), record.n]
    same("a forced stop has log q = 0", stop[must, 0], torch.zeros(()), 0.0)
    holds("a forced stop is the first id", (stop[must, 1:] == NEG_INF) & (record.stop[must, None] == 0))
    may = record.can_stop & (torch.arange(record.can_stop.shape[1]) <= record.n[:, None])
    scored = policy.score(record).log_stop.amax(-1) > NEG_INF
    holds("only states that may stop have a log q(stop)", ~scored | may)


def _check_heads(policy: FiniteStepper, record: Rollouts, gen: torch.Generator, tol: float) -> None:
    space = policy.space
    cut = (torch.rand(len(record), generator=gen) * (record.n + 1)).long().minimum(record.n)
    s, c = space.replay(record, cut), policy.start_at(record, cut)
    jumped = policy.log_probs(c, s, space.menu(s))
    for i, rows, c_i, s_i, menu in _walk_to(policy, record, cut):
        move, stop = policy.log_probs(c_i, s_i, menu)
        same(f"start_at equals stepping, cut at {i} (moves)", jumped[0][rows], move, tol)
        same(f"start_at equals stepping, cut at {i} (stops)", jumped[1][rows], stop, tol)
    new = rollout(policy, record.problem, gen, record_raw="raw", prefix=(record, cut))
    t = min(new.moves.shape[1], record.moves.shape[1])
    kept = torch.arange(t) < cut[:, None]
    holds("a redrawn tail keeps the head", (new.moves[:, :t] == record.moves[:, :t]) | ~kept)
    holds("a redrawn object is no shorter than its head", new.n >= cut)
    _check_scores(policy, new, tol)


def _walk_to(policy: FiniteStepper, record: Rollouts, cut: Tensor) -> list[tuple[int, Tensor, Any, State, Menu]]:
    """For each cut: the cut, the rows that are cut there, and their stepped carry, state and menu."""
    out = []
    for i in range(int(cut.max()) + 1):
        rows = (cut == i).nonzero().squeeze(1)
        if not len(rows):
            continue
        part = record.take(rows)
        s, c = policy.space.start(part.problem), policy.start(part.problem)
        for j in range(i):
            c, s = policy.step(c, s, part.moves[:, j]), policy.space.step(s, part.moves[:, j])
        out.append((i, rows, c, s, policy.space.menu(s)))
    return out


def check_guide(guide: Guide, space: Space, n_problems: int = 1, rows: int = 32, seed: int = 0) -> None:
    """Laws of a Guide.

    1. ``log_next`` is log psi of the state that each legal move leads to.
    2. ``take`` gathers and ``start_at`` equals stepping, as log psi and the value of stopping see them.
    3. A soft psi is positive. A hard one is 0 or -inf, excludes no prefix of an object it accepts, and its
       ``log_end`` is its own verdict on whole objects (``score``), where it has one.
    """
    gen = generator(seed)
    record = random_rollouts(space, torch.arange(rows) % n_problems, gen)
    index = torch.randint(rows, (rows,), generator=gen)
    s, c, live = space.start(record.problem), guide.start(record.problem), record
    for i in range(record.moves.shape[1] + 1):
        psi = guide.log_psi(c, s)
        tol = tolerance(psi)
        index = torch.randint(len(live), (len(live),), generator=gen)
        taken = guide.take(_copy(guide, live, i), index), space.take(s, index)
        same(f"take gathers psi after {i} moves", guide.log_psi(*taken), psi[index], tol)
        _same_end(f"take gathers the value of stopping after {i} moves", guide.log_end(*taken), guide.log_end(c, s),
                  index, len(live), tol)  # fmt: skip
        there = guide.start_at(live, torch.full_like(live.n, i))
        same(f"start_at equals stepping after {i} moves", guide.log_psi(there, s), psi, tol)
        holds("psi of a hard guide is 0 or 1, of a soft one positive",
              ((psi == 0) | (psi == NEG_INF)) if guide.hard else psi > NEG_INF)  # fmt: skip
        _check_next(guide, space, live, i, s, tol)
        on = (live.n > i).nonzero().squeeze(1)
        if not len(on):
            break
        live = live.take(on)
        c, s = guide.take(c, on), space.take(s, on)
        move = live.moves[:, i]
        c, s = guide.step(c, s, move), space.step(s, move)
    if guide.hard and hasattr(guide, "score"):
        _check_hard(guide, space)


def _copy(guide: Guide, record: Rollouts, i: int) -> Any:
    """A fresh carry after i moves: ``take`` and ``step`` may consume the one they are given."""
    return guide.start_at(record, torch.full_like(record.n, i))


def _same_end(law: str, a: Tensor | None, b: Tensor | None, index: Tensor, rows: int, tol: float) -> None:
    holds(f"{law}: known or not", (a is None) == (b is None))
    if a is not None and b is not None:
        same(law, a.expand(len(index), -1), b.expand(rows, -1)[index], tol)


def _check_next(guide: Guide, space: Space, record: Rollouts, i: int, s: State, tol: float) -> None:
    menu = space.menu(s)
    listed = guide.log_next(_copy(guide, record, i), s)
    if listed is None or menu.legal is None:
        return
    go = menu.must != MUST_STOP
    row, move = (menu.legal & go[:, None]).nonzero().unbind(1)
    if not len(row):
        return
    c = guide.take(_copy(guide, record, i), row)
    before = space.take(s, row)
    after = space.step(space.take(s, row), move)
    psi = guide.log_psi(guide.step(c, before, move), after)
    same(f"log_next is psi of the next state after {i} moves", listed.expand(len(menu.must), -1)[row, move], psi, tol)


def _check_hard(guide: Guide, space: Space) -> None:
    paths = _small(space)
    if paths is None:
        return
    verdict = cast(Any, guide).score(paths)
    c, s = guide.start_at(paths, paths.n), space.replay(paths, paths.n)
    end, psi = guide.log_end(c, s), guide.log_psi(c, s)
    assert end is not None
    alive = psi > NEG_INF
    ended = end.expand(len(paths), space.n_stops)[torch.arange(len(paths)), paths.stop]
    accepted = verdict > NEG_INF
    holds("psi excludes no object that is accepted", alive | ~accepted)
    same("log_end is the verdict on the whole object", ended[alive], verdict[alive], 0.0)
    for i in range(paths.moves.shape[1]):
        upto = torch.full_like(paths.n, i).minimum(paths.n)
        psi = guide.log_psi(guide.start_at(paths, upto), space.replay(paths, upto))
        holds(f"psi excludes no prefix of {i} moves of an accepted object", (psi > NEG_INF) | ~accepted)
