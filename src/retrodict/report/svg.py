"""Plots as inline SVG: numbers in, one string out. No script, no font, no file: a page that holds them needs nothing.

Every plot is 440 units wide and is shown at about that many pixels, on a phone and on a desk alike.
"""

from __future__ import annotations

import html
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field

WIDTH = 440
COLOURS = ("#0b62a4", "#c8501e", "#1b7f5c", "#8b4a9c", "#a67c00", "#4a5560")
INK, FAINT, GRID = "#1f2328", "#6a737d", "#e4e7eb"


def colour(i: int) -> str:
    """Colour of the i-th method; they repeat after six."""
    return COLOURS[i % len(COLOURS)]


def esc(text: object) -> str:
    """Text for SVG and HTML; what no font shows becomes a mark."""
    shown = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in str(text))
    return html.escape(shown, quote=True)


def num(x: float) -> str:
    """A coordinate."""
    return f"{x:.1f}".removesuffix(".0")


def ticks(low: float, high: float, count: int = 5, whole: bool = False) -> list[float]:
    """Round numbers that cover an interval."""
    span = max(high - low, 1e-12)
    power = 10.0 ** math.floor(math.log10(span / count))
    step = next(power * m for m in (1, 2, 5, 10) if span / (power * m) <= count)
    step = max(step, 1.0) if whole else step
    first = math.ceil(low / step - 1e-9)
    return [i * step for i in range(first, math.floor(high / step + 1e-9) + 1)]


@dataclass
class Plot:
    """A frame with scales; what is drawn collects in ``parts``."""

    height: float
    x: tuple[float, float]
    y: tuple[float, float] = (0.0, 1.0)
    left: float = 44
    right: float = 12
    top: float = 12
    bottom: float = 40
    log_x: bool = False
    parts: list[str] = field(default_factory=list)

    def px(self, x: float) -> float:
        """Where x is."""
        low, high = self.x
        if self.log_x:
            x, low, high = math.log(x), math.log(low), math.log(high)
        return self.left + (x - low) / ((high - low) or 1) * (WIDTH - self.left - self.right)

    def py(self, y: float) -> float:
        """Where y is."""
        low, high = self.y
        return self.height - self.bottom - (y - low) / ((high - low) or 1) * (self.height - self.top - self.bottom)

    def line(self, x1: float, y1: float, x2: float, y2: float, stroke: str, width: float = 1, more: str = "") -> None:
        """A straight line, in pixels."""
        self.parts.append(f'<line x1="{num(x1)}" y1="{num(y1)}" x2="{num(x2)}" y2="{num(y2)}" stroke="{stroke}" '
                          f'stroke-width="{width:g}"{more}/>')  # fmt: skip

    def text(self, x: float, y: float, text: str, anchor: str = "start", fill: str = INK, more: str = "") -> None:
        """Text, in pixels."""
        self.parts.append(
            f'<text x="{num(x)}" y="{num(y)}" text-anchor="{anchor}" fill="{fill}"{more}>{esc(text)}</text>'
        )

    def path(self, points: Sequence[tuple[float, float]], stroke: str, width: float = 1.5, more: str = "") -> None:
        """A line through points, in the plot's own numbers."""
        at = " ".join(f"{num(self.px(x))},{num(self.py(y))}" for x, y in points)
        self.parts.append(f'<polyline points="{at}" fill="none" stroke="{stroke}" stroke-width="{width:g}"{more}/>')

    def dot(self, x: float, y: float, radius: float, fill: str, title: str = "", stroke: str = "none") -> None:
        """A disc, in pixels."""
        tip = f"<title>{esc(title)}</title>" if title else ""
        self.parts.append(
            f'<circle cx="{num(x)}" cy="{num(y)}" r="{radius:g}" fill="{fill}" stroke="{stroke}">{tip}</circle>'
        )

    def axes(self, x_name: str, x_ticks: Sequence[float], y_ticks: Sequence[float] = (), percent: bool = False) -> None:
        """Grid lines, numbers and the name of the x axis."""
        base, right = self.height - self.bottom, WIDTH - self.right
        for y in y_ticks:
            self.line(self.left, self.py(y), right, self.py(y), GRID)
            self.text(self.left - 6, self.py(y) + 4, f"{y:.0%}" if percent else f"{y:g}", "end", FAINT)
        for x in x_ticks:
            self.line(self.px(x), base, self.px(x), base + 4, FAINT)
            self.text(self.px(x), base + 17, f"{x:g}", "middle", FAINT)
        self.line(self.left, base, right, base, FAINT)
        self.text((self.left + right) / 2, self.height - 5, x_name, "middle", FAINT)

    def svg(self, label: str) -> str:
        """The whole plot."""
        return (f'<svg viewBox="0 0 {WIDTH} {num(self.height)}" role="img" aria-label="{esc(label)}">'
                f"{''.join(self.parts)}</svg>")  # fmt: skip


