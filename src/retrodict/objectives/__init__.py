"""Training objectives as pure functions of scores, rollouts and log gamma."""

from retrodict.objectives.db import db
from retrodict.objectives.grpo import grpo, rloo
from retrodict.objectives.mle import mle
from retrodict.objectives.pooled import pooled
from retrodict.objectives.ppo import ppo
from retrodict.objectives.reinforce import reinforce
from retrodict.objectives.residual import residual
from retrodict.objectives.rtb import rtb
from retrodict.objectives.sir import sir
from retrodict.objectives.subtb import subtb
from retrodict.objectives.table import OBJECTIVES, objective
from retrodict.objectives.tb import tb
from retrodict.objectives.vargrad import vargrad

__all__ = [
    "OBJECTIVES", "db", "grpo", "mle", "objective", "pooled", "ppo", "reinforce", "residual", "rloo", "rtb", "sir",
    "subtb", "tb", "vargrad",
]  # fmt: skip
