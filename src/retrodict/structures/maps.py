"""Posterior over maps given a story, as a language model reads it: what is linked, what pays, what is blocked.

The narrator says each fact f that is true of a map m a Poisson number of times, lambda_f, in words s drawn from
p_LM(s | f): the model's own probability of s as another wording of f ("<f> In other words:"). Which fact a sentence
states is never given; it is summed out, which for superposed Poisson processes (Kingman 1993, sections 2.1 and 5.2) is

    p(story | m) ~ exp(-sum_{f in F(m)} lambda_f) prod_k sum_{f in F(m)} lambda_f p_LM(s_k | f)
    p(m | story) ~ p(m) p(story | m)

    F(m):  every link of m, lambda = -log(unsaid), so that a share ``unsaid`` of them is never said
           every link of m as blocked later, lambda = ``blocked``
           every place with every amount of the story, lambdas that sum to ``reward``; one empty fact, ``nothing``

The factor exp(-lambda |m|) is what keeps dense maps from winning: a link that is there would mostly have been said. A
map is a set of undirected links, p(m) Bernoulli(rho) each, given that m is connected. Given m the facts of sentences
are independent, so a draw of m is completed to a draw of the world at the story's end: links said to be blocked are
closed, and the last amount said of a place holds.

Exact up to ``LISTED`` pairs of places, by enumeration; beyond, Metropolis-Hastings of this library on maps written down
pair by pair (``maps_sampler``). Assumptions: one fact a sentence; a fact that shares no name with a sentence has the
least probability among those asked about it; a sentence cannot state an amount that it does not hold. Bias: none beyond
these and the model's own reading.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from retrodict.errors import InputError
from retrodict.numerics import NEG_INF, sample_categorical
from retrodict.rng import generator
from retrodict.structures.ask import Asker
from retrodict.structures.planner import Worlds
from retrodict.structures.stories import Said
from retrodict.structures.stories_words import Words, listed

LEAD = " In other words:"
"""What stands between a fact and a sentence that may be saying it."""
LISTED = 15
"""Pairs of places up to which all maps are listed (32,768 maps of 6 places)."""


@dataclass(frozen=True)
class Narrator:
    """The prior of maps and how stories are told.

    Attributes:
        unsaid: share of links that no sentence mentions.
        degree: links of a place expected by the prior, before the condition that all places are connected.
        blocked: how often, on average, a link is said to be blocked.
        reward: amounts said, on average.
        nothing: sentences, on average, that say nothing of the map.
    """

    unsaid: float = 0.15
    degree: float = 1.5
    blocked: float = 0.1
    reward: float = 2.0
    nothing: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.unsaid < 1:
            raise InputError(f"unsaid is the share of links never mentioned, between 0 and 1, not {self.unsaid:g}")
        if min(self.degree, self.blocked, self.reward, self.nothing) <= 0:
            raise InputError("the narrator's degree, blocked, reward and nothing must be positive")

    @property
    def link(self) -> float:
        """How often a link is said, on average."""
        return -math.log(self.unsaid)

    def rho(self, d: int) -> float:
        """Prior probability of a link, at most a half."""
        return min(0.5, self.degree / (d - 1))


@dataclass(frozen=True)
class Reading:
    """log p(sentence | fact) of k sentences, in nats; the reader's whole say in the posterior.

    Attributes:
        link: of each of the f pairs being linked, ``blocked`` of it being blocked.
        reward: of each place paying each of the story's amounts.
        nothing: of saying nothing about the map.
        amounts: the amounts, rising.
        d: number of places.
    """

    link: Float[Tensor, "k f"]
    blocked: Float[Tensor, "k f"]
    reward: Float[Tensor, "k d a"]
    nothing: Float[Tensor, " k"]
    amounts: tuple[float, ...]
    d: int


def pairs_of(d: int) -> Int[Tensor, "f 2"]:
    """All pairs of places, i < j, in the order of every ``f`` axis here."""
    return torch.tensor(list(itertools.combinations(range(d), 2)))


# -- reading ----------------------------------------------------------------------------------------------------------


def sentences_of(text: str) -> list[str]:
    """The sentences of a text."""
    return [s for s in re.split(r"(?<=[.!?])\s+", " ".join(text.split())) if s]


def bare(name: str) -> str:
    """A name without its article."""
    return name.removeprefix("the ")


def names_in(sentence: str, names: Sequence[str]) -> list[bool]:
    """Whether a sentence holds each name, as whole words."""
    return [re.search(rf"\b{re.escape(bare(n))}\b", sentence, re.IGNORECASE) is not None for n in names]


MONEY = re.compile(r"\$ ?(\d+(?:\.\d+)?)|(\d+(?:\.\d+)?) (?:\w+ )?(?:dollar|coin|euro|pound|point)")
"""How amounts are written."""


def amounts_in(sentence: str) -> list[float]:
    """The amounts of money (or points) in a sentence."""
    return [float(a or b) for a, b in MONEY.findall(sentence)]


def read(asker: Asker, text: str, names: Sequence[str], words: Words) -> Reading:
    """Ask a model how probable each sentence is as another wording of each fact.

    ``words`` gives the reader's wording of facts (``say_*``). Raises InputError for a text without sentences, fewer
    than two names, or a name that the text never says.
    """
    said = sentences_of(text)
    if not said:
        raise InputError("the story is empty: give a text with a few sentences")
    if len(names) < 2:
        raise InputError(f"a map needs at least two places, and {len(names)} was given")
    held = [names_in(s, names) for s in said]
    for i, name in enumerate(names):
        if not any(h[i] for h in held):
            raise InputError(f"the story never mentions {name!r}; leave it out, or write it as the story does")
    pairs, amounts = pairs_of(len(names)).tolist(), tuple(sorted({x for s in said for x in amounts_in(s)}))
    asked: list[tuple[int, int, int, str]] = []  # sentence, table (0 link, 1 blocked, 2 reward), column, wording
    for k, sentence in enumerate(said):
        for table, say in ((0, words.say_link), (1, words.say_blocked)):
            asked += [(k, table, f, say.format(a=names[i], b=names[j])) for f, (i, j) in enumerate(pairs)
                      if held[k][i] or held[k][j]]  # fmt: skip
        asked += [(k, 2, i * len(amounts) + amounts.index(x), words.say_reward.format(a=names[i], x=f"{x:g}"))
                  for x in dict.fromkeys(amounts_in(sentence)) for i in range(len(names)) if held[k][i]]  # fmt: skip
    empty = words.say_nothing.format(all=listed(names))
    found = asker.log_p([(empty + LEAD, f" {s}") for s in said]
                        + [(fact + LEAD, f" {said[k]}") for k, _, _, fact in asked])  # fmt: skip
    nothing, floor = found[: len(said)], found[: len(said)].clone()
    for (k, *_), value in zip(asked, found[len(said) :], strict=True):
        floor[k] = torch.minimum(floor[k], value)
    tables = [floor[:, None].repeat(1, len(pairs)), floor[:, None].repeat(1, len(pairs)),
              _unsayable(said, amounts, floor).repeat(1, len(names))]  # fmt: skip
    for (k, table, column, _), value in zip(asked, found[len(said) :], strict=True):
        tables[table][k, column] = value
    reward = tables[2].view(len(said), len(names), len(amounts))
    return Reading(tables[0], tables[1], reward, nothing, amounts, len(names))


def _unsayable(said: Sequence[str], amounts: Sequence[float], floor: Float[Tensor, " k"]) -> Float[Tensor, "k a"]:
    """The floor for amounts that a sentence holds, -inf for those it does not."""
    holds = torch.tensor([[x in amounts_in(s) for x in amounts] for s in said], dtype=torch.bool)
    return torch.where(holds.view(len(said), len(amounts)), floor[:, None], NEG_INF)


def told(said: Sequence[Said], d: int, error: float = 0.0) -> Reading:
    """The reading of one who knows what each sentence states: probability 1 of it, ``error`` of every other fact."""
    pairs, k = pairs_of(d).tolist(), len(said)
    amounts = tuple(sorted({x.amount for x in said if x.kind == "reward"}))
    off = math.log(error) if error > 0 else NEG_INF
    link, blocked = torch.full((2, k, len(pairs)), off, dtype=torch.float64)
    reward, nothing = torch.full((k, d, len(amounts)), off, dtype=torch.float64), torch.full((k,), off).double()
    for i, x in enumerate(said):
        if x.kind == "reward":
            reward[i, x.place, amounts.index(x.amount)] = 0.0
        elif x.kind == "nothing":
            nothing[i] = 0.0
        else:
            (link if x.kind == "link" else blocked)[i, [pairs.index(list(p)) for p in x.pairs]] = 0.0
    return Reading(link, blocked, reward, nothing, amounts, d)


# -- the posterior ----------------------------------------------------------------------------------------------------


def log_facts(reading: Reading, maps: Bool[Tensor, "n f"], by: Narrator) -> Float[Tensor, "n k c"]:
    """log of lambda_f p_LM(s_k | f) for every fact: links, blocked links, rewards, the empty one, side by side."""
    n, k = len(maps), len(reading.nothing)
    off = torch.where(maps, 0.0, NEG_INF).double()[:, None, :]
    link, blocked = reading.link + math.log(by.link) + off, reading.blocked + math.log(by.blocked) + off
    reward = reading.reward.flatten(1) + math.log(by.reward / max(1, reading.reward[0].numel()))
    rest = torch.cat([reward, reading.nothing[:, None] + math.log(by.nothing)], 1)
    return torch.cat([link, blocked, rest.expand(n, k, -1)], 2)


def log_story(reading: Reading, maps: Bool[Tensor, "n f"], by: Narrator) -> Float[Tensor, " n"]:
    """log p(story | m) up to a constant, the facts of all sentences summed out, by one product over all maps."""
    f = maps.shape[1]
    said = log_facts(reading, torch.ones(1, f, dtype=torch.bool), by)[0]
    top = said.amax(1, keepdim=True)
    p = (said - top).exp()
    sums = maps.double() @ (p[:, :f] + p[:, f : 2 * f]).T + p[:, 2 * f :].sum(1)
    return (sums.log() + top.T).sum(1) - (by.link + by.blocked) * maps.sum(1).double()


def adjacency(maps: Bool[Tensor, "n f"], d: int) -> Bool[Tensor, "n d d"]:
    """Symmetric matrices of maps given as sets of pairs."""
    i, j = pairs_of(d).T
    a = torch.zeros(len(maps), d, d, dtype=torch.bool)
    a[:, i, j] = a[:, j, i] = maps
    return a


def connected(maps: Bool[Tensor, "n f"], d: int) -> Bool[Tensor, " n"]:
    """Whether every place can be reached from every other, by squaring."""
    reach = adjacency(maps, d).float() + torch.eye(d)
    for _ in range(max(1, (d - 1).bit_length())):
        reach = (reach @ reach).clamp_max(1.0)
    return (reach > 0).flatten(1).all(1)


def log_prior(maps: Bool[Tensor, "n f"], d: int, by: Narrator) -> Float[Tensor, " n"]:
    """log p(m) up to a constant: independent links of probability rho, all places connected."""
    on, rho = maps.sum(1).double(), by.rho(d)
    value = on * math.log(rho) + (maps.shape[1] - on) * math.log1p(-rho)
    return torch.where(connected(maps, d), value, NEG_INF)


def all_maps(pairs: int) -> Bool[Tensor, "n f"]:
    """Every set of pairs."""
    if pairs > LISTED:
        raise InputError(f"2^{pairs} maps are too many to list (at most 2^{LISTED}); use the sampler")
    return (torch.arange(2**pairs)[:, None] >> torch.arange(pairs) & 1).bool()


@dataclass(frozen=True)
class MapPosterior:
    """Maps with log-probabilities (all maps, or equally weighted draws), and the reading they come from."""

    names: tuple[str, ...]
    reading: Reading
    narrator: Narrator
    maps: Bool[Tensor, "n f"]
    log_p: Float[Tensor, " n"]
    exact: bool

    def links(self) -> Float[Tensor, "d d"]:
        """P(linked as the story begins) of every pair."""
        p = (self.log_p.exp() @ self.maps.double()).clamp_max(1.0)
        i, j = pairs_of(len(self.names)).T
        out = torch.zeros(len(self.names), len(self.names), dtype=torch.float64)
        out[i, j] = out[j, i] = p
        return out

    def worlds(self, n: int = 1000, seed: int = 0) -> Worlds:
        """n independent draws of the world at the story's end: a map, then what each sentence said, given the map."""
        gen = generator(seed)
        rows = sample_categorical(self.log_p.expand(n, -1), gen)
        maps = self.maps[rows]
        said = log_facts(self.reading, maps, self.narrator)
        fact = sample_categorical(said.flatten(0, 1), gen).view(n, -1)
        return Worlds(*after(self.reading, maps, fact), torch.full((n,), 1.0 / n, dtype=torch.float64))

    def stated(self, n: int = 300, seed: int = 0) -> Float[Tensor, "k c"]:
        """P(fact | sentence, story) of every sentence, in the order of ``log_facts``: what it was read as."""
        maps = self.maps[sample_categorical(self.log_p.expand(n, -1), generator(seed))]
        return log_facts(self.reading, maps, self.narrator).softmax(2).mean(0)

    def top(self, k: int = 1) -> Bool[Tensor, "k d d"]:
        """The most probable maps."""
        return adjacency(self.maps[self.log_p.argsort(descending=True)[:k]], len(self.names))


