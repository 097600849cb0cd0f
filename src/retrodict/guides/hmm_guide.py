"""Exact look-ahead with an HMM: how likely is it that the rest satisfies the constraint, stops in time, explains Y?

    psi_t(x_1..t) = p_HMM(the rest is accepted, stops within the m = L - t moves left, then u | x_1..t)
                  = sum_z f_t(z) V_m(s_t, z)

with f_t the belief after x_1..t (prompt included), s_t the automaton's state, u the evidence's tokens, and V by the
backward recursion (GeLaTo, Zhang et al. 2023; Ctrl-G, Zhang et al. 2024), over classes c of tokens that the automaton
cannot tell apart, with T(z, c) the mass of B(z, .) on the legal tokens of c:

    V_m(s, z) = sum_k [stop k allowed and accepted in s] e_k(z) + sum_z' A(z, z') sum_c T(z', c) V_m-1(next(s, c), z')
    V_0(s, z) = [the stop that the limit forces is accepted in s] e(z)

e_k(z) is p_HMM(stop k, then u | z): u follows the text of a stop that has one, and replaces an end of sequence (then
both prices are paid). A stop forced for nothing (limit ``force``) has price one. The masses are HMM's own, lost mass
(illegal tokens, broken words) included, as the target's prior counts it: psi is the optimal twist where the model *is*
the HMM. Elsewhere it is a twist like any other: what it favours is paid for in weights, so evidence and law stay
unbiased, which a guide that only bends logits (Ctrl-G) gives up.

psi is zero only where the automaton cannot be satisfied in the moves left; elsewhere it is floored.

Where the model's own next-token probabilities are at hand (the sampler steps the guide beside the prior's policy), psi
of the present state looks one token further for nothing:

    psi_t(x_1..t) = sum_v p(v | x_1..t) psi_HMM(x_1..t v) + sum_k p(stop k | x_1..t) p_HMM(u | x_1..t, stop k)

which is the normaliser of the next proposal, so that resampling sees it one step earlier.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from retrodict.errors import InputError
from retrodict.guides.base import BaseGuide
from retrodict.guides.dfa import DFAGuide
from retrodict.guides.hmm import HMM
from retrodict.numerics import NEG_INF
from retrodict.protocols import Problems
from retrodict.records import Rollouts
from retrodict.spaces.limits import free_stop, may_stop
from retrodict.spaces.strings import Strings, StringState

TINY = 1e-30
"""What psi is floored at, as a share of its table's largest entry, where it is not a hard zero."""


@dataclass
class HMMCarry:
    """Belief and automaton state of each row.

    ``seen`` is the prior's carry where its pass is read; ``look`` what was made of it: log psi of every next token and
    of the state itself.
    """

    belief: Float[Tensor, "b h"]
    state: Int[Tensor, " b"]
    seen: Any = None
    look: tuple[Float[Tensor, "b v"], Float[Tensor, " b"]] | None = None


