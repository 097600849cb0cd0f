"""What a key of a recipe may hold, whether it comes from YAML or from a flag: one check, one wording."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import tyro
from tyro.constructors import PrimitiveConstructorSpec

from retrodict.errors import nearest

LABEL = re.compile(r"[A-Za-z0-9][\w.-]*")
"""Names that can be a file's or a folder's."""


@dataclass(frozen=True)
class Words:
    """A flag's words as they stood on the command line."""

    words: list[Any]


@dataclass(frozen=True)
class Value:
    """A kind of value.

    Attributes:
        metavar: how the help writes it.
        of: a YAML value to the value used; raises ValueError with what was expected.
        read: a flag's word to a YAML value.
        many: whether a flag takes several words.
    """

    metavar: str
    of: Callable[[Any], Any]
    read: Callable[[str], Any] = str
    many: bool = False

    def __call__(self, given: Any) -> Any:
        """The checked value."""
        if isinstance(given, Words):
            words = [self.read(w) for w in given.words]
            if self.many and not words:
                raise ValueError(f"give at least one {self.metavar.split()[0]}")
            return self.of(words if self.many else words[0])
        return self.of(given)


def flag(value: Value, text: str) -> tuple[Any, Any]:
    """What tyro needs to take a flag's words as they are; they are checked with the keys of the recipe, later."""
    spec = PrimitiveConstructorSpec(
        nargs="*" if value.many else 1,
        metavar=value.metavar,
        instance_from_str=Words,
        is_instance=lambda x: True,
        str_from_instance=lambda x: [],
    )
    return spec, tyro.conf.arg(help=text, help_behavior_hint="")


def spell(x: Any) -> str:
    """A value as a person wrote it, for messages."""
    try:
        text = json.dumps(x, ensure_ascii=False)
    except (TypeError, ValueError):
        text = repr(x)
    return text if len(text) <= 60 else text[:57] + "..."


def _text(x: Any) -> str:
    if not isinstance(x, str):
        hint = f"; write it in quotes: {spell(str(x).lower() if isinstance(x, bool) else str(x))}"
        raise ValueError(f"expected text, found {spell(x)}{'' if isinstance(x, (list, dict)) else hint}")
    return x


def _number(word: str) -> Any:
    for kind in (int, float):
        try:
            return kind(word)
        except ValueError:
            continue
    return word


TEXT = Value("TEXT", _text)


def whole(low: int) -> Value:
    """Whole numbers from ``low`` up."""

    def of(x: Any) -> int:
        if isinstance(x, bool) or not isinstance(x, int):
            raise ValueError(f"expected a whole number, found {spell(x)}")
        if x < low:
            raise ValueError(f"must be at least {low}, not {x}")
        return x

    return Value("INT", of, _number)


def real(holds: Callable[[float], bool] = lambda x: True, what: str = "") -> Value:
    """Numbers that ``holds`` says yes to; ``what`` says which those are."""

    def of(x: Any) -> float:
        x = _number(x) if isinstance(x, str) else x  # YAML reads 1e-3 as text
        if isinstance(x, bool) or not isinstance(x, (int, float)):
            raise ValueError(f"expected a number, found {spell(x)}")
        if x != x or not holds(x):
            raise ValueError(f"must be {what or 'a number'}, not {x:g}")
        return float(x)

    return Value("NUMBER", of, _number)


def choice(options: Callable[[], Iterable[str]], metavar: str, other: Callable[[str], bool] | None = None) -> Value:
    """One of some words; ``other`` lets further ones through (import paths)."""

    def of(x: Any) -> str:
        word = _text(x)
        if word not in (known := list(options())) and not (other is not None and other(word)):
            raise ValueError(f"unknown value {spell(word)}{nearest(word, known)}")
        return word

    return Value(metavar, of)


def _words(x: Any) -> list[str]:
    if isinstance(x, str):
        raise ValueError(f"expected a list of words, found {spell(x)}; write [{x}]")
    if not isinstance(x, list) or not x:
        raise ValueError(f"expected a list of words, found {spell(x)}")
    return [_text(w) for w in x]


def _stop(x: Any) -> str | int | list[int]:
    ids = x if isinstance(x, list) else [x]
    if isinstance(x, str):
        if not x:
            raise ValueError("a stop cannot be empty; write none for no stop, or eos for the model's own end")
        return x
    if not ids or not all(isinstance(i, int) and not isinstance(i, bool) for i in ids):
        raise ValueError(f"expected text, a token id or a list of ids, found {spell(x)}")
    return x


def _chat(x: Any) -> str:
    word = "off" if x is False else _text(x)
    if word not in ("auto", "off"):
        raise ValueError(f"unknown value {spell(word)}{nearest(word, ['auto', 'off'])}")
    return word


def _name(x: Any) -> str:
    if not LABEL.fullmatch(name := _text(x)):
        raise ValueError(f"{spell(name)} cannot name a folder; use letters, digits, '.', '_' and '-'")
    return name


def samplers(known: Callable[[], Iterable[str]]) -> Value:
    """A sampler's name, several, or a mapping from names to options of their own; gives the mapping."""

    def of(x: Any) -> dict[str, dict[str, Any]]:
        named = dict(x) if isinstance(x, Mapping) else dict.fromkeys([x] if isinstance(x, str) else _words(x))
        if not named:
            raise ValueError("names no sampler")
        out = {}
        for label, options in named.items():
            if not isinstance(label, str) or not isinstance(options or {}, Mapping):
                raise ValueError(f"expected names with options, as in {{smc: {{n: 64}}}}; found {spell(x)}")
            options = dict(options or {})
            name = str(options.setdefault("sampler", label))
            if name not in known() and ":" not in name:
                raise ValueError(f"unknown sampler {spell(name)}{nearest(name, known())}")
            label = label.rpartition(":")[2]
            if not LABEL.fullmatch(label):
                raise ValueError(f"{spell(label)} cannot name a file; use letters, digits, '.', '_' and '-'")
            if label in out:
                raise ValueError(f"two samplers are called {label!r}; give one another name and 'sampler: ...'")
            out[label] = options
        return out

    return Value("NAME ...", of, many=True)


WORDS = Value("WORD ...", _words, many=True)
STOP = Value("TEXT", _stop)
CHAT = Value("{auto,off}", _chat)
NAME = Value("NAME", _name)
POSITIVE = real(lambda x: 0 < x < float("inf"), "above 0")
SHARE = real(lambda x: 0 <= x <= 1, "a share between 0 and 1")
NEGATIVE = real(lambda x: -float("inf") < x < 0, "negative nats, e.g. -20")
WEIGHT = real(lambda x: 0 <= x < float("inf"), "0 or more")
FINITE = real(lambda x: abs(x) < float("inf"), "a finite number")
