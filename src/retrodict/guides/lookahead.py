"""The model's own look-ahead: what the evidence would be worth if the latent ended here.

    log psi_t = power * log p(Y | X, z_1..t, stop) + (1 - power) * log p(Y | X)

The second part does not depend on the prefix: it keeps unfinished particles at the height of finished ones, whose
value is the likelihood itself. Without it a tempered look-ahead starves whatever has already stopped. Each step costs
1 + |Y| tokens a distinct prefix.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from retrodict.guides.base import BaseGuide
from retrodict.models.ragged import peek_ragged
from retrodict.protocols import LanguageModel, Problems
from retrodict.records import Rollouts
from retrodict.spaces.strings import Strings, StringState

FLOOR = -1e4
"""Lowest log psi in nats: psi must not vanish where the target does not."""


@dataclass
class LookaheadCarry:
    """A cache of distinct prefixes, the row of each particle, and log p(Y | prefix, stop) of each row and stop."""

    cache: Any
    problem: Int[Tensor, " r"]
    rows: Int[Tensor, " b"]
    value: Float[Tensor, "r s"]
    root: Float[Tensor, " m"]


class LookaheadGuide(BaseGuide):
    """psi of a prefix from p(Y | X, prefix, stop), the best stop where there are several; ``power`` as above."""

    def __init__(self, lm: LanguageModel, space: Strings, problems: Problems, power: float = 1.0) -> None:
        self.lm, self.space, self.problems, self.power = lm, space, problems, power

    def on(self, problems: Problems) -> LookaheadGuide:
        """The same look-ahead on other problems."""
        return LookaheadGuide(self.lm, self.space, problems, self.power)

    def _value(self, cache: Any, problem: Int[Tensor, " r"]) -> Float[Tensor, "r s"]:
        out = []
        for s in range(self.space.n_stops):
            head = self.space.stops.text_ids(s)
            suffixes = [(*head, *self.problems[p].evidence) for p in problem.tolist()]
            value = peek_ragged(self.lm, cache, torch.arange(len(problem), device=problem.device), suffixes, len(head))
            out.append(value)
        return torch.stack(out, 1)

    def _start(self, problem: Tensor, prompts: list[tuple[int, ...]]) -> LookaheadCarry:
        seen: dict[tuple[int, tuple[int, ...]], int] = {}
        keys = [(p, tuple(x)) for p, x in zip(problem.tolist(), prompts, strict=True)]
        rows = torch.tensor([seen.setdefault(k, len(seen)) for k in keys], device=problem.device)
        cache, _ = self.lm.encode([x for _, x in seen], room=self.space.max_moves)
        owner = torch.tensor([p for p, _ in seen], device=problem.device)
        return LookaheadCarry(cache, owner, rows, self._value(cache, owner), self._root(problem))

    def _root(self, problem: Tensor) -> Float[Tensor, " m"]:
        """log p(Y | X) of the problems in a batch: no latent at all."""
        distinct = problem.unique().tolist()
        cache, _ = self.lm.encode([self.problems[p].context for p in distinct])
        rows = torch.arange(len(distinct), device=problem.device)
        value = peek_ragged(self.lm, cache, rows, [self.problems[p].evidence for p in distinct])
        return value.new_zeros(len(self.problems)).index_copy(0, torch.tensor(distinct, device=problem.device), value)

    def start(self, problem: Int[Tensor, " b"]) -> LookaheadCarry:
        """Encode each problem once."""
        return self._start(problem, [tuple(self.problems[i].context) for i in problem.tolist()])

    def start_at(self, rollouts: Rollouts, upto: Int[Tensor, " b"]) -> LookaheadCarry:
        """Encode prompt and prefix together."""
        heads = [self.problems[i].context for i in rollouts.problem.tolist()]
        moves = rollouts.moves.tolist()
        return self._start(
            rollouts.problem, [(*h, *z[:k]) for h, z, k in zip(heads, moves, upto.tolist(), strict=True)]
        )

    def step(self, c: LookaheadCarry, s: StringState, move: Int[Tensor, " b"]) -> LookaheadCarry:
        """Run the new token and the evidence after it."""
        pairs, rows = torch.unique(c.rows * self.lm.vocab_size + move, return_inverse=True)
        source = pairs // self.lm.vocab_size
        cache = c.cache
        if len(source) != len(c.problem) or not torch.equal(source, torch.arange(len(source), device=source.device)):
            cache = self.lm.take(cache, source)
        cache, _ = self.lm.step(cache, pairs % self.lm.vocab_size)
        problem = c.problem[source]
        return LookaheadCarry(cache, problem, rows, self._value(cache, problem), c.root)

    def take(self, c: LookaheadCarry, index: Tensor) -> LookaheadCarry:
        """Rows ``index``; the cache is gathered only at the next step."""
        return LookaheadCarry(c.cache, c.problem, c.rows[index], c.value, c.root)

    def log_psi(self, c: LookaheadCarry, s: StringState) -> Float[Tensor, " b"]:
        """See the module's formula."""
        here = c.value[c.rows].amax(-1).double().clamp_min(FLOOR)
        return self.power * here + (1 - self.power) * c.root[s.problem].double().clamp_min(FLOOR)

    def end_terms(self, c: LookaheadCarry) -> dict[str, Float[Tensor, "b s"]]:
        """Terms of stopping now that are already computed: the likelihood itself."""
        return {"likelihood": c.value[c.rows]}
