"""The proposal that a twist induces, trainable: q(v | x_1..t) proportional to p(v | x_1..t) psi(x_1..t v).

Hidden states carry no gradient: they are computed once (:class:`Seen`), and only the head is run again when it has
moved. What is seen may be cut to the ``top`` tokens of each prefix, which then stand for the rest as well: a bias of
the training and never of a weight.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from retrodict.guides.twist import TwistGuide
from retrodict.numerics import NEG_INF, log_prob_of
from retrodict.policies.guided import GuidedPolicy
from retrodict.protocols import Problems
from retrodict.records import FREE, PAD, Rollouts, Scores


@dataclass(frozen=True)
class Seen:
    """What the head reads of every prefix of recorded rows, and what it is multiplied by.

    Attributes:
        problem: of each row.
        x: hidden states.
        left: moves that remain.
        automaton: state of the hard constraint's automaton.
        ids: the tokens kept of each prefix, and ``move`` their log p^beta (hard guide and menu included).
        stop: log p^beta of each stop. ``price`` is that at the model's own price, whatever the space says, and ``hard``
            the constraint's part: what a stop would be worth under another length limit.
        taken: log p^beta of the move taken.
    """

    problem: Int[Tensor, " b"]
    x: Float[Tensor, "b t1 e"]
    left: Int[Tensor, "b t1"]
    automaton: Int[Tensor, "b t1"]
    ids: Int[Tensor, "b t1 k"] | None
    move: Float[Tensor, "b t1 k"]
    stop: Float[Tensor, "b t1 s"]
    price: Float[Tensor, "b t1 s"]
    hard: Float[Tensor, "b t1 s"]
    taken: Float[Tensor, "b t"]

    def take(self, index: Tensor, t: int | None = None) -> Seen:
        """Rows ``index``, up to t moves."""
        whole = {f.name: getattr(self, f.name) for f in fields(self)}
        parts: dict[str, Any] = {k: v if v is None else v[index] for k, v in whole.items()}
        if t is not None:
            wide = {k: v[:, : t + (k != "taken")] for k, v in parts.items() if v is not None and v.dim() > 1}
            parts |= wide
        return Seen(**parts)


class TwistedPolicy(GuidedPolicy):
    """The prior bent by a twist. Trainable: its parameters are the head's."""

    guide: TwistGuide

    def __init__(self, guide: TwistGuide, top: int | None = None) -> None:
        super().__init__(guide.prior, guide)
        self.top, self.updates, self.about = top, 0, {}
        self.about: dict[str, object]

    @property
    def version(self) -> str:
        """The model's fingerprint; it moves with every step of training."""
        return f"{self.guide.lm.version}/twist@{self.updates}"

    def on(self, problems: Problems) -> TwistedPolicy:
        """The same head on other problems."""
        return TwistedPolicy(self.guide.on(problems), self.top)

    def parameters(self) -> dict[str, Tensor]:
        """The head's."""
        return dict(self.guide.head.parameters())

    def settle(self) -> None:
        """Gradients are where they belong."""

    def refresh(self) -> None:
        """Nothing is copied; the version moves."""
        self.updates += 1

    @torch.no_grad()
    def seen(self, rollouts: Rollouts) -> Seen:
        """One teacher-forced pass of the frozen model over recorded rows."""
        guide, space, r = self.guide, self.space, rollouts
        t = r.moves.shape[1]
        x = guide.states(r)
        hard = None if guide.inner is None else guide.inner.start(r.problem)
        left, automaton, ids, move, stop, price, ends, taken = [], [], [], [], [], [], [], []
        for i in range(t + 1):
            s = space.replay(r, r.n.clamp_max(i))
            log_p = log_prob_of(guide.logits(x[:, i]))
            log_move, log_stop = guide.allowed(log_p, s, space.menu(s), hard)
            left.append(guide.left(s))
            automaton.append(guide.state_of(hard, r.problem))
            stop.append(log_stop)
            price.append(guide.beta * space.raw_stop(log_p))
            end = None if guide.inner is None else guide.inner.log_end(hard, s)
            ends.append(torch.zeros_like(log_stop) if end is None else end.to(log_stop).expand_as(log_stop))
            if i < t:
                taken.append(log_move.gather(1, r.moves[:, i : i + 1]).squeeze(1))
                hard = None if guide.inner is None else guide.inner.step(hard, s, r.moves[:, i])
            if self.top is not None and self.top < log_move.shape[1]:
                mass = log_move.logsumexp(1, keepdim=True)
                log_move, kept = log_move.topk(self.top, 1)
                rest = mass - log_move.logsumexp(1, keepdim=True)
                log_move = log_move + torch.where(mass > NEG_INF, rest, 0.0)
                ids.append(kept)
            move.append(log_move)
        first = torch.stack(taken, 1) if t else log_move.new_zeros(len(r), 0)
        some = torch.stack(ids, 1) if ids else None
        names = ("left", "automaton", "move", "stop", "price", "hard")
        lists = (left, automaton, move, stop, price, ends)
        whole: dict[str, Any] = {k: torch.stack(y, 1) for k, y in zip(names, lists, strict=True)}
        return Seen(problem=r.problem, x=x, ids=some, taken=first, **whole)

    def score(self, rollouts: Rollouts, raw: bool = False, grad: bool = False) -> Scores:
        """log q, log psi and one look ahead of every recorded prefix; ``raw`` is the prior's own."""
        if raw:
            return self.base.score(rollouts, raw=True)
        with torch.set_grad_enabled(grad):
            return self.scores(self.seen(rollouts), rollouts)

    def scores(self, f: Seen, r: Rollouts) -> Scores:
        """Scores of rows from what was seen of them."""
        guide, (b, t1) = self.guide, f.left.shape
        level = guide.level[r.problem].to(f.move)[:, None, None]
        about = guide.about[r.problem, None].expand(b, t1, -1).flatten(0, 1)
        ids = None if f.ids is None else f.ids.flatten(0, 1)
        at, x, left = f.automaton.flatten(), f.x.flatten(0, 1), f.left.flatten()
        after = None
        if guide.automaton is not None:
            after = (guide.automaton[at] if ids is None else guide.automaton[at[:, None], ids]).long()
        psi, end = guide.head(x, left, at, about, ids, after)
        psi, end = (level + guide.power * y.view(b, t1, -1).to(f.move) for y in (psi, end))
        every = torch.cat([f.move + psi, f.stop + end], -1)
        dead = (every == NEG_INF).all(-1)  # the constraint cannot be met from there: whatever q says, its weight is 0
        ahead = torch.where(dead[:, :, None], 0.0, every).logsumexp(-1)
        mine = self._taken(f, r, about, level)
        inside = torch.arange(t1, device=r.n.device) <= r.n[:, None]
        log_q = torch.where(r.kind == FREE, f.taken + mine - ahead[:, :-1], 0.0)
        log_stop = torch.where(inside[:, :, None], f.stop + end - ahead[:, :, None], NEG_INF)
        row = torch.arange(b, device=r.n.device)
        symbol = torch.cat([torch.where(r.kind == PAD, 0.0, mine), mine.new_zeros(b, 1)], 1)
        symbol = symbol.index_put((row, r.n), end[row, r.n, r.stop])
        low = level[:, :, 0] - 0.9 * guide.head.bound
        log_ahead = torch.where(inside, torch.where(dead, low, ahead), 0.0).detach()
        return Scores(log_q, log_stop, log_psi=symbol, log_ahead=log_ahead)

    def _taken(self, f: Seen, r: Rollouts, about: Tensor, level: Tensor) -> Float[Tensor, "b t"]:
        """log psi of the moves taken."""
        guide, (b, t) = self.guide, r.moves.shape
        if not t:
            return f.taken
        at, ids = f.automaton[:, :-1].flatten(), r.moves.flatten()[:, None]
        after = None if guide.automaton is None else guide.automaton[at[:, None], ids].long()
        about = about.view(b, t + 1, -1)[:, :-1].flatten(0, 1)
        psi, _ = guide.head(f.x[:, :-1].flatten(0, 1), f.left[:, :-1].flatten(), at, about, ids, after)
        return level[:, :, 0] + guide.power * psi.view(b, t).to(f.taken)
