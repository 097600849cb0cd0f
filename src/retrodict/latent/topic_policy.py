"""An amortized posterior of topics: a network reads a document's words in order and draws one topic for each.

    q(z_i = k | z_<i, w) = softmax over k of  log phi[k, w_i] + log(n_k + alpha + r_k) + g_psi(word i, state)_k

n_k counts the topics of the words before, r_k expects those of the words to come: r_k = sum_{j>i} u_jk with u_j
proportional to phi[k, w_j] (n_k + alpha + r_k), iterated twice from u_j proportional to phi[k, w_j] (a collapsed
variational update; Asuncion et al. 2009). With g = 0 the last word is exact, the first ones nearly. g is one network
for all topics (inputs of topic k, and their mean over topics), so topics may be renamed; and since it reads phi through
its inputs it follows an M-step that moves the topics: one q for all documents, and all phi like those it has met.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from retrodict.latent.lda import LDA, TopicSpace, padded, topic_counts, topic_space
from retrodict.numerics import NEG_INF
from retrodict.policies.base import FiniteStepper, over_menu
from retrodict.policies.layers import linear
from retrodict.protocols import Problems
from retrodict.records import Menu, Rollouts, Scores
from retrodict.rng import generator
from retrodict.spaces.vectors import AssignmentState

INPUTS = 6
"""Numbers that the network reads of each topic."""
LOOKS = 2
"""Updates of what the words to come are expected to be."""


class TopicPolicy(FiniteStepper):
    """q(z | w) of a topic model, whose present topics it reads. Trainable by every objective of ``objectives.table``.

    Args:
        model: whose topics and alpha q reads.
        problems: the documents; the model's by default.
        hidden: width of the network.
        seed: of its weights.
    """

    def __init__(self, model: LDA, problems: Problems | None = None, *, hidden: int = 32, seed: int = 0) -> None:
        self.model, self.problems = model, model.problems if problems is None else problems
        self.space: TopicSpace = topic_space(len(model.log_phi), self.problems)
        self.words = padded([p.row["words"] for p in self.problems], model.log_phi.shape[1])
        self.net: dict[str, Tensor] = {}
        gen = generator(seed)
        linear(self.net, "in", INPUTS, hidden, gen, gain=2**0.5)
        linear(self.net, "mix", 2 * hidden, hidden, gen, gain=2**0.5)
        linear(self.net, "out", hidden, 1, gen, gain=0.0)
        self.about: dict[str, Any] = {}
        self.updates = 0

    @property
    def version(self) -> str:
        """Moves with every update and with the topics."""
        return f"topics@{self.updates},{self.model.updates}"

    def parameters(self) -> Mapping[str, Tensor]:
        """The network's."""
        return self.net

    def settle(self) -> None:
        """Gradients are where they belong."""

    def refresh(self) -> None:
        """Nothing is copied; the version moves."""
        self.updates += 1

    def on(self, problems: Problems) -> TopicPolicy:
        """The same network on other documents."""
        new = TopicPolicy(self.model, problems, hidden=1)
        new.net, new.updates = self.net, self.updates
        return new

    # -- step by step: it carries no more than the problem ------------------------------------------------------------

    def start(self, problem: Int[Tensor, " b"]) -> Int[Tensor, " b"]:
        """The documents."""
        return problem

    def start_at(self, rollouts: Rollouts, upto: Int[Tensor, " b"]) -> Int[Tensor, " b"]:
        """The documents."""
        return rollouts.problem

    def step(self, c: Int[Tensor, " b"], s: AssignmentState, move: Tensor) -> Int[Tensor, " b"]:
        """The documents."""
        return c

    def take(self, c: Int[Tensor, " b"], index: Int[Tensor, " k"]) -> Int[Tensor, " k"]:
        """Rows ``index``."""
        return c[index]

    def log_probs(
        self, c: Int[Tensor, " b"], s: AssignmentState, menu: Menu, raw: bool = False
    ) -> tuple[Float[Tensor, "b v"], Float[Tensor, "b s"]]:
        """See ``protocols.Stepper``; it is no prior, so ``raw`` is the same."""
        before = topic_counts(s.values, s.values >= 0, self.space.n_moves)
        moves = self._logits(self.words[c], before, s.n.clamp_max(self.words.shape[1] - 1))
        return over_menu(moves, moves.new_zeros(len(moves), 1), menu)

    # -- all at once --------------------------------------------------------------------------------------------------

    def score(self, rollouts: Rollouts, raw: bool = False, grad: bool = False) -> Scores:
        """log q of all moves in one pass, differentiable where asked; the stop is forced."""
        b, t = rollouts.moves.shape
        inside = torch.arange(t) < rollouts.n[:, None]
        one_hot = F.one_hot(rollouts.moves, self.space.n_moves).double() * inside[:, :, None]
        words = self.words[rollouts.problem].repeat_interleave(t, 0)
        before = (one_hot.cumsum(1) - one_hot).flatten(0, 1)
        with torch.set_grad_enabled(grad):
            moves = self._logits(words, before, torch.arange(t).repeat(b)).log_softmax(1)
            taken = moves.view(b, t, -1).gather(2, rollouts.moves[:, :, None]).squeeze(2)
            log_q = torch.where(inside, taken, 0.0)
        ends = torch.arange(t + 1) == rollouts.n[:, None]
        return Scores(log_q, torch.where(ends, 0.0, NEG_INF)[:, :, None])

    def _logits(
        self, words: Int[Tensor, "b n"], before: Float[Tensor, "b k"], at: Int[Tensor, " b"]
    ) -> Float[Tensor, "b k"]:
        """Of the topic of word ``at``, before normalisation; ``before`` counts the topics of the words before it."""
        w, alpha = self.net, self.model.alpha
        alone = self.model.log_phi.T[words.clamp_min(0)].softmax(2)
        ahead = ((words >= 0) & (torch.arange(words.shape[1]) > at[:, None]))[:, :, None]
        here = alone[torch.arange(len(at)), at].log()
        first = after = (alone * ahead).sum(1)
        for _ in range(LOOKS):
            u = alone * (before + alpha + after)[:, None]
            after = (u / u.sum(2, keepdim=True) * ahead).sum(1)
        base = here + (before + after + alpha).log()
        left = after.sum(1, keepdim=True).expand_as(after)
        told = torch.stack([here, (before + alpha).log(), (first + alpha).log(), (after + alpha).log(),
                            base.log_softmax(1), (1 + left).log()], 2).float()  # fmt: skip
        x = F.relu(F.linear(told, w["in.weight"], w["in.bias"]))
        x = torch.cat([x, x.mean(1, keepdim=True).expand_as(x)], 2)
        x = F.relu(F.linear(x, w["mix.weight"], w["mix.bias"]))
        return base.float() + F.linear(x, w["out.weight"], w["out.bias"]).squeeze(2)
