"""The page of ``retrodict plan``: the story as it was read, the map, the plans; from its answer alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from retrodict.cli.graph_page import heat_map
from retrodict.cli.plan import spell
from retrodict.report.page import details, figure, page, table, text
from retrodict.report.svg import esc


def render(answer: Mapping[str, Any]) -> str:
    """The page."""
    names, config = answer["names"], answer["config"]
    title = f"A plan for {config.get('name', 'a story')}"
    kicker = " · ".join(("retrodict plan", answer["lm"]["name"], answer["made"]))
    how = "every map was listed" if answer["exact"] else "maps were sampled"
    aim = f"to {names[answer['goal']]}" if answer["goal"] is not None else "to the most money"
    lead = (f"Maps of {len(names)} places in proportion to their posterior given the story ({how}), and the plan from "
            f"{names[answer['start']]} {aim} that is best over {answer['draws']:,} worlds drawn from it.")  # fmt: skip
    story = " ".join(answer["text"].split())
    body = [f'<p class="kicker">{esc(kicker)}</p><h1>{esc(title)}</h1><p class="lead">{esc(lead)}</p>',
            f'<div class="story">{text(story, 6000)}</div>', "<h2>Plans</h2>", _plans(answer),
            "<h2>Map</h2>", _maps(answer), "<h2>Sentences</h2>", _sentences(answer), _record(config)]  # fmt: skip
    return page(f"{title} – retrodict", "\n".join(body))


def _plans(answer: Mapping[str, Any]) -> str:
    rows = [[spell(p["places"]), f"{p['optimal']:.1%}", f"{p['works']:.1%}", f"{p['utility']:.2f}"] for p in
            answer["plans"]]  # fmt: skip
    head = ["plan", "optimal", "possible", "expected gain"]
    first = [[o, f"{d:.1%}", f"{b:.1%}"] for o, d, b in zip(answer["options"], answer["direct"], answer["first"],
                                                           strict=True)]  # fmt: skip
    told = ("Optimal: probability that no other plan does better. Possible: that every step is open. Below, the first "
            "step: the model's own answer to the question, and the probability that it is a best one.")  # fmt: skip
    return (f"{table(head, rows, (), (0,))}<p class='soft'>{esc(told)}</p><p>{esc(answer['question'])}</p>"
            + table(["first step", "the model's answer", "best by the posterior"], first))  # fmt: skip


def _maps(answer: Mapping[str, Any]) -> str:
    plots = [figure("Linked, as the story begins", heat_map(answer["names"], answer["links"]), ""),
             figure("Open, at its end", heat_map(answer["names"], answer["open"]), "What is said to be blocked is "
                    "closed.")]  # fmt: skip
    pays = answer["reward"]
    paid = "" if pays is None else table(["place", "expected amount"], [
        [n, f"{x:.2f}"] for n, x in zip(answer["names"], pays, strict=True) if x >= 0.005])  # fmt: skip
    return f'<div class="figures">{"".join(plots)}</div>{paid}'


def _sentences(answer: Mapping[str, Any]) -> str:
    rows = [[s["text"], "; ".join(f"{f['says']} ({f['p']:.0%})" for f in s["facts"] if f["p"] >= 0.01)] for s in
            answer["sentences"]]  # fmt: skip
    return table(["sentence", "read as"], rows, (), (0, 1))


def _record(config: Mapping[str, Any]) -> str:
    return details("How it was made", table(["what", "value"], [[k, str(v)] for k, v in config.items()], (0,), (1,)))