@dataclass(frozen=True)
class Interval:
    """One method's evidence: estimate with 95% interval, single runs, and bounds with theirs. None: not known."""

    name: str
    fill: str
    value: float | None = None
    low: float | None = None
    high: float | None = None
    runs: Sequence[float] = ()
    lower: tuple[float, float] | None = None
    upper: tuple[float, float] | None = None
    note: str = ""


def evidence(rows: Sequence[Interval]) -> str:
    """log Z of each method: dot and bar for the estimate and its 95% interval, ticks for runs, brackets for bounds."""
    told: list[float] = []
    for r in rows:
        told += [v for v in (r.value, r.low, r.high, *r.runs) if v is not None and math.isfinite(v)]
        told += [v for b in (r.lower, r.upper) if b is not None for v in (b[0] - b[1], b[0] + b[1]) if math.isfinite(v)]
    if not told:
        return ""
    pad = 0.06 * (max(told) - min(told)) or 0.5
    plot = Plot(44 * len(rows) + 46, (min(told) - pad, max(told) + pad), left=112, top=4)
    marks = ticks(*plot.x)
    for x in marks:
        plot.line(plot.px(x), plot.top, plot.px(x), plot.height - plot.bottom, GRID)
    for i, r in enumerate(rows):
        y = plot.top + 44 * i + 22
        plot.text(plot.left - 10, y + 4, r.name if len(r.name) <= 15 else r.name[:14] + "…", "end")
        if r.value is None or not math.isfinite(r.value):
            plot.text(plot.left + 6, y + 4, r.note or "no estimate", fill=FAINT)
            continue
        for v in r.runs:
            if math.isfinite(v):
                plot.line(plot.px(v), y - 11, plot.px(v), y - 5, r.fill, 1, ' opacity=".55"')
        if r.low is not None and r.high is not None and math.isfinite(r.low) and math.isfinite(r.high):
            plot.line(plot.px(r.low), y, plot.px(r.high), y, r.fill, 3, ' stroke-linecap="round"')
        plot.dot(plot.px(r.value), y, 4.5, r.fill, f"log Z about {r.value:.2f}", "#fff")
        for bound, turn, word in ((r.lower, 1, "lower"), (r.upper, -1, "upper")):
            if bound is not None and math.isfinite(bound[0]):
                x = plot.px(bound[0])
                tip = f"<title>{word} bound {bound[0]:.2f} ± {bound[1]:.2f} (standard error)</title>"
                line = f"M{num(x + 5 * turn)} {num(y - 9)}H{num(x)}V{num(y + 9)}H{num(x + 5 * turn)}"
                plot.parts.append(f'<path d="{line}" fill="none" stroke="{r.fill}" stroke-width="2">{tip}</path>')
    plot.axes("log evidence, nats", marks)
    return plot.svg("log evidence of each method")


def ess(runs: Sequence[Sequence[float]], resampled: Sequence[Sequence[bool]], n: int, threshold: float | None,
        fill: str) -> str:  # fmt: skip
    """ESS before each step's resampling decision, one line a run; open circles where the run was then resampled."""
    steps = max(map(len, runs))
    plot = Plot(190, (1, max(steps, 2)), (0, n))
    if threshold:
        plot.line(
            plot.left, plot.py(threshold), WIDTH - plot.right, plot.py(threshold), FAINT, 1, ' stroke-dasharray="3 3"'
        )
    plot.axes("step", ticks(1, max(steps, 2), 8, whole=True), ticks(0, n, 4, whole=True))
    for line, marks in zip(runs, resampled, strict=True):
        plot.path([(i + 1, v) for i, v in enumerate(line)], fill, 1.3, ' opacity=".75"')
        for i, (v, yes) in enumerate(zip(line, marks, strict=True)):
            if yes:
                plot.dot(plot.px(i + 1), plot.py(v), 3, "#fff", f"step {i + 1}: ESS {v:.1f}, then resampled", fill)
    return plot.svg("effective sample size before each resampling")


