"""Figures on the pages, out of the JSON in ``benchmarks/results``; ``python docs/figures.py`` writes them in place.

    <!-- figure: FILE ; PATH ; FORMAT -->...<!-- /figure -->    one number: the keys that lead to it, joined by /
    <!-- figures: FILE ; WORDS -->...<!-- /figures -->          the rows of a suite whose name contains one of
                                                           WORDS, joined by |; all of them without
    <!-- pivot: FILE ; METRIC -->...<!-- /pivot -->            one metric: a row for each method, a column for each name
    <!-- tally: FILE -->...<!-- /tally -->                      how many rows of a suite have a bar, and hold

A file that is not there leaves "not measured yet": nothing on a page is typed in by hand. ``docs/check.py`` fails
where a page and its file differ.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
MARK = re.compile(r"(<!-- (figure|figures|pivot|tally): ([^>]*?) -->).*?(<!-- /\2 -->)", re.DOTALL)
COLUMNS = ("name", "method", "metric", "value", "bar", "holds")


def read(name: str) -> Any:
    """A file of results, or None."""
    path = RESULTS / name
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def number(name: str, path: str, form: str) -> str:
    """One number of a file."""
    data = read(name)
    for key in path.split("/"):
        data = data.get(key) if isinstance(data, dict) else None
    return "(not measured yet)" if data is None else format(data, form)


def _missing(name: str) -> str:
    return f"Not measured yet: `make bench` writes `benchmarks/results/{name}`."


def _made(data: dict[str, Any]) -> str:
    made = data.get("environment", {})
    told = [made.get("gpu") or made.get("cpu"), made.get("torch") and f"torch {made['torch']}",
            made.get("threads") and f"threads {made['threads']}", made.get("commit") and f"commit {made['commit']}",
            made.get("date")]  # fmt: skip
    return ", ".join(str(x) for x in told if x)


def _cell(row: dict[str, Any], key: str) -> str:
    value = row.get(key)
    if key == "holds":
        return "" if value is None else "yes" if value else "**no**"
    if isinstance(value, float | int):
        error = re.match(r" ?\+- ?[^,;]+", str(row.get("note") or "")) if key == "value" else None
        return (f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}") + (f" {error[0].strip()}" if error else "")
    return str(value or "").replace("|", "\\|")


def table(name: str, words: str = "") -> str:
    """Rows of a suite as a table, and what they were measured on."""
    data = read(name)
    rows = [r for r in (data or {}).get("rows", []) if any(word.strip() in r["name"] for word in words.split("|"))]
    if not rows:
        return _missing(name)
    lines = [" | ".join(COLUMNS), "|".join("---" for _ in COLUMNS)]
    lines += [" | ".join(_cell(r, key) for key in COLUMNS) for r in rows]
    return "\n".join(f"| {line} |" for line in lines) + f"\n\n({_made(data)})"


def pivot(name: str, metric: str) -> str:
    """One metric of a suite, methods by names."""
    data = read(name)
    found = {(r["method"], r["name"]): r for r in (data or {}).get("rows", []) if r["metric"] == metric}
    if not found:
        return _missing(name)
    methods, names = (list(dict.fromkeys(key[i] for key in found)) for i in (0, 1))
    lines = [" | ".join(["method", *names]), "|".join("---" for _ in ["method", *names])]
    lines += [" | ".join([m, *(_cell(found.get((m, n), {}), "value") for n in names)]) for m in methods]
    return "\n".join(f"| {line} |" for line in lines) + f"\n\n({_made(data)})"


def tally(name: str) -> str:
    """How many rows of a suite have a bar, and how many of those hold."""
    data = read(name)
    held = [r["holds"] for r in (data or {}).get("rows", []) if r.get("holds") is not None]
    if not held:
        return _missing(name)
    share = "all of them hold" if all(held) else f"{sum(held)} of them hold"
    return f"{len(held)} numbers have a bar; {share} ({_made(data)})."


def filled(page: Path) -> str:
    """The text of a page with its figures as the files have them now."""

    def write(mark: re.Match[str]) -> str:
        told = [x.strip() for x in mark[3].split(";")]
        if mark[2] == "figure":
            return f"{mark[1]}{number(*told)}{mark[4]}"
        made = {"figures": table, "pivot": pivot, "tally": tally}[mark[2]](*told)
        return f"{mark[1]}\n{made}\n{mark[4]}"

    return MARK.sub(write, page.read_text(encoding="utf-8"))


def main() -> int:
    """Write the figures of every page."""
    for page in sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")]):
        text = filled(page)
        if text != page.read_text(encoding="utf-8"):
            page.write_text(text, encoding="utf-8")
            print(f"wrote {page.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
