"""Constraints named in a recipe or by flags: read and compiled before any weight is loaded."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from retrodict.cli import values
from retrodict.errors import InputError
from retrodict.targets.algebra import Bindable
from retrodict.targets.constraint import json_schema, lark, one_of, regex

KEYS = ("regex", "one_of", "json_schema", "lark")
"""Keys that say what whole texts must look like."""


def _schema(x: Any) -> Any:
    if not isinstance(x, (str, Mapping)) or not x:
        raise ValueError(f"expected a file, or a schema as a mapping; found {values.spell(x)}")
    return x


SCHEMA = values.Value("FILE", _schema)


def constraints(config: Any, at: Callable[[str], str]) -> list[Bindable]:
    """The constraints that a recipe or the flags name; InputError says which key is wrong, and why."""
    made: dict[str, Callable[[Any], Any]] = {
        "regex": regex,
        "one_of": one_of,
        "json_schema": lambda x: json_schema(dict(x) if isinstance(x, Mapping) else _read(x)),
        "lark": lambda x: lark(x if "start:" in x.replace(" ", "") else _read(x)),
    }
    out = []
    for key in KEYS:
        value = getattr(config, key)
        if value is None:
            continue
        try:
            out.append(made[key](value))
        except InputError as error:
            raise InputError(f"{at(key)}: {error}") from None
    return out


def _read(path: str) -> str:
    try:
        return Path(path).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise InputError(f"cannot read {path!r}: {why} (paths start at the present folder)") from None
