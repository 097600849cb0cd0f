"""The objectives, by name. A new one is a file and a row here; the exactness tests pick the row up."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from retrodict.errors import InputError, nearest
from retrodict.objectives.db import db
from retrodict.objectives.grpo import grpo, rloo
from retrodict.objectives.mle import mle
from retrodict.objectives.pooled import pooled
from retrodict.objectives.ppo import ppo
from retrodict.objectives.reinforce import reinforce
from retrodict.objectives.rtb import rtb
from retrodict.objectives.sir import sir
from retrodict.objectives.subtb import subtb
from retrodict.objectives.tb import tb
from retrodict.objectives.twists import ctl, fudge, sixo, softq
from retrodict.objectives.vargrad import vargrad

Objective = Callable[..., tuple[Tensor, dict[str, float]]]
"""(scores, rollouts, log_gamma, **options) -> (loss, metrics)."""

OBJECTIVES: dict[str, Objective] = {
    "pooled": pooled,
    "subtb": subtb,
    "vargrad": vargrad,
    "tb": tb,
    "db": db,
    "rtb": rtb,
    "mle": mle,
    "sir": sir,
    "reinforce": reinforce,
    "rloo": rloo,
    "grpo": grpo,
    "ppo": ppo,
}


TWISTS: dict[str, Objective] = {"ctl": ctl, "softq": softq, "sixo": sixo, "fudge": fudge}
"""Those that fit a twist: they need a policy whose scores have ``log_psi`` (``policies.twisted``)."""
NEED_PREFIXES = ("pooled", "subtb", "db")
"""Those that live on the values of every prefix."""
WITH_LOG_Z = ("tb", "rtb", "subtb", "db")
"""Those that read a learned log Z where they are given one."""


def objective(name: str) -> Objective:
    """An objective by name, a twist's too. Raises InputError for an unknown one."""
    every = {**OBJECTIVES, **TWISTS}
    if name not in every:
        raise InputError(f"unknown objective {name!r}{nearest(name, every)}")
    return every[name]
