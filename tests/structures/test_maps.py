"""The posterior over maps equals Bayes by enumeration, with the sums written out in Python; a planted bug is seen."""

from __future__ import annotations

import functools
import itertools
import math
from dataclasses import replace

import pytest
import torch

from retrodict.errors import InputError
from retrodict.models.tabular import TabularLM
from retrodict.models.tiny import TinyLM
from retrodict.records import Rollouts
from retrodict.rng import generator
from retrodict.structures.ask import Asker
from retrodict.structures.maps import (
    LEAD,
    MapPosterior,
    Narrator,
    Reading,
    adjacency,
    all_maps,
    connected,
    log_prior,
    log_story,
    map_posterior,
    pairs_of,
    read,
    sentences_of,
    told,
)
from retrodict.structures.maps_sampler import MapTerm, sampled_maps
from retrodict.structures.stories import story
from retrodict.structures.stories_words import RENDERERS, TIES

BY = Narrator(unsaid=0.3, degree=1.2, blocked=0.4, reward=1.5, nothing=0.8)
NAMES = ("Ann", "Bo", "Cy")


def channel(d: int, k: int, amounts: tuple[float, ...] = (3.0, 8.0), seed: int = 0, scale: float = 2.0) -> Reading:
    """A reader whose every answer is known: random log-probabilities."""
    gen, f = generator(seed), d * (d - 1) // 2

    def table(*shape: int) -> torch.Tensor:
        return scale * torch.randn(*shape, generator=gen, dtype=torch.float64)

    return Reading(table(k, f), table(k, f), table(k, d, len(amounts)), table(k), amounts, d)


def facts(m: tuple[int, ...], reading: Reading, by: Narrator) -> list[tuple[tuple, float]]:
    """What may be said of a map, and how often."""
    d, a = reading.d, len(reading.amounts)
    out: list[tuple[tuple, float]] = [(("link", f), -math.log(by.unsaid)) for f in m]
    out += [(("blocked", f), by.blocked) for f in m]
    out += [(("reward", i, x), by.reward / (d * a)) for i in range(d) for x in range(a)]
    return [*out, (("nothing",), by.nothing)]


def said(reading: Reading, k: int, fact: tuple) -> float:
    """p(sentence | fact)."""
    table = getattr(reading, fact[0])[k]
    return math.exp(float(table[fact[1:]] if fact[1:] else table))


def joined(m: tuple[int, ...], d: int) -> bool:
    """Whether a map of pairs is connected, by growing one part."""
    pairs, seen = pairs_of(d).tolist(), {0}
    for _ in range(d):
        seen |= {x for f in m for x in pairs[f] if set(pairs[f]) & seen}
    return len(seen) == d


def by_hand(reading: Reading, by: Narrator) -> dict[tuple, float]:
    """p(map, open at the end, rewards | story): every map and every assignment of facts to sentences."""
    d, k, pairs = reading.d, len(reading.nothing), pairs_of(reading.d).tolist()
    rho, out = min(0.5, by.degree / (d - 1)), {}
    for size in range(len(pairs) + 1):
        for m in itertools.combinations(range(len(pairs)), size):
            if not joined(m, d):
                continue
            may = facts(m, reading, by)
            rate = sum(lam for fact, lam in may if fact[0] in ("link", "blocked"))
            prior = rho**size * (1 - rho) ** (len(pairs) - size) * math.exp(-rate)
            for chosen in itertools.product(may, repeat=k):
                p, shut, pays = prior, set(), [0.0] * d
                for i, (fact, lam) in enumerate(chosen):
                    p *= lam * said(reading, i, fact)
                    if fact[0] == "blocked":
                        shut.add(fact[1])
                    elif fact[0] == "reward":
                        pays[fact[1]] = reading.amounts[fact[2]]
                key = (m, tuple(f for f in m if f not in shut), tuple(pays))
                out[key] = out.get(key, 0.0) + p
    total = sum(out.values())
    return {key: p / total for key, p in out.items()}


def law(p: MapPosterior) -> dict[tuple, float]:
    """Each map's probability."""
    rows = (tuple(m.nonzero().flatten().tolist()) for m in p.maps)
    return dict(zip(rows, p.log_p.exp().tolist(), strict=True))


