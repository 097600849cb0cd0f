"""A target guided by an HMM: ``with_hmm(target, hmm)``."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from retrodict.errors import InputError
from retrodict.guides.base import hard_part, parts, product
from retrodict.guides.dfa import DFAGuide
from retrodict.guides.hmm import HMM
from retrodict.guides.hmm_guide import HMMGuide
from retrodict.models.ragged import peek_ragged
from retrodict.policies.lm import LMPolicy
from retrodict.spaces.strings import Strings
from retrodict.targets.algebra import Target


def with_hmm(target: Target, hmm: HMM, power: float = 1.0) -> Target:
    """The same target, with an HMM's look-ahead as its guide: to stops, to its word constraint, and to its evidence.

    It takes the place of the target's soft guides and of its automaton (which it contains); other hard guides stay
    beside it. ``power`` is the exponent of psi.

    Raises:
        InputError: an HMM of another tokenizer, or a target that is not about strings of a language model.
    """
    prior = target.prior
    if not isinstance(target.space, Strings) or not isinstance(prior, LMPolicy):
        raise InputError("an HMM guides strings of a language model; this target has none as its prior")
    hmm.check(prior.lm)
    hard = [] if target.guide is None else [g for g, _ in parts(target.guide) if hard_part(g) is not None]
    automata = [g for g in hard if isinstance(g, DFAGuide)]
    automaton = automata[0] if automata else None
    for other in automata[1:]:
        automaton = other if automaton is None else automaton.meet(other)
    hmm = hmm.to(hmm.emission.dtype, prior.lm.device)
    level = _level(prior, target) if any(p.evidence for p in target.problems) else None
    guide = HMMGuide(hmm, target.space, target.problems, automaton, power, prior, level)
    rest = [g for g in hard if not isinstance(g, DFAGuide)]
    return target.with_guide(product(guide, *rest) if rest else guide)


def _level(prior: LMPolicy, target: Target) -> Float[Tensor, " m"]:
    """log p(Y | X) of each problem: what the evidence is worth with no latent at all."""
    cache, _ = prior.lm.encode([p.context for p in target.problems])
    rows = torch.arange(len(target.problems), device=prior.lm.device)
    return peek_ragged(prior.lm, cache, rows, [p.evidence for p in target.problems])
