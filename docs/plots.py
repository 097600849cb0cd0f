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


def quality() -> None:
    """Evidence gap against seconds of training, a line for each objective."""
    path = ROOT / "benchmarks" / "results" / "quality.json"
    if not path.is_file():
        return
    data = json.loads(path.read_text(encoding="utf-8"))
    lines: dict[str, list[tuple[float, float]]] = {}
    for row in data["rows"]:
        found = re.fullmatch(r"gap \(nats\) after (\d+) s", row["metric"])
        if found:
            lines.setdefault(row["method"], []).append((float(found[1]), float(row["value"])))
    figure, axes = plt.subplots(figsize=(7, 4))
    for (name, points), marker in zip(lines.items(), "osD^vP", strict=False):
        axes.plot(*zip(*points, strict=True), marker=marker, label=name)
    axes.set(xlabel="seconds of training", ylabel="upper - lower bound of log Z (nats)", ylim=(0, None))
    axes.set_title(data["rows"][0]["name"], fontsize=9)
    axes.legend(frameon=False)
    OUT.mkdir(exist_ok=True)
    figure.savefig(OUT / "quality.svg", bbox_inches="tight", metadata={"Date": None})


if __name__ == "__main__":
    quality()
