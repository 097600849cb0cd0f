"""Particle filtering over steps: a target whose guide is a process reward of the completed steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from retrodict.errors import InputError
from retrodict.guides.base import ProductGuide
from retrodict.guides.steps import StepGuide
from retrodict.spaces.strings import Strings
from retrodict.targets.algebra import Target
from retrodict.targets.verifier import Verifier


def stepwise(target: Target, reward: Verifier, *, boundary: str | Sequence[str] = "\n", power: float = 1.0) -> Target:
    """The same target, with ``reward`` of each chain's completed steps as the guide of SMC (times the guide it has).

    ``rd.smc`` on it is particle filtering with a process reward. What is sampled does not change: for a reward of the
    finished chain multiply the target by a verifier (the same one, if it can judge whole chains).

    Args:
        target: over strings.
        reward: a verifier of partial texts, positive where a finished chain may still be good.
        boundary: what ends a step, one or several; a tool's answer does in any case.
        power: exponent of the reward (1/beta); below 1 it trusts partial chains less.

    Raises:
        InputError: a target that is not over strings, an empty boundary, or a power that is not positive.
    """
    if not isinstance(target.space, Strings):
        raise InputError("steps are parts of a text; this target is not over strings")
    guide = StepGuide(reward.bind(target)[0], target.space, boundary, power)
    return replace(target, guide=guide if target.guide is None else ProductGuide(target.guide, guide))
