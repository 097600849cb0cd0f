"""The command line: ``retrodict demo | sample | train | compare | report | models | bench``.

Each command reads its flags (through tyro) and, for sample and compare, a recipe; what is wrong with them is said in
one line on stderr before anything is loaded. Exit codes: 0 done, 1 it could not be done, 2 the input was wrong,
130 interrupted (what had finished is saved).
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import io
import os
import pkgutil
import re
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Annotated, Any, NoReturn

import tyro

import retrodict
from retrodict.cli import config, values
from retrodict.errors import InputError, MissingExtra, RetrodictError, nearest

COMMANDS: dict[str, str] = {
    "demo": "posterior inference on a small real language model, with a bound on its error",
    "sample": "draw from one target with one sampler",
    "train": "fine-tune a policy to sample the posterior in one pass",
    "compare": "several samplers on the same target, side by side",
    "graph": "posterior over causal graphs of a table's columns, a language model as prior",
    "worlds": "what can be true, given what is believed and what must hold together",
    "plan": "what a story says of a map, and what to do there",
    "report": "build report.html from a run folder again; needs no model",
    "models": "which models can be loaded here, in which precision and where",
    "bench": "measure against the bars: retrodict bench exact --json FILE",
}
CLOSED_PIPE = 141


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; gives the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in words
    words = [w for w in words if w != "--debug"]
    try:
        with _terminable():
            code = _dispatch(words)
        sys.stdout.flush()
        return code
    except KeyboardInterrupt as stop:
        return _say(str(stop) or "interrupted before anything was finished", 130)
    except BrokenPipeError:
        _silence_stdout()
        return CLOSED_PIPE
    except SystemExit as stop:  # help, version
        return stop.code if isinstance(stop.code, int) else 0 if stop.code is None else 1
    except Exception as error:  # one line for people; --debug shows where it came from
        if debug:
            traceback.print_exc()
        if isinstance(error, RetrodictError):
            return _say(str(error), 2 if isinstance(error, (InputError, MissingExtra)) else 1)
        more = "" if debug else "; add --debug for the traceback"
        return _say(f"unexpected {type(error).__name__}: {error or 'no message'}{more}", 1)


def _say(message: str, code: int) -> int:
    """One line on stderr."""
    line = " ".join(message.split())
    with contextlib.suppress(OSError):
        print(f"retrodict: {line}", file=sys.stderr, flush=True)
    return code


@contextlib.contextmanager
def _terminable() -> Any:
    """A polite kill (SIGTERM) ends a run as Ctrl-C does: what is finished gets saved."""

    def stop(*_: Any) -> NoReturn:
        raise KeyboardInterrupt

    try:
        before = signal.signal(signal.SIGTERM, stop)
    except ValueError:  # not the main thread: tests, notebooks
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _silence_stdout() -> None:
    """Nobody reads any more; the interpreter must not complain about that when it ends."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _dispatch(words: list[str]) -> int:
    if not words or words[0] in ("-h", "--help", "help"):
        print(usage())
        return 0 if words else 2
    if words[0] == "--version":
        print(f"retrodict {retrodict.__version__}")
        return 0
    command, rest = words[0], words[1:]
    if command not in COMMANDS:
        raise InputError(f"unknown command {command!r}{nearest(command, COMMANDS)}")
    return {"demo": _demo, "sample": _sample, "compare": _sample, "train": _train, "report": _report, "models": _models,
            "graph": _graph, "worlds": _worlds, "plan": _plan, "bench": _bench}[command](command, rest)  # fmt: skip


def usage() -> str:
    """What ``retrodict --help`` prints."""
    rows = "\n".join(f"  {name:<9}{text}" for name, text in COMMANDS.items())
    return (f"usage: retrodict COMMAND [OPTIONS]\n\n{rows}\n\n"
            "  retrodict COMMAND --help lists the options; --debug anywhere shows tracebacks; --version\n"
            "  retrodict sample recipes/infill.yaml --n 128      keys of the recipe are flags too")  # fmt: skip


# -- flags ----------------------------------------------------------------------------------------------------------


def parse(kind: Any, command: str, words: Sequence[str], options: Sequence[str] = ()) -> Any:
    """tyro's answer, with its refusals as one line: an unknown flag gets the nearest of ``options``."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            found, unknown = tyro.cli(kind, args=list(words), prog=f"retrodict {command}", return_unknown_args=True)
    except SystemExit as stop:
        if stop.code in (0, None):
            raise
        raise InputError(f"{command}: {_unboxed(said.getvalue())}") from None
    for word in unknown:
        if word.startswith("--") and word != "--":
            name = word[2:].partition("=")[0].replace("-", "_")
            close = re.search(r"did you mean '(\w+)'", nearest(name, options) if options else "")
            hint = f"did you mean --{close[1].replace('_', '-')}?" if close else f"see retrodict {command} --help"
            raise InputError(f"{command}: unknown flag {word.partition('=')[0]}; {hint}")
    if unknown:
        raise InputError(f"{command}: unexpected word {unknown[0]!r}; a text of several words goes in quotes")
    return found


def _unboxed(text: str) -> str:
    """What tyro's error box says, less its title and what follows its first rule, on one line."""
    blocks: list[list[str]] = [[]]
    for line in text.splitlines():
        line = re.sub(r"^[│|]\s*|\s*[│|]$", "", line.strip())
        if re.match(r"[╭+][─-]", line):  # the frame, with the title in it
            continue
        if re.search(r"\w", line):
            blocks[-1].append(line)
        elif blocks[-1]:
            blocks.append([])
    titled = len(blocks[0]) == 1 and not blocks[0][0].endswith(".") and any(blocks[1:])
    return " ".join(blocks[1 if titled else 0]).rstrip(".") or "the flags cannot be read"


