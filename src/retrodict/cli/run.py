"""What ``sample`` and ``compare`` do once a recipe has been checked: load, draw piece by piece, save, say."""

from __future__ import annotations

import contextlib
import signal
import sys
from collections.abc import Generator, Iterator
from typing import Any

from retrodict.cli.config import Plan
from retrodict.cli.pieces import pieces, run
from retrodict.cli.targets import build
from retrodict.diagnostics.verdict import EMPTY, diagnose
from retrodict.errors import InputError
from retrodict.models import load as door
from retrodict.particles import Particles
from retrodict.particles_io import names_of, printable
from retrodict.records import Rollouts
from retrodict.report.compare import compare
from retrodict.report.run import RunFolder, environment
from retrodict.samplers.common import OnStep
from retrodict.targets.algebra import Target
from retrodict.targets.simulate import simulate
from retrodict.targets.verifier import VerifierError

BATCH = 8
"""Problems sampled together."""
BEST, PROBLEMS = 5, 10
"""Texts, and problems, that are printed; the run folder has them all."""


def execute(command: str, plan: Plan) -> int:
    """Run a plan; gives the exit code. Whatever is finished when it stops, for whatever reason, is saved."""
    config = plan.config
    with _spinner(f"loading {config.model}"):
        lm = door.load(config.model, adapter=config.adapter, dtype=config.dtype, device=config.device)
        if config.adapter is not None:
            lm: Any = lm.view("default")  # pyright: ignore[reportAttributeAccessIssue]
    target = build(plan.kind, lm, plan.arguments, plan.data, plan.factors)
    exact: Rollouts | None = None
    if config.simulated is not None:
        with _spinner(f"simulating {config.simulated} problems"):
            target, exact = simulate(target, config.simulated, config.seed)
    folder = RunFolder.create(config.out, plan.name, plan.resolved, _texts(target, lm), environment(lm))
    done: dict[str, Particles] = {}
    try:
        with contextlib.closing(_draw(plan, target)) as drawn:  # closing it clears its bar before anything is said
            for label, particles, final in drawn:
                done[label] = particles
                with _unbroken():
                    folder.put(label, particles, final)
        if command == "compare":
            with _spinner("comparing"):
                table = compare(target, done, seed=config.seed, exact=exact)
            folder.comparison(table)
    except KeyboardInterrupt:
        with _unbroken():
            said = _partial(folder, plan, done)
        raise KeyboardInterrupt(f"interrupted; {said}") from None
    except VerifierError as error:
        with _unbroken():
            folder.failure(_at_work(plan, done), error.text, str(error))
            said = _partial(folder, plan, done, str(error))
        raise VerifierError(f"{error}; {said}", error.text) from error
    except Exception as error:
        with _unbroken():
            if done or not isinstance(error, InputError):
                _partial(folder, plan, done, f"{type(error).__name__}: {error}")
            else:
                folder.discard()
        raise
    try:
        with _unbroken():
            folder.close("complete")
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"interrupted; everything is saved in {folder.path}") from None
    if command == "compare":
        _print_comparison(table)
    else:
        for label, particles in done.items():
            _print_sample(label, particles, target)
    print(f"report  {folder.path / 'report.html'}")
    dead = [label for label, p in done.items() if diagnose(p).verdict == EMPTY]
    if dead and len(dead) == len(done):
        why = diagnose(done[dead[0]]).reason
        print(f"retrodict: {dead[0]}: {why}; saved in {folder.path}", file=sys.stderr)
        return 1
    return 0


def _draw(plan: Plan, target: Target) -> Generator[tuple[str, Particles, bool], None, None]:
    """Each method's answer so far, after each of its pieces, and whether that was the last."""
    for label, method in plan.methods.items():
        calls = pieces(method, target, plan.config.seed, plan.config.batch or BATCH)
        with _progress(label) as on_step:
            particles = None
            for particles in run(method, calls, on_step):
                yield label, particles, False
            if particles is not None:
                yield label, particles, True


def _at_work(plan: Plan, done: dict[str, Particles]) -> str:
    """The method that was drawing when it stopped."""
    return next((m for m in plan.methods if m not in done), list(plan.methods)[-1])


def _partial(folder: RunFolder, plan: Plan, done: dict[str, Particles], why: str = "") -> str:
    """Save what there is, and say where it is."""
    for label, particles in done.items():
        folder.put(label, particles, final=True)
    folder.close("failed" if why else "interrupted", why)
    if not done:
        return f"no method had finished anything; the recipe is kept in {folder.path}"
    sizes = ", ".join(f"{p.m} x {p.k} of {m}" if p.m > 1 else f"{p.k} of {m}" for m, p in done.items())
    return f"what had finished ({sizes}) is saved in {folder.path}"


def _texts(target: Target, lm: Any) -> list[dict[str, Any]]:
    """The problems as text, for the report."""
    decode = lm.tokenizer.decode
    return [
        {"name": p.name or str(i), "context": decode(p.context), "evidence": decode(p.evidence) if p.evidence else "",
         "row": dict(p.row)}
        for i, p in enumerate(target.problems)
    ]  # fmt: skip


# -- what is printed ------------------------------------------------------------------------------------------------


def _console(stderr: bool = False) -> Any:
    from rich.console import Console

    stream = sys.stderr if stderr else sys.stdout
    return Console(stderr=stderr, width=None if stream.isatty() else 160, highlight=False)


def _print_sample(label: str, particles: Particles, target: Target) -> None:
    """The heaviest texts of each problem, and the verdict."""
    print(f"gamma = {target.formula}" + (f"   ({target.note})" if target.note else ""))
    names = names_of(particles)
    for q, name in list(enumerate(names))[:PROBLEMS]:
        seconds = particles.trace.counts.get("seconds", 0.0)
        head = f"{label}, {particles.k} draws" + (f", {seconds:.1f} s" if particles.m == 1 else f", problem {name}")
        print(f"\n{head}\n   weight  text")
        for text, weight in particles.best(q, BEST):
            print(f"  {weight:7.1%}  {printable(text, 160)}")
    if len(names) > PROBLEMS:
        print(f"\n({len(names) - PROBLEMS} more problems in samples.jsonl)")
    print()
    _console().print(diagnose(particles), soft_wrap=True)


def _print_comparison(table: Any) -> None:
    _console().print(table)


# -- progress and interrupts ----------------------------------------------------------------------------------------


@contextlib.contextmanager
def _spinner(what: str) -> Iterator[None]:
    """A turning mark on a terminal, nothing elsewhere."""
    if not sys.stderr.isatty():
        yield
        return
    with _console(stderr=True).status(what):
        yield


@contextlib.contextmanager
def _progress(what: str) -> Iterator[OnStep]:
    """A bar on a terminal, nothing elsewhere."""
    if not sys.stderr.isatty():
        yield lambda done, of: None
        return
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description:<12}"), BarColumn(), TextColumn("{task.percentage:>3.0f}%"),
               TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn())  # fmt: skip
    with Progress(*columns, console=_console(stderr=True)) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, of: bar.update(task, completed=done, total=of)


@contextlib.contextmanager
def _unbroken() -> Iterator[None]:
    """Ctrl-C waits until a save is over."""
    caught: list[int] = []

    def later(number: int, frame: Any) -> None:
        caught.append(number)

    try:
        before: dict[int, Any] = {s: signal.signal(s, later) for s in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not the main thread
        yield
        return
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if any(callable(before[number]) for number in caught) and sys.exc_info()[0] is None:
            raise KeyboardInterrupt