class HMMGuide(BaseGuide):
    """psi from an HMM, for the strings of ``space``.

    Args:
        hmm: over the same tokens (``hmm.check(lm)``).
        space: its limit, window and stops are what is looked ahead to.
        problems: their contexts are read by the HMM; their evidence is the suffix u.
        automaton: the target's hard constraint, or None.
        power: exponent of psi.
        prior: the policy whose passes are read (None: psi is the HMM's alone). Its carry has ``log_p`` and ``rows``.
        level: log psi of each problem's empty string; None leaves it to the HMM. An HMM prices a suffix far below what
            the model does, and what is unfinished must stand at the height of what has stopped.
    """

    def __init__(
        self,
        hmm: HMM,
        space: Strings,
        problems: Problems,
        automaton: DFAGuide | None = None,
        power: float = 1.0,
        prior: Any = None,
        level: Float[Tensor, " m"] | None = None,
    ) -> None:
        if space.stops.predicate is not None or space.max_free != space.max_moves:
            raise InputError("an HMM looks ahead to stop tokens; predicate stops and tools are not known to it")
        if hmm.vocab_size != space.vocab_size:
            raise InputError(f"an HMM over {hmm.vocab_size} tokens cannot guide strings over {space.vocab_size}")
        self.hmm, self.space, self.problems, self.automaton, self.power = hmm, space, problems, automaton, power
        self.prior, self.level = prior, level
        self.device, self.dtype = hmm.emission.device, hmm.emission.dtype
        legal = space.legal_ids(self.device)
        if automaton is None:
            self.next = torch.zeros(1, 1, dtype=torch.long, device=self.device)
            of = torch.zeros(space.vocab_size, dtype=torch.long, device=self.device)
            self.ends = torch.ones(1, space.n_stops, dtype=torch.bool, device=self.device)
        else:
            self.next, of, self.ends = automaton.tokens.next, automaton.tokens.of, automaton.tokens.ends
        self.of = of
        # columns of B sorted by class, so that a class is a slice: one matrix product for each
        self.order = of.argsort(stable=True)
        self.place = self.order.argsort()
        self.columns = (hmm.emission * legal)[:, self.order].contiguous()
        self.sizes = torch.bincount(of, minlength=self.next.shape[1]).tolist()
        self.mass = torch.stack([x.sum(1) for x in self.columns.split(self.sizes, 1)], 1)  # T [h, class]
        # problems with the same evidence share tables
        rows: dict[tuple[int, ...], int] = {}
        self.table_of = torch.tensor([rows.setdefault(p.evidence, len(rows)) for p in problems], device=self.device)
        made = [self._table(u) for u in rows]
        self.tables = torch.stack([t for t, _ in made])  # [u, left, state, h]
        self.scale = torch.stack([s for _, s in made])  # [u, left], log
        self.stops = torch.stack([self._after_stop(u)[1] for u in rows])  # [u, h, s]
        self.roots = hmm.read([p.context for p in problems])
        root = torch.einsum("mh,mh->m", self.roots, self.tables[self.table_of, -1, 0]).clamp_min(TINY).double().log()
        root = self.power * (root + self.scale[self.table_of, -1])
        self.shift = torch.zeros_like(root) if level is None else level.double() - root

    def on(self, problems: Problems) -> HMMGuide:
        """The same guide on other problems."""
        prior = None if self.prior is None else self.prior.on(problems)
        if self.level is not None:
            raise InputError("this guide's level is that of its problems; use with_hmm on the target of the others")
        return HMMGuide(self.hmm, self.space, problems, self.automaton, self.power, prior)

    # -- tables ---------------------------------------------------------------------------------------------------

    def _suffix(self, u: Sequence[int]) -> Float[Tensor, " h"]:
        """p(u | z), z the state before u's first token."""
        value = self.hmm.initial.new_ones(self.hmm.states)
        for token in reversed(u):
            value = self.hmm.transition @ (self.hmm.emission[:, token] * value)
        return value

    def _after_stop(self, u: Sequence[int]) -> tuple[Float[Tensor, "h s"], Float[Tensor, "h s"]]:
        """(p(stop k, then u | z), p(u | z, stop k)): what paid and free stops are worth."""
        after, stops = self._suffix(u), self.space.stops
        if not stops.acts:
            return after[:, None], after[:, None]
        step, emit = self.hmm.transition, self.hmm.emission[:, list(stops.ids)]
        price = step @ emit
        if not stops.in_text:  # u replaces the end of sequence
            return price.sum(1, keepdim=True) * after[:, None], after[:, None]
        both = step @ (emit * after[:, None])
        return both, both / price.clamp_min(torch.finfo(self.dtype).tiny)

    def _table(self, u: Sequence[int]) -> tuple[Float[Tensor, "left state h"], Float[Tensor, " left"]]:
        """V_m for m = 0..L, each divided by its largest entry, whose log is beside it."""
        space, top = self.space, self.space.max_moves
        paid, free = self._after_stop(u)
        last = (free if free_stop(space.limit) else paid)[:, 0]
        v = self.ends[:, :1] * last
        out, logs, log = [], [], paid.new_zeros((), dtype=torch.float64)
        for left in range(top + 1):
            if left:
                v = self._back(v) @ self.hmm.transition.T
                can = may_stop(space.limit, torch.tensor(top - left), space.min_moves, top)
                if space.stops.acts and bool(can):
                    v = v + (self.ends.to(paid.dtype) @ paid.T) * torch.exp(-log).to(paid.dtype)
            biggest = v.amax().clamp_min(torch.finfo(v.dtype).tiny)
            v, log = v / biggest, log + biggest.double().log()
            out.append(v)
            logs.append(log)
        return torch.stack(out), torch.stack(logs)

    def _back(self, v: Float[Tensor, "state h"]) -> Float[Tensor, "state h"]:
        """sum_c T(z, c) v(next(s, c), z), a few states at a time."""
        rows = max(1, (1 << 22) // (self.next.shape[1] * v.shape[1]))
        return torch.cat([torch.einsum("sch,hc->sh", v[part], self.mass) for part in self.next.split(rows)])

    # -- the guide ------------------------------------------------------------------------------------------------

    def start(self, problem: Int[Tensor, " b"]) -> HMMCarry:
        """The belief after each problem's context."""
        return HMMCarry(self.roots[problem], torch.zeros_like(problem))

    def start_at(self, rollouts: Rollouts, upto: Int[Tensor, " b"]) -> HMMCarry:
        """Run the first ``upto`` moves."""
        c = self.start(rollouts.problem)
        for t in range(int(upto.max()) if len(upto) else 0):
            new, on = self._moved(c, rollouts.moves[:, t]), upto > t
            c = HMMCarry(torch.where(on[:, None], new.belief, c.belief), torch.where(on, new.state, c.state))
        return c

    def step(self, c: HMMCarry, s: StringState, move: Int[Tensor, " b"]) -> HMMCarry:
        """Filter one token."""
        return self._moved(c, move)

    def _moved(self, c: HMMCarry, move: Int[Tensor, " b"]) -> HMMCarry:
        return HMMCarry(self.hmm.step(c.belief, move)[0], self.next[c.state, self.of[move]])

    def take(self, c: HMMCarry, index: Tensor) -> HMMCarry:
        """Rows ``index``."""
        look = None if c.look is None else (c.look[0][index], c.look[1][index])
        return HMMCarry(c.belief[index], c.state[index], None, look)

    def reads(self, policy: Any) -> bool:
        """Whether a policy's pass is the prior's own."""
        prior, lm = self.prior, getattr(policy, "lm", None)
        return prior is not None and lm is not None and policy.problems is self.problems and (
            lm.version == prior.lm.version and policy.reads == prior.reads)  # fmt: skip

    def see(self, c: HMMCarry, carry: Any) -> HMMCarry:
        """Keep the prior's carry, for one look further."""
        return replace(c, seen=carry)

    def _alive(self, left: Tensor, state: Tensor) -> Bool[Tensor, "..."]:
        """Whether the automaton can still be satisfied."""
        if self.automaton is None:
            return torch.ones_like(state, dtype=torch.bool)
        return self.automaton.alive[left, state]

    def log_psi(self, c: HMMCarry, s: StringState) -> Float[Tensor, " b"]:
        """See the module's formulas: one look further where the prior's pass is seen."""
        if c.seen is not None:
            return self._look(c, s)[1]
        left, table = self.space.max_moves - s.n, self.table_of[s.problem]
        value = (c.belief * self.tables[table, left, c.state]).sum(1).clamp_min(TINY).double().log()
        psi = self.power * (value + self.scale[table, left]) + self.shift[s.problem]
        return torch.where(self._alive(left, c.state), psi, NEG_INF)

    def log_next(self, c: HMMCarry, s: StringState) -> Float[Tensor, "b v"]:
        """log psi after every token."""
        return self._next(c, s) if c.seen is None else self._look(c, s)[0]

    def _look(self, c: HMMCarry, s: StringState) -> tuple[Float[Tensor, "b v"], Float[Tensor, " b"]]:
        """log psi of every next token, and of the present state by one look further; made once a state."""
        if c.look is None:
            log_p = c.seen.log_p if c.seen.tidy else c.seen.log_p[c.seen.rows]
            after = self._next(c, s)
            stop = self.space.log_p_stops(self.space.raw_stop(log_p), s) + self.log_end(c, s)
            move = (log_p + after).logsumexp(1)
            full = s.n >= self.space.max_moves
            psi = torch.logaddexp(move.masked_fill(full, NEG_INF).double(), stop.logsumexp(1).double())
            scale = self.scale[self.table_of[s.problem], self.space.max_moves - s.n]
            floor = self.power * (scale + math.log(TINY)) + self.shift[s.problem]
            alive = self._alive(self.space.max_moves - s.n, c.state)
            c.look = after, torch.where(alive, torch.maximum(psi, floor), NEG_INF)
        return c.look

    def _next(self, c: HMMCarry, s: StringState) -> Float[Tensor, "b v"]:
        """log psi of the HMM after every token: sum_z f(z) B(z, x) V(next, z) / sum_z f(z) B(z, x), f the prediction.

        (Illegal tokens, which no policy proposes, get a number that means nothing.)
        """
        left = (self.space.max_moves - s.n - 1).clamp_min(0)
        table = self.table_of[s.problem]
        ahead = c.belief @ self.hmm.transition
        to = self.next[c.state]  # [b, class]
        value = ahead[:, None] * self.tables[table[:, None], left[:, None], to]  # [b, class, h]
        parts = self.columns.split(self.sizes, 1)
        top = torch.cat([value[:, i] @ part for i, part in enumerate(parts)], 1)
        ratio = top.div_((ahead @ self.columns).clamp_min_(torch.finfo(top.dtype).tiny))
        log = ratio.clamp_min_(TINY).log_().add_(self.scale[table, left, None].to(top.dtype))
        if self.power != 1.0:
            log.mul_(self.power)
        log.add_(self.shift[s.problem, None].to(log.dtype))
        dead = ~self._alive(left[:, None], to)
        if dead.any():
            log.masked_fill_(dead[:, self.of[self.order]], NEG_INF)
        return log[:, self.place]

    def log_end(self, c: HMMCarry, s: StringState) -> Float[Tensor, "b s"]:
        """log p_HMM(u | x_1..t, stop k) (0 without evidence), -inf where the automaton does not accept."""
        value = torch.einsum("bh,bhs->bs", c.belief, self.stops[self.table_of[s.problem]])
        log = self.power * value.clamp_min(torch.finfo(value.dtype).tiny).log() + self.shift[s.problem, None].to(value)
        return torch.where(self.ends[c.state], log, NEG_INF)
