"""Adaptive weighted rejection sampling of a token: for checks that only say yes or no to one text at a time.

A mask asks a constraint about every token of the vocabulary. Here tokens (moves and stops together) are drawn from the
policy without replacement and asked about one by one, and the mass of what would be allowed, Z = sum_v p(v) psi(v),
is estimated from the few that were. The first accepted token has the law p psi / Z, and E[Z-hat | token] = Z, so

    E[Z-hat 1[v]] = p(v) psi(v),        log b = log p(v) - log Z-hat

and b stands in every weight where a density would: SMC, importance sampling and MH (which keeps the b it accepted, as
pseudo-marginal chains do) stay unbiased. Two estimators (Lipkin et al. 2025, arXiv 2504.05410), R the tokens rejected:

    recursive   Z-hat = 1 - p(R) where one more token, drawn from what is left, passes too; p(v) where it does not
    geometric   draws with replacement are counted, those of R too, whose numbers are geometric; until A were accepted
                or too many rejected. Z-hat = min(A - 1, a) / (a + r - 1), a accepted and r rejected

The first multiplies out the product of the paper's section 3; the second is the Rao-Blackwell form of "the first draw
was accepted". Both end after ``max_rejects`` rejections and stay unbiased: the token tested last weighs 1 - p(R) in the
recursive form (no further draw), and what met no accepted token weighs 0. 1 - p(R) is summed over what is left, never
subtracted from 1, so tokens of any probability are found.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from retrodict.errors import InputError, nearest
from retrodict.guides.base import parts
from retrodict.numerics import NEG_INF, invert_cdf
from retrodict.policies.base import Drawn, FiniteStepper
from retrodict.policies.guided import GuidedCarry, GuidedPolicy, bend
from retrodict.protocols import Guide, Problems, State
from retrodict.records import Menu

MAX_LISTED = 1_000_000
"""Tests that :meth:`AWRS.log_probs` may ask at once."""

Test = Callable[[Tensor, Tensor], Tensor]
"""(rows, tokens) to whether each passes; tokens from v on are stops."""


class AWRS(GuidedPolicy):
    """``base`` bent by a 0/1 ``guide`` that is asked about one token at a time.

    All hard parts of the guide are asked; soft ones that list their moves bend the base first. Rollouts record the
    base's log q, and the effective density b in ``log_b``. ``score`` lists the vocabulary: for small ones.

    Args:
        base: what tokens are drawn from.
        guide: what tests them.
        estimator: ``geometric``, or ``recursive``: fewest tests, and on flat distributions little better than a coin.
        accepts: A of the geometric form, at least 2: more tests, less variance.
        max_rejects: rejections after which a row gives up; the geometric form, which counts repeated draws as well,
            gives up after ``max_rejects / (1 - max p)``.
    """

    def __init__(
        self,
        base: FiniteStepper,
        guide: Guide,
        *,
        estimator: str = "geometric",
        accepts: int = 4,
        max_rejects: int = 1000,
    ) -> None:
        super().__init__(base, guide)
        if estimator not in ESTIMATORS:
            raise InputError(f"unknown estimator {estimator!r}{nearest(estimator, ESTIMATORS)}")
        if accepts < 2:
            raise InputError(f"accepts must be at least 2, not {accepts}: one accepted token says nothing about Z")
        if max_rejects < 1:
            raise InputError(f"max_rejects must be at least 1, not {max_rejects}")
        if not any(g.hard for g, _ in parts(guide, None)):
            raise InputError("AWRS needs a guide whose psi is 0 or 1; a soft guide proposes by rd.GuidedPolicy")
        self.estimator, self.accepts, self.max_rejects = estimator, accepts, max_rejects

    def on(self, problems: Problems) -> AWRS:
        """The same policy and guide on other problems."""
        moved = super().on(problems)
        return AWRS(moved.base, moved.guide, estimator=self.estimator, accepts=self.accepts,
                    max_rejects=self.max_rejects)  # fmt: skip

    # -- drawing --------------------------------------------------------------------------------------------------

    def propose(
        self,
        c: GuidedCarry,
        s: State,
        menu: Menu,
        gen: torch.Generator,
        held: tuple[Int[Tensor, " b"], Int[Tensor, " b"]] | None = None,
    ) -> Drawn:
        """A move or a stop a row, with its effective density.

        ``held`` gives (move, stop) that rows must take, (-1, -1) for a free one, as conditional SMC does; what is
        random in Z-hat is then drawn from its law given the token, tilted by Z-hat.
        """
        log_move, log_stop = self._soft(c, s, menu)
        v, b = log_move.shape[1], len(log_move)
        log_p = torch.cat([log_move, log_stop], 1).double()
        token = torch.full((b,), -1, device=log_p.device)
        kept = token.clone() if held is None else torch.where(held[1] >= 0, v + held[1], held[0])
        log_z = torch.full((b,), NEG_INF, dtype=torch.float64, device=log_p.device)
        pool = _Pool(log_p.softmax(-1), lambda rows, x: self._passes(c, s, rows, x, v), gen)
        at = self._alive(c, s).nonzero().squeeze(1)
        token[at], log_z[at] = ESTIMATORS[self.estimator](pool, at, kept[at], self.accepts, self.max_rejects)
        token = torch.where(log_z == NEG_INF, log_p.argmax(1), token)
        log_b = log_p.gather(1, token[:, None]).squeeze(1) - log_z  # +inf: weight 0
        move = torch.where(token < v, token, log_move.argmax(1))
        log_q = log_move.gather(1, move[:, None]).squeeze(1)
        return Drawn(move, torch.where(token < v, -1, token - v), log_b.to(log_q.dtype), log_q, log_stop)

    def _soft(self, c: GuidedCarry, s: State, menu: Menu) -> tuple[Tensor, Tensor]:
        """The base, bent by the soft parts that list their moves."""
        log_move, log_stop = self.base.log_probs(c.base, s, menu)
        for guide, carry in parts(self.guide, c.guide):
            if not guide.hard and (log_next := guide.log_next(carry, s)) is not None:
                log_move, log_stop = bend(log_move, log_stop, menu, log_next, guide.log_end(carry, s))
        return log_move, log_stop

    def _alive(self, c: GuidedCarry, s: State) -> Bool[Tensor, " b"]:
        """Rows whose prefix passes; the others have weight 0 already, and no token of theirs is asked about."""
        alive = torch.ones_like(s.n, dtype=torch.bool)
        for guide, carry in parts(self.guide, c.guide):
            if guide.hard:
                alive &= (s.n == 0) | (guide.log_psi(carry, s) > NEG_INF)
        return alive

    def _passes(self, c: GuidedCarry, s: State, rows: Tensor, token: Tensor, v: int) -> Bool[Tensor, " r"]:
        """Whether all hard parts pass one token a row; a part is asked only about what those before it let through."""
        ok = torch.ones_like(token, dtype=torch.bool)
        for guide, carry in parts(self.guide, c.guide):
            if not guide.hard:
                continue
            for stops in (False, True):
                pick = (ok & ((token >= v) == stops)).nonzero().squeeze(1)
                if len(pick):
                    at, x = rows[pick], token[pick]
                    ok[pick] = self._ends(guide, carry, s, at, x - v) if stops else self._grows(guide, carry, s, at, x)
        return ok

    def _grows(self, guide: Guide, carry: Any, s: State, rows: Tensor, move: Tensor) -> Bool[Tensor, " r"]:
        before = self.space.take(s, rows)
        after = guide.step(guide.take(carry, rows), before, move)
        return guide.log_psi(after, self.space.step(before, move)) > NEG_INF

    def _ends(self, guide: Guide, carry: Any, s: State, rows: Tensor, stop: Tensor) -> Bool[Tensor, " r"]:
        value = guide.log_end(guide.take(carry, rows), self.space.take(s, rows))
        if value is None:
            return torch.ones_like(stop, dtype=torch.bool)
        return value.expand(len(rows), -1).gather(1, stop[:, None].clamp_max(value.shape[1] - 1)).squeeze(1) > NEG_INF

    # -- the law itself -------------------------------------------------------------------------------------------

    def log_probs(self, c: GuidedCarry, s: State, menu: Menu, raw: bool = False) -> tuple[Tensor, Tensor]:
        """p psi / Z, the law of the drawn token where nothing is given up, by asking about every token."""
        if raw:
            return self.base.log_probs(c.base, s, menu, raw)
        log_move, log_stop = self._soft(c, s, menu)
        v, log_p = log_move.shape[1], torch.cat([log_move, log_stop], 1)
        rows, token = (log_p > NEG_INF).nonzero().unbind(1)
        if len(rows) > MAX_LISTED:
            raise InputError(
                f"scoring a policy that tests tokens one by one takes {len(rows):,} tests a step; give a mask instead"
            )
        psi = torch.full_like(log_p, NEG_INF)
        psi[rows, token] = torch.where(self._passes(c, s, rows, token, v), 0.0, NEG_INF).to(log_p.dtype)
        return bend(log_move, log_stop, menu, psi[:, :v], psi[:, v:])


# -- estimators -----------------------------------------------------------------------------------------------------


@dataclass
class _Pool:
    """Probabilities of the tokens not drawn yet; drawing removes them."""

    left: Float[Tensor, "b k"]
    test: Test
    gen: torch.Generator

    def uniform(self, rows: Tensor) -> Float[Tensor, " r"]:
        """One number in [0, 1) a row."""
        return torch.rand(len(rows), generator=self.gen, dtype=torch.float64, device=self.left.device)

    def mass(self, rows: Tensor) -> Float[Tensor, " r"]:
        """1 - p(everything drawn), without cancellation."""
        return self.left[rows].sum(1)

    def draw(self, rows: Tensor) -> tuple[Int[Tensor, " r"], Float[Tensor, " r"]]:
        """One token a row without replacement, and its probability. Rows must have something left."""
        x = invert_cdf(self.left[rows], self.uniform(rows)[:, None]).squeeze(1)
        p = self.left[rows, x]
        self.left[rows, x] = 0.0
        return x, p


def recursive(
    pool: _Pool, rows: Int[Tensor, " r"], held: Int[Tensor, " r"], accepts: int, max_rejects: int
) -> tuple[Int[Tensor, " r"], Float[Tensor, " r"]]:
    """Token and log Z-hat of each row by the recursion E f = p(x) f(x) + (1 - p(x)) E[f | not x].

    With a held token the rejected set keeps its law, since E[Z-hat | R, token] = Z does not depend on R; only the
    further draw is tilted, by redrawing until one is accepted with probability Z-hat / (1 - p(R)).
    """
    token, z = held.clone(), torch.zeros(len(rows), dtype=torch.float64, device=rows.device)
    live = torch.arange(len(rows), device=rows.device)
    for rejected in range(max_rejects + 1):
        mass = pool.mass(rows[live])
        live, mass = live[mass > 0], mass[mass > 0]
        if not len(live):
            break
        x, p = pool.draw(rows[live])
        ok, kept = pool.test(rows[live], x), held[live] >= 0
        token[live] = torch.where(kept, held[live], x)
        if rejected == max_rejects:
            z[live] = torch.where(ok | kept, mass, 0.0)
            break
        free = ok & ~kept
        if free.any():
            z[live[free]] = _further(pool, rows[live[free]], mass[free], p[free])
        bound = ok & kept
        if bound.any():
            pool.left[rows[live[bound]], x[bound]] = p[bound]
            z[live[bound]] = _tilted(pool, rows[live[bound]], held[live[bound]], mass[bound])
        live = live[~ok]
    return token, z.log()


def _further(pool: _Pool, rows: Tensor, mass: Tensor, p: Tensor) -> Float[Tensor, " r"]:
    """1 - p(R) where one more token passes or nothing is left, else the accepted token's p."""
    z = mass.clone()
    some = (pool.mass(rows) > 0).nonzero().squeeze(1)
    if len(some):
        y, _ = pool.draw(rows[some])
        z[some] = torch.where(pool.test(rows[some], y), mass[some], p[some])
    return z


