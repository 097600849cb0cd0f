"""An ambiguous grammar of English bits, and planted bugs of what reads it.

Prepositional phrases attach to nouns or to verbs ("saw Kim with ducks"), nouns join in compounds ("dog park ducks"),
and words belong to two classes ("saw her duck").
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from jaxtyping import Float
from torch import Tensor

from retrodict.latent.pcfg import PCFG, TreeTerm, grammar, simulate
from retrodict.records import Rollouts
from retrodict.rng import generator
from retrodict.targets.algebra import Target

AMBIGUOUS = """
S  -> NP VP 1.0
NP -> D N 0.3 | NP PN 0.15 | N N 0.05 | 'Kim' 0.2 | 'Sue' 0.15 | 'her' 0.05 | 'ducks' 0.1
VP -> V NP 0.5 | V SC 0.1 | VP PV 0.2 | 'slept' 0.1 | 'duck' 0.1
SC -> NP B 1.0
B  -> 'duck' 0.5 | 'sleep' 0.3 | B PV 0.2
PN -> PO NP 1.0
PV -> PI NP 1.0
N  -> N N 0.15 | 'dog' 0.25 | 'park' 0.2 | 'duck' 0.2 | 'saw' 0.1 | 'telescope' 0.1
D  -> 'the' 0.6 | 'her' 0.2 | 'a' 0.2
V  -> 'saw' 0.5 | 'liked' 0.3 | 'ducks' 0.2
PO -> 'of' 0.6 | 'with' 0.3 | 'in' 0.1
PI -> 'with' 0.5 | 'in' 0.3 | 'at' 0.2
"""
"""PN attaches to a noun, PV to a verb; "with" is either. In Chomsky normal form."""


def ambiguous() -> PCFG:
    """The grammar above."""
    return grammar(AMBIGUOUS)


def distinct(
    pcfg: PCFG, n: int, seed: int, longest: int = 8, without: Sequence[tuple[int, ...]] = ()
) -> list[tuple[int, ...]]:
    """n different sentences as the grammar draws them, none of ``without``."""
    gen, seen, out = generator(seed), set(without), []
    while len(out) < n:
        for x in simulate(pcfg, 4 * n, gen, longest)[0]:
            if x not in seen and len(out) < n:
                seen.add(x)
                out.append(x)
    return out


# -- planted bugs ----------------------------------------------------------------------------------------------------


class SwappedChildren(TreeTerm):
    """Planted: a rule A -> B C is looked up as A -> C B."""

    def __call__(self, rollouts: Rollouts, every_prefix: bool = False) -> Float[Tensor, " b"]:
        swapped = replace(self.pcfg, binary=self.pcfg.binary.transpose(1, 2).clamp_min(-30.0))
        return TreeTerm(swapped, self.space)(rollouts)


def with_term(target: Target, term: type[TreeTerm]) -> Target:
    """The target with a planted term in the place of its own."""
    old = target.factors["grammar"]
    assert isinstance(old, TreeTerm)
    return replace(target, factors={"grammar": term(old.pcfg, old.space)})
