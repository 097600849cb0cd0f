"""A verifier or classifier as a factor: any callable on decoded texts and data rows."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from retrodict.errors import InputError, RetrodictError, nearest
from retrodict.numerics import NEG_INF
from retrodict.protocols import Problems, Space
from retrodict.records import Problem, Rollouts
from retrodict.targets.algebra import Factor, Target

Kind = str
"""One of KINDS; checked where a verifier is made."""

KINDS = ("log", "prob", "bool", "reward")
Check = Callable[[list[str], list[Mapping[str, Any]]], Sequence[float | bool]]


class VerifierError(RetrodictError):
    """A verifier raised or returned something unusable; ``text`` is what it was given."""

    def __init__(self, message: str, text: str) -> None:
        super().__init__(message)
        self.text = text


@dataclass(frozen=True)
class Verifier(Factor):
    """``fn(texts, rows) -> numbers``, called in batches, once for each distinct (problem, text).

    ``kind`` says what a number means: ``log`` (a log-value in nats), ``prob`` (its log is taken), ``bool`` (0 or
    -inf, or ``floor`` nats where given, which is then part of the target), ``reward`` (divided by ``beta``).
    """

    fn: Check
    kind: Kind = "prob"
    beta: float = 1.0
    floor: float | None = None
    name: str = "verifier"
    batch: int = 256

    def bind(self, target: Target) -> tuple[VerifierTerm, None]:
        """Tie to a target's space and problems."""
        return VerifierTerm(self, target.space, target.problems), None

    def __mul__(self, other: Target) -> Target:
        return other * self


def verifier(
    fn: Check, kind: Kind = "prob", *, beta: float = 1.0, floor: float | None = None, name: str = "verifier"
) -> Verifier:
    """A verifier as a factor; multiply it into a target.

    Args:
        fn: ``fn(texts, rows)`` returns one number a text; rows are the problems' data rows.
        kind: ``log | prob | bool | reward``.
        beta: scale of a reward: the factor is exp(reward / beta).
        floor: nats given to a false ``bool`` (or a zero ``prob``) instead of minus infinity.
        name: how tables call the factor.

    Raises:
        InputError: an unknown kind, a non-positive beta, or a positive floor.
    """
    if kind not in KINDS:
        raise InputError(f"unknown kind {kind!r}{nearest(kind, KINDS)}")
    if not beta > 0:
        raise InputError(f"beta must be positive, not {beta}; small beta means a sharp reward")
    if floor is not None and not floor < 0:
        raise InputError(f"floor must be negative nats, not {floor}; e.g. floor=-20")
    return Verifier(fn, kind, beta, floor, name)


@dataclass(frozen=True)
class VerifierTerm:
    """A verifier on a space: decodes, calls, caches."""

    spec: Verifier
    space: Space
    problems: Problems
    noise: str = "none"
    prefixes: bool = False
    cache: dict[tuple[int, str], float] = field(default_factory=dict, repr=False)

    @property
    def name(self) -> str:
        """The factor's name."""
        return self.spec.name

    @property
    def version(self) -> str:
        """Name, kind and scale."""
        fn = getattr(self.spec.fn, "__qualname__", type(self.spec.fn).__name__)
        return f"{fn}:{self.spec.kind}/{self.spec.beta:g}"

    def on(self, problems: Sequence[Problem]) -> VerifierTerm:
        """The same verifier on other problems (with an empty cache)."""
        return VerifierTerm(self.spec, self.space, problems)

    def __call__(self, rollouts: Rollouts, every_prefix: bool = False) -> Tensor:
        """Log-values ``[b]`` of complete objects."""
        if every_prefix:
            raise InputError(
                f"the factor {self.name!r} has no prefix values; use an objective on whole objects (vargrad, tb)"
            )
        values = self.values(list(zip(rollouts.problem.tolist(), self.space.show(rollouts), strict=True)))
        return torch.tensor(values, dtype=torch.float64, device=rollouts.n.device)

    def values(self, wanted: Sequence[tuple[int, str]]) -> list[float]:
        """Log-values of (problem, text) pairs: each distinct one is asked about once, in batches."""
        new = list(dict.fromkeys(k for k in wanted if k not in self.cache))
        for i in range(0, len(new), self.spec.batch):
            part = new[i : i + self.spec.batch]
            for key, value in zip(part, self._call(part), strict=True):
                self.cache[key] = self._log(value, key[1])
        return [self.cache[k] for k in wanted]

    def _call(self, part: list[tuple[int, str]]) -> list[float]:
        texts, rows = [t for _, t in part], [self.problems[p].row for p, _ in part]
        try:
            values = list(self.spec.fn(texts, rows))
        except RetrodictError:
            raise
        except Exception as error:
            text = self._culprit(part) if len(part) > 1 else texts[0]
            raise VerifierError(f"verifier {self.name!r} raised {type(error).__name__}: {error}; on the text {text!r}",
                                text) from error  # fmt: skip
        if len(values) != len(texts):
            raise VerifierError(
                f"verifier {self.name!r} returned {len(values)} values for {len(texts)} texts; return one each",
                texts[0],
            )
        return [self._number(v, text) for v, text in zip(values, texts, strict=True)]

    def _number(self, value: object, text: str) -> float:
        try:
            return float(value)  # pyright: ignore[reportArgumentType]
        except (TypeError, ValueError):
            raise VerifierError(f"verifier {self.name!r} returned {value!r} on the text {text!r}; return a number",
                                text) from None  # fmt: skip

    def _culprit(self, part: list[tuple[int, str]]) -> str:
        for p, text in part:
            try:
                self.spec.fn([text], [self.problems[p].row])
            except Exception:
                return text
        return part[0][1]

    def _log(self, value: float, text: str) -> float:
        kind, floor = self.spec.kind, self.spec.floor
        if math.isnan(value) or value == math.inf:
            what = "NaN" if math.isnan(value) else "an infinite value"
            raise VerifierError(f"verifier {self.name!r} returned {what} on the text {text!r}; return a number", text)
        if kind == "reward":
            return value / self.spec.beta
        if kind == "log":
            return value
        if kind == "prob" and not 0 <= value <= 1:
            raise VerifierError(f"verifier {self.name!r} gave the probability {value} on {text!r}; use kind='reward'",
                                text)  # fmt: skip
        low = NEG_INF if floor is None else floor
        if kind == "bool":
            return 0.0 if value else low
        return max(math.log(value), low) if value > 0 else low
