"""``retrodict bench exact``: every sampler on small targets against enumeration, and planted bugs against the gates.

Bars are those of ``retrodict.testing.oracle``: |z| <= 4.5 for the evidence and for each object over at least ``seeds``
independent runs, total variation of weighted counts under its computed 99.9% bound, s.e. of Z-hat <= 2% of Z, MH
kernels invariant to 1e-10 on the enumerated matrix. A planted bug must miss a gate by more than 8 standard errors.

Then every GFlowNet objective, trained from samples by the loop: total variation to the posterior <= 1e-2 on each target
and under each mixture of behaviours, by one plan for all; planted bugs must end at five times that. What other
objectives converge to is shown.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from retrodict.bench.rows import Row, at_least, at_most, show_only
from retrodict.testing.bugs import BAR, BUGS, Bug
from retrodict.testing.bugs_training import CAUGHT, TRAINING_BUGS, TrainingBug, gradient_error
from retrodict.testing.gates import METHODS
from retrodict.testing.oracle import Exact, enumerate_target
from retrodict.testing.targets import Case, cases
from retrodict.testing.testtime import all_bugs, all_pairs
from retrodict.testing.trained import BAR as TV_BAR
from retrodict.testing.trained import SHOWN, pairs, show, total_variation, train, training_targets

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


def objective_row(objective: str, target: str, mixture: str) -> Row:
    """How far a table that an objective trained is from the posterior."""
    made = training_targets()[target]
    policy = train(made, objective, mixture)
    value = total_variation(made, policy, backward=objective != "rtb")
    return at_most(SUITE, target, objective, f"total variation, {mixture}", value, TV_BAR, "trained from samples")


def training_bug_row(bug: TrainingBug) -> Row:
    """How far a planted bug of training ends from what the right version reaches."""
    note = f"planted bug, on {bug.target}"
    return at_least(SUITE, bug.name, bug.objective, f"caught at {bug.metric}", bug.caught(), CAUGHT, note)


def gradient_rows() -> list[Row]:
    """The gradient in micro-batches against that of the whole batch."""
    names = ("pooled", "subtb", "vargrad", "tb", "db", "rtb")
    where, metric = "infill, own_stop", "gradient error, micro-batches"
    return [at_most(SUITE, where, n, metric, gradient_error("pushed", n, where), 1e-9) for n in names]


def training_rows(advance: Any, quick: bool = False) -> list[Row]:
    """Objectives, planted bugs of training, and what the other objectives converge to."""
    rows: list[Row] = []
    for objective, target, mixture in pairs()[:: 9 if quick else 1]:
        advance(f"{objective}: {target}, {mixture}")
        rows.append(objective_row(objective, target, mixture))
    rows += gradient_rows()
    for bug in TRAINING_BUGS[:: 3 if quick else 1]:
        advance(f"planted: {bug.name}")
        rows.append(training_bug_row(bug))
    for objective in () if quick else SHOWN:
        advance(f"shown: {objective}")
        rows += [show_only(SUITE, "infill, own_stop", objective, *found) for found in show(objective)]
    return rows


def run(seeds: int = 200, quick: bool = False) -> list[Row]:
    """All small targets by all methods, the planted bugs, then training; about six minutes on one core.

    Args:
        seeds: least number of independent runs behind a z-score (more where the s.e. of Z-hat asks for it).
        quick: one target of each kind.
    """
    todo, pairs_of_rooms, bugs = cases(quick), all_pairs(quick), [*BUGS, *all_bugs()]
    rows: list[Row] = []
    training = len(pairs()) + len(TRAINING_BUGS) + len(SHOWN)
    with _progress(len(todo) * len(METHODS) + len(pairs_of_rooms) + len(bugs) + training) as advance:
        for case in todo:
            exact = enumerate_target(case.target, case.policy)
            for method in METHODS:
                advance(f"{case.name}: {method}")
                if method == "smc, no guide" and case.target.guide is None:
                    continue  # the same as with it
                rows += method_rows(case, method, exact, seeds)
        for pair in pairs_of_rooms:
            advance(f"{pair.case.name}: {pair.method}")
            gates = pair.run(seeds)
            rows += [at_most(SUITE, pair.case.name, pair.method, g.metric, g.value, g.bar, g.note) for g in gates]
        for bug in bugs:
            advance(f"planted: {bug.name}")
            rows.append(bug_row(bug, seeds))
        rows += training_rows(advance, quick)
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
