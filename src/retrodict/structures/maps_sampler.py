"""Maps of more places than can be listed: Metropolis-Hastings on sets of links, written down pair by pair.

A map of f pairs is a string of f yes-or-no tokens, one path an object, so the library's own spaces and samplers apply
and no backward probability is needed. The target is log p(m) + log p(story | m) (``maps``), the proposal favours what
some sentence seems to say; the suffix kernel redraws the pairs after a uniform cut, the block kernel up to four
neighbours. Bias: what is left of the chains' start, less the longer they are; compared with enumeration where both can
be had.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from retrodict.numerics import NEG_INF
from retrodict.policies.base import FiniteStepper, over_menu
from retrodict.protocols import Problems
from retrodict.records import Menu, Problem, Rollouts
from retrodict.rng import child_seed
from retrodict.samplers.mh.run import mh
from retrodict.spaces.stops import Stops
from retrodict.spaces.strings import Strings, StringState
from retrodict.structures.maps import Narrator, Reading, log_facts, log_prior, log_story
from retrodict.targets.algebra import Target

KERNELS = ("suffix", "block")
"""Far moves, and moves that reach every pair alike; both leave the posterior as it is."""
CHAINS, ROUNDS, STEPS = 128, 12, 15
"""Chains; rounds of each kernel in turn; steps of a kernel in a round."""


@dataclass(frozen=True)
class MapTerm:
    """log p(m) + log p(story | m) of maps written pair by pair."""

    reading: Reading
    narrator: Narrator
    name: str = "map"
    noise: str = "none"
    prefixes: bool = False
    version: str = "1"

    def __call__(self, rollouts: Rollouts, every_prefix: bool = False) -> Float[Tensor, " b"]:
        """``[b]``."""
        maps = rollouts.moves.bool()
        return log_prior(maps, self.reading.d, self.narrator) + log_story(self.reading, maps, self.narrator)


class PairPolicy(FiniteStepper):
    """Decides each pair by itself: token 1 ("linked") at place f with a given probability."""

    def __init__(self, space: Strings, problems: Problems, linked: Float[Tensor, " f"]) -> None:
        self.space, self.problems = space, problems
        self.log_p = torch.stack([torch.log1p(-linked), linked.log()], 1)

    def start(self, problem: Int[Tensor, " b"]) -> Int[Tensor, " b"]:
        """It carries nothing."""
        return problem

    def start_at(self, rollouts: Rollouts, upto: Int[Tensor, " b"]) -> Int[Tensor, " b"]:
        """It carries nothing."""
        return rollouts.problem

    def step(self, c: Tensor, s: StringState, move: Tensor) -> Tensor:
        """It carries nothing."""
        return c

    def take(self, c: Tensor, index: Tensor) -> Tensor:
        """Rows ``index``."""
        return c[index]

    def log_probs(self, c: Tensor, s: StringState, menu: Menu, raw: bool = False) -> tuple[Tensor, Tensor]:
        """The probability of this pair; the stop is forced after the last."""
        log_move = self.log_p[s.n.clamp_max(len(self.log_p) - 1)]
        return over_menu(log_move, torch.full((len(s.n), 1), NEG_INF, dtype=log_move.dtype), menu)


def proposal_of(reading: Reading, by: Narrator) -> Float[Tensor, " f"]:
    """Between 0.05 and 0.95: half the prior's share of links, and near 1 for a pair that some sentence seems to say."""
    f = reading.link.shape[1]
    said = log_facts(reading, torch.ones(1, f, dtype=torch.bool), by)[0].softmax(1)
    told = (said[:, :f] + said[:, f : 2 * f]).sum(0)
    return (told + 0.5 * by.rho(reading.d)).clamp(0.05, 0.95)


def sampled_maps(
    reading: Reading, by: Narrator, *, seed: int = 0, chains: int = CHAINS, rounds: int = ROUNDS, steps: int = STEPS
) -> Bool[Tensor, "n f"]:
    """Draws of p(map | story): the states of ``chains`` chains after each round of the second half."""
    f = reading.link.shape[1]
    space = Strings(2, Stops(), f, limit="exact_prefix")
    problems = [Problem((), name="map")]
    target = Target(space, problems, {"map": MapTerm(reading, by)})
    policy = PairPolicy(space, problems, proposal_of(reading, by))
    now, kept, turns = None, [], KERNELS * rounds
    for i, kernel in enumerate(turns):
        now = mh(target, policy, n=chains, seed=child_seed(seed, i), steps=steps, kernel=kernel, keep=1,
                 start=now).objects  # fmt: skip
        if kernel == KERNELS[-1] and 2 * i >= len(turns):
            kept.append(now.moves.bool())
    return torch.cat(kept)
