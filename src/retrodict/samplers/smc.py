"""Sequential Monte Carlo, and conditional SMC.

Populations grow objects move by move through gamma_t(prefix) = p(prefix)^beta psi_t(prefix) (psi_t alone without a
prior); at its stop a particle's intermediate target is gamma itself. With q the proposal,

    w_t = gamma_t P_B / (gamma_{t-1} q),      Z-hat = prod over steps of the mean weight

Z-hat is unbiased for any psi and q that do not vanish where gamma does not (Del Moral 2004); log Z-hat is
biased low. Weighted averages are biased O(1/n). Resampling happens where ESS < threshold * n and some particle still
grows: never on the last step. It may leave out who has stopped: weights within the rest keep their sum, which is all
that unbiasedness asks.
"""

from __future__ import annotations

import time

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from retrodict.errors import InputError, nearest
from retrodict.numerics import NEG_INF, at_end, ess, log_mean_exp, normalise, safe_sub
from retrodict.particles import Particles
from retrodict.policies.base import FiniteStepper, Tape
from retrodict.records import FORCED, FREE, MUST_MOVE, Rollouts, Trace
from retrodict.rng import generator
from retrodict.samplers.common import (
    OnStep,
    device_of,
    finish,
    meter,
    positive,
    proposal,
    rows_for,
)
from retrodict.samplers.resampling import RESAMPLERS, STEERING, fan_out, without_replacement
from retrodict.samplers.walk import Held, Look, Walk
from retrodict.targets.algebra import Target, temper

STOPPED = ("compete", "aside")
"""What may become of particles that have stopped when a population is resampled."""


def smc(
    target: Target,
    policy: FiniteStepper | None = None,
    *,
    n: int,
    seed: int,
    runs: int = 4,
    ess_threshold: float = 0.5,
    resampling: str = "systematic",
    beam: int = 1,
    ramp: int = 0,
    stopped: str = "compete",
    on_step: OnStep | None = None,
) -> Particles:
    """n particles a run and problem; all runs and problems advance together in one batch.

    Args:
        target: what to draw from; its guide gives psi_t and, where it lists moves, the proposal.
        policy: the proposal; default the prior bent by the target's guide.
        n: particles of one population.
        seed: one seed, one result.
        runs: independent populations of each problem (for the interval of the evidence).
        ess_threshold: resample where ESS < threshold * n; 0 never resamples, 1 at every step.
        resampling: ``systematic | stratified | residual | multinomial``, or ``without_replacement`` with a ``beam``.
        beam: SMC steering: every growing particle goes on as this many clones, and the n * beam candidates are then
            thinned to n without replacement. The answer has n * beam slots a run, empty ones of weight 0.
        ramp: moves over which the prior's exponent rises from 1 to the target's in the intermediate targets.
        stopped: ``compete`` resamples all particles; with ``aside`` who has stopped keeps its slot and its weight, and
            those that grow are resampled among themselves. For targets that are paid at the end (p^alpha, a reward of
            the whole, a likelihood without look-ahead), where prefixes that owe it still crowd out what has paid.
        on_step: progress callback.

    Raises:
        InputError: an unknown resampling scheme, a beam without its scheme or beside ``aside``, a ramp to no
            exponent, a count below one.
    """
    return _Run(target, policy, n, seed, runs, ess_threshold, resampling, on_step, None, beam, ramp, stopped).go()


def conditional_smc(
    target: Target,
    policy: FiniteStepper | None = None,
    *,
    exact: Rollouts,
    n: int,
    seed: int,
    runs: int = 1,
    ess_threshold: float = 0.5,
    ramp: int = 0,
    stopped: str = "compete",
    on_step: OnStep | None = None,
) -> Particles:
    """SMC with slot 0 of every population held to an exact posterior sample (Andrieu, Doucet and Holenstein 2010).

    With ``exact`` drawn from the posterior, E[Z / Z-hat] = 1, so E[log Z-hat] >= log Z: an upper bound. (Where free
    SMC can die out, the expectation is P(Z-hat > 0) < 1, and the bound only gets looser.) Resampling is multinomial:
    systematic resampling breaks the law (0.96 instead of 1).

    Args:
        exact: one row a problem, in the order of the problems (used by every run), or one row a population.
    """
    m = len(target.problems)
    if len(exact) == m:
        exact = exact.take(torch.arange(m, device=exact.n.device).repeat_interleave(runs))
    if len(exact) != m * runs:
        raise InputError(
            f"conditional SMC needs one exact sample a problem ({m}) or population ({m * runs}), got {len(exact)}"
        )
    return _Run(target, policy, n, seed, runs, ess_threshold, "multinomial", on_step, exact, 1, ramp, stopped).go()


