"""Policies over spaces whose moves can be listed: sample by stepping, score by replaying."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from retrodict.errors import InputError, nearest
from retrodict.numerics import NEG_INF, sample_categorical
from retrodict.protocols import Carry, Problems, State
from retrodict.records import CHOOSE, FORCED, FREE, MUST_MOVE, MUST_STOP, PAD, Menu, Rollouts, Scores


def over_menu(
    log_move: Float[Tensor, "b v"], log_stop: Float[Tensor, "b s"], menu: Menu
) -> tuple[Float[Tensor, "b v"], Float[Tensor, "b s"]]:
    """Renormalise jointly over what the menu allows; forced moves and stops get log-probability 0."""
    if menu.legal is not None:
        log_move = log_move.masked_fill(~menu.legal, NEG_INF)
    if not menu.can_stop.any():  # one normalisation, no second pass over the vocabulary
        log_stop = torch.full_like(log_stop, NEG_INF)
        return _forced(log_move.log_softmax(-1), log_stop, menu)
    log_stop = log_stop.masked_fill(~menu.can_stop[:, None], NEG_INF)
    norm = torch.logaddexp(log_move.logsumexp(-1), log_stop.logsumexp(-1))[:, None]
    return _forced(log_move - norm, log_stop - norm, menu)


def _forced(log_move: Tensor, log_stop: Tensor, menu: Menu) -> tuple[Tensor, Tensor]:
    """Log-probability 0 for what the space forces."""
    stop_now = (menu.must == MUST_STOP)[:, None]
    if stop_now.any():
        only_first = torch.full_like(log_stop, NEG_INF)
        only_first[:, 0] = 0.0
        log_move = torch.where(stop_now, NEG_INF, log_move)
        log_stop = torch.where(stop_now, only_first, log_stop)
    if menu.forced is not None:
        put = (menu.must == MUST_MOVE)[:, None]
        only = torch.full_like(log_move, NEG_INF).scatter(1, menu.forced[:, None], 0.0)
        log_move = torch.where(put, only, log_move)
        log_stop = torch.where(put, NEG_INF, log_stop)
    return log_move, log_stop


def choose(
    log_move: Float[Tensor, "b v"], log_stop: Float[Tensor, "b s"], gen: torch.Generator
) -> tuple[Int[Tensor, " b"], Int[Tensor, " b"]]:
    """Draw a move or a stop from a joint distribution: (move, stop), stop = -1 where a move was drawn."""
    stop_mass = log_stop.logsumexp(-1)
    coin = torch.rand(len(stop_mass), generator=gen, device=stop_mass.device, dtype=torch.float64)
    stop, move = sample_categorical(log_stop, gen), sample_categorical(log_move, gen)
    none = log_move.gather(1, move[:, None]).squeeze(1) == NEG_INF  # nothing but stops, whose mass may round below one
    stops = (coin < stop_mass.double().exp()) | (none & (stop_mass > NEG_INF))
    return move, torch.where(stops, stop, -1)


@dataclass(frozen=True)
class Drawn:
    """A move or a stop drawn in each of b states.

    Attributes:
        move: the move (any legal one where a stop was drawn).
        stop: the stop, -1 where a move was drawn.
        log_b: log density of what was drawn; or, of a policy that draws by itself, log p - log w-hat with
            E[w-hat 1[v]] = p(v) psi(v), +inf for weight 0: it stands where a density would, and weights stay unbiased.
        log_q: log-probability of the move, and ``log_stop`` of every stop, under the policy itself.
    """

    move: Int[Tensor, " b"]
    stop: Int[Tensor, " b"]
    log_b: Float[Tensor, " b"]
    log_q: Float[Tensor, " b"]
    log_stop: Float[Tensor, "b s"]


def drawn(
    log_move: Float[Tensor, "b v"],
    log_stop: Float[Tensor, "b s"],
    move: Int[Tensor, " b"],
    stop: Int[Tensor, " b"],
    behaviour: tuple[Tensor, Tensor] | None = None,
) -> Drawn:
    """The record of a draw from a listed distribution, or from a ``behaviour`` of it."""
    b_move, b_stop = behaviour or (log_move, log_stop)
    log_b = torch.where(stop < 0, b_move.gather(1, move[:, None]).squeeze(1),
                        b_stop.gather(1, stop[:, None].clamp_min(0)).squeeze(1))  # fmt: skip
    return Drawn(move, stop, log_b, log_move.gather(1, move[:, None]).squeeze(1), log_stop)


def tempered(log_move: Tensor, log_stop: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """The behaviour's distribution at another temperature."""
    if temperature == 1.0:
        return log_move, log_stop
    joint = (torch.cat([log_move, log_stop], -1) / temperature).log_softmax(-1)
    return joint[:, : log_move.shape[1]], joint[:, log_move.shape[1] :]


