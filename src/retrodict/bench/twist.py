"""The twist for "no word over five letters" of ``bench constraints``, fitted on other prompts than it is judged on."""

from __future__ import annotations

from typing import Any

from retrodict.bench.reference import TOKENS
from retrodict.policies.twisted import TwistedPolicy
from retrodict.protocols import LanguageModel
from retrodict.targets.algebra import Target
from retrodict.targets.constraint import short_words
from retrodict.targets.problems import TextProblem, tokenise
from retrodict.targets.ready import from_prior, strings
from retrodict.training.twist import fit_twist

GENERIC = (
    "The best way to spend a Sunday is", "When the train came in", "In the old house on the hill", "I have never seen",
    "The man at the door said", "To make good bread you need", "Last night we went to", "The sea was calm and",
    "My friend Sam told me", "If it does not rain", "The cat sat by the fire and", "There was once a king who",
    "The news this morning was", "It is hard to say why", "The first thing I saw was", "On the way to work",
    "A small boy ran up to", "The price of oil", "We all know that", "The team won the game and",
    "After the meal she", "The road to the north", "He took off his hat and", "Some people think that",
    "In the spring the garden", "The doctor looked at", "What I like most about", "The room was dark, but",
    "Two birds sat on", "The teacher asked us to", "Here is a list of", "The answer to your question is",
    "The phone rang and", "Every year in June", "The city council", "Once I had a car that",
    "This book is about", "The water in the lake", "By the time we got home", "You should always",
)  # fmt: skip
"""Beginnings to fit on, written for this benchmark."""

FIT = {"rows": 16, "steps": 600, "samples": 8, "per_step": 8, "lr": 3e-3, "top": 64, "evaluate": 2}
"""Settings of the fit."""


def generic_target(lm: LanguageModel, limit: str = "own_stop") -> Target:
    """No word over five letters after each generic prompt."""
    data = tokenise(lm, [TextProblem(x, name=x, chat=False) for x in GENERIC])
    return from_prior(lm, data, strings(lm, "eos", TOKENS, limit)) * short_words(5)


def fit(lm: LanguageModel, **settings: Any) -> TwistedPolicy:
    """The twist of the rows below: 640 strings, then 600 steps of 64 rows."""
    return fit_twist(generic_target(lm), **{**FIT, **settings})