def _tilted(pool: _Pool, rows: Tensor, held: Tensor, mass: Tensor) -> Float[Tensor, " r"]:
    """The same given the token, in proportion to its value."""
    z, p = mass.clone(), pool.left[rows, held]
    pool.left[rows, held] = 0.0
    live = (pool.mass(rows) > 0).nonzero().squeeze(1)
    while len(live):
        y, q = pool.draw(rows[live])
        pool.left[rows[live], y] = q
        ok = pool.test(rows[live], y)
        low = ~ok & (pool.uniform(live) < p[live] / mass[live])
        z[live[low]] = p[live[low]]
        live = live[~ok & ~low]
    return z


def geometric(
    pool: _Pool, rows: Int[Tensor, " r"], held: Int[Tensor, " r"], accepts: int, max_rejects: int
) -> tuple[Int[Tensor, " r"], Float[Tensor, " r"]]:
    """Token and log Z-hat of each row from the counts of draws with replacement.

    With a held token, the first draw is that token: counts tilted by P(first accepted | counts) are the counts given
    that the first was accepted. Repeats of the likeliest token should not count against ``max_rejects``, which is
    why it is divided by 1 - max p, a bound known before anything is drawn.
    """
    token, live = held.clone(), torch.arange(len(rows), device=rows.device)
    most = (max_rejects / (1 - pool.left[rows].amax(1))).floor()
    a, r, yes, no = torch.zeros(4, len(rows), dtype=torch.float64, device=rows.device)  # counts, and mass of each kind
    kept = (held >= 0).nonzero().squeeze(1)
    yes[kept], a[kept] = pool.left[rows[kept], held[kept]], 1.0
    pool.left[rows[kept], held[kept]] = 0.0
    while len(live):
        outside = pool.mass(rows[live]) + yes[live]  # 1 - p(R)
        u = 1 - pool.uniform(rows[live])
        cap = most[live]
        again = (u.log() / (-outside.clamp_max(1)).log1p()).floor()  # draws of R before one outside it
        again = torch.where(no[live] > 0, torch.where(outside > 0, again, cap), 0.0)
        r[live] = (r[live] + again).minimum(cap)
        going = r[live] < cap
        live, outside = live[going], outside[going]
        repeat = pool.uniform(rows[live]) * outside < yes[live]
        a[live[repeat]] += 1
        new = live[~repeat]
        x, p = pool.draw(rows[new])
        ok = pool.test(rows[new], x)
        token[new] = torch.where(ok & (token[new] < 0), x, token[new])
        a[new], yes[new] = a[new] + ok, yes[new] + p * ok
        r[new], no[new] = r[new] + ~ok, no[new] + p * ~ok
        live = live[(a[live] < accepts) & (r[live] < most[live])]
    z = torch.where(a > 0, a.clamp_max(accepts - 1) / (a + r - 1).clamp_min(1), 0.0)
    return token, z.log()


ESTIMATORS = {"recursive": recursive, "geometric": geometric}
