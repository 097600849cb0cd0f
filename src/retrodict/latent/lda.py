"""Topic models: which topic each word of a document came from (latent Dirichlet allocation; Blei, Ng and Jordan 2003).

    theta ~ Dirichlet(alpha, ..., alpha),      z_i | theta ~ theta,      w_i | z_i ~ phi[z_i],      i = 1..n

The latent is z alone; theta is integrated out (Griffiths and Steyvers 2004, eq. 2, 3), n_k = how often z is k:

    log p(z, w | phi) = log G(K alpha) - log G(n + K alpha) + sum_k [log G(n_k + alpha) - log G(alpha)]
                        + sum_i log phi[z_i, w_i]                                                  (G: gamma function)

Its first line is an urn, p(z_i = k | z_<i) = (n_k + alpha) / (i - 1 + K alpha): the prior, a process over the space.

Exact sums. p(z) depends on z through its counts only, and with r_ik = phi[k, w_i] / sum_k phi[k, w_i]

    log p(w | phi) = sum_i log sum_k phi[k, w_i]  +  log E[p(z)],      z_i ~ r_i independently,

so a recursion over the distribution of the counts (a Poisson multinomial) gives it in O(n K (n + 1)^(K - 1)) steps and
not K^n. Its gradient by log phi[k, v] is the posterior's expected count of word v under topic k (Fisher's identity):
the exact E-step. M is closed: phi[k, v] proportional to that count + beta, which raises log p(w | phi) + beta sum log
phi, a Dirichlet(1 + beta) prior's mode.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from retrodict.errors import InputError
from retrodict.numerics import log_mean_exp, sample_categorical
from retrodict.particles import Particles
from retrodict.policies.base import FiniteStepper, over_menu
from retrodict.protocols import Problems
from retrodict.records import CHOOSE, MUST_STOP, Menu, Problem, Rollouts
from retrodict.rng import generator
from retrodict.spaces.vectors import Assignments, AssignmentState
from retrodict.targets.algebra import Target
from retrodict.targets.prior import Prior
from retrodict.training.learn import weighted_rows

Documents = Sequence[Sequence[int]]
MOST_COUNTS = 50_000
"""Vectors of counts up to which sums run over all of them."""
CHUNK = 100
"""Documents at once in a recursion over counts."""


@dataclass(frozen=True)
class TopicSpace(Assignments):
    """One topic for each word of a document; documents differ in length. ``lengths`` has one number a problem."""

    lengths: tuple[int, ...] = ()

    def menu(self, s: AssignmentState) -> Menu:
        """Any topic for the next word; the stop after the document's last."""
        whole = s.n == torch.tensor(self.lengths)[s.problem]
        return Menu(torch.ones(len(s.n), self.n_moves, dtype=torch.bool), whole, torch.where(whole, MUST_STOP, CHOOSE))

    def on(self, problems: Problems) -> TopicSpace:
        """The space of other documents."""
        return topic_space(self.n_moves, problems)


def topic_space(topics: int, problems: Problems) -> TopicSpace:
    """The topics of the words of each problem's document."""
    lengths = tuple(len(p.row["words"]) for p in problems)
    return TopicSpace((topics,) * max(lengths), lengths=lengths)


def document_problems(documents: Documents) -> list[Problem]:
    """One problem for each document: its words, as numbers, in ``row["words"]``."""
    return [Problem((), row={"words": tuple(int(w) for w in d)}, name=str(i)) for i, d in enumerate(documents)]


def padded(documents: Documents, words: int) -> Int[Tensor, "m n"]:
    """Words of documents, -1 past the end. Raises InputError for an empty document and for a word out of range."""
    out = torch.full((len(documents), max((len(d) for d in documents), default=0)), -1)
    for i, d in enumerate(documents):
        if not len(d):
            raise InputError(f"document {i} has no words; leave it out")
        wrong = [w for w in d if not 0 <= w < words]
        if wrong:
            raise InputError(f"document {i} holds word {wrong[0]}, and the {words} words are numbered from 0")
        out[i, : len(d)] = torch.as_tensor(d)
    return out


def topic_counts(z: Int[Tensor, "b n"], inside: Tensor, topics: int) -> Float[Tensor, "b k"]:
    """How often each topic stands in each row."""
    return torch.zeros(len(z), topics, dtype=torch.float64).scatter_add_(1, z.clamp_min(0), inside.double())


def log_urn(counts: Float[Tensor, "... k"], alpha: float) -> Float[Tensor, "..."]:
    """log p(z) of assignments with these counts."""
    n, k = counts.sum(-1), counts.shape[-1]
    each = (torch.lgamma(counts + alpha) - math.lgamma(alpha)).sum(-1)
    return each + math.lgamma(k * alpha) - torch.lgamma(n + k * alpha)


