"""Questions of reasoning-gym (Stojanovski et al. 2025, arXiv 2505.24760), seeded and offline, and its own scores."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any

from retrodict.errors import InputError, MissingExtra, nearest


def questions(name: str, n: int, seed: int, **settings: Any) -> tuple[list[dict[str, Any]], Callable[..., bool]]:
    """n rows {question, answer, metadata} of one of its data sets, and ``right(answer, row)`` by its score.

    An answer is right where ``score_answer`` gives 1: some data sets give less for another format.

    Raises:
        MissingExtra: the package is not installed.
        InputError: no such data set.
    """
    try:
        gym: Any = importlib.import_module("reasoning_gym")
    except ImportError:
        raise MissingExtra("reasoning-gym", "reasoning") from None
    known = importlib.import_module("reasoning_gym.factory").DATASETS
    if name not in known:
        raise InputError(f"reasoning-gym has no data set {name!r}{nearest(name, known)}")
    made = gym.create_dataset(name, size=n, seed=seed, **settings)

    def right(answer: str, row: Mapping[str, Any]) -> bool:
        return made.score_answer(answer, dict(row)) == 1.0

    return [dict(made[i]) for i in range(n)], right
