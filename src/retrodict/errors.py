"""Errors whose message is one line: what was wrong, and what to write instead."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class RetrodictError(Exception):
    """Base of every error the library raises on purpose; the command line prints only its message."""


class InputError(RetrodictError, ValueError):
    """The caller's input cannot be used as it is."""


class MissingExtra(RetrodictError, ImportError):
    """A package of an optional extra is not installed."""

    def __init__(self, package: str, extra: str) -> None:
        super().__init__(f"{package} is not installed; run: pip install 'retrodict[{extra}]'")


class ZeroWeights(RetrodictError):
    """Every sample of a problem has weight zero; the message names the factor that did it."""


def nearest(word: str, options: Iterable[str]) -> str:
    """``; did you mean 'x'?`` for the closest option, or the list of options where none is close."""
    options = sorted(options)
    close = difflib.get_close_matches(word, options, 1)
    return f"; did you mean {close[0]!r}?" if close else f"; choose one of {', '.join(options)}"