class _Run:
    """One call of SMC: the weights of all populations, and the loop. Slots of a population: n, times ``beam``."""

    def __init__(
        self, target: Target, policy: FiniteStepper | None, n: int, seed: int, runs: int, threshold: float,
        resampling: str, on_step: OnStep | None, exact: Rollouts | None, beam: int = 1, ramp: int = 0,
        stopped: str = "compete",
    ) -> None:  # fmt: skip
        positive(n=n, runs=runs, beam=beam)
        if resampling not in (known := (*RESAMPLERS, STEERING)):
            raise InputError(f"unknown resampling {resampling!r}{nearest(resampling, known)}")
        if (beam > 1) != (resampling == STEERING):
            raise InputError(f"resampling={STEERING!r} and a beam of 2 or more go together; give both or neither")
        if stopped not in STOPPED:
            raise InputError(f"unknown value {stopped!r} of stopped{nearest(stopped, STOPPED)}")
        if stopped == "aside" and beam > 1:
            raise InputError(
                "stopped='aside' keeps who has stopped out of resampling, and a beam thins all; leave one out"
            )
        if not 0 <= threshold <= 1:
            raise InputError(f"ess_threshold is a share of n between 0 and 1, not {threshold}")
        self.beta = target.betas.get("prior", 1.0)
        if ramp < 0 or ramp and (target.prior is None or self.beta == 1.0):
            raise InputError(
                f"ramp={ramp}: moves over which the prior's exponent rises from 1 to the target's, which is "
                f"{self.beta:g} here; write target.with_betas(prior=4), or leave ramp out"
            )
        self.target, self.kept, self.n, self.runs, self.threshold = target, n, n * beam, runs, threshold
        self.scheme, self.beam, self.ramp = RESAMPLERS.get(resampling), beam, ramp
        self.aside = stopped == "aside"
        self.on_step, self.exact = on_step, exact
        full = proposal(target, policy, soft=True)
        self.device = device_of(target, full)
        self.gen = generator(seed, self.device)
        self.walk = Walk(target, full, self.gen)
        self.name, self.guide = self.walk.name, target.guide
        self.settings = {"n": n, "runs": runs, "seed": seed, "ess_threshold": threshold, "resampling": resampling}
        self.settings |= {"beam": beam} if beam > 1 else {}
        self.settings |= ({"ramp": ramp} if ramp else {}) | ({"stopped": stopped} if self.aside else {})
        self.method = "smc" if exact is None else "conditional_smc"
        self.m = len(target.problems)
        self.pops = self.m * runs

    # -- the loop ----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def go(self) -> Particles:
        """Run to the end."""
        began, tokens = time.perf_counter(), meter(self.target)
        n, space, walk = self.n, self.target.space, self.walk
        problem = rows_for(self.target, self.runs * n, self.device)
        b = len(problem)
        walk.start(problem)
        rows = torch.arange(b, device=self.device)
        log_w = torch.zeros(b, dtype=torch.float64, device=self.device)
        self.zero, self.final = torch.zeros_like(log_w), {}  # terms of complete objects, by name
        log_pre = torch.zeros_like(log_w)  # log gamma_t of each particle's present prefix
        root = torch.arange(b, device=self.device) % n
        tape: Tape | None = None
        ess_of, did, parents, alive_of = [], [], [], []
        while len(rows):
            look = walk.look(self._held(tape, rows))
            if tape is None:
                log_stop = look.drawn.log_stop
                tape = Tape(problem, log_stop.shape[1], space.max_moves, log_stop.dtype)
            rows, move = self._draw(tape, rows, look, log_w, log_pre)
            if len(rows):
                walk.advance(move)
                self._weigh(tape, rows, log_w, log_pre)
                dead = log_w[rows] == NEG_INF
                if dead.any():
                    keep = (~dead).nonzero().squeeze(1)
                    walk.take(keep)
                    rows = rows[keep]
            ess_now = ess(log_w.view(self.pops, n))
            alive = torch.zeros(b, dtype=torch.bool, device=self.device)
            alive[rows] = True
            room = self._room(log_w, alive)
            pick = self._due(log_w, alive, room)
            ess_of.append(ess_now)
            did.append(pick)
            alive_of.append(alive.view(self.pops, n).sum(1))
            index, log_w = self._parents(log_w, alive, room, pick)
            parents.append(index)
            if pick.any():
                rows, log_pre, root = self._resample(tape, index, rows, alive, log_w, log_pre, root)
            if self.on_step is not None:
                self.on_step(len(ess_of), space.max_moves + 1)
        assert tape is not None
        rollouts = tape.rollouts(self.name)
        rollouts = rollouts.with_terms(self.final, {k: t.version for k, t in self.target.factors.items()})
        live = log_w.view(self.pops, n) > NEG_INF
        roots = torch.tensor([len(r[k].unique()) for r, k in zip(root.view(self.pops, n), live, strict=True)])
        trace = Trace(
            self.method, self.settings, torch.stack(ess_of).cpu(), torch.stack(did).cpu(), roots,
            torch.stack(parents).cpu(), torch.stack(alive_of).cpu(),
            counts={"steps": float(len(ess_of)), "resamplings": float(torch.stack(did).sum())},
        )  # fmt: skip
        log_z = log_mean_exp(log_w.view(self.m, self.runs, n))
        return finish(self.target, rollouts, log_w.view(self.m, -1), log_z, trace, began, tokens)

    def _draw(
        self, tape: Tape, rows: Tensor, look: Look, log_w: Tensor, log_pre: Tensor
    ) -> tuple[Int[Tensor, " a"], Int[Tensor, " a"]]:
        """Record what was drawn; weigh the rows that stop. Returns the rows that go on, and their moves."""
        at, d, raw = tape.n[rows], look.drawn, look.raw
        tape.at_state(rows, at, look.menu, d.log_stop, raw[1] if raw else None)
        tape.log_b[rows, at] = d.log_b
        ends = d.stop >= 0
        done = rows[ends]
        tape.stop[done] = d.stop[ends]
        if len(done):
            log_q = tape.log_b[done, at[ends]].double()
            log_w[done] += safe_sub(self._log_gamma(tape, done, ends), log_pre[done] + log_q)
        on = (~ends).nonzero().squeeze(1)
        rows, at, move = rows[on], at[on], d.move[on]
        tape.moves[rows, at] = move
        forced = look.menu.must[on] == MUST_MOVE
        tape.kind[rows, at] = torch.where(forced, FORCED, FREE).to(torch.int8)
        tape.log_q[rows, at] = d.log_q[on]
        if raw is not None:
            tape.log_p[rows, at] = torch.where(forced, 0.0, raw[0][on, move].to(tape.log_p.dtype))
        tape.n[rows] = at + 1
        if len(done):
            self.walk.take(on)
        return rows, move

    def _held(self, tape: Tape | None, rows: Tensor) -> Held | None:
        """What slot 0 of each population must take: the next of the retained object."""
        if self.exact is None:
            return None
        move, stop = torch.full((2, len(rows)), -1, device=rows.device)
        slot = (rows % self.n == 0).nonzero().squeeze(1)
        pop = rows[slot] // self.n
        at = torch.zeros_like(slot) if tape is None else tape.n[rows[slot]]
        over = at >= self.exact.n[pop]
        stop[slot] = torch.where(over, self.exact.stop[pop], -1)
        if self.exact.moves.shape[1]:
            move[slot] = torch.where(over, -1, self.exact.moves[pop, at.clamp_max(self.exact.moves.shape[1] - 1)])
        return move, stop

    def _log_gamma(self, tape: Tape, done: Tensor, ends: Bool[Tensor, " a"]) -> Float[Tensor, " d"]:
        """log gamma of the rows that just stopped; what was already computed is not computed again."""
        known: dict[str, Tensor] = {}
        whole = tape.some(done, self.name)
        if self.guide is not None:
            known = {k: v[ends].gather(1, whole.stop[:, None]).squeeze(1) for k, v in
                     self.guide.end_terms(self.walk.c["guide"]).items() if k in self.target.factors}  # fmt: skip
        versions = {k: self.target.factors[k].version for k in known}
        whole = self.target.terms(whole.with_terms(known, versions))
        for name in self.target.factors:
            value = whole.terms[name]
            self.final.setdefault(name, torch.full_like(self.zero, NEG_INF))
            self.final[name][done] = (at_end(value, whole.n, whole.stop) if value.dim() > 1 else value).double()
        return self.target.log_gamma(whole)

    def _weigh(self, tape: Tape, rows: Tensor, log_w: Tensor, log_pre: Tensor) -> None:
        """w_t of the rows that moved."""
        at = tape.n[rows] - 1
        log_q = tape.log_b[rows, at].double()
        new = torch.zeros_like(log_q)
        if self.target.prior is not None:
            inside = torch.arange(tape.log_p.shape[1], device=rows.device) <= at[:, None]
            new = temper(torch.where(inside, tape.log_p[rows].double(), 0.0).sum(1), self._exponent(int(at.max()) + 1))
        else:
            tape.log_pb[rows, at] = self.target.space.log_pb(self.walk.s).to(tape.log_pb.dtype)
            log_q = log_q - tape.log_pb[rows, at].double()
        new = new + self.walk.log_psi()
        log_w[rows] += safe_sub(new, log_pre[rows] + log_q)
        log_pre[rows] = new

    def _exponent(self, t: int) -> float:
        """The prior's exponent after t moves: on a ramp it rises linearly from 1; at a stop gamma has the full one."""
        return self.beta if t >= self.ramp else 1 + (self.beta - 1) * t / self.ramp

    def _room(self, log_w: Tensor, alive: Bool[Tensor, " b"]) -> Bool[Tensor, "pop n"]:
        """Slots that resampling fills anew: all, or with ``aside`` those of who grows and of the dead."""
        all_of = alive | (log_w == NEG_INF) if self.aside else torch.ones_like(alive)
        return all_of.view(self.pops, self.n)

    def _due(self, log_w: Tensor, alive: Bool[Tensor, " b"], room: Bool[Tensor, "pop n"]) -> Bool[Tensor, " pop"]:
        """Populations to resample: some particle grows, and the ESS of those in the room is low."""
        here = ess(log_w.view(self.pops, self.n).masked_fill(~room, NEG_INF))
        return alive.view(self.pops, self.n).any(1) & (here < self.threshold * room.sum(1).double()) & (here > 0)

    def _parents(
        self, log_w: Tensor, alive: Bool[Tensor, " b"], room: Bool[Tensor, "pop n"], pick: Bool[Tensor, " pop"]
    ) -> tuple[Int[Tensor, "pop n"], Float[Tensor, " b"]]:
        """Parent of each slot within its population (itself where it is not resampled), and its weight.

        The k slots of the room share its weight: sum of w / k each, so that the sum stays.
        """
        index = torch.arange(self.n, device=self.device).repeat(self.pops, 1)
        if not pick.any():
            return index, log_w
        room = room[pick]
        old = log_w.view(self.pops, self.n)
        here, k = old[pick].masked_fill(~room, NEG_INF), room.sum(1, keepdim=True)
        level = here.logsumexp(1, keepdim=True) - k.double().log()
        new = old.clone()
        if self.scheme is None:
            kept, share = without_replacement(normalise(here), self.kept, self.gen)
            grows = alive.view(self.pops, self.n)[pick].gather(1, kept)
            index[pick], share = fan_out(kept, share, grows, self.beam)
            new[pick] = level + (share * self.n).log()
        else:
            place = (room.cumsum(1) - 1).clamp_min(0)
            drawn = self.scheme(normalise(here), self.gen, k).gather(1, place)
            index[pick] = torch.where(room, drawn, index[pick])
            new[pick] = torch.where(room, level, old[pick])
        if self.exact is not None:
            index[:, 0] = 0
        return index, new.flatten()

    def _resample(self, tape: Tape, index: Tensor, rows: Tensor, alive: Tensor, log_w: Tensor, log_pre: Tensor,
                  root: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        flat = (index + torch.arange(self.pops, device=self.device)[:, None] * self.n).flatten()
        tape.take(flat)
        self.final = {k: v[flat] for k, v in self.final.items()}
        place = torch.full((len(alive),), -1, device=self.device)
        place[rows] = torch.arange(len(rows), device=self.device)
        new_rows = (alive[flat] & (log_w > NEG_INF)).nonzero().squeeze(1)
        self.walk.take(place[flat[new_rows]])
        return new_rows, log_pre[flat], root[flat]
