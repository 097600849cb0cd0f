"""A language model's prior over graphs, read whole: the probability of the graph's description in words.

    log R(G) = alpha * log p_LM(desc(G) | context) + log p(D | G)
    log p_LM(desc(G)) := log 1/(K M) sum over K templates k and M node orders o of exp s(text_ko(G))

One graph has many descriptions; which one is written is no part of what is believed, so it is averaged over templates
(three of our own) and over the order in which nodes are named, the same orders for every graph. The score s of a text
is one of three, since a graph with more edges has a longer text and would be improbable for that alone:

    raw        log p(text | context)
    null       log p(text | context) - log p(text | a context about nothing), what the context adds to the text
    per_edge   log p(text | context) / (edges + 1), the mean of a statement (the closing sentence is one); no density

Under ``raw`` the shortest template has nearly all of the average's mass. Bias: none for the density defined here; it
is not a sum over all texts that say the same. It is no sum over parent sets either: every distinct graph is described
and scored once (``Asker`` keeps the texts). Source: the talk's first formula; null prompts as in Holtzman et al. 2021
(arXiv:2104.08315).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from retrodict.errors import InputError, nearest
from retrodict.numerics import NEG_INF, log_mean_exp
from retrodict.records import Problem, Rollouts
from retrodict.rng import generator
from retrodict.spaces.dags import Dags, adjacency
from retrodict.structures.ask import NULL_PROMPT, Asker
from retrodict.structures.lm_prior import Variables, phrases_of
from retrodict.targets.algebra import Factor, Target

Links = Sequence[tuple[str, Sequence[str]]]
"""Each node, and what it causes (or what causes it), in the order in which they are told."""


def and_list(words: Sequence[str]) -> str:
    """As in: a, b and c."""
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def by_cause(causes: Links, effects: Links) -> str:
    """What each variable causes."""
    told = "".join(f" {a} directly causes {and_list(bs)}." for a, bs in causes if bs)
    return f"{told} There are no other direct causes." if told else " There are no direct causes at all."


def by_effect(causes: Links, effects: Links) -> str:
    """What each variable is caused by."""
    told = "".join(f" {b} is directly caused by {and_list(xs)}." for b, xs in effects if xs)
    return f"{told} Nothing else is caused." if told else " Nothing is caused by anything else."


def as_arrows(causes: Links, effects: Links) -> str:
    """The list of edges."""
    edges = [f"{a} -> {b}" for a, bs in causes for b in bs]
    return f" {', '.join(edges)}, and no more." if edges else " none."


Template = Callable[[Links, Links], str]
TEMPLATES: tuple[Template, ...] = (by_cause, by_effect, as_arrows)
PROMPTS = ("{context}This is how {names} depend on each other.", "{context}The causes of {names} are these.",
           "{context}The causal links among {names}:")  # fmt: skip
"""What each template follows; {names} in the order at hand."""
LENGTHS = ("raw", "null", "per_edge")


def node_orders(d: int, count: int, seed: int = 0) -> tuple[tuple[int, ...], ...]:
    """``count`` different orders of d nodes, the plain one first; all of them where there are no more."""
    if count < 1:
        raise InputError(f"give at least one node order, not {count}")
    if math.factorial(d) <= count:
        return tuple(itertools.permutations(range(d)))
    gen, found = generator(seed), {tuple(range(d)): None}
    while len(found) < count:
        found[tuple(torch.randperm(d, generator=gen).tolist())] = None
    return tuple(found)


@dataclass(frozen=True)
class Describer:
    """log p_LM of graphs over named variables, by their descriptions.

    Attributes:
        asker: scores and caches texts.
        variables: names, or names with the words that describe them.
        context: what comes before: the field the variables belong to.
        orders: node orders averaged over (``node_orders``); the plain order by default.
        length: raw, null or per_edge.
        templates: pairs of (prompt, template) averaged over.
    """

    asker: Asker
    variables: Variables
    context: str = ""
    orders: Sequence[tuple[int, ...]] = ()
    length: str = "null"
    templates: Sequence[tuple[str, Template]] = tuple(zip(PROMPTS, TEMPLATES, strict=True))
    known: dict[bytes, float] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        if self.length not in LENGTHS:
            raise InputError(f"unknown length {self.length!r}{nearest(self.length, LENGTHS)}")
        phrases_of(self.variables)

    @property
    def version(self) -> str:
        """The model, the wording and the average."""
        told = ",".join(t.__name__ for _, t in self.templates)
        return (f"described:{self.asker.lm.name}/{self.asker.lm.version}/{self.length}/{told} after {self.context!r}, "
                f"{phrases_of(self.variables)[1]}, orders {tuple(self._orders())}")  # fmt: skip

    def _orders(self) -> Sequence[tuple[int, ...]]:
        return self.orders or (tuple(range(len(phrases_of(self.variables)[0]))),)

    def texts(self, graph: Bool[Tensor, "d d"]) -> list[tuple[str, str]]:
        """Every (prompt, description) of a graph, orders within templates."""
        called, edges, out = phrases_of(self.variables)[1], graph.tolist(), []
        for prompt, template in self.templates:
            for order in self._orders():
                causes = [(called[i], [called[j] for j in order if edges[i][j]]) for i in order]
                effects = [(called[j], [called[i] for i in order if edges[i][j]]) for j in order]
                names = and_list([called[i] for i in order])
                out.append((prompt.format(context=self.context, names=names), template(causes, effects)))
        return out

    def log_p(self, graphs: Bool[Tensor, "n d d"]) -> Float[Tensor, " n"]:
        """The averaged score of each graph, in nats; each distinct one is described once."""
        keys = [bytes(g.flatten().to(torch.uint8).tolist()) for g in graphs]
        new = {k: graphs[i] for i, k in enumerate(keys) if k not in self.known}
        if new:
            texts = [self.texts(g) for g in new.values()]
            flat = [pair for each in texts for pair in each]
            score = self.asker.gain(flat, NULL_PROMPT) if self.length == "null" else self.asker.log_p(flat)
            score = score.view(len(new), -1)
            if self.length == "per_edge":
                score = score / torch.tensor([[float(g.sum()) + 1.0] for g in new.values()], dtype=torch.float64)
            self.known.update(zip(new, log_mean_exp(score, 1).tolist(), strict=True))
        return torch.tensor([self.known[k] for k in keys], dtype=torch.float64)

    def exact(self, space: Dags, alpha: float = 1.0) -> tuple[Bool[Tensor, "n d d"], Float[Tensor, " n"]]:
        """All graphs of a small space, and alpha times the score normalised over them."""
        graphs = space.enumerate()
        value = alpha * self.log_p(graphs)
        return graphs, value - value.logsumexp(0)


# -- as a factor of a target -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Described(Factor):
    """The description's log-probability as a factor: ``target * Described(describer) ** alpha``."""

    describer: Describer
    name: str = "description"

    def bind(self, target: Target) -> tuple[DescribedTerm, None]:
        """Tie to a target's space of graphs."""
        if not isinstance(target.space, Dags):
            raise InputError("a description is a factor of graphs; multiply it into a target over Dags")
        return DescribedTerm(self.describer, target.space, self.name), None