def marginal(exact: dict[tuple, float]) -> dict[tuple, float]:
    """The same of ``by_hand``."""
    out: dict[tuple, float] = {}
    for (m, _, _), p in exact.items():
        out[m] = out.get(m, 0.0) + p
    return out


def distance(p: dict[tuple, float], q: dict[tuple, float]) -> float:
    """Total variation."""
    return 0.5 * sum(abs(p.get(x, 0.0) - q.get(x, 0.0)) for x in {*p, *q})


@pytest.mark.parametrize("seed", [0, 1])
def test_posterior_is_bayes_by_enumeration(seed):
    reading = channel(3, 3, seed=seed)
    assert distance(law(map_posterior(reading, NAMES, BY)), marginal(by_hand(reading, BY))) < 1e-12


def test_without_the_cost_of_unsaid_links_the_posterior_is_wrong():
    """The planted bug: prod_k alone, as if every link that is there had not had to be mentioned."""
    reading = channel(3, 3)
    p = map_posterior(reading, NAMES, BY)
    level = log_prior(p.maps, 3, BY) + log_story(reading, p.maps, BY) + (BY.link + BY.blocked) * p.maps.sum(1)
    bug = MapPosterior(NAMES, reading, BY, p.maps, level.log_softmax(0), True)
    assert distance(law(bug), marginal(by_hand(reading, BY))) > 0.1


def test_worlds_are_drawn_from_the_joint_law():
    """Maps, what is closed and what pays: frequencies of 40,000 draws against the enumerated joint law."""
    reading, n = channel(3, 2, seed=3), 40_000
    exact, w = by_hand(reading, BY), map_posterior(reading, NAMES, BY).worlds(n, seed=1)
    i, j = pairs_of(3).T
    drawn: dict[tuple, float] = {}
    for links, pays in zip(w.open[:, i, j].tolist(), w.reward.tolist(), strict=True):
        key = (tuple(f for f, yes in enumerate(links) if yes), tuple(pays))
        drawn[key] = drawn.get(key, 0.0) + 1 / n
    merged: dict[tuple, float] = {}
    for (_, links, pays), p in exact.items():
        merged[links, pays] = merged.get((links, pays), 0.0) + p
    for key, p in merged.items():
        assert abs(drawn.get(key, 0.0) - p) < 5 * math.sqrt(p * (1 - p) / n) + 1e-4
    assert set(drawn) <= set(merged)


def test_the_last_amount_holds_and_blocked_links_are_closed():
    reading = told(story("tree", "revaluation", places=4, vague=0.0, seed=2).said, 4, error=1e-9)
    made = story("tree", "revaluation", places=4, vague=0.0, seed=2)
    w = map_posterior(reading, made.names).worlds(200)
    assert float((w.reward == made.reward).all(1).double().mean()) > 0.99
    shut = story("ring", "detour", places=5, vague=0.0, seed=4)
    w = map_posterior(told(shut.said, 5, error=1e-9), shut.names, Narrator(unsaid=0.01)).worlds(300)
    assert not bool((w.open & shut.before & ~shut.after).any(0)[shut.before & ~shut.after].float().mean() > 0.01)
    assert float((w.open == shut.after).flatten(1).all(1).double().mean()) > 0.6


def test_chains_have_the_posterior_as_their_law():
    """The term is log p up to a constant, exactly; the chains' marginals are those of enumeration."""
    reading = channel(4, 5, seed=5)
    exact = map_posterior(reading, ("a", "b", "c", "d"), BY)
    off = MapTerm(reading, BY)(pair_rows(exact.maps)) - exact.log_p
    assert float(off.max() - off.min()) < 1e-10
    drawn = sampled_maps(reading, BY, seed=2, chains=300, rounds=3, steps=12)
    assert bool(connected(drawn, 4).all())
    i, j = pairs_of(4).T
    assert float((drawn.double().mean(0) - exact.links()[i, j]).abs().max()) < 0.1


def pair_rows(maps: torch.Tensor) -> Rollouts:
    """Rollouts of maps written pair by pair; only what the term reads is real."""
    b, t = maps.shape
    flat, wide = torch.zeros(b, t), torch.zeros(b, t + 1)
    return Rollouts(torch.zeros(b).long(), maps.long(), torch.ones(b, t, dtype=torch.int8), torch.full((b,), t),
                    torch.zeros(b).long(), wide.bool(), flat, wide[:, :, None], wide, flat)  # fmt: skip


