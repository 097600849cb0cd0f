"""The page of ``retrodict worlds``: statements before and after, worlds, rules, texts; from its answer alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from retrodict.report.page import details, figure, page, table
from retrodict.report.svg import FAINT, GRID, INK, WIDTH, colour, esc, num

PLOTTED, ROW = 30, 22
"""Statements in the plot, and the height of each."""


def render(answer: Mapping[str, Any]) -> str:
    """The page."""
    model, title = answer["lm"], str(answer["name"])
    kicker = " · ".join(x for x in ("retrodict worlds", model["name"] if model else "", answer["made"]) if x)
    lead = (f"{len(answer['statements'])} statements, believed one by one, and the worlds in which they keep "
            f"{len(answer['costs'])} rules, in proportion to what is believed.")  # fmt: skip
    body = [f'<p class="kicker">{esc(kicker)}</p><h1>{esc(title)}</h1><p class="lead">{esc(lead)}</p>', _mass(answer),
            "<h2>Statements</h2>", _statements(answer["statements"]), "<h2>Worlds</h2>", _worlds(answer["worlds"]),
            _calibration(answer["calibration"]), _contexts(answer["contexts"]), _model(model),
            _record(answer["config"])]  # fmt: skip
    return page(f"{title} – retrodict", "\n".join(x for x in body if x))


def _mass(answer: Mapping[str, Any]) -> str:
    how = "every world was listed" if answer["exact"] else (
        f"worlds were sampled: log Z = {answer['log_z']:.3f} ± {answer['log_z_error']:.3f} nats")  # fmt: skip
    told = (
        f"Inconsistency mass: {answer['inconsistency']:.4f}. Beliefs taken one by one give that much probability to "
        f"worlds that break a rule ({how}; {answer['components']} groups of statements hang together)."
    )
    rows = [[c["rule"], f"{c['inconsistency']:.4f}"] for c in answer["costs"]]
    return f"<p>{esc(told)}</p>{details('Each rule alone', table(['rule', 'inconsistency mass'], rows))}"


def _statements(rows: Sequence[Mapping[str, Any]]) -> str:
    plot = figure("Before and after", dumbbells(rows[:PLOTTED]), "Ring: believed alone. Dot: given the rules. The "
                  "statements that moved most come first.")  # fmt: skip
    truth = {None: "", True: "true", False: "false"}
    cells = [[s["says"], f"{s['before']:.3f}", f"{s['after']:.3f}", f"{s['log_odds']:+.2f}", truth[s["truth"]]] for s in
             rows]  # fmt: skip
    return plot + table(["statement", "before", "after", "log-odds", "is"], cells, (4,), (0,))


def dumbbells(rows: Sequence[Mapping[str, Any]]) -> str:
    """One line a statement, from its probability before to that after."""
    left, right = 0.52 * WIDTH, WIDTH - 10
    bottom = ROW * len(rows) + 8

    def x(p: float) -> float:
        return left + (right - left) * p

    parts = [f'<line x1="{num(x(p))}" x2="{num(x(p))}" y1="0" y2="{bottom}" stroke="{GRID}"/>'
             f'<text x="{num(x(p))}" y="{bottom + 14}" text-anchor="middle" fill="{INK}">{p:g}</text>'
             for p in (0.0, 0.5, 1.0)]  # fmt: skip
    for k, s in enumerate(rows):
        y, says = ROW * k + 14, str(s["says"])
        short = esc(says if len(says) <= 34 else says[:33] + "…")
        mark, before, after = colour(1) if s["truth"] is False else colour(0), x(s["before"]), x(s["after"])
        tip = f"{esc(says)}: {s['before']:.3f} to {s['after']:.3f}"
        parts.append(f'<text x="{num(left - 10)}" y="{y + 4}" text-anchor="end" fill="{INK}">{short}</text>'
                     f'<line x1="{num(before)}" x2="{num(after)}" y1="{y}" y2="{y}" stroke="{FAINT}" stroke-width="2"/>'
                     f'<circle cx="{num(before)}" cy="{y}" r="4" fill="#fff" stroke="{mark}" stroke-width="1.5"/>'
                     f'<circle cx="{num(after)}" cy="{y}" r="4.5" fill="{mark}">'
                     f"<title>{tip}</title></circle>")  # fmt: skip
    return (f'<svg viewBox="0 0 {WIDTH} {bottom + 20}" role="img" aria-label="probabilities before and after">'
            f"{''.join(parts)}</svg>")  # fmt: skip


def _worlds(worlds: Sequence[Mapping[str, Any]]) -> str:
    rows = [[f"{w['p']:.4f}", "; ".join(w["true"]) or "nothing is true"] for w in worlds]
    return table(["probability", "what is true in it"], rows, (), (1,))


def _calibration(m: Mapping[str, float]) -> str:
    if not m:
        return ""
    rows = [[when, *(f"{m[f'{k}_{when}']:.4f}" for k in ("brier", "ece", "accuracy"))] for when in ("before", "after")]
    told = f"On {m['known']:.0f} statements whose truth is known. Brier and ECE: 0 is perfect."
    return f"<h2>Against what is known</h2>{table(['', 'Brier', 'ECE', 'accuracy'], rows)}<p class='soft'>{told}</p>"


def _contexts(contexts: Sequence[Mapping[str, Any]]) -> str:
    if not contexts:
        return ""
    kinds = {None: "", True: "flagged", False: "not flagged"}
    rows = []
    for c in contexts:
        moved = "; ".join(f"{m['says']} {m['log_odds']:+.2f}" for m in c["moved"][:3])
        numbers = [f"{c['kl']:.3f}", f"{c['beliefs']:.3f}", f"{c['inconsistency']:+.4f}"]
        rows.append([c["name"], "harmless" if c["harmless"] else kinds[c["flagged"]], *numbers, moved])
    told = ("Each text was put before the questions. KL: how far it moved the posterior over worlds, in nats; flagged "
            "where that is more than any harmless text did.")  # fmt: skip
    head = ["text", "", "KL", "of beliefs alone", "inconsistency", "moved most, in log-odds"]
    return f"<h2>Texts before the questions</h2>{table(head, rows, (0, 1), (5,))}<p class='soft'>{esc(told)}</p>"


def _model(model: Mapping[str, Any] | None) -> str:
    if not model:
        return ""
    told = (
        f"{model['name']} was asked about {model['asked']} statements in {model['questions']} questions; "
        f"{model['outside']:.1%} of its answers' mass is neither yes nor no, and in {model['mostly_outside']} "
        "questions most of it."
    )
    return f"<p class='soft'>{esc(told)}</p>"


def _record(config: Mapping[str, Any]) -> str:
    rows = [[str(k), str(v)] for k, v in config.items()]
    return details("How it was made", table(["setting", "value"], rows, (0, 1)))
