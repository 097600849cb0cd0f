"""Exactness of test-time Monte Carlo: what each room adds to ``bench exact`` and to the tests.

A room's module lists ``pairs(quick)``, its methods on small targets of its own, and ``BUGS``. A new method is one row
there; the benchmark and the tests pick it up.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from retrodict.testing import grammars, hmms, lexical, mcmc, smc_more, steps, twists
from retrodict.testing.bugs import Bug
from retrodict.testing.gates import Gates
from retrodict.testing.oracle import Gate, enumerate_target
from retrodict.testing.targets import Case


@dataclass(frozen=True)
class Pair:
    """One method on one small target: a label for tables, the target, and the gates that hold it."""

    method: str
    case: Case
    gates: Gates

    def run(self, seeds: int = 200) -> list[Gate]:
        """All gates, against the enumerated target."""
        return self.gates(self.case, enumerate_target(self.case.target, self.case.policy), seeds)


ROOMS: tuple[tuple[Callable[[bool], Sequence[Pair]], Sequence[Bug]], ...] = (
    (smc_more.pairs, smc_more.BUGS),  # weighted rejection, steering, alpha ramp
    (mcmc.pairs, mcmc.BUGS),  # Markov chains and ladders
    (lexical.pairs, lexical.BUGS),  # byte automata
    (grammars.pairs, grammars.BUGS),  # regular expressions, JSON schemas, Lark grammars
    (twists.pairs, twists.BUGS),  # learned twists
    (hmms.pairs, hmms.BUGS),  # HMM look-ahead
    (steps.pairs, steps.BUGS),  # steps of a chain, votes
)
"""(pairs, planted bugs) of each room."""


def all_pairs(quick: bool = False) -> list[Pair]:
    """Every method of every room on its targets; ``quick`` keeps a few of each."""
    return [pair for pairs, _ in ROOMS for pair in pairs(quick)]


def all_bugs() -> list[Bug]:
    """Every planted bug of every room."""
    return [bug for _, bugs in ROOMS for bug in bugs]