def test_larger_maps_are_sampled(monkeypatch):
    short = functools.partial(sampled_maps, chains=16, rounds=2, steps=2)
    monkeypatch.setattr("retrodict.structures.maps_sampler.sampled_maps", short)
    monkeypatch.setattr("retrodict.structures.maps.LISTED", 5)
    p = map_posterior(channel(4, 3), ("a", "b", "c", "d"), BY)
    assert not p.exact and len(p.maps) == 16 and p.worlds(10).open.shape == (10, 4, 4)


def test_maps_are_counted():
    """Connected labelled graphs: 1, 4, 38, 728 of 2 to 5 places (OEIS A001187)."""
    counts = [int(connected(all_maps(d * (d - 1) // 2), d).sum()) for d in (2, 3, 4, 5)]
    assert counts == [1, 4, 38, 728]
    with pytest.raises(InputError, match="use the sampler"):
        all_maps(21)


# -- reading ----------------------------------------------------------------------------------------------------------

ALPHABET = " .:'?abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789,"
TEXT = "Ann sees Bo. Cy pays 3 dollars. Cy and Ann talk."


def test_reading_is_the_models_own_probability():
    """Every entry is the log-probability of the sentence after the wording of the fact, and Bayes by hand follows."""
    lm = TinyLM(ALPHABET, seed=3, dtype=torch.float64)
    asker, found = Asker(lm), read(Asker(lm), TEXT, NAMES, TIES)
    said_ = sentences_of(TEXT)
    assert said_ == ["Ann sees Bo.", "Cy pays 3 dollars.", "Cy and Ann talk."] and found.amounts == (3.0,)

    def value(fact: str, k: int) -> float:
        return float(asker.log_p([(fact + LEAD, f" {said_[k]}")])[0])

    assert math.isclose(float(found.link[0, 0]), value(TIES.say_link.format(a="Ann", b="Bo"), 0), abs_tol=1e-9)
    assert math.isclose(float(found.blocked[2, 1]), value(TIES.say_blocked.format(a="Ann", b="Cy"), 2), abs_tol=1e-9)
    assert math.isclose(float(found.reward[1, 2, 0]), value(TIES.say_reward.format(a="Cy", x="3"), 1), abs_tol=1e-9)
    assert math.isclose(float(found.nothing[0]), value(TIES.say_nothing.format(all="Ann, Bo and Cy"), 0), abs_tol=1e-9)
    assert float(found.reward[0].max()) == float("-inf")  # no amount in it
    assert float(found.link[1, 0]) == float(torch.cat([found.link[1], found.blocked[1], found.nothing[1:2]]).min())
    tame = replace(found, **{t: getattr(found, t) - found.nothing.view(-1, *[1] * (getattr(found, t).dim() - 1))
                             for t in ("link", "blocked", "reward", "nothing")})  # fmt: skip
    assert distance(law(map_posterior(found, NAMES, BY)), marginal(by_hand(tame, BY))) < 1e-9


def test_no_amounts_at_all():
    found = read(Asker(TabularLM.random(ALPHABET, seed=1)), "Ann sees Bo. Cy sees Ann.", NAMES, TIES)
    w = map_posterior(found, NAMES).worlds(20)
    assert found.reward.shape == (2, 3, 0) and float(w.reward.abs().max()) == 0.0


@pytest.mark.parametrize("text, names, match", [
    ("  ", NAMES, "empty"), ("Ann sees Bo.", NAMES, "never mentions 'Cy'"), ("Ann sleeps.", ("Ann",), "two places"),
])  # fmt: skip
def test_what_cannot_be_read_is_said(text, names, match):
    with pytest.raises(InputError, match=match):
        read(Asker(TabularLM.random(ALPHABET)), text, names, TIES)


def test_a_perfect_reader_finds_what_was_said():
    for renderer in RENDERERS:
        made = story("clustered", places=5, unsaid=0.0, vague=0.0, renderer=renderer, seed=1)
        p = map_posterior(told(made.said, 5, error=1e-12), made.names)
        assert torch.equal(p.top(1)[0], made.before)
        assert torch.equal(adjacency(p.maps[:1], 5)[0], adjacency(p.maps[:1], 5)[0].T)