def explored(log_move: Tensor, log_stop: Tensor, menu: Menu, epsilon: float) -> tuple[Tensor, Tensor]:
    """(1 - epsilon) of a distribution plus epsilon of the uniform one over all legal moves and stops together.

    States where the space leaves no choice keep theirs. The uniform part also covers what a guide masks in q.
    """
    if epsilon == 0.0:
        return log_move, log_stop
    legal = torch.ones_like(log_move, dtype=torch.bool) if menu.legal is None else menu.legal
    stops = menu.can_stop[:, None].expand_as(log_stop)
    size = (legal.sum(1) + stops.sum(1)).to(log_move.dtype)
    uniform, choice = (math.log(epsilon) - size.log())[:, None], (menu.must == CHOOSE)[:, None]

    def mix(log_p: Tensor, allowed: Tensor) -> Tensor:
        part = torch.where(allowed, uniform, NEG_INF)
        return torch.where(choice, torch.logaddexp(log_p + math.log1p(-epsilon), part), log_p)

    return mix(log_move, legal), mix(log_stop, stops)


def behaviour_of(behaviour: Mapping[str, Any] | None) -> tuple[float, float]:
    """(temperature, epsilon) of a behaviour, 1 and 0 by default.

    Raises:
        InputError: an unknown key, a temperature that is not positive, an epsilon outside [0, 1).
    """
    known = {"temperature": 1.0, "epsilon": 0.0}
    for key in behaviour or {}:
        if key not in known:
            raise InputError(f"unknown behaviour {key!r}{nearest(key, known)}")
    temperature, epsilon = (float(x) for x in {**known, **(behaviour or {})}.values())
    if not 0 < temperature < math.inf:
        raise InputError(f"the behaviour's temperature must be positive, not {temperature:g}; 1 is the policy itself")
    if not 0 <= epsilon < 1:
        raise InputError(f"epsilon must be at least 0 and below 1, not {epsilon:g}; it is the share of random moves")
    return temperature, epsilon


class FiniteStepper:
    """Base of policies that list log-probabilities of all moves. Subclasses give the Stepper methods."""

    space: Any
    problems: Problems

    def start(self, problem: Int[Tensor, " b"]) -> Carry:
        """Carry of b empty objects."""
        raise NotImplementedError  # abstract

    def log_probs(self, c: Carry, s: State, menu: Menu, raw: bool = False) -> tuple[Tensor, Tensor]:
        """Log-probabilities of moves and stops, see ``protocols.Stepper``."""
        raise NotImplementedError  # abstract

    def step(self, c: Carry, s: State, move: Tensor) -> Carry:
        """Carry after a move; ``s`` is the state before it."""
        raise NotImplementedError  # abstract

    def take(self, c: Carry, index: Tensor) -> Carry:
        """Rows ``index``."""
        raise NotImplementedError  # abstract

    def start_at(self, rollouts: Rollouts, upto: Int[Tensor, " b"]) -> Carry:
        """Carry after the first ``upto`` moves of recorded rows (rows may differ)."""
        raise NotImplementedError  # abstract

    def sample(
        self, problem: Int[Tensor, " b"], gen: torch.Generator, behaviour: Mapping[str, Any] | None = None
    ) -> Rollouts:
        """Draw one object a row; see :func:`rollout`."""
        return rollout(self, problem, gen, behaviour=behaviour)

    @torch.no_grad()
    def score(self, rollouts: Rollouts, raw: bool = False) -> Scores:
        """log q of every recorded move and of every stop, by replaying; no tool runs again."""
        b, t = rollouts.moves.shape[:2]
        scripted = bool((rollouts.kind == FORCED).any())
        s = self.space.replay(rollouts, torch.zeros_like(rollouts.n))
        c = self.start(rollouts.problem)
        rows = torch.arange(b, device=rollouts.n.device)
        log_q, log_stop = [], []
        for i in range(t + 1):
            menu = self.space.menu(s)
            move_lp, stop_lp = self.log_probs(c, s, menu, raw)
            full = stop_lp.new_full((b, stop_lp.shape[1]), NEG_INF)
            full[rows] = stop_lp
            log_stop.append(full)
            if i == t:
                break
            on = (rollouts.n[rows] > i).nonzero().squeeze(1)
            move = rollouts.moves[rows[on], i]
            step_lp = move_lp.new_zeros(b)
            free = rollouts.kind[rows[on], i] == FREE
            step_lp[rows[on]] = torch.where(free, move_lp[on].gather(1, move[:, None]).squeeze(1), 0.0)
            log_q.append(step_lp)
            rows, c, s = rows[on], self.take(c, on), self.space.take(s, on)
            if len(rows):
                c = self.step(c, s, move)
                if scripted:
                    s = self.space.replay(rollouts.take(rows), torch.full_like(rows, i + 1))
                else:
                    s = self.space.step(s, move)
            else:
                log_q += [move_lp.new_zeros(b)] * (t - i - 1)
                log_stop += [stop_lp.new_full((b, stop_lp.shape[1]), NEG_INF)] * (t - i)
                break
        moves = torch.stack(log_q, 1) if t else rollouts.log_q[:, :0]
        return Scores(moves, torch.stack(log_stop, 1))


