"""Sequential Monte Carlo, and conditional SMC.

Populations grow objects move by move through gamma_t(prefix) = p(prefix)^beta psi_t(prefix) (psi_t alone without a
prior); at its stop a particle's intermediate target is gamma itself. With q the proposal,

    w_t = gamma_t P_B / (gamma_{t-1} q),      Z-hat = prod over steps of the mean weight

Z-hat is unbiased for any psi and q that do not vanish where gamma does not (Del Moral 2004); log Z-hat is
biased low. Weighted averages are biased O(1/n). Resampling happens where ESS < threshold * n and some particle still
grows: never on the last step.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from retrodict.errors import InputError, nearest
from retrodict.numerics import NEG_INF, at_end, ess, log_mean_exp, normalise, safe_sub
from retrodict.particles import Particles
from retrodict.policies.base import FiniteStepper, Tape, choose
from retrodict.policies.guided import GuidedPolicy, bend
from retrodict.protocols import Guide
from retrodict.records import FORCED, FREE, MUST_MOVE, Menu, Rollouts, Trace
from retrodict.rng import generator
from retrodict.samplers.common import (
    OnStep,
    base_of,
    device_of,
    finish,
    meter,
    positive,
    prior_name,
    proposal,
    rows_for,
)
from retrodict.samplers.resampling import RESAMPLERS
from retrodict.targets.algebra import Target, temper


def smc(
    target: Target,
    policy: FiniteStepper | None = None,
    *,
    n: int,
    seed: int,
    runs: int = 4,
    ess_threshold: float = 0.5,
    resampling: str = "systematic",
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
        resampling: ``systematic | stratified | residual | multinomial``.
        on_step: progress callback.

    Raises:
        InputError: an unknown resampling scheme, or a count below one.
    """
    return _Run(target, policy, n, seed, runs, ess_threshold, resampling, on_step, None).go()


