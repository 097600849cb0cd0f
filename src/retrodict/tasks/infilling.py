"""Story infilling: the missing middle Z of a story, between X and Y (Hu et al. 2024, section 4.2).

The stories are the language model's own: it goes on from one of our openings for a sentence (X), writes a middle (Z)
and what follows (Y). For such a story Z is an exact draw from p(Z | X, Y), so a policy's gap to the posterior is
bounded from both sides; no story's middle is ever shown to training.
"""

from __future__ import annotations

import dataclasses

import torch

from retrodict.errors import InputError
from retrodict.policies.base import rollout
from retrodict.policies.lm import LMPolicy
from retrodict.protocols import LanguageModel
from retrodict.records import Problem, Rollouts
from retrodict.rng import generator
from retrodict.targets.algebra import Target
from retrodict.targets.ready import posterior, strings
from retrodict.targets.simulate import simulate

OPENINGS = (
    "The cat", "My sister", "Every morning", "The old man", "On Sunday", "The train", "A small boy", "Our teacher",
    "The garden", "Last winter", "The baker", "Two friends", "The phone", "In the kitchen", "The farmer", "Anna",
    "The boat", "After school", "The king", "A stranger", "The doctor", "At the market", "The dog", "My grandmother",
    "The river", "When it rained", "The painter", "Tom", "The new house", "Late at night", "The soldier", "A letter",
    "The children", "In the forest", "The driver", "Maria", "The shop", "One evening", "The bird", "Peter",
)  # fmt: skip
"""Beginnings of a first sentence, written for this task. The last eight are held out."""
HELD_OUT = 8
LEAD = "Here is a simple story for children.\n\n"
"""What stands before every story, so that the model tells one."""
BEGINNINGS = (256, 64)
"""First sentences to train on, and held out."""


def beginnings(lm: LanguageModel, n: int, seed: int, *, held_out: bool = False, max_tokens: int = 16) -> list[Problem]:
    """n first sentences: openings in turn, each continued by the model to a full stop within ``max_tokens``."""
    openings = OPENINGS[-HELD_OUT:] if held_out else OPENINGS[:-HELD_OUT]
    space = strings(lm, ".", max_tokens, "own_stop", 3)
    starts = [Problem(tuple(lm.tokenizer.encode(LEAD + text))) for text in openings]
    policy, gen = LMPolicy(lm, space, starts), generator(seed, lm.device, int(held_out))
    out: dict[tuple[int, ...], Problem] = {}
    for _ in range(64):
        turn = torch.arange(len(out), len(out) + 2 * n, device=lm.device) % len(starts)
        rows = rollout(policy, turn, gen)
        for p, ids, k in zip(rows.problem.tolist(), rows.moves.tolist(), rows.n.tolist(), strict=True):
            if k < max_tokens and len(out) < n:
                context = (*starts[p].context, *ids[:k], *space.stops.text_ids(0))
                out.setdefault(context, Problem(context, name=f"story {len(out) + 1}"))
        if len(out) == n:
            return list(out.values())
    raise InputError(f"only {len(out)} of {n} beginnings ended within {max_tokens} tokens; raise max_tokens")


def target(lm: LanguageModel, *, max_tokens: int = 16, limit: str = "force", seed: int = 0) -> Target:
    """p(Z | X) p(Y | X, Z) for beginnings that are still without an end: ``simulate`` writes Y."""
    return _begun(lm, max_tokens, limit, seed, False)


def held_out(lm: LanguageModel, *, max_tokens: int = 16, limit: str = "force", seed: int = 0) -> Target:
    """As :func:`target`, from openings that it never uses."""
    return _begun(lm, max_tokens, limit, seed, True)


def _begun(lm: LanguageModel, max_tokens: int, limit: str, seed: int, held_out: bool) -> Target:
    begun = beginnings(lm, BEGINNINGS[held_out], seed, held_out=held_out)
    blank = [dataclasses.replace(p, evidence=tuple(lm.tokenizer.encode(" "))) for p in begun]
    return posterior(lm, blank, stop=".", max_tokens=max_tokens, min_tokens=1, limit=limit)


def stories(
    lm: LanguageModel, n: int, seed: int = 0, *, held_out: bool = False, max_tokens: int = 16, after: int = 12
) -> tuple[Target, Rollouts]:
    """n stories as problems p(Z | X) p(Y | X, Z), and the exact middle of each (for bounds; never for training).

    ``held_out`` stories begin with openings that the others never use. Z and Y are a sentence each, of at most
    ``max_tokens`` and ``after`` tokens.
    """
    return simulate(_begun(lm, max_tokens, "force", seed, held_out), n, seed, tokens=after, until=".")
