"""``retrodict plan story.txt``: what a story says of a map, and what to do there.

A model reads the story sentence by sentence; printed and kept in a run folder are the posterior over maps (each link's
probability), the best plan with its probability of being optimal, and what the model answers when asked directly. What
is wrong with the story or the names is said before a model is loaded.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import tyro

from retrodict.cli.answers import keep
from retrodict.errors import InputError
from retrodict.samplers.common import positive
from retrodict.structures.ask import Asker
from retrodict.structures.maps import LISTED, MapPosterior, Narrator, amounts_in, map_posterior, read, sentences_of
from retrodict.structures.maps_direct import greedy
from retrodict.structures.planner import Plan, Worlds, answer, plans
from retrodict.structures.stories import Question
from retrodict.structures.stories_words import Words
from retrodict.structures.story_names import given_places, place_of, places_in, start_of

SHOWN = 8
"""Plans kept, and printed."""


def run(
    story: tyro.conf.Positional[str] = "",
    lm: str = "smollm2",
    dtype: str = "auto",
    places: str = "",
    start: str = "",
    goal: str = "",
    unsaid: float = 0.15,
    draws: int = 2000,
    cache: str = "",
    seed: int = 0,
    out: str = "runs",
) -> int:
    """The posterior over the maps that a story leaves open, and the plan that is best under it.

    Args:
        story: a text file: places, what leads where, what lies where.
        lm: the language model that reads it.
        dtype: its precision.
        places: names joined by commas; by default those found in the story.
        start: where you are; by default where the story says so, else the first place it names.
        goal: where to go by the fewest steps; by default to the most money, a step costing 1.
        unsaid: share of links that the story leaves out.
        draws: worlds drawn for the plan.
        cache: a file of the model's answers, which spares it on another call.
        seed: of the draws.
        out: where the run folder is made.
    """
    config = {k: v for k, v in locals().items() if v not in ("", None)}
    positive(draws=draws)
    narrator, text = Narrator(unsaid=unsaid), _text(story)
    names, words = (
        given_places(text, [p.strip() for p in places.split(",") if p.strip()]) if places else places_in(text)
    )
    here = place_of(start, names, "--start") if start else start_of(text, names)
    there = place_of(goal, names, "--goal") if goal else None
    if there is None and not any(amounts_in(s) for s in sentences_of(text)):
        raise InputError("the story names no amounts (as in '10 dollars'); say where to go: --goal 'the tower'")
    if there == here:
        raise InputError(f"the goal is where you are already ({names[here]}); give another --goal or --start")
    from retrodict.models.load import load

    asker = Asker(load(lm, dtype=dtype), cache or None)
    found = map_posterior(read(asker, text, names, words), names, narrator, seed=seed)
    told = answer_of(found, asker, text, words, here, there, draws, seed)
    show(told)
    folder = keep("plan", out, {"name": Path(story).stem, **config}, told, asker.lm)
    print(f"\nthe page is {folder / 'report.html'}")
    return 0


def _text(path: str) -> str:
    if not path:
        raise InputError("plan: which story? give a text file, such as docs/structures/house.txt")
    try:
        text = Path(path).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read {path!r}: {getattr(error, 'strerror', None) or 'not UTF-8 text'}") from None
    if not text.strip():
        raise InputError(f"{path} is empty: write a story into it, a few sentences on what leads where")
    return text


# -- the answer -------------------------------------------------------------------------------------------------------


def answer_of(
    found: MapPosterior, asker: Asker, text: str, words: Words, here: int, there: int | None, draws: int, seed: int
) -> dict[str, Any]:
    """Everything that is printed and that the page shows, as plain values."""
    names, w = found.names, found.worlds(draws, seed)
    if there is not None:  # to arrive is worth more than any way costs
        prize = torch.zeros(len(names), dtype=torch.float64)
        prize[there] = len(names)
        w = Worlds(w.open, prize.expand(draws, -1), w.weight)
    every = plans(w, here)
    kind, says = ("way", words.way) if there is not None else ("best", words.best)
    others = [i for i in range(len(names)) if i != here]
    text_of = says.format(a=names[here], b=names[there if there is not None else here])
    question = Question("first", text_of, tuple(names[i] for i in others), tuple((i,) for i in others), ())
    best_first = answer(w, here, "first", question.paths)
    return {
        "names": names, "text": text, "exact": found.exact, "draws": draws, "start": here, "goal": there, "kind": kind,
        "links": found.links().tolist(), "open": w.open.double().mean(0).tolist(),
        "reward": None if there is not None else w.reward.mean(0).tolist(),
        "plans": [_plan(p, names, w, here) for p in every[:SHOWN]],
        "question": text_of, "options": question.options, "direct": greedy(asker, text, question).tolist(),
        "first": best_first.best.tolist(), "sentences": _sentences(found, text),
        "lm": {"name": asker.lm.name, "asked": asker.counts.scored + asker.counts.cached,
               "outside": asker.counts.mean_outside},
    }  # fmt: skip


def _plan(p: Plan, names: tuple[str, ...], w: Worlds, here: int) -> dict[str, Any]:
    stops = torch.tensor([here, *p.places])
    works = float(w.weight @ w.open[:, stops[:-1], stops[1:]].all(1).double())
    return {"places": [names[i] for i in p.places], "utility": p.utility, "optimal": p.best, "works": works}


def _sentences(found: MapPosterior, text: str) -> list[dict[str, Any]]:
    """Each sentence with the two facts that it most likely states."""
    n, reading = found.names, found.reading
    pairs = [f"{n[i]} – {n[j]}" for i in range(len(n)) for j in range(i + 1, len(n))]
    facts = [*pairs, *(f"{p}: closed" for p in pairs), *(f"{x}: {a:g}" for x in n for a in reading.amounts), "nothing"]
    out = []
    for sentence, row in zip(sentences_of(text), found.stated(), strict=True):
        top = row.argsort(descending=True)[:2].tolist()
        out.append({"text": sentence, "facts": [{"says": facts[k], "p": float(row[k])} for k in top]})
    return out


# -- what is printed --------------------------------------------------------------------------------------------------


def spell(places: list[str]) -> str:
    """A plan in words."""
    return ", then ".join(places) if places else "stay where you are"


def show(told: Mapping[str, Any]) -> None:
    """The links, the plans, the direct answer."""
    names = told["names"]
    how = "every map was listed" if told["exact"] else f"maps were sampled (over {LISTED} pairs of places)"
    print(f"{len(names)} places: {', '.join(names)}; you are in {names[told['start']]} ({how})\n")
    print("   told   open   link")
    rows = [(told["links"][i][j], told["open"][i][j], f"{names[i]} – {names[j]}")
            for i in range(len(names)) for j in range(i + 1, len(names))]  # fmt: skip
    for p, now, link in sorted(rows, reverse=True)[: 2 * len(names)]:
        print(f"  {p:5.1%}  {now:5.1%}   {link}" if p < 0.9995 else f"   100%  {now:5.1%}   {link}")
    print("\n   gain   optimal   possible   plan" if told["goal"] is None else "\n  optimal   possible   plan")
    for p in told["plans"][:SHOWN]:
        gain = f"  {p['utility']:5.2f}   " if told["goal"] is None else "  "
        print(f"{gain}{p['optimal']:7.1%}   {p['works']:8.1%}   {spell(p['places'])}")
    best = max(range(len(told["direct"])), key=lambda i: told["direct"][i])
    print(f"\n{told['lm']['name']} asked directly goes first to {told['options'][best]} "
          f"({told['direct'][best]:.1%} among the places), which is a best first step with probability "
          f"{told['first'][best]:.1%}")  # fmt: skip
