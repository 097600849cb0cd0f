"""The targets and samplers a recipe can name, and how its keys become their arguments.

Both tables are functions of the library (or ``my.module:fn``); which keys each reads, and their defaults, are its
signature's.
"""

from __future__ import annotations

import importlib
import inspect
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from retrodict.errors import InputError, nearest
from retrodict.protocols import LanguageModel
from retrodict.targets import ready
from retrodict.targets.algebra import Target
from retrodict.targets.problems import TextProblem, problems
from retrodict.tasks import arithmetic_train, continuation, infilling

NOT_KEYS = frozenset({"lm", "data", "name", "verifier", "target", "policy", "seed", "start", "on_step", "tool"})
"""Parameters that are no keys of a recipe under their own name."""
SAMPLER_NAMES = {"temperature": "proposal_temperature"}
IGNORED = {"exact": {"n"}}
"""Parameters that a sampler has for the sake of a common signature."""
POSTERIOR = ("problems", "context", "evidence", "chat", "problem_name")


@dataclass(frozen=True)
class Kind:
    """A kind of target: the function that makes it, the keys it reads, those it cannot do without."""

    fn: Callable[..., Target]
    needs: tuple[str, ...] = ()
    any_of: tuple[str, ...] = ()
    extra: tuple[str, ...] = ()
    held_out: Callable[..., Target] | None = None

    @property
    def keys(self) -> tuple[str, ...]:
        """The keys it reads."""
        own = [p for p in inspect.signature(self.fn).parameters if p not in NOT_KEYS]
        verified = ("verifier",) if "verifier" in self.needs else ()
        return (*self.extra, *own, *(("until",) if "stop" in own else ()), *verified)

    @property
    def defaults(self) -> dict[str, Any]:
        """Its own defaults of those keys."""
        told = inspect.signature(self.fn).parameters
        return {k: p.default for k, p in told.items() if k in self.keys and p.default not in (p.empty, None, ())}


TARGETS: dict[str, Kind] = {
    "infill": Kind(ready.infill, ("before", "after")),
    "continuation": Kind(ready.continuation, ("prompt",)),
    "of_length": Kind(ready.of_length, ("prompt", "tokens")),
    "including": Kind(ready.including, ("prompt",), any_of=("contain", "avoid")),
    "scored": Kind(ready.continuation, ("prompt", "verifier")),
    "posterior": Kind(ready.posterior, ("problems", "context"), extra=POSTERIOR),
    "stories": Kind(infilling.target, held_out=infilling.held_out),
    "arithmetic": Kind(arithmetic_train.recipe),
    "sentences": Kind(continuation.recipe),
}


@dataclass(frozen=True)
class Method:
    """A sampler with its options: ``said`` in the words of a recipe, ``arguments`` in its own."""

    name: str
    fn: Callable[..., Any]
    keys: tuple[str, ...]
    said: Mapping[str, Any] = field(default_factory=dict)
    arguments: Mapping[str, Any] = field(default_factory=dict)

    def with_options(self, options: Mapping[str, Any]) -> Method:
        """The same sampler with these options over its defaults."""
        own = {v: k for k, v in SAMPLER_NAMES.items()}
        told = inspect.signature(self.fn).parameters
        defaults = {k: p.default for k in self.keys if (p := told[own.get(k, k)]).default is not p.empty}
        said = {"sampler": self.name} | {k: x for k, x in (defaults | dict(options)).items() if x is not None}
        return replace(self, said=said, arguments={own.get(k, k): x for k, x in said.items() if k != "sampler"})


def method_of(name: str, fn: Callable[..., Any]) -> Method:
    """A sampler and the keys it reads."""
    own = [p for p in inspect.signature(fn).parameters if p not in NOT_KEYS and p not in IGNORED.get(name, ())]
    return Method(name, fn, tuple(SAMPLER_NAMES.get(p, p) for p in own))


def kind_of(name: str, at: str) -> Kind:
    """A kind of target by name or import path."""
    if name in TARGETS:
        return TARGETS[name]
    fn = import_path(name, at)
    told = inspect.signature(fn).parameters
    return Kind(fn, tuple(k for k, p in told.items() if k not in NOT_KEYS and p.default is p.empty))


def import_path(path: str, at: str) -> Callable[..., Any]:
    """The function that ``my.module:fn`` names; modules of the present folder are found too."""
    module, colon, name = path.partition(":")
    if not colon or not module or not name:
        raise InputError(f"{at}: {path!r} is no import path; write my.module:fn")
    if "" not in sys.path and os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        found: Any = importlib.import_module(module)
    except ModuleNotFoundError as error:
        what = f"no module {error.name!r}"
        raise InputError(f"{at}: cannot import {path!r}: {what}; it is looked for in the present folder too") from None
    except Exception as error:  # the user's module may raise what it likes
        where = f" (line {error.lineno})" if isinstance(error, SyntaxError) else ""
        raise InputError(f"{at}: importing {module!r} raised {type(error).__name__}: {error}{where}") from error
    try:
        for part in name.split("."):
            found = getattr(found, part)
    except AttributeError:
        public = [k for k, v in vars(importlib.import_module(module)).items() if callable(v) and k[:1] != "_"]
        near = nearest(name, public) if public else ""
        raise InputError(f"{at}: the module {module!r} has no {name!r}{near}") from None
    if not callable(found):
        raise InputError(f"{at}: {path!r} is a {type(found).__name__}, not a function")
    return found


def questions(arguments: Mapping[str, Any]) -> list[TextProblem]:
    """The problems of a posterior target, from its file and templates; none for other targets."""
    if "problems" not in arguments:
        return []
    told = {k: arguments.get(k, "") for k in POSTERIOR}
    return problems(os.path.expanduser(told["problems"]), context=told["context"], evidence=told["evidence"],
                    chat=False if told["chat"] == "off" else "auto", name=told["problem_name"])  # fmt: skip


def build(
    kind: Kind, lm: LanguageModel, arguments: Mapping[str, Any], data: Sequence[TextProblem], factors: Sequence[Any]
) -> Target:
    """The target of a checked recipe."""
    told = {k: x for k, x in arguments.items() if k not in (*POSTERIOR, "until", "verifier")}
    if told.get("stop") == "none":
        told["stop"] = None
    if "until" in arguments:
        told["stop"] = ready.until(arguments["until"])
    if told.get("lookahead") == 0:
        told["lookahead"] = None
    target = kind.fn(lm, *([data] if data else []), **told)
    for factor in factors:
        target = target * factor
    return target