def after(
    reading: Reading, maps: Bool[Tensor, "n f"], fact: Int[Tensor, "n k"]
) -> tuple[Bool[Tensor, "n d d"], Float[Tensor, "n d"]]:
    """What is open and what each place pays once all was said, ``fact`` being what each sentence said (log_facts)."""
    n, f = maps.shape
    amounts = torch.tensor(reading.amounts, dtype=torch.float64)
    shut = torch.zeros(n, f + 1, dtype=torch.bool)
    shut.scatter_(1, torch.where((fact >= f) & (fact < 2 * f), fact - f, f), True)
    reward = torch.zeros(n, reading.d + 1, dtype=torch.float64)
    for k in range(fact.shape[1]):  # in the order of the story: the last amount said of a place holds
        told = fact[:, k] - 2 * f
        is_reward = (told >= 0) & (told < reading.d * len(amounts))
        place = torch.where(is_reward, told // max(1, len(amounts)), reading.d)
        value = amounts[told % len(amounts)] if len(amounts) else torch.zeros(n, dtype=torch.float64)
        reward.scatter_(1, place[:, None], value[:, None])
    return adjacency(maps & ~shut[:, :f], reading.d), reward[:, : reading.d]


def map_posterior(
    reading: Reading, names: Sequence[str], narrator: Narrator | None = None, *, seed: int = 0
) -> MapPosterior:
    """p(map | story): exact up to ``LISTED`` pairs, else draws (``maps_sampler``, whose chains take ``seed``)."""
    by, pairs = narrator or Narrator(), reading.link.shape[1]
    if pairs > LISTED:
        from retrodict.structures.maps_sampler import sampled_maps

        maps = sampled_maps(reading, by, seed=seed)
        level = torch.full((len(maps),), -math.log(len(maps)), dtype=torch.float64)
        return MapPosterior(tuple(names), reading, by, maps, level, False)
    maps = all_maps(pairs)
    maps = maps[connected(maps, reading.d)]
    log_p = log_prior(maps, reading.d, by) + log_story(reading, maps, by)
    return MapPosterior(tuple(names), reading, by, maps, log_p.log_softmax(0), True)