AtEnd = Callable[[Carry, Tensor, Tensor, Tensor], Mapping[str, Tensor]]


class Tape:
    """Records trajectories step by step for rows that end at different times."""

    def __init__(self, problem: Tensor, n_stops: int, t: int, dtype: torch.dtype) -> None:
        b, device = len(problem), problem.device
        self.problem = problem
        zeros = {"device": device, "dtype": dtype}
        self.moves = torch.zeros(b, t, dtype=torch.long, device=device)
        self.kind = torch.full((b, t), PAD, dtype=torch.int8, device=device)
        self.n = torch.zeros(b, dtype=torch.long, device=device)
        self.stop = torch.zeros(b, dtype=torch.long, device=device)
        self.can_stop = torch.zeros(b, t + 1, dtype=torch.bool, device=device)
        self.log_q = torch.zeros(b, t, **zeros)
        self.log_p = torch.zeros(b, t, **zeros)
        self.log_b = torch.zeros(b, t + 1, **zeros)
        self.log_pb = torch.zeros(b, t, **zeros)
        self.log_stop = torch.full((b, t + 1, n_stops), NEG_INF, **zeros)
        self.log_p_stop = torch.full((b, t + 1, n_stops), NEG_INF, **zeros)

    def at_state(self, rows: Tensor, i: Tensor, menu: Menu, log_stop: Tensor, log_p_stop: Tensor | None) -> None:
        """Record what could have ended at the present state of ``rows``, whose move count is ``i``."""
        self.can_stop[rows, i] = menu.can_stop
        self.log_stop[rows, i] = log_stop.to(self.log_stop.dtype)
        if log_p_stop is not None:
            self.log_p_stop[rows, i] = log_p_stop.to(self.log_stop.dtype)

    def take(self, index: Tensor) -> None:
        """Gather rows (resampling)."""
        for name, x in vars(self).items():
            setattr(self, name, x[index])

    def some(self, index: Tensor, raw_name: str | None) -> Rollouts:
        """The record of some rows."""
        part = object.__new__(Tape)
        vars(part).update({name: x[index] for name, x in vars(self).items()})
        return part.rollouts(raw_name)

    def rollouts(self, raw_name: str | None, behaviour: Mapping[str, Any] | None = None) -> Rollouts:
        """The record, cut to the longest row; raw model values become term ``raw_name``."""
        t = int(self.n.max()) if len(self.n) else 0
        terms = {}
        if raw_name is not None:
            path = torch.cat([self.log_p.new_zeros(len(self.n), 1), self.log_p[:, :t].cumsum(1)], 1)
            terms[raw_name] = path[:, :, None] + self.log_p_stop[:, : t + 1]
            terms[f"{raw_name}.path"] = path  # without the stop: what a kept prefix is worth
        return Rollouts(
            problem=self.problem, moves=self.moves[:, :t], kind=self.kind[:, :t], n=self.n, stop=self.stop,
            can_stop=self.can_stop[:, : t + 1], log_q=self.log_q[:, :t], log_stop=self.log_stop[:, : t + 1],
            log_b=self.log_b[:, : t + 1], log_pb=self.log_pb[:, :t], terms=terms, behaviour=dict(behaviour or {}),
        )  # fmt: skip


