"""An amortized parser q(tree | sentence), and grammars induced from sentences by EM.

The parser is a small network over shift and reduce (``policies.net``) that reads the labels on the stack and the words
to come: all that a context-free posterior depends on. Whole trees alone have a value (no state before the last may
stop), so VarGrad (Richter et al. 2020) is the objective: log p(tree, sentence) - log q(tree | sentence) is to be one
number, log p(sentence), for every tree. One draw in two has some uniform moves, so that trees which q has given up are
met again; the menu keeps q inside the grammar.

    M   p(A -> r)  proportional to  sum_sentences E[number of times A -> r is used] + pseudo

with the expectation from inside and outside (Lari and Young 1990), from exact draws, or from q's (weighted) draws.
``pseudo`` is a Dirichlet prior's count: what EM then never lowers is log p(sentences) + pseudo sum log p(rules).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from retrodict.errors import InputError
from retrodict.latent.pcfg import (
    PCFG,
    Counts,
    Sentences,
    expected_counts,
    log_evidence,
    pcfg_target,
    simulate,
    tree_counts,
)
from retrodict.numerics import NEG_INF
from retrodict.particles import Particles
from retrodict.policies.net import NetPolicy
from retrodict.records import Problem, Rollouts
from retrodict.rng import generator
from retrodict.spaces.parses import Parses
from retrodict.targets.algebra import Target
from retrodict.training.amortize import amortize
from retrodict.training.learn import weighted_rows
from retrodict.training.threads import one_thread

PLAN: dict[str, Any] = {
    "objective": "vargrad", "steps": 250, "samples": 8, "per_step": 64, "lr": 3e-3, "lr_end": 0.01, "tempered": 0.5,
    "temperatures": (1.0, 1.0), "epsilon": 0.2, "evaluate": 2,
}  # fmt: skip
"""Settings of the training loop that work for sentences of up to 8 words and a dozen symbols."""
HIDDEN, LAYERS = 256, 2


def parser(target: Target, hidden: int = HIDDEN, layers: int = LAYERS, seed: int = 0) -> NetPolicy:
    """An untrained parser for a target over trees: an MLP on the stack and the words to come.

    It reads any sentence of the same words, seen or new, of up to ``target.space.longest``: ``policy.on(problems)``.
    """
    if not isinstance(target.space, Parses):
        raise InputError(f"a parser draws trees of sentences (Parses), not {type(target.space).__name__}")
    return NetPolicy(target.space, target.problems, hidden=hidden, layers=layers, seed=seed)


def amortize_parser(target: Target, policy: NetPolicy | None = None, **given: Any) -> NetPolicy:
    """A parser that draws from p(tree | sentence): ``retrodict.amortize`` under :data:`PLAN`, changed by ``given``."""
    policy = policy or parser(target, seed=int(given.get("seed", 0)))
    with one_thread():
        return amortize(target, policy, **{**PLAN, **given})


# -- induction -------------------------------------------------------------------------------------------------------


def every_rule(labels: int, tags: int, words: tuple[str, ...]) -> PCFG:
    """All rules that a grammar of so many symbols can have, equally probable: where induction without rules starts.

    Symbols A, B, ... (the root is A) rewrite as any two symbols, T, U, ... (``tags`` of them) as any word.
    """
    if labels < 1 or tags < 1 or labels + tags > 26 or not words:
        raise InputError(f"give at least one symbol, one tag and one word, 26 symbols and tags in all, not {labels}, "
                         f"{tags} and {len(words)}")  # fmt: skip
    s = labels + tags
    names = tuple("ABCDEFGHIJKLMNOPQRSTUVWXYZ"[i] for i in range(labels))
    names += tuple(f"T{i + 1}" for i in range(tags))
    binary = torch.full((s, s, s), NEG_INF, dtype=torch.float64)
    lexical = torch.full((s, len(words)), NEG_INF, dtype=torch.float64)
    binary[:labels] = -torch.tensor(float(s * s), dtype=torch.float64).log()
    lexical[labels:] = -torch.tensor(float(len(words)), dtype=torch.float64).log()
    return PCFG(names, words, binary, lexical)


def jittered(pcfg: PCFG, seed: int, spread: float = 1.0) -> PCFG:
    """The same rules with other probabilities: each times exp(spread * normal), normalised. A start for EM."""
    gen = generator(seed)
    noise = [torch.randn(x.shape, generator=gen, dtype=torch.float64) for x in (pcfg.binary, pcfg.lexical)]
    return _normalised(pcfg, pcfg.binary + spread * noise[0], pcfg.lexical + spread * noise[1])


def _normalised(pcfg: PCFG, binary: Float[Tensor, "s s s"], lexical: Float[Tensor, "s w"]) -> PCFG:
    total = torch.cat([binary.flatten(1), lexical], 1).logsumexp(1)
    return PCFG(pcfg.labels, pcfg.words, binary - total[:, None, None], lexical - total[:, None])


def most_likely(pcfg: PCFG, counts: Counts, pseudo: float = 0.0) -> PCFG:
    """Relative frequencies of rules; a symbol that was never used keeps its rules as they are."""
    binary, lexical = (
        torch.where(x > NEG_INF, n + pseudo, 0.0)
        for x, n in ((pcfg.binary, counts.binary), (pcfg.lexical, counts.lexical))
    )
    used = (binary.flatten(1).sum(1) + lexical.sum(1)) > 0
    binary = torch.where(used[:, None, None], binary.log(), pcfg.binary)
    return _normalised(pcfg, binary, torch.where(used[:, None], lexical.log(), pcfg.lexical))


class GrammarModel:
    """A grammar that learns from sentences, for ``training.learn``: exact, sampled or amortized E-steps.

    Args:
        pcfg: where it starts; rules that it lacks are never learned.
        sentences: what it learns from; each must have a tree.
        pseudo: added to every rule's count. Above 0 no rule dies; at 0 those without use do, and an amortized E-step
            then meets trees of probability 0.
        longest: words of the longest sentence that it dreams of; by default that of the sentences.
    """

    def __init__(self, pcfg: PCFG, sentences: Sentences, pseudo: float = 0.01, longest: int = 0) -> None:
        if pseudo < 0:
            raise InputError(f"pseudo is a count added to every rule's, 0 or more, not {pseudo:g}")
        self.pcfg, self.pseudo = pcfg, pseudo
        self._target = pcfg_target(pcfg, sentences, longest)

    @property
    def target(self) -> Target:
        """log gamma = log p(tree, sentence) under the present grammar; the space stays that of the start."""
        return self._target

    @property
    def space(self) -> Parses:
        """All trees of the sentences under the rules of the start."""
        assert isinstance(self._target.space, Parses)
        return self._target.space

    def m_step(self, particles: Particles, seed: int = 0) -> float:
        """Relative frequencies of rules in weighted trees; gives sum_k w_k log p(tree_k, x), a mean over sentences."""
        rows, weights = weighted_rows(particles)
        counts = tree_counts(self.space, rows, weights * len(rows.problem.unique()))
        self._become(most_likely(self.pcfg, counts, self.pseudo))
        return float((weights * self._target.factors["grammar"](rows)).sum())

    def exact_step(self) -> float:
        """The same from inside and outside; gives the mean of log p(sentence) before it."""
        counts, total = expected_counts(self.pcfg, self.space.sentences)
        self._become(most_likely(self.pcfg, counts, self.pseudo))
        return total / len(self.space.sentences)

    def simulate(self, n: int, gen: torch.Generator) -> tuple[Target, Rollouts]:
        """n sentences of at most ``longest`` words with their trees, from the grammar itself."""
        sentences, moves = simulate(self.pcfg, n, gen, self.space.longest)
        target = self._target.on([Problem(x) for x in sentences])
        return target, target.space.record(torch.arange(n), moves)  # pyright: ignore[reportAttributeAccessIssue]

    def log_evidence(self) -> Float[Tensor, " m"]:
        """log p(sentence) of each."""
        return log_evidence(self.pcfg, self.space.sentences)

    def _become(self, pcfg: PCFG) -> None:
        term: Any = self._target.factors["grammar"]
        self.pcfg = pcfg
        self._target = replace(self._target, factors={"grammar": replace(term, pcfg=pcfg)})