class Urn(FiniteStepper):
    """p(z): a topic in proportion to how often it was taken, plus alpha. It reads no words."""

    def __init__(self, space: TopicSpace, problems: Problems, alpha: float) -> None:
        self.space, self.problems, self.alpha, self.version = space, problems, alpha, f"urn {alpha:g}"

    def on(self, problems: Problems) -> Urn:
        """The same for documents of other lengths."""
        return Urn(self.space.on(problems), problems, self.alpha)

    def start(self, problem: Int[Tensor, " b"]) -> Int[Tensor, " b"]:
        """It carries nothing."""
        return problem

    def start_at(self, rollouts: Rollouts, upto: Int[Tensor, " b"]) -> Int[Tensor, " b"]:
        """It carries nothing."""
        return rollouts.problem

    def step(self, c: Tensor, s: AssignmentState, move: Tensor) -> Tensor:
        """It carries nothing."""
        return c

    def take(self, c: Tensor, index: Tensor) -> Tensor:
        """Rows ``index``."""
        return c[index]

    def log_probs(
        self, c: Tensor, s: AssignmentState, menu: Menu, raw: bool = False
    ) -> tuple[Float[Tensor, "b v"], Float[Tensor, "b s"]]:
        """(n_k + alpha) over their sum; the menu takes nothing away, so ``raw`` is the same."""
        moves = (topic_counts(s.values, s.values >= 0, self.space.n_moves) + self.alpha).log()
        return over_menu(moves, moves.new_zeros(len(moves), 1), menu)


@dataclass(frozen=True, eq=False)
class WordTerm:
    """log p(w | z, phi) = sum_i log phi[z_i, w_i] of finished assignments."""

    log_phi: Float[Tensor, "k v"]
    problems: Problems
    version: str
    name: str = "likelihood"
    noise: str = "none"
    prefixes: bool = False

    def on(self, problems: Problems) -> WordTerm:
        """The same topics on other documents."""
        return replace(self, problems=problems)

    def __call__(self, rollouts: Rollouts, every_prefix: bool = False) -> Float[Tensor, " b"]:
        """``[b]``; a prefix is no object."""
        words = padded([p.row["words"] for p in self.problems], self.log_phi.shape[1])[rollouts.problem]
        t = rollouts.moves.shape[1]
        value = self.log_phi[rollouts.moves, words[:, :t].clamp_min(0)]
        return torch.where(torch.arange(t) < rollouts.n[:, None], value, 0.0).sum(1)


def topic_target(log_phi: Float[Tensor, "k v"], alpha: float, problems: Problems, version: str = "phi") -> Target:
    """log gamma(z) = log p(z, w | phi) for each document. Raises InputError for a word that no topic has."""
    padded([p.row["words"] for p in problems], log_phi.shape[1])
    space = topic_space(len(log_phi), problems)
    urn = Urn(space, problems, alpha)
    factors = {"prior": Prior(urn, prefixes=False), "likelihood": WordTerm(log_phi, problems, version)}
    return Target(space, problems, factors, prior=urn)


# -- exact sums over z ----------------------------------------------------------------------------------------------


def log_evidence(log_phi: Float[Tensor, "k v"], words: Int[Tensor, "m n"], alpha: float) -> Float[Tensor, " m"]:
    """log p(w | phi) of each document (-1: padding), differentiable by log phi; the recursion at the head of this file.

    Raises InputError where there are too many vectors of counts.
    """
    k, n = len(log_phi), words.shape[1]
    if (n + 1) ** (k - 1) > MOST_COUNTS:
        raise InputError(f"{n} words under {k} topics have {(n + 1) ** (k - 1):,} counts, more than {MOST_COUNTS:,}; "
                         "take fewer topics or shorter documents")  # fmt: skip
    return torch.cat([_evidence(log_phi, part, alpha) for part in words.split(CHUNK)])


def _evidence(log_phi: Float[Tensor, "k v"], words: Int[Tensor, "m n"], alpha: float) -> Float[Tensor, " m"]:
    k, (m, n) = len(log_phi), words.shape
    inside = words >= 0
    each = log_phi.T[words.clamp_min(0)]
    total = each.logsumexp(2)
    r = (each - total[:, :, None]).exp()
    p = torch.zeros(m, *[n + 1] * (k - 1), dtype=log_phi.dtype)  # of the counts of all topics but the last
    p[(slice(None), *[0] * (k - 1))] = 1.0
    wide = (slice(None), *[None] * (k - 1))
    for i in range(n):
        new = r[:, i, k - 1][wide] * p
        for a in range(k - 1):
            up = torch.cat([torch.zeros_like(p.narrow(a + 1, 0, 1)), p.narrow(a + 1, 0, n)], a + 1)
            new = new + r[:, i, a][wide] * up
        p = torch.where(inside[:, i][wide], new, p)
    side = torch.arange(n + 1, dtype=torch.float64)
    first = torch.cartesian_prod(*[side] * (k - 1)).view(-1, k - 1) if k > 1 else torch.zeros(1, 0)
    last = inside.sum(1)[:, None] - first.sum(1)
    urn = log_urn(torch.cat([first.expand(m, -1, -1), last.clamp_min(0)[:, :, None]], 2), alpha)
    mass = torch.where(last >= 0, p.view(m, -1), 0.0)
    top = torch.where(last >= 0, urn, -math.inf).amax(1)
    return torch.where(inside, total, 0.0).sum(1) + top + (mass * (urn - top[:, None]).exp()).sum(1).log()


