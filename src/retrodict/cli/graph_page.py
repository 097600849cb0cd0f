"""The page of ``retrodict graph``: heat map, edges with intervals, graphs, calibration; from its answer alone."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from retrodict.report.page import details, figure, page, table
from retrodict.report.svg import FAINT, GRID, INK, WIDTH, Plot, colour, esc, num

CELL_TEXT = 14
"""Variables up to which every cell of the heat map holds its number."""
EDGES, GRAPHS, BINS = 24, 6, 10
MARK = "#c8501e"


def render(answer: Mapping[str, Any]) -> str:
    """The page."""
    model, rows = answer["lm"], answer["rows"]
    data = f"{rows:,} rows of {len(answer['names'])} variables" if rows is not None else "no data"
    lead = f"Causal graphs in proportion to their posterior: {data}" + (
        f", with {model['name']} as prior (exponent {model['alpha']:g})." if model else ".")  # fmt: skip
    kicker = " · ".join(x for x in ("retrodict graph", model["name"] if model else "", answer["made"]) if x)
    body = [f'<p class="kicker">{esc(kicker)}</p><h1>{esc(_title(answer))}</h1><p class="lead">{esc(lead)}</p>',
            *[f'<p><span class="badge care">note</span>{esc(n)}</p>' for n in answer["notes"]],
            _metrics(answer), "<h2>Edges</h2>", _figures(answer), _edges(answer), _graphs(answer),
            _experiments(answer), _record(answer)]  # fmt: skip
    return page(f"{_title(answer)} – retrodict", "\n".join(x for x in body if x))


def _title(answer: Mapping[str, Any]) -> str:
    path = str(answer["config"].get("data") or answer["config"].get("variables") or "graph")
    return f"Graphs of {path.rsplit('/', 1)[-1]}"


def _metrics(answer: Mapping[str, Any]) -> str:
    m = answer["metrics"]
    if not m:
        return ""
    head = ["E[SHD]", "AUROC", "Brier", "ECE", "E[edges]", "true edges"]
    true = sum(map(sum, answer["truth"]))
    cells = [f"{m['e_shd']:.2f}", f"{m['auroc']:.3f}", f"{m['brier']:.4f}", f"{m['ece']:.4f}", f"{m['edges']:.2f}",
             str(true)]  # fmt: skip
    told = ("E[SHD]: expected number of pairs that differ from the true graph, a reversal counted once. AUROC: how "
            "often a true edge is more probable than a missing one. Brier and ECE: how far probabilities are from what "
            "is there; 0 is perfect.")  # fmt: skip
    return f"<h3>Against the true graph</h3>{table(head, [cells], ())}<p class='soft'>{esc(told)}</p>"


def _figures(answer: Mapping[str, Any]) -> str:
    kind = "exact" if answer["exact"] else f"by {answer['method']}"
    framed = " Framed: edges of the true graph." if answer["truth"] else ""
    plots = [figure("Probability of each edge", heat_map(answer["names"], answer["marginals"], answer["truth"]),
                    f"From row to column, {kind}.{framed}")]  # fmt: skip
    if answer["lm"]:
        p = answer["lm"]["probabilities"]
        plots.append(figure("What the language model says", heat_map(answer["names"], p, answer["truth"]),
                            "Its answer to each question alone, before acyclicity and data."))  # fmt: skip
    if answer["truth"]:
        plots.append(figure("Calibration", _calibration(answer["marginals"], answer["truth"]),
                            "Share of true edges among those of about the same probability; the size of a dot is their "
                            "number. On the diagonal, probabilities mean what they say."))  # fmt: skip
    return f'<div class="figures">{"".join(plots)}</div>'


def heat_map(names: Sequence[str], p: Sequence[Sequence[float]], truth: Sequence[Sequence[bool]] | None = None) -> str:
    """A d x d grid, row i to column j; darker is more probable."""
    d = len(names)
    left = min(150.0, 12 + 6.4 * max(map(len, names)))
    cell = (WIDTH - left - 4) / d
    parts = []
    for k, name in enumerate(names):
        y, x = left + (k + 0.5) * cell, left + (k + 0.5) * cell
        short = esc(name if len(name) <= 20 else name[:19] + "…")
        parts.append(f'<text x="{num(left - 5)}" y="{num(y + 4)}" text-anchor="end" fill="{INK}">{short}</text>')
        parts.append(
            f'<text transform="translate({num(x + 4)},{num(left - 5)}) rotate(-90)" fill="{INK}">{short}</text>'
        )
    for i in range(d):
        for j in range(d):
            x, y = left + j * cell, left + i * cell
            if i == j:
                parts.append(_square(x, y, cell, GRID, 1.0))
                continue
            parts.append(_square(x, y, cell, colour(0), p[i][j], f"{names[i]} → {names[j]}: {p[i][j]:.3f}"))
            if d <= CELL_TEXT and p[i][j] >= 0.005:
                ink = "#fff" if p[i][j] > 0.55 else INK
                parts.append(f'<text x="{num(x + cell / 2)}" y="{num(y + cell / 2 + 4)}" text-anchor="middle" '
                             f'fill="{ink}" font-size="{num(min(11, cell / 2.6))}">{p[i][j]:.2f}</text>')  # fmt: skip
            if truth and truth[i][j]:
                side = num(cell - 2)
                parts.append(f'<rect x="{num(x + 1)}" y="{num(y + 1)}" width="{side}" height="{side}" fill="none" '
                             f'stroke="{MARK}" stroke-width="2"/>')  # fmt: skip
    side = num(left + d * cell + 2)
    return f'<svg viewBox="0 0 {WIDTH} {side}" role="img" aria-label="edge probabilities">{"".join(parts)}</svg>'


def _square(x: float, y: float, side: float, fill: str, opacity: float, title: str = "") -> str:
    tip = f"<title>{esc(title)}</title>" if title else ""
    return (f'<rect x="{num(x)}" y="{num(y)}" width="{num(side)}" height="{num(side)}" fill="{fill}" '
            f'fill-opacity="{max(opacity, 0.02):.3f}" stroke="{GRID}" stroke-width=".5">{tip}</rect>')  # fmt: skip


def _calibration(p: Sequence[Sequence[float]], truth: Sequence[Sequence[bool]]) -> str:
    plot = Plot(260, (0.0, 1.0), (0.0, 1.0))
    steps = [0.0, 0.25, 0.5, 0.75, 1.0]
    plot.axes("probability of the edge", steps, steps)
    plot.path([(0, 0), (1, 1)], FAINT, 1, ' stroke-dasharray="4 3"')
    bins: dict[int, list[tuple[float, bool]]] = {}
    for i, row in enumerate(p):
        for j, x in enumerate(row):
            if i != j:
                bins.setdefault(min(int(x * BINS), BINS - 1), []).append((x, bool(truth[i][j])))
    for found in bins.values():
        n, mean, hit = len(found), sum(x for x, _ in found) / len(found), sum(y for _, y in found) / len(found)
        plot.dot(
            plot.px(mean), plot.py(hit), 3 + 2 * math.log10(n), colour(0), f"{n} pairs: {mean:.2f} said, {hit:.2f} true"
        )
    return plot.svg("calibration of edge probabilities")


def _edges(answer: Mapping[str, Any]) -> str:
    names, p, model, truth = answer["names"], answer["marginals"], answer["lm"], answer["truth"]
    d = len(names)
    order = sorted(((p[i][j], i, j) for i in range(d) for j in range(d) if i != j), reverse=True)
    rows = []
    for x, i, j in order[:EDGES]:
        span = "exact" if answer["exact"] else f"{answer['low'][i][j]:.3f} to {answer['high'][i][j]:.3f}"
        row = [f"{names[i]} → {names[j]}", f"{x:.3f}", span]
        row += [f"{model['probabilities'][i][j]:.3f}"] if model else []
        row += ["yes" if truth[i][j] else ""] if truth else []
        rows.append(row)
    head = ["edge", "probability", "95% interval", *(["model alone"] if model else []), *(["true"] if truth else [])]
    return details(f"The {len(rows)} most probable edges", table(head, rows), True)


def _graphs(answer: Mapping[str, Any]) -> str:
    if not answer["top"]:
        return '<p class="soft">This method gives probabilities of edges, and no graphs.</p>'
    names = answer["names"]
    best = [figure(f"weight {g['weight']:.1%}", drawing(names, g["edges"]), "") for g in answer["top"][:GRAPHS]]
    drawn = [figure(f"draw {k + 1}", drawing(names, g), "") for k, g in enumerate(answer["drawn"][:GRAPHS])]
    more = details("Graphs drawn at random from the posterior", f'<div class="figures">{"".join(drawn)}</div>')
    return f'<h2>Graphs of most weight</h2><div class="figures">{"".join(best)}</div>{more}'


def drawing(names: Sequence[str], edges: Sequence[Sequence[int]]) -> str:
    """A graph as a picture: nodes on a circle, arrows between."""
    d, height, radius = len(names), 300.0, 108.0
    turn = [2 * math.pi * k / d for k in range(d)]
    at = [(WIDTH / 2 + 1.35 * radius * math.sin(a), height / 2 - radius * math.cos(a)) for a in turn]
    parts = []
    for i, j in edges:
        (x1, y1), (x2, y2) = at[i], at[j]
        length = math.hypot(x2 - x1, y2 - y1) or 1.0
        ux, uy = (x2 - x1) / length, (y2 - y1) / length
        near, far = (12 + 3 * min(len(names[k]), 14) * abs(ux) for k in (i, j))  # clear of the names
        x1, y1, x2, y2 = x1 + near * ux, y1 + near * uy, x2 - (far + 4) * ux, y2 - (far + 4) * uy
        parts.append(f'<line x1="{num(x1)}" y1="{num(y1)}" x2="{num(x2)}" y2="{num(y2)}" stroke="{colour(0)}" '
                     'stroke-width="1.4"/>')  # fmt: skip
        tip = [(x2 + 4 * ux, y2 + 4 * uy), (x2 - 5 * ux - 4 * uy, y2 - 5 * uy + 4 * ux),
               (x2 - 5 * ux + 4 * uy, y2 - 5 * uy - 4 * ux)]  # fmt: skip
        parts.append(f'<polygon points="{" ".join(f"{num(a)},{num(b)}" for a, b in tip)}" fill="{colour(0)}"/>')
    for name, (x, y) in zip(names, at, strict=True):
        short = esc(name if len(name) <= 14 else name[:13] + "…")
        parts.append(f'<text x="{num(x)}" y="{num(y + 4)}" text-anchor="middle" fill="{INK}">{short}</text>')
    return f'<svg viewBox="0 0 {WIDTH} {num(height)}" role="img" aria-label="graph">{"".join(parts)}</svg>'


def _experiments(answer: Mapping[str, Any]) -> str:
    """What setting each variable would tell."""
    if not answer["gain"]:
        return ""
    told = ("Expected information about the graph, in nats, if the variable were set by hand and very many rows were "
            "seen: the part that data without experiments cannot give, however much of it there is. Where a sample "
            "stands for very many graphs it comes out low: read the order.")  # fmt: skip
    rows = sorted(zip(answer["names"], answer["gain"], strict=True), key=lambda x: -x[1])
    cells = [[name, f"{gain:.3f}"] for name, gain in rows]
    return f"<h2>The next experiment</h2><p class='soft'>{esc(told)}</p>{table(['set', 'gain'], cells)}"


def _record(answer: Mapping[str, Any]) -> str:
    rows = [["density", " × ".join(answer["factors"].values())], ["method", answer["method"]]]
    rows += [["log Z", f"{answer['log_z']:.4f} nats"]] if answer["log_z"] is not None else []
    rows += [[k, f"{v:.4g}"] for k, v in answer["counts"].items()]
    rows += [[k, str(v)] for k, v in answer["config"].items()]
    return details("How it was made", table(["what", "value"], rows, (0,), (1,)))