@dataclass(frozen=True)
class DescribedTerm:
    """The factor on a space of graphs: values every prefix, asking about each distinct graph once."""

    describer: Describer
    space: Dags
    name: str = "description"
    noise: str = "none"
    prefixes: bool = True

    @property
    def version(self) -> str:
        """That of the describer."""
        return self.describer.version

    def on(self, problems: Sequence[Problem]) -> Any:
        """A prior is the same for every problem."""
        return self

    def __call__(self, rollouts: Rollouts, every_prefix: bool = False) -> Tensor:
        """``[b]``, or of every prefix ``[b, t+1, s]`` (-inf past the end)."""
        if not every_prefix:
            return self.describer.log_p(self.space.graphs(rollouts))
        return by_prefix(self.space, rollouts, lambda graphs: self.describer.log_p(graphs)[:, None])


def by_prefix(space: Dags, rollouts: Rollouts, value: Callable[[Tensor], Tensor]) -> Float[Tensor, "b t1 s"]:
    """``value`` of the graph after every prefix, one column a stop; -inf past the end."""
    b, t = rollouts.moves.shape
    out = torch.full((b, t + 1, space.n_stops), NEG_INF, dtype=torch.float64)
    for i in range(t + 1):
        rows = (rollouts.n >= i).nonzero().squeeze(1)
        part = rollouts.take(rows)
        out[rows, i] = value(adjacency(part, space.d, space.required, torch.full_like(part.n, i)))
    return out
