"""Plots on the pages, out of the JSON in ``benchmarks/results``; ``python docs/plots.py`` writes ``docs/figures``."""

from __future__ import annotations

import json
import re
from pathlib import Path

import matplotlib

matplotlib.use("svg")
matplotlib.rcParams["svg.hashsalt"] = "retrodict"  # the same file from the same numbers
import matplotlib.pyplot as plt  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
OUT = ROOT / "docs" / "figures"


PANELS = {"gap (nats)": "upper - lower bound of log Z (nats)", "lower bound (nats)": "lower bound of log Z (nats)"}


def quality() -> None:
    """Evidence gap, and lower bound, against seconds of training; a line for each objective."""
    path = ROOT / "benchmarks" / "results" / "quality.json"
    if not path.is_file():
        return
    data = json.loads(path.read_text(encoding="utf-8"))
    figure, both = plt.subplots(1, 2, figsize=(10, 4))
    for axes, (metric, words) in zip(both, PANELS.items(), strict=True):
        lines: dict[str, list[tuple[float, float]]] = {}
        for row in data["rows"]:
            found = re.fullmatch(rf"{re.escape(metric)} after (\d+) s", row["metric"])
            if found:
                lines.setdefault(row["method"], []).append((float(found[1]), float(row["value"])))
        for (name, points), marker in zip(lines.items(), "osD^vP", strict=False):
            axes.plot(*zip(*points, strict=True), marker=marker, label=name)
        axes.set(xlabel="seconds of training", ylabel=words)
    start = {r["metric"]: float(r["value"]) for r in reversed(data["rows"])}  # all methods begin as the prior
    gap, lower = start["gap (nats) after 0 s"], start["lower bound (nats) after 0 s"]
    both[0].set_ylim(0, 2 * gap)
    both[1].set_ylim(lower - gap / 2, lower + gap / 4)
    both[0].legend(frameon=False, fontsize=8)
    figure.suptitle(f"{data['rows'][0]['name']}; a curve that leaves the frame is in the table", fontsize=9)
    OUT.mkdir(exist_ok=True)
    figure.savefig(OUT / "quality.svg", bbox_inches="tight", metadata={"Date": None})


if __name__ == "__main__":
    quality()
