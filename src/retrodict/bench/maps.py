"""``retrodict bench maps``: stories that leave a map to be inferred, and a small causal world whose rules are latent.

Maps (structures/maps.md): the same questions, answered by

    direct              the model picks the likeliest option after story and question
    chain               the same after a sampled chain of reasoning
    posterior, utility  posterior over maps as the same model reads the story, exact planner, expected utility
    posterior, vote     the same worlds, the option most often optimal
    best map            the planner on the single most probable map
    perfect reading     posterior, utility, with every sentence understood: what the story itself leaves open
    chance              one option at random

Accuracy by condition, by family and by question. Standard errors are over stories, whose three questions share a map.
Rules (structures/gridworld.md): share of exactly right states after h actions, of the model asked step by step, of the
posterior over rule sets rolled out exactly, and of the prior over rule sets. Nothing has a bar: a model that reads
nothing leaves the posterior at its prior, which the tables show; the sums themselves are gated in the tests.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from retrodict.bench.rows import Row, show_only, write
from retrodict.diagnostics.calibration import auroc, brier, calibration_error
from retrodict.errors import InputError
from retrodict.models.load import load
from retrodict.rng import child_seed, generator
from retrodict.samplers.common import positive
from retrodict.structures import gridworld as grid
from retrodict.structures.ask import Asker
from retrodict.structures.maps import MapPosterior, log_prior, map_posterior, pairs_of, read, told
from retrodict.structures.maps_direct import chained, chosen, greedy
from retrodict.structures.planner import Worlds, answer
from retrodict.structures.stories import CONDITIONS, FAMILIES, Story, story
from retrodict.structures.stories_words import RENDERERS

SUITE = "maps"
UNSAID, VAGUE = 0.15, 0.2
WORLDS = 1000
"""Worlds drawn of each posterior."""

Right = dict[str, list[float]]
"""Of each method, how right it was on each question of a story (chance is a fraction)."""


def told_stories(copies: int, places: int, seed: int) -> list[tuple[Story, str]]:
    """``copies`` stories of every family and condition, in rooms and in ties by turns, and their renderer."""
    out = []
    for f, family in enumerate(FAMILIES):
        for c, condition in enumerate(CONDITIONS):
            for k in range(copies):
                renderer = tuple(RENDERERS)[(f + c + k) % len(RENDERERS)]
                made = story(family, condition, places=places, unsaid=UNSAID, vague=VAGUE, renderer=renderer,
                             seed=child_seed(seed, f, c, k))  # fmt: skip
                out.append((made, renderer))
    return out


def planned(s: Story, w: Worlds, vote: bool = False) -> list[float]:
    """Whether each question is answered rightly from worlds."""
    found = [answer(w, s.start, q.kind, q.paths) for q in s.questions]
    return [float(chosen(a.best if vote else a.utility, q)) for a, q in zip(found, s.questions, strict=True)]


def best_map(p: MapPosterior) -> MapPosterior:
    """All mass on the most probable map."""
    top = p.log_p.argmax()
    return replace(p, maps=p.maps[top][None], log_p=torch.zeros(1, dtype=torch.float64))


def judged(s: Story, p: MapPosterior) -> Right:
    """The answers that need no further question to the model."""
    perfect = map_posterior(told(s.said, len(s.names)), s.names, p.narrator)
    w = p.worlds(WORLDS)
    return {
        "posterior, utility": planned(s, w), "posterior, vote": planned(s, w, vote=True),
        "best map": planned(s, best_map(p).worlds(WORLDS)), "perfect reading": planned(s, perfect.worlds(WORLDS)),
        "chance": [sum(q.right) / len(q.options) for q in s.questions],
    }  # fmt: skip


def graded(name: str, right: Sequence[Right]) -> list[Row]:
    """Accuracy of each method over some stories, with its standard error over stories."""
    rows = []
    for method in right[0]:
        each = torch.tensor([sum(r[method]) / len(r[method]) for r in right], dtype=torch.float64)
        se = float(each.std()) / math.sqrt(len(each)) if len(each) > 1 else math.nan
        note = f"{len(each)} stories, {sum(len(r[method]) for r in right)} questions"
        rows += [show_only(SUITE, name, method, "accuracy", float(each.mean()), note),
                 show_only(SUITE, name, method, "standard error of accuracy", se, note)]  # fmt: skip
    return rows


def map_rows(stories: Sequence[Story], right: Sequence[Right]) -> list[Row]:
    """The tables of accuracy: all, by condition, by family, by question."""
    rows = graded("all", right)
    for name in (*CONDITIONS, *FAMILIES):
        some = [r for s, r in zip(stories, right, strict=True) if name in (s.condition, s.family)]
        rows += graded(name, some) if some else []
    for i, q in enumerate(stories[0].questions):
        rows += graded(f"which {q.kind}", [{m: [x[i]] for m, x in r.items()} for r in right])
    return rows


def link_rows(stories: Sequence[Story], found: Mapping[str, Sequence[MapPosterior]]) -> list[Row]:
    """How well P(linked) of every pair agrees with the truth."""
    rows = []
    i, j = pairs_of(len(stories[0].names)).T
    truth = torch.cat([s.before[i, j] for s in stories])
    for method, posteriors in found.items():
        p = torch.cat([x.links()[i, j] for x in posteriors])
        for metric, fn in (("Brier", brier), ("calibration error", calibration_error), ("AUROC", auroc)):
            rows.append(show_only(SUITE, "links", method, metric, fn(p, truth), f"{len(truth)} pairs"))
    return rows


def maps(asker: Asker, copies: int, places: int, chains: int, seed: int) -> list[Row]:
    """Read every story, plan, ask directly; the rows."""
    made, right, found = told_stories(copies, places, seed), [], []
    for n, (s, renderer) in enumerate(made):
        p = map_posterior(read(asker, s.text, s.names, RENDERERS[renderer]), s.names)
        direct = [float(chosen(greedy(asker, s.text, q), q)) for q in s.questions]
        right.append({"direct": direct, **judged(s, p)})
        found.append(p)
        print(f"story {n + 1} of {len(made)}: {s.family}, {s.condition}, {renderer}", flush=True)
    stories = [s for s, _ in made]
    asked = [(s.text, q) for s in stories for q in s.questions]
    told_by = iter(chained(asker, asked, chains=chains, seed=seed))
    for s, r in zip(stories, right, strict=True):
        r["chain"] = [float(chosen(next(told_by), q)) for q in s.questions]
    about = {"posterior": found, "perfect reading": [map_posterior(told(s.said, places), s.names) for s in stories]}
    if all(p.exact for p in found):
        about["prior"] = [replace(p, log_p=log_prior(p.maps, places, p.narrator).log_softmax(0)) for p in found]
    return map_rows(stories, right) + link_rows(stories, about)


# -- rules ------------------------------------------------------------------------------------------------------------


def rules(asker: Asker, worlds: int, seen: int, episodes: int, horizon: int, seed: int) -> list[Row]:
    """Rollouts of worlds with random rules: exactly right states by horizon, and what was learned of the rules."""
    every, hits, gain, marginal, truth = grid.all_rules(), {}, [], [], []
    prior = torch.full((len(every),), 1.0 / len(every), dtype=torch.float64)
    for w in range(worlds):
        held = every[int(torch.randint(len(every), (1,), generator=generator(seed, "cpu", w)))]
        texts = grid.observe(held, seen, seed=child_seed(seed, w))
        p = grid.rule_posterior(grid.log_likelihood(asker, texts, every), every)
        at = int((every == held).all(1).nonzero())
        gain.append(float(p[at].log() - prior[at].log()))
        marginal.append((p @ every.double()).clamp_max(1.0))
        truth.append(held)
        for e in range(episodes):
            start, actions, right = grid.journey(held, horizon, seed=child_seed(seed, w, e))
            states = grid.roll(start, actions, every)
            told_by = {"posterior": grid.predict(p, states), "prior": grid.predict(prior, states),
                       "direct": grid.predict_directly(asker, texts, start, actions)}  # fmt: skip
            for method, said in told_by.items():
                hits.setdefault(method, []).append([a == b for a, b in zip(said, right, strict=True)])
        print(f"rules {w + 1} of {worlds}", flush=True)
    note = f"{worlds} rule sets, {seen} texts each, {worlds * episodes} rollouts"
    rows = []
    for method, x in hits.items():
        share = torch.tensor(x, dtype=torch.float64)
        for h in range(horizon):
            rows.append(
                show_only(SUITE, f"rollout, {h + 1} steps", method, "exact states", float(share[:, h].mean()), note)
            )
    p, t = torch.cat(marginal), torch.cat(truth)
    rows.append(show_only(SUITE, "rules", "posterior", "nats gained on the true rule set", sum(gain) / worlds, note))
    rows.append(show_only(SUITE, "rules", "posterior", "Brier of each rule", brier(p, t), "0.25 is the prior's"))
    return rows


def run(
    copies: int = 1,
    places: int = 6,
    chains: int = 1,
    worlds: int = 6,
    seen: int = 8,
    episodes: int = 3,
    horizon: int = 6,
    model: str = "smollm2",
    dtype: str = "",
    device: str = "",
    seed: int = 0,
    cache: str = "",
    partial: str = "",
) -> list[Row]:
    """Both tables; some minutes of one core.

    Args:
        copies: stories of each family and condition; 0 leaves the maps out.
        places: in a story.
        chains: sampled chains a question.
        worlds: rule sets; 0 leaves them out.
        seen: texts of transitions a rule set.
        episodes: rollouts a rule set.
        horizon: actions of a rollout.
        model, dtype, device: see ``rd.load``; "" for its defaults.
        seed: of everything.
        cache: a file that keeps the model's answers, so that a second run asks nothing twice.
        partial: a JSON file of the rows so far.
    """
    positive(places=places, chains=chains, seen=seen, episodes=episodes, horizon=horizon)
    if min(copies, worlds) < 0 or copies + worlds == 0:
        raise InputError("give at least one copy of the stories or one world of rules")
    given: dict[str, Any] = {k: v for k, v in (("dtype", dtype), ("device", device)) if v}
    asker, rows = Asker(load(model, **given), cache or None), []
    if copies:
        rows += maps(asker, copies, places, chains, seed)
    if partial:
        write(rows, Path(partial))
    if worlds:
        rows += rules(asker, worlds, seen, episodes, horizon, seed)
    c = asker.counts
    note = f"{c.questions} questions with options, {c.scored} texts scored, {c.cached} known"
    return [*rows, show_only(SUITE, "options", "direct", "mean mass outside the options", c.mean_outside, note)]