def _flags() -> Any:
    """The class tyro reads: the recipe's path, and one flag a key of :class:`config.Config`."""

    def one(name: str, value: values.Value, text: str) -> tuple[str, Any, Any]:
        kind = Annotated[Any, *values.flag(value, text)]
        return name, kind, dataclasses.field(default=None)

    told = [one(k, f.metadata["value"], f.metadata["help"] + config.default_of(k)) for k, f in config.FIELDS.items()]
    name, kind, default = one("recipe", values.Value("RECIPE", str), "a YAML file with the same keys; flags win")
    return dataclasses.make_dataclass("Flags", [(name, tyro.conf.Positional[kind], default), *told])


def _sample(command: str, words: list[str]) -> int:
    flags = _flags()
    flags.__doc__ = COMMANDS[command][0].upper() + COMMANDS[command][1:] + "."
    found = parse(flags, command, words, list(config.FIELDS))
    given = {k: x for k, x in vars(found).items() if x is not None}
    recipe = given.pop("recipe", None)
    plan = config.load(command, None if recipe is None else recipe.words[0], given)
    from retrodict.cli.run import execute

    return execute(command, plan)


def _train(command: str, words: list[str]) -> int:
    from retrodict.cli import train

    return train.run(words, parse)


# -- the other commands ---------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Report:
    """Build report.html from a run folder again; needs no model."""

    folder: tyro.conf.Positional[str] = ""
    """a folder that demo, sample, train or compare wrote"""


def _report(command: str, words: list[str]) -> int:
    from retrodict.cli.answers import rebuild
    from retrodict.report.html import write

    folder = parse(Report, command, words, ["folder"]).folder
    if not folder:
        raise InputError("report: which run folder? give one that a command wrote, such as runs/infill-001")
    print(rebuild(folder) or write(folder))
    return 0


@dataclasses.dataclass
class Models:
    """Which models can be loaded here, in which precision and where. Loads nothing unless asked to."""

    load: str = ""
    """load this one (smollm2, a hub id, a folder, a GGUF file) and say in one line what it is"""
    dtype: str = "auto"
    """auto, float32, bfloat16, float16, float64"""
    device: str = "auto"
    """auto, cpu, cuda"""
    adapter: str = ""
    """with --load: folder of a PEFT adapter"""


def _models(command: str, words: list[str]) -> int:
    from retrodict.cli.models import show

    told = parse(Models, command, words, ["load", "dtype", "device", "adapter"])
    return show(told.load, told.dtype, told.device, told.adapter)


def _demo(command: str, words: list[str]) -> int:
    return _run(command, words, _door("retrodict.cli.demo"))


def _graph(command: str, words: list[str]) -> int:
    return _run(command, words, _door("retrodict.cli.graph"))


def _worlds(command: str, words: list[str]) -> int:
    return _run(command, words, _door("retrodict.cli.worlds"))


def _plan(command: str, words: list[str]) -> int:
    return _run(command, words, _door("retrodict.cli.plan"))


def _bench(command: str, words: list[str]) -> int:
    import retrodict.bench as room

    plain = [m.name for m in pkgutil.iter_modules(room.__path__) if m.name != "rows"]
    if not words or words[0] in ("-h", "--help"):
        print(f"usage: retrodict bench SUITE [--json FILE] [OPTIONS]\n\nsuites: {', '.join(_suites(plain))}")
        return 0 if words else 2
    suite, rest = words[0], words[1:]
    if suite not in plain or not hasattr(module := importlib.import_module(f"retrodict.bench.{suite}"), "run"):
        raise InputError(f"unknown suite {suite!r}{nearest(suite, _suites(plain))}")
    path = None
    for i, word in enumerate(rest):
        if word == "--json" or word.startswith("--json="):
            path = word[7:] if "=" in word else next(iter(rest[i + 1 : i + 2]), "")
            if not path or path.startswith("--"):
                raise InputError("bench: --json needs a file to write to")
            rest = rest[:i] + rest[i + (1 if "=" in word else 2) :]
            break
    if path is not None:
        config.writable(os.path.dirname(path) or ".", "--json")
    rows = _call(f"bench {suite}", rest, module.run)
    report = importlib.import_module("retrodict.bench.rows").report
    return int(report(rows, path) or 0)


def _suites(names: Sequence[str]) -> list[str]:
    return [n for n in names if hasattr(importlib.import_module(f"retrodict.bench.{n}"), "run")]


def _door(module: str) -> Callable[..., Any]:
    """The ``run`` of a command that has a module of its own."""
    return importlib.import_module(module).run


def _run(command: str, words: list[str], fn: Callable[..., Any]) -> int:
    code = _call(command, words, fn)
    return code if isinstance(code, int) else 0


def _call(command: str, words: list[str], fn: Callable[..., Any]) -> Any:
    """Call a function with its keyword parameters as flags."""
    import functools
    import inspect

    told: dict[str, Any] = {}

    @functools.wraps(fn)
    def keep(**given: Any) -> None:
        told.update(given)

    parse(keep, command, words, list(inspect.signature(fn).parameters))
    return fn(**told)


if __name__ == "__main__":
    sys.exit(main())
