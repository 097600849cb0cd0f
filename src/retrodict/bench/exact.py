"""``retrodict bench exact``: every sampler on small targets against enumeration, and planted bugs against the gates.

Bars are those of ``retrodict.testing.oracle``: |z| <= 4.5 for the evidence and for each object over at least ``seeds``
independent runs, total variation of weighted counts under its computed 99.9% bound, s.e. of Z-hat <= 2% of Z, MH
kernels invariant to 1e-10 on the enumerated matrix. A planted bug must miss a gate by more than 8 standard errors.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from retrodict.bench.rows import Row, at_least, at_most
from retrodict.testing.bugs import BAR, BUGS, Bug
from retrodict.testing.gates import METHODS
from retrodict.testing.oracle import Exact, enumerate_target
from retrodict.testing.targets import Case, cases

SUITE = "exact"


def method_rows(case: Case, method: str, exact: list[Exact], seeds: int) -> list[Row]:
    """One method's gates on one target."""
    gates = METHODS[method][1](case, exact, seeds)
    return [at_most(SUITE, case.name, method, g.metric, g.value, g.bar, g.note) for g in gates]


def bug_row(bug: Bug, seeds: int) -> Row:
    """How far a planted bug misses its gates, in standard errors."""
    gate = bug.caught(seeds)
    note = f"planted bug, seen by {gate.metric}"
    return at_least(SUITE, bug.name, bug.method, "caught at |z|", gate.value, BAR, note)


def run(seeds: int = 200, quick: bool = False) -> list[Row]:
    """All small targets by all methods, then the planted bugs; about three minutes on one core.

    Args:
        seeds: least number of independent runs behind a z-score (more where the s.e. of Z-hat asks for it).
        quick: one target of each kind.
    """
    todo = cases(quick)
    rows: list[Row] = []
    with _progress(len(todo) * len(METHODS) + len(BUGS)) as advance:
        for case in todo:
            exact = enumerate_target(case.target, case.policy)
            for method in METHODS:
                advance(f"{case.name}: {method}")
                if method == "smc, no guide" and case.target.guide is None:
                    continue  # the same as with it
                rows += method_rows(case, method, exact, seeds)
        for bug in BUGS:
            advance(f"planted: {bug.name}")
            rows.append(bug_row(bug, seeds))
    return rows


@contextmanager
def _progress(total: int) -> Iterator[Any]:
    """A live line on a terminal; nothing elsewhere."""
    from rich.console import Console
    from rich.progress import Progress

    console = Console(stderr=True)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=total)
        yield lambda what: bar.update(task, advance=1, description=what)


def main(words: Sequence[str] | None = None) -> int:
    """``python -m retrodict.bench.exact [--json FILE] [--seeds N] [--quick]``; exit status 1 where a bar is missed."""
    import argparse
    from pathlib import Path

    from retrodict.bench.rows import report

    parser = argparse.ArgumentParser(description="every sampler against enumeration")
    parser.add_argument("--json", type=Path, default=None)
    parser.add_argument("--seeds", type=int, default=200)
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args(words)
    return report(run(args.seeds, args.quick), args.json)


if __name__ == "__main__":
    raise SystemExit(main())
