"""Checks for the library's parts and for a user's own: laws, exactness gates, small targets, planted bugs.

| question                                               | call                                                 |
|--------------------------------------------------------|------------------------------------------------------|
| does my Space, Policy or Guide keep its contract       | check_space, check_policy, check_guide               |
| does my Target, model or sampler keep its contract     | check_target, check_model, check_sampler             |
| is my sampler right on a target that can be enumerated | evidence_gates, law_gates, conditional_gates         |
| is SMC (any row of METHODS) right on my small target   | check_exact(Case("mine", target), "smc, systematic") |
| would the gates see a mistake                          | BUGS                                                 |

Every check raises AssertionError that says which law broke and by how much.
"""

from retrodict.testing.bugs import BUGS, Bug
from retrodict.testing.chains import invariance, law_after, transition
from retrodict.testing.gates import METHODS, check_exact
from retrodict.testing.laws import check_guide, check_policy, check_space, holds, same
from retrodict.testing.laws_values import check_model, check_sampler, check_target, with_constant
from retrodict.testing.oracle import (
    Exact,
    Gate,
    best_law,
    conditional_gates,
    enumerate_target,
    evidence_gates,
    law_gates,
    log_bound,
    weighted_tv,
)
from retrodict.testing.sets import SetPolicy, Subsets, set_target
from retrodict.testing.targets import Case, TableGuide, by_hand, cases

__all__ = [
    "BUGS",
    "METHODS",
    "Bug",
    "Case",
    "Exact",
    "Gate",
    "SetPolicy",
    "Subsets",
    "TableGuide",
    "best_law",
    "by_hand",
    "cases",
    "check_exact",
    "check_guide",
    "check_model",
    "check_policy",
    "check_sampler",
    "check_space",
    "check_target",
    "conditional_gates",
    "enumerate_target",
    "evidence_gates",
    "holds",
    "invariance",
    "law_after",
    "law_gates",
    "log_bound",
    "same",
    "set_target",
    "transition",
    "weighted_tv",
    "with_constant",
]
