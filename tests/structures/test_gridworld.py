"""The rules of the grid against a plain rewriting, the posterior over rule sets against Bayes by hand, rollouts."""

from __future__ import annotations

import math

import pytest
import torch

from retrodict.errors import InputError
from retrodict.models.tiny import TinyLM
from retrodict.rng import generator
from retrodict.structures import gridworld as grid
from retrodict.structures.ask import Asker
from retrodict.structures.maps import LEAD

ALPHABET = " .:'?abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789,\n"
EVERY = grid.all_rules()


def slow(s, action, rules):
    """One transition, case by case."""
    square, key, door, battery = s
    key_rule, wall, drain, dead, charge, spring, ice, breaks = rules
    doors = {frozenset(("blue", "green"))} if not door else set()
    walls = {frozenset(("white", "black"))} if wall else set()
    at = {"red": (0, 0), "blue": (0, 1), "green": (0, 2), "white": (1, 0), "black": (1, 1), "yellow": (1, 2)}
    where = {v: k for k, v in at.items()}
    name = grid.SQUARES[square]

    def beyond(place):
        (r, c), (dr, dc) = at[place], [(-1, 0), (1, 0), (0, 1), (0, -1)][action]
        to = where.get((r + dr, c + dc), place)
        return place if frozenset((place, to)) in doors | walls else to

    if action < 4:
        to = beyond(name)
        if to == name or (dead and battery == 0):
            return s
        if ice and to == "black":
            to = beyond(to)
        battery = max(battery - 1, 0) if drain else battery
        battery = grid.FULL if charge and to == "white" else battery
        return grid.SQUARES.index(to), key, 0 if spring else door, battery
    if action == 4:
        return square, 1 if name == "yellow" and key == 0 else key, door, battery
    if name in ("blue", "green") and not door and (key == 1 or not key_rule):
        return square, 2 if key == 1 and breaks else key, 1, battery
    return s


def states():
    return [(a, b, c, d) for a in range(6) for b in range(3) for c in range(2) for d in range(4)]


def test_transitions_equal_a_plain_rewriting():
    gen = generator(0)
    some = EVERY[torch.randperm(256, generator=gen)[:24]]
    for s in states()[::5]:
        for action in range(6):
            got = grid.step(torch.tensor(s).expand(24, 4), torch.full((24,), action), some).tolist()
            assert [tuple(x) for x in got] == [slow(s, action, r) for r in some.tolist()]


def test_every_rule_matters():
    """Each rule changes some transition, against all the others off or on."""
    every = [(s, a) for s in states() for a in range(6)]
    at, action = torch.tensor([s for s, _ in every]), torch.tensor([a for _, a in every])
    for r in range(len(grid.RULES)):
        changed = False
        for base in (torch.zeros(8, dtype=torch.bool), torch.ones(8, dtype=torch.bool)):
            other = base.clone()
            other[r] = ~other[r]
            one, two = (grid.step(at, action, x.expand(len(every), -1)) for x in (base, other))
            changed |= not torch.equal(one, two)
        assert changed, grid.RULES[r]


def by_hand(asker: Asker, seen, prior) -> list[float]:
    """p(r | x) with the transition rewritten and every text asked for every rule set."""
    weight = []
    for rules in EVERY.tolist():
        lp = sum(math.log(p if yes else 1 - p) for p, yes in zip(prior, rules, strict=True))
        for x in seen:
            s = slow(x.before, x.action, rules)
            lp += float(asker.log_p([(grid.describe(s) + LEAD, f" {x.text}")])[0])
        weight.append(lp)
    top = max(weight)
    total = sum(math.exp(w - top) for w in weight)
    return [math.exp(w - top) / total for w in weight]


def test_posterior_is_bayes_under_a_model():
    asker = Asker(TinyLM(ALPHABET, seed=4, dtype=torch.float64))
    seen = grid.observe(EVERY[201], 5, seed=1)
    prior = [0.5, 0.3, 0.7, 0.5, 0.2, 0.6, 0.5, 0.4]
    told = grid.log_likelihood(asker, seen, EVERY)
    p = grid.rule_posterior(told, EVERY, torch.tensor(prior))
    exact = torch.tensor(by_hand(asker, seen, prior), dtype=torch.float64)
    assert float((p - exact).abs().max()) < 1e-9
    bug = grid.rule_posterior(told.mean(0, keepdim=True), EVERY, torch.tensor(prior))  # planted: texts averaged
    assert float((bug - exact).abs().sum()) / 2 > 0.02


def test_a_known_channel_names_the_rules():
    """Outcomes read through a channel that errs with probability 0.1: the posterior by hand, and it finds the truth."""
    held = EVERY[77]
    seen = grid.observe(held, 60, seed=2)
    rows = []
    for x in seen:
        found, index = grid.outcomes(x.before, x.action, EVERY)
        right = torch.tensor([s == x.after for s in found])
        rows.append(torch.where(right, math.log(0.9), math.log(0.1 / 143)).double()[index])
    p = grid.rule_posterior(torch.stack(rows), EVERY)
    misses = torch.tensor([sum(slow(x.before, x.action, r) != x.after for x in seen) for r in EVERY.tolist()]).double()
    by_count = (misses * math.log(0.1 / 143) + (len(seen) - misses) * math.log(0.9)).softmax(0)
    assert float((p - by_count).abs().max()) < 1e-12
    assert float(p[(EVERY == held).all(1)]) > 0.9


def test_rollouts_and_their_prediction():
    start, actions, truth = grid.journey(EVERY[90], 5, seed=3)
    s, path = start, []
    for a in actions:
        s = slow(s, a, EVERY[90].tolist())
        path.append(s)
    assert path == truth
    rolled = grid.roll(start, actions, EVERY)
    assert [tuple(x) for x in rolled[90].tolist()] == truth
    sure = torch.zeros(256, dtype=torch.float64)
    sure[90] = 1.0
    assert grid.predict(sure, rolled) == truth
    level = torch.rand(256, generator=generator(1), dtype=torch.float64)
    for h, said in enumerate(grid.predict(level / level.sum(), rolled)):
        mass = {}
        for w, x in zip(level.tolist(), rolled[:, h].tolist(), strict=True):
            mass[tuple(x)] = mass.get(tuple(x), 0.0) + w
        assert said == max(mass, key=lambda k: mass[k])


def test_the_model_asked_directly_follows_its_likeliest_option():
    asker = Asker(TinyLM(ALPHABET, seed=2, context=1024))
    seen = grid.observe(EVERY[12], 2, seed=5)
    start, actions, _ = grid.journey(EVERY[12], 3, seed=6)
    said = grid.predict_directly(asker, seen, start, actions)
    s = start
    for a, x in zip(actions, said, strict=True):
        assert x in grid.outcomes(s, a, EVERY)[0]
        s = x
    assert asker.counts.questions > 0


def test_texts_hold_what_they_say():
    gen = generator(0)
    for s in states()[::7]:
        whole, least = grid.worded(s, 0.0, gen), grid.worded(s, 1.0, gen)
        assert grid.SQUARES[s[0]] in whole and grid.SQUARES[s[0]] in least and str(s[3]) in whole
        assert len(least) < len(whole) and whole.endswith(".") and whole[0].isupper()
    with pytest.raises(InputError, match="at least one"):
        grid.observe(EVERY[0], 0)