class LDA:
    """Documents and the topics that learn from them: a model for ``training.learn``.

    Args:
        documents: words as numbers 0..words - 1; lengths may differ.
        topics: how many.
        words: size of the vocabulary.
        alpha: of the Dirichlet of each document's topics.
        beta: pseudo-count of each word in each topic.
        log_phi: where the topics start; near uniform by default, from ``seed``.
        seed: of that start.
    """

    def __init__(
        self, documents: Documents, topics: int, words: int, *, alpha: float = 0.5, beta: float = 0.1,
        log_phi: Float[Tensor, "k v"] | None = None, seed: int = 0,
    ) -> None:  # fmt: skip
        if not alpha > 0 or not beta > 0 or topics < 1:
            raise InputError(f"a topic model needs alpha and beta above 0 and a topic, not {alpha}, {beta}, {topics}")
        self.words, self.alpha, self.beta, self.updates = padded(documents, words), alpha, beta, 0
        self.problems = document_problems(documents)
        if log_phi is None:
            log_phi = torch.randn(topics, words, generator=generator(seed), dtype=torch.float64)
        self.log_phi = log_phi.double().log_softmax(1)
        self._target: Target | None = None

    @property
    def target(self) -> Target:
        """log gamma(z) = log p(z, w | phi), theta integrated out."""
        if self._target is None:
            self._target = self.of(self.problems)
        return self._target

    def of(self, problems: Problems) -> Target:
        """The target of other documents, under the present topics."""
        return topic_target(self.log_phi, self.alpha, problems, f"phi@{self.updates}")

    def log_evidence(self) -> Float[Tensor, " m"]:
        """log p(w | phi) of each document, exactly."""
        return log_evidence(self.log_phi, self.words, self.alpha)

    def held_out(self, documents: Documents) -> float:
        """log p(w | phi) of other documents, nats per word."""
        words = padded(documents, self.log_phi.shape[1])
        return float(log_evidence(self.log_phi, words, self.alpha).sum() / (words >= 0).sum())

    def expected_counts(self) -> tuple[Float[Tensor, "k v"], float]:
        """The posterior's expected count of each word under each topic, and the mean over documents of log p(w)."""
        log_phi = self.log_phi.clone().requires_grad_()
        total, counts = 0.0, torch.zeros_like(self.log_phi)
        for part in self.words.split(CHUNK):
            value = log_evidence(log_phi, part, self.alpha).sum()
            counts += torch.autograd.grad(value, log_phi)[0]
            total += float(value.detach())
        return counts, total / len(self.words)

    def exact_step(self) -> float:
        """One round of exact EM; gives the mean over documents of log p(w) before it."""
        counts, value = self.expected_counts()
        self._topics(counts)
        return value

    def m_step(self, particles: Particles, seed: int = 0) -> float:
        """phi from the weighted counts of a sample; gives sum_k w_k log p(z_k, w), a mean over documents."""
        rows, w = weighted_rows(particles)
        inside = torch.arange(rows.moves.shape[1]) < rows.n[:, None]
        word = self.words[rows.problem][:, : rows.moves.shape[1]]
        at = (rows.moves * self.log_phi.shape[1] + word)[inside]
        data = len(rows.problem.unique())
        mass = torch.zeros(self.log_phi.numel(), dtype=torch.float64)
        mass.index_add_(0, at, (w.double()[:, None] * data).expand_as(inside)[inside])
        self._topics(mass.view_as(self.log_phi) * len(self.words) / data)
        return float((w.double() * self.target.on(self.problems).log_gamma(replace(rows, terms={}, versions={}))).sum())

    def _topics(self, counts: Float[Tensor, "k v"]) -> None:
        """The M-step on expected counts."""
        self.log_phi = (counts + self.beta).log()
        self.log_phi = self.log_phi - self.log_phi.logsumexp(1, keepdim=True)
        self._target, self.updates = None, self.updates + 1

    def simulate(self, n: int, gen: torch.Generator) -> tuple[Target, Rollouts]:
        """n documents of the model itself, of the data's lengths, with the topics of their words."""
        pick = torch.randint(len(self.problems), (n,), generator=gen)
        lengths = [self.problems[i] for i in pick.tolist()]
        rows = Urn(topic_space(len(self.log_phi), lengths), lengths, self.alpha).sample(torch.arange(n), gen)
        word = sample_categorical(self.log_phi[rows.moves.flatten()], gen).view_as(rows.moves)
        made = [w[:k] for w, k in zip(word.tolist(), rows.n.tolist(), strict=True)]
        return self.of(document_problems(made)), rows


def predictive(log_phi: Float[Tensor, "s k v"], documents: Documents, alpha: float) -> float:
    """log of the mean over draws of phi of p(w | phi), summed over documents: nats per word."""
    words = padded(documents, log_phi.shape[2])
    each = torch.stack([log_evidence(one, words, alpha) for one in log_phi])
    return float(log_mean_exp(each, 0).sum() / (words >= 0).sum())
