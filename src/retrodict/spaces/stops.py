"""How a string ends: by an action (exact token ids), by a predicate on its text, or only at its length limit."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Stops:
    """The stop of a string space.

    Attributes:
        ids: stop token ids; each is an action, and (where ``in_text``) each makes an object of its own.
        in_text: whether the stop's text belongs to the latent, so that Y follows it (newline, "."). End-of-sequence
            ids do not: Y replaces them, and all of them count as one stop, their probabilities added.
        predicate: instead of ids, a condition on the latent's text; where it becomes true the string ends at once.
        label: how errors and tables call it.
    """

    ids: tuple[int, ...] = ()
    in_text: bool = False
    predicate: Callable[[str], bool] | None = None
    label: str = "none"

    @property
    def n(self) -> int:
        """Number of distinct stops an object can have."""
        return len(self.ids) if self.in_text else 1

    @property
    def acts(self) -> bool:
        """Whether stopping is an action of the policy."""
        return bool(self.ids)

    def text_ids(self, s: int) -> tuple[int, ...]:
        """Ids that stop s adds to the latent's text."""
        return (self.ids[s],) if self.in_text else ()


@dataclass(frozen=True)
class EndsWith:
    """True once the text ends with (or contains) ``text``."""

    text: str

    def __call__(self, latent: str) -> bool:
        return self.text in latent


@dataclass(frozen=True)
class Matches:
    """True once the regular expression is found in the text."""

    pattern: str

    def __call__(self, latent: str) -> bool:
        return re.search(self.pattern, latent) is not None
