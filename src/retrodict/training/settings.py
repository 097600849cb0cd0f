"""Every number of a training run, checked where it is made."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from retrodict.errors import InputError, nearest
from retrodict.objectives.table import objective
from retrodict.training.collect import Mixture
from retrodict.training.distance import DISTANCES


@dataclass(frozen=True)
class Settings:
    """How a policy is trained.

    Attributes:
        objective: a row of ``objectives.table``; "auto" is pooled where every term values prefixes, else vargrad.
        options: keyword arguments of the objective (``lam``, ``beta``, ``clip``).
        steps: gradient steps.
        samples: rows of each problem in a step.
        per_step: problems in a step (all of them, if at most 8, where not given).
        lr, lr_log_z: Adam's step sizes for the policy and for a learned log Z; ``warmup`` steps rise linearly, then a
            cosine falls to ``lr_end`` times lr.
        clip: largest norm of the gradient.
        mixture: what a step's samples are drawn from.
        capacity, priority, replay_alpha, distance, tolerance: the buffer of each problem, see ``training.replay``.
        reward_temperature: (start, end, steps): gamma^(1/T) with T falling linearly; None for T = 1 throughout.
        micro: rows that run through the model with gradient at once; found from the memory there is by default.
        checkpointing: run layers again in the backward pass: less memory, a third more time.
        shards: independent streams of samples that a step is made of; runs on 1 and on ``shards`` processes agree.
        evaluate: fresh draws of each problem behind the evaluation at the end (and every ``evaluate_every`` steps).
        seed: one seed, one result.
    """

    objective: str = "auto"
    options: Mapping[str, Any] = field(default_factory=dict)
    steps: int = 100
    samples: int = 16
    per_step: int | None = None
    lr: float = 1e-3
    lr_end: float = 0.1
    lr_log_z: float = 0.1
    warmup: int = 5
    clip: float = 1.0
    mixture: Mixture = field(default_factory=Mixture)
    capacity: int = 50
    priority: str = "uniform"
    replay_alpha: float = 1.0
    distance: str | None = None
    tolerance: float = 0.0
    reward_temperature: tuple[float, float, int] | None = None
    micro: int | None = None
    checkpointing: bool = False
    shards: int = 1
    evaluate: int = 256
    evaluate_every: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.objective != "auto":
            objective(self.objective)  # raises for an unknown one
        for name in ("steps", "samples", "capacity", "shards", "evaluate"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be at least 1, not {getattr(self, name)}")
        for name in ("lr", "lr_log_z", "clip"):
            if not 0 < getattr(self, name) < math.inf:
                raise InputError(f"{name} must be a number above 0, not {getattr(self, name)}")
        if self.distance is not None and self.distance not in DISTANCES:
            raise InputError(f"unknown distance {self.distance!r}{nearest(self.distance, DISTANCES)}")
        if self.samples % self.shards:
            raise InputError(f"samples {self.samples} do not divide into {self.shards} shards; give a multiple")
        if self.reward_temperature is not None and not min(self.reward_temperature[:2]) > 0:
            raise InputError(f"reward temperatures must be above 0, not {self.reward_temperature[:2]}")

    def rate(self, step: int) -> float:
        """Adam's step size at a step (0-based)."""
        if step < self.warmup:
            return self.lr * (step + 1) / self.warmup
        done = (step - self.warmup) / max(1, self.steps - self.warmup)
        return self.lr * (self.lr_end + (1 - self.lr_end) * 0.5 * (1 + math.cos(math.pi * min(1.0, done))))

    def reward_t(self, step: int) -> float:
        """The reward temperature at a step."""
        if self.reward_temperature is None:
            return 1.0
        start, end, steps = self.reward_temperature
        return end + (start - end) * max(0.0, 1 - step / max(1, steps))

    def plain(self) -> dict[str, Any]:
        """All values as JSON holds them."""
        return dataclasses.asdict(self)


def settings(**given: Any) -> Settings:
    """Settings from keywords, those of :class:`Mixture` among them; an unknown one gets the nearest."""
    mixed = {f.name for f in dataclasses.fields(Mixture)}
    own = {f.name for f in dataclasses.fields(Settings)} - {"mixture"}
    for name in given:
        if name not in own | mixed:
            raise InputError(f"unknown setting {name!r}{nearest(name, [*own, *mixed])}")
    mixture = Mixture(**{k: v for k, v in given.items() if k in mixed})
    return Settings(mixture=mixture, **{k: v for k, v in given.items() if k in own})
