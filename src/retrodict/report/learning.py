"""The part of a page that shows training: learning curves from metrics.jsonl, and what each policy came to."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from retrodict.report import svg
from retrodict.report.page import figure, table

PLOTS = (("elbo", "Lower bound", "E_q[log γ/q] of each step's own draws, in nats; log Z is above it."),
         ("var_a", "Var(log γ/q)", "Variance over each step's own draws; 0 at the posterior."))  # fmt: skip
AXES = (("step", "steps"), ("seconds", "seconds of training"))


def learning(runs: Mapping[str, tuple[Sequence[Mapping[str, Any]], Mapping[str, Any]]]) -> str:
    """Curves and numbers of each trained policy, (metrics, about) by name; nothing where nothing was trained."""
    runs = {name: x for name, x in runs.items() if x[0]}
    if not runs:
        return ""
    fills = {name: svg.colour(i) for i, name in enumerate(runs)}
    names = svg.legend(list(fills.items())) if len(runs) > 1 else ""
    out = []
    for key, title, told in PLOTS:
        for axis, of in AXES:
            lines = [(name, points(rows, axis, key), fills[name]) for name, (rows, _) in runs.items()]
            plot = svg.curves([x for x in lines if x[1]], of)
            out.append(figure(f"{title} against {axis}{'s' * (axis == 'step')}", plot + names, told) if plot else "")
    return f'<h2>Training</h2>{_numbers(runs)}<div class="figures">{"".join(out)}</div>'


def points(rows: Sequence[Mapping[str, Any]], x: str, y: str) -> list[tuple[float, float]]:
    """Steps that have both numbers; a skipped step has neither."""
    found = [(r.get(x), r.get(y)) for r in rows]
    return [(float(a), float(b)) for a, b in found if isinstance(a, (int, float)) and isinstance(b, (int, float))
            and math.isfinite(a) and math.isfinite(b)]  # fmt: skip


def _numbers(runs: Mapping[str, tuple[Sequence[Mapping[str, Any]], Mapping[str, Any]]]) -> str:
    """The last evaluation of each policy, on fresh draws, as its card has it."""
    rows = []
    for name, (steps, about) in runs.items():
        found = about.get("evaluation") or {}
        bound = _number(found.get("elbo"), ".2f")
        bound += f" ± {found['elbo_se']:.2f}" if isinstance(found.get("elbo_se"), float) else ""
        skipped = sum("skipped" in r for r in steps)
        rows.append([name, str(about.get("objective") or steps[-1].get("objective", "")), f"{len(steps)}",
                     _number(steps[-1].get("seconds"), ".0f"), bound, _number(found.get("log_z"), ".2f"),
                     _number(found.get("ess"), ".1%"), _number(found.get("distinct"), ".0f"),
                     _number(found.get("length"), ".1f"), f"{skipped}"])  # fmt: skip
    head = ["policy", "objective", "steps", "seconds", "lower bound", "log Z by importance", "ESS of draws", "distinct",
            "mean tokens", "skipped"]  # fmt: skip
    keep = [i for i in range(len(head)) if {r[i] for r in rows} - {"--", "0", ""}]
    told = (
        '<p class="soft">Bound, log Z, ESS and distinct: fresh draws after the last step, averaged over problems.</p>'
    )
    return table([head[i] for i in keep], [[r[i] for i in keep] for r in rows], (0, 1)) + told


def _number(x: Any, form: str) -> str:
    return format(x, form) if isinstance(x, (int, float)) and math.isfinite(x) else "--"