def conditional_smc(
    target: Target,
    policy: FiniteStepper | None = None,
    *,
    exact: Rollouts,
    n: int,
    seed: int,
    runs: int = 1,
    ess_threshold: float = 0.5,
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
    return _Run(target, policy, n, seed, runs, ess_threshold, "multinomial", on_step, exact).go()


@dataclass
class _Step:
    """What one step of the growing rows needs."""

    rows: Int[Tensor, " a"]
    menu: Menu
    log_move: Float[Tensor, "a v"]
    log_stop: Float[Tensor, "a s"]
    raw: tuple[Tensor, Tensor] | None


class _Run:
    """One call of SMC: the state of all populations, and the loop."""

    def __init__(self, target: Target, policy: FiniteStepper | None, n: int, seed: int, runs: int, threshold: float,
                 resampling: str, on_step: OnStep | None, exact: Rollouts | None) -> None:  # fmt: skip
        positive(n=n, runs=runs)
        if resampling not in RESAMPLERS:
            raise InputError(f"unknown resampling {resampling!r}{nearest(resampling, RESAMPLERS)}")
        if not 0 <= threshold <= 1:
            raise InputError(f"ess_threshold is a share of n between 0 and 1, not {threshold}")
        self.target, self.n, self.runs, self.threshold = target, n, runs, threshold
        self.scheme, self.on_step, self.exact = RESAMPLERS[resampling], on_step, exact
        full = proposal(target, policy)
        self.base = base_of(full)
        self.bends: Guide | None = full.guide if isinstance(full, GuidedPolicy) else None
        self.guide: Guide | None = target.guide
        if policy is None and self.bends is None:
            self.bends = self.guide  # a soft guide that lists moves proposes too
        self.name = prior_name(target, full)
        self.prior = target.prior if self.name is None else None  # stepped on its own only where q has another model
        self.beta = target.betas.get("prior", 1.0)
        self.device = device_of(target, full)
        self.gen = generator(seed, self.device)
        self.settings = {"n": n, "runs": runs, "seed": seed, "ess_threshold": threshold, "resampling": resampling}
        self.method = "smc" if exact is None else "conditional_smc"
        self.m = len(target.problems)
        self.pops = self.m * runs

    # -- carries of the growing rows: base, prior, and each distinct guide -------------------------------------------

    def _start(self, problem: Tensor) -> None:
        self.c: dict[str, Any] = {"base": self.base.start(problem)}
        self.movers: dict[str, Any] = {"base": self.base}
        if self.prior is not None:
            self.movers["prior"], self.c["prior"] = self.prior, self.prior.start(problem)
        if self.guide is not None:
            self.movers["guide"], self.c["guide"] = self.guide, self.guide.start(problem)
        if self.bends is not None and self.bends is not self.guide:
            self.movers["bends"], self.c["bends"] = self.bends, self.bends.start(problem)
        self.s = self.target.space.start(problem)

    def _take(self, index: Tensor) -> None:
        self.c = {k: self.movers[k].take(c, index) for k, c in self.c.items()}
        self.s = self.target.space.take(self.s, index)

    def _advance(self, move: Tensor) -> None:
        self.c = {k: self.movers[k].step(c, self.s, move) for k, c in self.c.items()}
        self.s = self.target.space.step(self.s, move)

    def _look(self, rows: Tensor) -> _Step:
        menu = self.target.space.menu(self.s)
        log_move, log_stop = self.base.log_probs(self.c["base"], self.s, menu)
        if self.name is not None:
            raw = self.base.log_probs(self.c["base"], self.s, menu, raw=True)
        elif self.prior is not None:
            raw = self.prior.log_probs(self.c["prior"], self.s, menu, raw=True)
        else:
            raw = None
        if self.bends is not None:
            c = self.c["guide" if self.bends is self.guide else "bends"]
            log_move, log_stop = bend(
                log_move, log_stop, menu, self.bends.log_next(c, self.s), self.bends.log_end(c, self.s)
            )
        return _Step(rows, menu, log_move, log_stop, raw)

    # -- the loop ----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def go(self) -> Particles:
        """Run to the end."""
        began, tokens = time.perf_counter(), meter(self.target)
        n, space = self.n, self.target.space
        problem = rows_for(self.target, self.runs * n, self.device)
        b = len(problem)
        self._start(problem)
        rows = torch.arange(b, device=self.device)
        log_w = torch.zeros(b, dtype=torch.float64, device=self.device)
        self.zero, self.final = torch.zeros_like(log_w), {}  # terms of complete objects, by name
        log_pre = torch.zeros_like(log_w)  # log gamma_t of each particle's present prefix
        root = torch.arange(b, device=self.device) % n
        tape: Tape | None = None
        ess_of, did, parents, alive_of = [], [], [], []
        while len(rows):
            step = self._look(rows)
            if tape is None:
                tape = Tape(problem, step.log_stop.shape[1], space.max_moves, step.log_stop.dtype)
            rows, move = self._draw(tape, step, log_w, log_pre)
            if len(rows):
                self._advance(move)
                self._weigh(tape, rows, log_w, log_pre)
                dead = log_w[rows] == NEG_INF
                if dead.any():
                    keep = (~dead).nonzero().squeeze(1)
                    self._take(keep)
                    rows = rows[keep]
            ess_now = ess(log_w.view(self.pops, n))
            alive = torch.zeros(b, dtype=torch.bool, device=self.device)
            alive[rows] = True
            growing = alive.view(self.pops, n).any(1)
            pick = growing & (ess_now < self.threshold * n) & (ess_now > 0)
            ess_of.append(ess_now)
            did.append(pick)
            alive_of.append(alive.view(self.pops, n).sum(1))
            index = self._ancestors(log_w, pick)
            parents.append(index)
            if pick.any():
                rows, log_w, log_pre, root = self._resample(tape, index, pick, rows, alive, log_w, log_pre, root)
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

    def _draw(self, tape: Tape, step: _Step, log_w: Tensor, log_pre: Tensor) -> tuple[Tensor, Tensor]:
        """Draw a move or a stop for each growing row; weigh those that stop. Returns the rows that go on, and moves."""
        rows, menu = step.rows, step.menu
        at = tape.n[rows]
        tape.at_state(rows, at, menu, step.log_stop, step.raw[1] if step.raw else None)
        move, stop = choose(step.log_move, step.log_stop, self.gen)
        if self.exact is not None:
            self._hold(rows, at, move, stop)
        ends = stop >= 0
        done = rows[ends]
        tape.stop[done] = stop[ends]
        tape.log_b[done, at[ends]] = step.log_stop[ends].gather(1, stop[ends, None]).squeeze(1)
        if len(done):
            log_q = tape.log_b[done, at[ends]].double()
            log_w[done] += safe_sub(self._log_gamma(tape, done, ends), log_pre[done] + log_q)
        on = (~ends).nonzero().squeeze(1)
        rows, at, move = rows[on], at[on], move[on]
        pick = (on, move)
        tape.moves[rows, at] = move
        forced = menu.must[on] == MUST_MOVE
        tape.kind[rows, at] = torch.where(forced, FORCED, FREE).to(torch.int8)
        tape.log_q[rows, at] = tape.log_b[rows, at] = step.log_move[pick]
        if step.raw is not None:
            tape.log_p[rows, at] = torch.where(forced, 0.0, step.raw[0][pick].to(tape.log_p.dtype))
        tape.n[rows] = at + 1
        if len(done):
            self._take(on)
        return rows, move

    def _hold(self, rows: Tensor, at: Tensor, move: Tensor, stop: Tensor) -> None:
        """Slot 0 of each population takes the moves of the retained object."""
        assert self.exact is not None
        slot = (rows % self.n == 0).nonzero().squeeze(1)
        pop = rows[slot] // self.n
        i = at[slot]
        over = i >= self.exact.n[pop]
        t = max(self.exact.moves.shape[1] - 1, 0)
        if self.exact.moves.shape[1]:
            move[slot] = torch.where(over, move[slot], self.exact.moves[pop, i.clamp_max(t)])
        stop[slot] = torch.where(over, self.exact.stop[pop], torch.full_like(i, -1))

    def _log_gamma(self, tape: Tape, done: Tensor, ends: Bool[Tensor, " a"]) -> Float[Tensor, " d"]:
        """log gamma of the rows that just stopped; what was already computed is not computed again."""
        known: dict[str, Tensor] = {}
        whole = tape.some(done, self.name)
        if self.guide is not None:
            known = {k: v[ends].gather(1, whole.stop[:, None]).squeeze(1) for k, v in
                     self.guide.end_terms(self.c["guide"]).items() if k in self.target.factors}  # fmt: skip
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
            new = temper(torch.where(inside, tape.log_p[rows].double(), 0.0).sum(1), self.beta)
        else:
            tape.log_pb[rows, at] = self.target.space.log_pb(self.s).to(tape.log_pb.dtype)
            log_q = log_q - tape.log_pb[rows, at].double()
        if self.guide is not None:
            new = new + self.guide.log_psi(self.c["guide"], self.s).double()
        log_w[rows] += safe_sub(new, log_pre[rows] + log_q)
        log_pre[rows] = new

    def _ancestors(self, log_w: Tensor, pick: Bool[Tensor, " pop"]) -> Int[Tensor, "pop n"]:
        """Parent of each particle within its population (itself where it is not resampled)."""
        index = torch.arange(self.n, device=self.device).repeat(self.pops, 1)
        if pick.any():
            index[pick] = self.scheme(normalise(log_w.view(self.pops, self.n)[pick]), self.gen)
            if self.exact is not None:
                index[:, 0] = 0
        return index

    def _resample(self, tape: Tape, index: Tensor, pick: Tensor, rows: Tensor, alive: Tensor, log_w: Tensor,
                  log_pre: Tensor, root: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
        flat = (index + torch.arange(self.pops, device=self.device)[:, None] * self.n).flatten()
        level = log_mean_exp(log_w.view(self.pops, self.n))[:, None].expand(-1, self.n)
        log_w = torch.where(pick[:, None], level, log_w.view(self.pops, self.n)).flatten()
        tape.take(flat)
        self.final = {k: v[flat] for k, v in self.final.items()}
        place = torch.full((len(alive),), -1, device=self.device)
        place[rows] = torch.arange(len(rows), device=self.device)
        new_rows = alive[flat].nonzero().squeeze(1)
        self._take(place[flat[new_rows]])
        return new_rows, log_w, log_pre[flat], root[flat]
