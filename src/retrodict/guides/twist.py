"""Learned twists (Zhao, Brekelmans, Makhzani and Grosse 2024, arXiv:2404.17546): a head on the model's own state.

    log psi(x_1..t v) = level + bound tanh((u . (E_v + d_v) + c + g[delta(a, v), l]) / bound),   (u, c) = MLP(h_t, l, a)

for every next token v in one pass: h_t the frozen model's hidden state, E_v its unembedding on its first principal
axes, d_v a learned correction, l the moves that remain, a the state of a hard constraint's automaton. A stop is one
more symbol with a psi of its own. The head starts at psi = e^level everywhere, which is plain SMC.

SMC weighs prefixes by one look further, which costs nothing more, since the proposal needs the same sum:

    log psi'(x_1..t) = log ( sum_v p(v | x_1..t) psi(x_1..t v) + sum_s p(stop s | x_1..t) psi(x_1..t s) )

Both equal the optimal twist E_p[phi | x_1..t] where psi does. psi > 0 within ``bound`` nats of its level, and a stop is
weighed by the target itself, so any head leaves SMC unbiased; hard constraints multiply in with their exact zeros.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from retrodict.guides.base import BaseGuide, ProductGuide
from retrodict.numerics import NEG_INF
from retrodict.protocols import Guide, Problems, State
from retrodict.records import MUST_MOVE, MUST_STOP, Menu, Rollouts
from retrodict.rng import generator

BOUND = 30.0
"""Nats that log psi may be from its level."""


def token_axes(lm: Any, rank: int) -> Float[Tensor, "v r"]:
    """Tokens on the principal axes of the unembedding, each of variance one; one-hot where there are few tokens."""
    v, like = lm.vocab_size, lm.state(lm.encode([[0]])[0])
    if v <= rank:
        return torch.eye(v, dtype=like.dtype, device=like.device)
    eye = torch.eye(like.shape[1], dtype=like.dtype, device=like.device)
    with torch.no_grad():
        w = lm.logits(eye).T.float()
        w = w - w.mean(0)
        values, axes = torch.linalg.eigh(w.T @ w / v)
        return (w @ axes[:, -rank:]) / values[-rank:].clamp_min(1e-12).sqrt()


class TwistHead:
    """The function above. ``parameters`` are leaf tensors by name; ``mean`` and ``scale`` standardise h_t."""

    def __init__(
        self,
        axes: Float[Tensor, "v r"],
        size: int,
        moves: int,
        stops: int = 1,
        states: int = 1,
        about: int = 0,
        hidden: int = 128,
        bound: float = BOUND,
        seed: int = 0,
    ) -> None:
        gen, r = generator(seed), axes.shape[1]
        self.axes, self.bound = axes, bound
        self.shape = {"size": size, "moves": moves, "stops": stops, "states": states, "about": about, "hidden": hidden,
                      "rank": r, "tokens": len(axes)}  # fmt: skip

        def normal(*shape: int, gain: float = 1.0) -> Tensor:
            return torch.randn(*shape, generator=gen).to(axes) * (gain / max(1, shape[0]) ** 0.5)

        self.mean, self.scale = axes.new_zeros(size), axes.new_ones(size)
        self._named = {
            "state": normal(size, hidden), "left": normal(moves + 1, hidden, gain=(moves + 1) ** 0.5),
            "about": normal(about, hidden), "automaton": axes.new_zeros(states, hidden),
            "token": axes.new_zeros(hidden, r), "level": axes.new_zeros(hidden), "stop": axes.new_zeros(hidden, stops),
            "correction": axes.new_zeros(len(axes), r), "next": axes.new_zeros(states, moves + 1),
        }  # fmt: skip
        for x in self._named.values():
            x.requires_grad_()

    def parameters(self) -> Mapping[str, Tensor]:
        """What is learned."""
        return self._named

    def __call__(
        self,
        x: Float[Tensor, "c e"],
        left: Int[Tensor, " c"],
        automaton: Int[Tensor, " c"],
        about: Float[Tensor, "c a"],
        ids: Int[Tensor, "c k"] | None = None,
        after: Int[Tensor, "c k"] | None = None,
    ) -> tuple[Float[Tensor, "c k"], Float[Tensor, "c s"]]:
        """log psi, less its level, of the next tokens ``ids`` (all by default) and of the stops.

        ``after`` are the automaton's states after each of those tokens.
        """
        w = self._named
        x = (x.to(self.axes.dtype) - self.mean) / self.scale
        z = torch.nn.functional.silu(
            x @ w["state"] + w["left"][left] + w["automaton"][automaton] + about.to(x) @ w["about"]
        )
        u, tokens = z @ w["token"], self.axes + w["correction"]
        out = u @ tokens.T if ids is None else (tokens[ids] @ u[:, :, None]).squeeze(2)
        out = out + (z @ w["level"])[:, None]
        if after is not None:
            out = out + w["next"][after, (left[:, None] - 1).clamp_min(0)]
        return self.bounded(out), self.bounded(z @ w["stop"])

    def bounded(self, x: Tensor) -> Tensor:
        """x near 0, never further out than the bound: psi must not vanish where the target does not."""
        return self.bound * torch.tanh(x / self.bound)


@dataclass(frozen=True)
class Look:
    """What a twist says at one state: log psi of each next token and stop, and of the state itself."""

    next: Float[Tensor, "b v"]
    end: Float[Tensor, "b s"]
    psi: Float[Tensor, " b"]


@dataclass
class TwistCarry:
    """The prior's carry (seen, or of a pass of its own that is begun when first needed) and the constraint's."""

    problem: Int[Tensor, " b"]
    hard: Any
    base: Any = None
    begin: Callable[[], Any] | None = None
    shared: bool = False
    look: Look | None = None


class TwistGuide(BaseGuide):
    """psi by a head, times the target's hard guide. ``prior`` is the LMPolicy whose passes it reads.

    ``level`` is log psi of each problem before anything is known, and psi is raised to ``power`` about it: below 1 for
    a head that is surer than it should be. Under p^beta the proposal is bent to p^beta psi.
    """

    def __init__(
        self,
        prior: Any,
        head: Any,
        hard: Guide | None = None,
        beta: float = 1.0,
        level: Float[Tensor, " m"] | None = None,
        about: Callable[[Problems], Float[Tensor, "m a"]] | None = None,
        power: float = 1.0,
    ) -> None:
        self.power = power
        self.prior, self.head, self.inner, self.beta = prior, head, hard, beta
        self.space, self.lm, self.problems = prior.space, prior.lm, prior.problems
        self.level = torch.zeros(len(self.problems), device=self.lm.device) if level is None else level
        self.about_of = about
        self.about = torch.zeros(len(self.problems), 0) if about is None else about(self.problems)
        self.automaton = getattr(hard, "next", None)

    def on(self, problems: Problems) -> TwistGuide:
        """The same head on other problems; their level is the mean of those it was fitted on."""
        inner: Any = self.inner
        hard = inner.on(problems) if hasattr(inner, "on") else inner
        level = self.level.mean().expand(len(problems)).clone()
        return TwistGuide(self.prior.on(problems), self.head, hard, self.beta, level, self.about_of, self.power)

    # -- the carry ------------------------------------------------------------------------------------------------

    def reads(self, policy: Any) -> bool:
        """Whether a policy's pass is the one this head was made for."""
        lm = getattr(policy, "lm", None)
        same = policy is self.prior or (lm is not None and lm.version == self.lm.version)
        return same and getattr(policy, "reads", "") == self.prior.reads and policy.problems is self.problems

    def see(self, c: TwistCarry, carry: Any) -> TwistCarry:
        """Read the prior's own pass instead of one of one's own."""
        return replace(c, base=carry, begin=None, shared=True)

    def start(self, problem: Int[Tensor, " b"]) -> TwistCarry:
        """Empty strings."""
        hard = None if self.inner is None else self.inner.start(problem)
        return TwistCarry(problem, hard, begin=partial(self.prior.start, problem))

    def start_at(self, rollouts: Rollouts, upto: Int[Tensor, " b"]) -> TwistCarry:
        """After the first ``upto`` moves."""
        hard = None if self.inner is None else self.inner.start_at(rollouts, upto)
        return TwistCarry(rollouts.problem, hard, begin=partial(self.prior.start_at, rollouts, upto))

    def _base(self, c: TwistCarry) -> Any:
        if c.base is None and c.begin is not None:
            c.base = c.begin()
        return c.base

    def step(self, c: TwistCarry, s: State, move: Int[Tensor, " b"]) -> TwistCarry:
        """Step the constraint, and the model where its pass is not seen elsewhere."""
        base = None if c.shared else self.prior.step(self._base(c), s, move)
        hard = None if self.inner is None else self.inner.step(c.hard, s, move)
        return TwistCarry(c.problem, hard, base, None, c.shared)

    def take(self, c: TwistCarry, index: Tensor) -> TwistCarry:
        """Rows ``index``."""
        base = None if c.shared else self.prior.take(self._base(c), index)
        hard = None if self.inner is None else self.inner.take(c.hard, index)
        look = None if c.look is None else Look(c.look.next[index], c.look.end[index], c.look.psi[index])
        return TwistCarry(c.problem[index], hard, base, None, c.shared, look)

    # -- psi ------------------------------------------------------------------------------------------------------

    def features(self, s: State, base: Any) -> Float[Tensor, "b e"]:
        """What the head reads of each state."""
        return self.lm.state(base.cache)[base.rows]

    def states(self, rollouts: Rollouts) -> Float[Tensor, "b t1 e"]:
        """The same of every prefix of recorded rows."""
        return self.lm.states(self.prior.prompts(rollouts.problem), rollouts.moves, rollouts.n)

    def logits(self, x: Float[Tensor, "b e"]) -> Float[Tensor, "b v"]:
        """The model's next-token logits from what the head reads."""
        return self.lm.logits(x)

    def allowed(
        self, log_p: Float[Tensor, "b v"], s: State, menu: Menu, hard: Any
    ) -> tuple[Float[Tensor, "b v"], Float[Tensor, "b s"]]:
        """p^beta of what the space and the hard guide allow, in nats; a forced move counts 0."""
        move = self.beta * log_p
        stop = self.space.log_p_stops(self.space.raw_stop(log_p), s)
        stop = torch.where(stop == NEG_INF, stop, self.beta * stop)
        if menu.legal is not None:
            move = move.masked_fill(~menu.legal, NEG_INF)
        move = torch.where((menu.must == MUST_STOP)[:, None], NEG_INF, move)
        if menu.forced is not None:
            put = (menu.must == MUST_MOVE)[:, None]
            only = torch.full_like(move, NEG_INF).scatter(1, menu.forced[:, None], 0.0)
            move, stop = torch.where(put, only, move), torch.where(put, NEG_INF, stop)
        if self.inner is None:
            return move, stop
        after, end = self.inner.log_next(hard, s), self.inner.log_end(hard, s)
        return move if after is None else move + after, stop if end is None else stop + end

    def state_of(self, hard: Any, problem: Tensor) -> Int[Tensor, " b"]:
        """The automaton's state; 0 where the constraint has none."""
        return torch.zeros_like(problem) if self.automaton is None else hard

    def left(self, s: State) -> Int[Tensor, " b"]:
        """Moves that remain."""
        return (self.space.max_free - self.space.counted(s)).clamp_min(0)

    @torch.no_grad()
    def _look(self, c: TwistCarry, s: State) -> Look:
        if c.look is None:
            base = self._base(c)
            log_p = base.log_p if base.tidy else base.log_p[base.rows]
            move, stop = self.allowed(log_p, s, self.space.menu(s), c.hard)
            at = self.state_of(c.hard, c.problem)
            after = None if self.automaton is None else self.automaton[at].long()
            level = self.level[c.problem].to(log_p)[:, None]
            psi, end = self.head(self.features(s, base), self.left(s), at, self.about[c.problem], None, after)
            psi, end = level + self.power * psi.to(log_p), level + self.power * end.to(log_p)
            ahead = torch.logaddexp((move + psi).logsumexp(-1), (stop + end).logsumexp(-1))
            if self.beta != 1.0:  # the proposal is bent from p to p^beta psi
                psi, end = psi + (self.beta - 1) * log_p, end + self._extra(stop)
            dead = (move == NEG_INF, stop == NEG_INF)
            c.look = Look(psi.masked_fill(dead[0], NEG_INF), end.masked_fill(dead[1], NEG_INF), ahead)
        return c.look

    def _extra(self, stop: Tensor) -> Tensor:
        return torch.where(stop == NEG_INF, 0.0, (1 - 1 / self.beta) * stop)

    def log_psi(self, c: TwistCarry, s: State) -> Float[Tensor, " b"]:
        """One look further: the sum over all next symbols of p psi."""
        return self._look(c, s).psi

    def log_next(self, c: TwistCarry, s: State) -> Float[Tensor, "b v"]:
        """log psi of every next token."""
        return self._look(c, s).next

    def log_end(self, c: TwistCarry, s: State) -> Float[Tensor, "b s"]:
        """log psi of stopping now."""
        return self._look(c, s).end


def hard_part(guide: Guide | None) -> Guide | None:
    """The hard guides of a target's guide: a twist takes the place of the soft ones."""
    if guide is None or guide.hard:
        return guide
    parts = [g for g in guide.guides if g.hard] if isinstance(guide, ProductGuide) else []
    return None if not parts else parts[0] if len(parts) == 1 else ProductGuide(*parts)