def ancestry(parents: Sequence[Sequence[int]], alive: Sequence[bool], fill: str) -> str:
    """Lineages of one population: dark where a final particle descends from it, faint where it died out.

    ``parents[t][i]`` is the slot at step t that slot i of step t + 1 came from; ``alive`` says which last slots count.
    """
    k, steps = len(parents[0]), len(parents)
    plot = Plot(220, (0, steps), (0, max(k - 1, 1)), top=6)
    kept = [set()] * steps + [{i for i in range(k) if alive[i]}]
    for t in range(steps - 1, -1, -1):
        kept[t] = {parents[t][i] for i in kept[t + 1]}
    faint, dark = [], []
    every = max(1, k // 128)
    for t, row in enumerate(parents):
        for i, j in enumerate(row):
            line = f"M{num(plot.px(t))} {num(plot.py(j))}L{num(plot.px(t + 1))} {num(plot.py(i))}"
            if i in kept[t + 1]:
                dark.append(line)
            elif i % every == 0:
                faint.append(line)
    plot.parts.append(f'<path d="{"".join(faint)}" fill="none" stroke="#c3c9d0" stroke-width=".8"/>')
    plot.parts.append(f'<path d="{"".join(dark)}" fill="none" stroke="{fill}" stroke-width="1.1"/>')
    plot.axes("step", ticks(0, steps, 8, whole=True))
    return plot.svg(f"lineages: {len(kept[0])} of {k} first particles have descendants")


def lengths(rows: Sequence[tuple[str, Sequence[float], str]]) -> str:
    """Share of the weight at each length, one strip a method on a shared scale."""
    longest = max(len(h) for _, h, _ in rows)
    first = min((i for _, h, _ in rows for i, v in enumerate(h) if v > 0), default=0)
    top = max((v for _, h, _ in rows for v in h), default=0) or 1
    strip = 62
    plot = Plot(strip * len(rows) + 46, (first - 0.5, max(longest - 0.5, first + 0.5)), left=112, top=4)
    unit = (WIDTH - plot.left - plot.right) / (plot.x[1] - plot.x[0])
    for r, (name, shares, fill) in enumerate(rows):
        base = plot.top + strip * (r + 1)
        plot.line(plot.left, base, WIDTH - plot.right, base, GRID)
        plot.text(plot.left - 10, base - 6, name if len(name) <= 15 else name[:14] + "…", "end")
        for i, v in enumerate(shares):
            if v > 0:
                h = (strip - 12) * v / top
                box = f'x="{num(plot.px(i) - 0.42 * unit)}" y="{num(base - h)}" width="{num(0.84 * unit)}"'
                tip = f"<title>{i} tokens: {v:.1%}</title>"
                plot.parts.append(f'<rect {box} height="{num(h)}" fill="{fill}">{tip}</rect>')
    plot.axes("tokens before the stop", ticks(first, longest - 1 if longest - 1 > first else first + 1, 8, whole=True))
    return plot.svg("length of the drawn texts")


def concentration(rows: Sequence[tuple[str, Sequence[float], str]]) -> str:
    """Share of the weight on the heaviest 1, 2, 3, ... distinct texts; high on the left is few texts."""
    longest = max(len(shares) for _, shares, _ in rows)
    plot = Plot(210, (1, max(longest, 2)), (0, 1), log_x=True)
    marks = [x for p in range(6) for m in (1, 2, 5) if (x := m * 10**p) <= max(longest, 2)]
    plot.axes("heaviest distinct texts", marks, (0, 0.25, 0.5, 0.75, 1), percent=True)
    for name, shares, fill in rows:
        total, line = 0.0, []
        for i, v in enumerate(shares):
            total += v
            line.append((i + 1, min(total, 1.0)))
        if line:
            plot.path(line, fill, 1.8)
            plot.dot(
                plot.px(line[0][0]), plot.py(line[0][1]), 3, fill, f"{name}: {line[0][1]:.1%} on the heaviest text"
            )
            plot.dot(plot.px(line[-1][0]), plot.py(line[-1][1]), 3, fill, f"{name}: {len(line)} distinct texts")
    return plot.svg("how much weight the heaviest texts carry")


def legend(names: Sequence[tuple[str, str]]) -> str:
    """Which colour is whose, as HTML."""
    items = "".join(f'<span><i style="background:{fill}"></i>{esc(name)}</span>' for name, fill in names)
    return f'<p class="legend">{items}</p>'


def curves(rows: Sequence[tuple[str, Sequence[tuple[float, float]], str]], x_name: str) -> str:
    """Noisy series: every point faint, and the mean of those nearby as a line. Nothing where there is no point.

    The scale leaves out the most extreme twentieth at each end, since one wild step would flatten all others.
    """
    told = sorted(y for _, line, _ in rows for _, y in line)
    if not told:
        return ""
    cut = len(told) // 20
    inside = told[cut : len(told) - cut]
    pad = 0.08 * (inside[-1] - inside[0]) or 0.5
    low, high = inside[0] - pad, inside[-1] + pad
    low = max(low, 0.0) if told[0] >= 0 else low
    start, end = min(line[0][0] for _, line, _ in rows if line), max(line[-1][0] for _, line, _ in rows if line)
    plot = Plot(210, (start, end if end > start else start + 1), (low, high), left=50)
    plot.axes(x_name, ticks(*plot.x, 6), ticks(low, high))
    for name, line, fill in rows:
        near = max(1, len(line) // 12)
        mean = [statistics.fmean(y for _, y in line[max(0, i - near) : i + near + 1]) for i in range(len(line))]
        for x, y in line if len(line) <= 400 else line[:: len(line) // 400]:
            if low <= y <= high:
                plot.parts.append(f'<circle cx="{num(plot.px(x))}" cy="{num(plot.py(y))}" r="1.6" fill="{fill}" '
                                  'opacity=".35"/>')  # fmt: skip
        smooth = [(x, min(max(m, low), high)) for (x, _), m in zip(line, mean, strict=True)]
        if len(smooth) > 1:
            plot.path(smooth, fill, 2)
        plot.dot(plot.px(smooth[-1][0]), plot.py(smooth[-1][1]), 3.5, fill, f"{name}: {mean[-1]:.2f} at the end")
    return plot.svg(f"learning curve over {x_name}")
