"""Rows of a benchmark: what was measured in this call, the bar it is held to, and whether it holds."""

from __future__ import annotations

import json
import math
import os
import platform
import subprocess
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch


@dataclass(frozen=True)
class Row:
    """One measurement. ``bar`` and ``holds`` are None where the number is only shown."""

    suite: str
    name: str
    method: str
    metric: str
    value: float
    bar: str | None = None
    holds: bool | None = None
    note: str = ""


def at_most(suite: str, name: str, method: str, metric: str, value: float, bar: float, note: str = "") -> Row:
    """A value that must not exceed its bar (NaN never holds)."""
    return Row(suite, name, method, metric, float(value), f"<= {bar:.4g}", bool(value <= bar), note)


def at_least(suite: str, name: str, method: str, metric: str, value: float, bar: float, note: str = "") -> Row:
    """A value that must reach its bar (NaN never holds)."""
    return Row(suite, name, method, metric, float(value), f">= {bar:.4g}", bool(value >= bar), note)


def show_only(suite: str, name: str, method: str, metric: str, value: float, note: str = "") -> Row:
    """A value without a bar."""
    return Row(suite, name, method, metric, float(value), None, None, note)


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def environment() -> dict[str, Any]:
    """Machine, versions, commit and date of a measurement."""
    try:
        done = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=Path(__file__).parent,
                              capture_output=True, text=True, timeout=10)  # fmt: skip
        commit = done.stdout.strip() or None
    except (OSError, subprocess.TimeoutExpired):
        commit = None
    return {
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "commit": commit,
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
    }


def write(rows: Sequence[Row], path: Path) -> None:
    """Rows and environment as JSON (a number that is not finite as text)."""

    def plain(row: Row) -> dict[str, Any]:
        d = asdict(row)
        d["value"] = row.value if math.isfinite(row.value) else str(row.value)
        return d

    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"environment": environment(), "rows": [plain(r) for r in rows]}, indent=1)
    part = path.with_name(f"{path.name}.part")
    part.write_text(text + "\n", encoding="utf-8")
    part.replace(path)


def read(path: Path) -> list[Row]:
    """Rows of a file that :func:`write` wrote; none where there is no file."""
    if not path.is_file():
        return []
    told = json.loads(path.read_text(encoding="utf-8"))["rows"]
    return [Row(**{**row, "value": float(row["value"])}) for row in told]


LONG = 100
"""Above so many rows, those of one (name, method) share a line of the printed table."""


def report(rows: Sequence[Row], path: Path | None = None) -> int:
    """Print the table, write the JSON; the exit status is 1 where a bar is missed."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    def verdict(holds: list[bool | None]) -> Text:
        if False in holds:
            return Text("NO", style="bold red")
        return Text("yes", style="green") if True in holds else Text("")

    if len(rows) <= LONG:
        table = Table("name", "method", "metric", "value", "bar", "holds", "note")
        table.columns[3].justify = "right"
        for r in rows:
            table.add_row(Text(r.name), Text(r.method), Text(r.metric), f"{r.value:.4g}", r.bar or "",
                          verdict([r.holds]), Text(r.note))  # fmt: skip
    else:
        table = Table("name", "method", "metric value bar", "holds")
        groups: dict[tuple[str, str], list[Row]] = {}
        for r in rows:
            groups.setdefault((r.name, r.method), []).append(r)
        for (name, method), group in groups.items():
            cells = "; ".join(f"{r.metric} {r.value:.3g} {r.bar or ''}".strip() for r in group)
            table.add_row(Text(name), Text(method), Text(cells), verdict([r.holds for r in group]))
    console = Console(width=None if os.isatty(1) else 170)
    console.print(table)
    missed = sum(r.holds is False for r in rows)
    console.print(Text(f"{len(rows):,} rows, {missed} bars missed", style="bold red" if missed else "green"))
    if path is not None:
        write(rows, path)
    return 1 if missed else 0