@torch.no_grad()
def rollout(
    policy: FiniteStepper,
    problem: Int[Tensor, " b"],
    gen: torch.Generator,
    *,
    behaviour: Mapping[str, Any] | None = None,
    record_raw: str | None = None,
    prefix: tuple[Rollouts, Int[Tensor, " b"]] | None = None,
    at_end: AtEnd | None = None,
) -> Rollouts:
    """Draw one complete object a row by ancestral sampling.

    ``behaviour={"temperature": T, "epsilon": e}`` says what is drawn from, and never enters ``log_q``: at each state
    b = (1 - e) q^(1/T) / sum q^(1/T) + e uniform over the menu, recorded in ``log_b``. ``record_raw`` names the term
    under which the policy's raw log-probabilities are kept (``"prior"`` where the policy samples from the prior), so
    that p and q of a weight come from the same pass. ``prefix=(rollouts, cut)`` keeps the first ``cut`` moves of given
    rows and draws only the rest (``log_q`` of kept moves is copied). ``at_end(carry, index, problem, stop)`` gives
    terms of the rows that stop at a step, while their caches are still there.
    """
    temperature, epsilon = behaviour_of(behaviour)
    space, device = policy.space, problem.device
    rows = torch.arange(len(problem), device=device)
    if prefix is None:
        c, s, n = policy.start(problem), space.start(problem), torch.zeros_like(rows)
    else:
        c, s, n = policy.start_at(*prefix), space.replay(*prefix), prefix[1].clone()
    tape: Tape | None = None
    extra: dict[str, Tensor] = {}
    while len(rows):
        menu = space.menu(s)
        d = _draw(policy, c, s, menu, gen, temperature, epsilon)
        if tape is None:
            tape = Tape(problem, d.log_stop.shape[1], space.max_moves, d.log_stop.dtype)
            if prefix is not None:
                _keep(tape, *prefix, record_raw)
        raw = policy.log_probs(c, s, menu, raw=True) if record_raw else None
        tape.at_state(rows, n, menu, d.log_stop, raw[1] if raw else None)
        ends = d.stop >= 0
        tape.n[rows], tape.stop[rows] = n, d.stop.clamp_min(0)
        tape.log_b[rows, n] = d.log_b
        if at_end is not None and ends.any():
            index = ends.nonzero().squeeze(1)
            for name, value in at_end(c, index, problem[rows[index]], d.stop[index]).items():
                extra.setdefault(name, value.new_zeros(len(problem)))[rows[index]] = value
        on = (~ends).nonzero().squeeze(1)
        rows, n, move = rows[on], n[on], d.move[on]
        if not len(rows):
            break
        tape.moves[rows, n] = move
        forced = menu.must[on] == MUST_MOVE
        tape.kind[rows, n] = torch.where(forced, FORCED, FREE).to(torch.int8)
        tape.log_q[rows, n] = d.log_q[on]
        if raw is not None:
            tape.log_p[rows, n] = torch.where(forced, 0.0, raw[0][on, move])
        if len(on) < len(menu.must):
            c, s = policy.take(c, on), space.take(s, on)
        c, s = policy.step(c, s, move), space.step(s, move)
        tape.log_pb[rows, n] = space.log_pb(s).to(tape.log_pb.dtype)
        n = n + 1
    if tape is None:
        raise ValueError("no rows to sample")
    return tape.rollouts(record_raw, behaviour).with_terms(extra)


def _draw(
    policy: FiniteStepper, c: Carry, s: State, menu: Menu, gen: torch.Generator, temperature: float, epsilon: float
) -> Drawn:
    """One draw a row from the behaviour; by the policy itself where it has its own way (``propose``)."""
    if hasattr(policy, "propose"):
        if (temperature, epsilon) != (1.0, 0.0):
            raise InputError(f"{type(policy).__name__} draws by itself, at temperature 1; temper what it draws from")
        return policy.propose(c, s, menu, gen)  # pyright: ignore[reportAttributeAccessIssue]
    log_move, log_stop = policy.log_probs(c, s, menu)
    behaviour = explored(*tempered(log_move, log_stop, temperature), menu, epsilon)
    return drawn(log_move, log_stop, *choose(*behaviour, gen), behaviour)


def _keep(tape: Tape, old: Rollouts, cut: Tensor, record_raw: str | None) -> None:
    """Copy the first ``cut`` moves (and the states before them) of old rows onto the tape."""
    t = old.moves.shape[1]
    inside = torch.arange(t, device=cut.device) < cut[:, None]
    for name in ("moves", "kind", "log_q", "log_pb"):
        x = getattr(tape, name)
        x[:, :t] = torch.where(inside, getattr(old, name), x[:, :t])
    tape.log_b[:, :t] = torch.where(inside, old.log_b[:, :t], tape.log_b[:, :t])
    tape.can_stop[:, :t] = inside & old.can_stop[:, :t]
    tape.log_stop[:, :t] = torch.where(inside[:, :, None], old.log_stop[:, :t], tape.log_stop[:, :t])
    if record_raw is not None and record_raw in old.terms:
        path = old.terms[f"{record_raw}.path"]
        tape.log_p[:, :t] = torch.where(inside, path[:, 1 : t + 1] - path[:, :t], tape.log_p[:, :t])
        tape.log_p_stop[:, :t] = torch.where(inside[:, :, None], old.terms[record_raw][:, :t] - path[:, :t, None],
                                             tape.log_p_stop[:, :t])  # fmt: skip
