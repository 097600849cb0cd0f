"""Masked language models as policies over ``spaces.masked``: where to look next, and which token is there.

    q(i, a | s) = q(i | s) q(a | i, s),      i masked in s

A network reads the sequence with its masks (what the space lets it see) and gives logits of a token at every position.
``order="uniform"`` draws the position uniformly: the reverse process of absorbing-state diffusion, and the any-order
model of Uria et al. 2014 and Hoogeboom et al. 2022 (arXiv:2110.02037). ``order="learned"`` has a logit a position too.

Which one a posterior needs. Its path measure is p(path) r(x) / Z, whose next position has probability proportional to
the expected reward after looking there. That is uniform only where the prior's conditionals agree between orders, so
that E[r | s, i] does not depend on i; a trained network's do not quite, and a uniform order then leaves a residual. The
learned order, whose logits start at 0, can be exact. The prior's own order is uniform, and its log p counts it.

Tokens that a problem gives (``Masked.given``) are read from the beginning by q; ``raw`` scores are the model's own,
which reads them only once they are revealed.
"""

from __future__ import annotations

from typing import Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from retrodict.numerics import NEG_INF
from retrodict.policies.layers import MLP
from retrodict.policies.stateless import StatelessPolicy
from retrodict.protocols import Problems
from retrodict.records import Menu, Rollouts, Scores
from retrodict.spaces.masked import Masked, MaskedState

Order = Literal["uniform", "learned"]


@runtime_checkable
class Reader(Protocol):
    """From sequences with masks to logits of tokens at every position, and of the positions themselves."""

    parameters: dict[str, Tensor]

    def __call__(self, seen: Int[Tensor, "u l"]) -> tuple[Float[Tensor, "u l v"], Float[Tensor, "u l"]]: ...


class MaskedMLP:
    """A multi-layer perceptron on the one-hots of all tokens; logits of positions start at 0."""

    def __init__(self, length: int, vocab: int, hidden: int = 128, layers: int = 2, seed: int = 0) -> None:
        self.length, self.vocab = length, vocab
        self.body = MLP(length * (vocab + 1), length * vocab + length, hidden, layers, seed)
        with torch.no_grad():
            for name in ("out.weight", "out.bias"):
                self.body.parameters[name][length * vocab :] = 0.0
        self.parameters = self.body.parameters

    def __call__(self, seen: Int[Tensor, "u l"]) -> tuple[Float[Tensor, "u l v"], Float[Tensor, "u l"]]:
        """Logits of tokens, and of positions."""
        out = self.body(F.one_hot(seen, self.vocab + 1).flatten(1).float())
        return out[:, : -self.length].unflatten(1, (self.length, self.vocab)), out[:, -self.length :]

    def copy(self) -> MaskedMLP:
        """Another network with the same weights."""
        new = MaskedMLP(self.length, self.vocab, len(self.parameters["0.bias"]), self.body.layers)
        with torch.no_grad():
            for name, x in new.parameters.items():
                x.copy_(self.parameters[name])
        return new


class MaskedPolicy(StatelessPolicy):
    """A reader of masked sequences as a policy. Trainable.

    Args:
        space: where the sequences live.
        problems: the questions; what a problem gives is the space's to know.
        net: the reader; its parameters are the policy's.
        order: how positions are drawn, see the head of this file.
    """

    def __init__(self, space: Masked, problems: Problems, net: Reader, order: Order = "uniform") -> None:
        self.space: Masked = space
        self.problems, self.net = problems, net
        self.order: Order = order
        super().__init__()

    def on(self, problems: Problems) -> MaskedPolicy:
        """The same reader on other problems."""
        return MaskedPolicy(self.space.on(problems), problems, self.net, self.order)

    def log_probs(
        self, c: Int[Tensor, " b"], s: MaskedState, menu: Menu, raw: bool = False
    ) -> tuple[Float[Tensor, "b v"], Float[Tensor, "b 1"]]:
        """See ``protocols.Stepper``; ``raw`` leaves out what the problem gives."""
        where, what = self._read(s, raw)
        whole = (s.tokens != self.space.mask).all(1)
        return (where[:, :, None] + what).flatten(1), torch.where(whole, 0.0, NEG_INF)[:, None].to(where.dtype)

    def _read(self, s: MaskedState, raw: bool) -> tuple[Float[Tensor, "b l"], Float[Tensor, "b l v"]]:
        """log q of the next position (-inf where nothing is masked), and of the token at each."""
        hidden, given = s.tokens == self.space.mask, self.space.observed_of(s.problem)
        reads = s.seen if raw else torch.where(s.seen == self.space.mask, given, s.seen)
        what, where = self.net(reads)
        if not raw:
            fits = (given == self.space.mask)[:, :, None] | (given[:, :, None] == torch.arange(self.space.vocab))
            what = what.masked_fill(~fits, NEG_INF)
        return self._positions(where, hidden), what.log_softmax(2)

    def _positions(self, logits: Float[Tensor, "b l"], hidden: Bool[Tensor, "b l"]) -> Float[Tensor, "b l"]:
        if self.order == "uniform":
            log_q = -hidden.sum(1, keepdim=True).clamp_min(1).to(logits.dtype).log()
        else:
            log_q = logits - torch.where(hidden, logits, NEG_INF).logsumexp(1, keepdim=True).clamp_min(-1e30)
        return torch.where(hidden, log_q, NEG_INF)

    # -- all at once --------------------------------------------------------------------------------------------------

    def score(self, rollouts: Rollouts, raw: bool = False, grad: bool = False) -> Scores:
        """log q of all moves: one pass over all prefixes of the rows, differentiable where asked. Stops are forced."""
        b, t = rollouts.moves.shape
        before = torch.arange(t).repeat(b)
        s = self.space.after(rollouts.problem.repeat_interleave(t), rollouts.moves.repeat_interleave(t, 0), before)
        move, row = rollouts.moves.flatten(), torch.arange(b * t)
        with torch.set_grad_enabled(grad):
            where, what = self._read(s, raw)
            at = move // self.space.vocab
            log_q = (where[row, at] + what[row, at, move % self.space.vocab]).view(b, t)
        ends = torch.arange(t + 1) == t
        return Scores(log_q, torch.where(ends, 0.0, NEG_INF).to(log_q.dtype).repeat(b, 1)[:, :, None])
