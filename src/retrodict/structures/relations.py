"""What a graph lets one see, in words a language model can judge: how each pair of variables moves.

D is one report a pair: no relation, together, or apart. It is drawn from a graph G so: each edge gets a sign, +1 or -1
with equal chances; the linear model X_j = sum_i w s_ij A_ij X_i + e_j with unit noise has covariance

    C = (I - B)^-T (I - B)^-1,    B_ij = w s_ij A_ij

and a pair's report is the sign of its covariance (0: no relation), replaced with probability ``error`` by one of the
other two at random. Signs of several edges are shared by all pairs, so reports depend on each other as the graph says.
With ``error`` > 0 every D has positive probability under every G, which squared-error objectives need.

p(D | G) is a sum over 2^pairs signs: listed up to d = 4, drawn at any d.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from retrodict.errors import InputError
from retrodict.numerics import log_mean_exp
from retrodict.structures.ask import NULL_PROMPT, Asker
from retrodict.structures.lm_prior import Variables, phrases_of

NONE, TOGETHER, APART = 0, 1, 2
WEIGHT = 0.7
"""Size of an edge's weight: below 1, so that an indirect path does not cancel a direct edge."""
MOST_LISTED = 4
"""Variables up to which every D is listed: 3^6 of them."""


@dataclass(frozen=True)
class Relations:
    """Reports about the pairs (i, j), i < j, of d variables. D is coded sum over pairs of report * 3^pair."""

    d: int
    error: float = 0.02

    def __post_init__(self) -> None:
        if self.d < 2:
            raise InputError(f"relations need at least two variables, not {self.d}")
        if not 0 <= self.error < 1:
            raise InputError(f"error is the share of wrong reports: at least 0 and below 1, not {self.error}")

    @cached_property
    def pairs(self) -> Int[Tensor, "2 p"]:
        """The pairs, in the order of the reports."""
        return torch.triu_indices(self.d, self.d, 1)

    @property
    def count(self) -> int:
        """Number of different D."""
        return 3 ** self.pairs.shape[1]

    def code(self, reports: Int[Tensor, "... p"]) -> Int[Tensor, "..."]:
        """Reports as one number."""
        return (reports * 3 ** torch.arange(reports.shape[-1])).sum(-1)

    def reports(self, code: Int[Tensor, "..."]) -> Int[Tensor, "... p"]:
        """The reports of a number."""
        return code[..., None] // 3 ** torch.arange(self.pairs.shape[1]) % 3

    def seen(self, graphs: Bool[Tensor, "n d d"], signs: Float[Tensor, "n p"]) -> Int[Tensor, "n p"]:
        """What is seen without error, given a sign for every pair."""
        i, j = self.pairs
        both = graphs.new_zeros(graphs.shape, dtype=torch.float64)
        both[:, i, j] = both[:, j, i] = WEIGHT * signs.double()
        weights = both * graphs
        power, total = weights, torch.eye(self.d, dtype=torch.float64) + weights
        for _ in range(self.d - 2):  # weights are nilpotent: the inverse of I - B is a finite sum
            power = power @ weights
            total = total + power
        cov = (total.transpose(1, 2) @ total)[:, i, j]
        return torch.where(cov.abs() < 1e-9, NONE, torch.where(cov > 0, TOGETHER, APART))

    def draw(self, graphs: Bool[Tensor, "n d d"], k: int, gen: torch.Generator) -> Int[Tensor, "n k"]:
        """k independent D of each graph, coded."""
        many = graphs.repeat_interleave(k, 0)
        p = self.pairs.shape[1]
        u = torch.rand(3, len(many), p, generator=gen, dtype=torch.float64)
        true = self.seen(many, torch.where(u[0] < 0.5, 1.0, -1.0))
        other = (true + 1 + (u[2] < 0.5).long()) % 3
        return self.code(torch.where(u[1] < self.error, other, true)).view(-1, k)

    def law(self, graphs: Bool[Tensor, "n d d"]) -> Float[Tensor, "n m"]:
        """log p(D | G) of every D. Raises InputError for more than four variables."""
        if self.d > MOST_LISTED:
            raise InputError(f"{self.d} variables have {self.count:,} reports; list at most {MOST_LISTED} variables, "
                             "and draw D beyond")  # fmt: skip
        p, n = self.pairs.shape[1], len(graphs)
        signs = (torch.arange(2**p)[:, None] >> torch.arange(p) & 1) * 2.0 - 1.0
        true = self.seen(graphs.repeat_interleave(2**p, 0), signs.repeat(n, 1)).view(n, 2**p, p)
        every = self.reports(torch.arange(self.count))
        wrong = (true[:, :, None] != every).sum(-1).double()  # n, signs, m
        share = (self.error / 2) ** wrong * (1 - self.error) ** (p - wrong)
        return share.mean(1).log()


# -- what a language model makes of them ------------------------------------------------------------------------------

TEMPLATES: tuple[tuple[str, ...], ...] = (
    (" {a} and {b} have nothing to do with each other.", " {a} and {b} go up and down together.",
     " When {a} goes up, {b} goes down."),
    (" There is no relation between {a} and {b}.", " More {a} goes with more {b}.", " More {a} goes with less {b}."),
)  # fmt: skip
"""A sentence for each report (none, together, apart), in several wordings."""
PROMPT = "{context}This is what is known about {names}."


@dataclass(frozen=True)
class Teller:
    """log p_LM of D told in words, averaged over wordings by log-mean-exp; each text is scored once.

    ``gain`` scores what the context adds to a text (see ``Asker.gain``) instead of the whole text, whose length and
    wording would otherwise decide.
    """

    asker: Asker
    relations: Relations
    variables: Variables
    context: str = ""
    gain: bool = True
    templates: Sequence[Sequence[str]] = TEMPLATES

    def __post_init__(self) -> None:
        names = phrases_of(self.variables)[0]
        if len(names) != self.relations.d:
            raise InputError(f"{len(names)} variables for relations among {self.relations.d}; name each once")

    def text(self, code: int, template: Sequence[str]) -> str:
        """D in one wording."""
        called = phrases_of(self.variables)[1]
        reports = self.relations.reports(torch.tensor(code)).tolist()
        pairs = self.relations.pairs.T.tolist()
        each = zip(reports, pairs, strict=True)
        return "".join(template[int(r)].format(a=called[i], b=called[j]) for r, (i, j) in each)

    def log_p(self, codes: Int[Tensor, "..."]) -> Float[Tensor, "..."]:
        """log p_LM(D) of coded reports, float64 nats."""
        distinct, place = torch.unique(codes, return_inverse=True)
        names = ", ".join(phrases_of(self.variables)[1])
        prompt = PROMPT.format(context=self.context, names=names)
        pairs = [(prompt, self.text(code, t)) for code in distinct.tolist() for t in self.templates]
        score = self.asker.gain(pairs, NULL_PROMPT) if self.gain else self.asker.log_p(pairs)
        return log_mean_exp(score.view(len(distinct), -1), 1)[place]
