"""The model's own look-ahead: psi_t = p(Y | X, z_1..t, stop)^power, the reward if the latent ended here.

For infilling this is the natural potential of a prefix (DESIGN 4). Each step costs 1 + |Y| tokens a distinct prefix.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from retrodict.guides.base import BaseGuide
from retrodict.numerics import NEG_INF
from retrodict.protocols import LanguageModel, Problems
from retrodict.records import Rollouts
from retrodict.spaces.strings import Strings, StringState


@dataclass
class LookaheadCarry:
    """A cache of distinct prefixes, the row of each particle, and log p(Y | prefix, stop) of each row and stop."""

    cache: Any
    problem: Int[Tensor, " r"]
    rows: Int[Tensor, " b"]
    value: Float[Tensor, "r s"]


class LookaheadGuide(BaseGuide):
    """psi = p(Y | X, prefix, stop)^power, summed over stops with the model's own p(stop) where there are several."""

    def __init__(self, lm: LanguageModel, space: Strings, problems: Problems, power: float = 1.0) -> None:
        self.lm, self.space, self.problems, self.power = lm, space, problems, power

    def on(self, problems: Problems) -> LookaheadGuide:
        """The same look-ahead on other problems."""
        return LookaheadGuide(self.lm, self.space, problems, self.power)

    def _value(self, cache: Any, problem: Int[Tensor, " r"]) -> Float[Tensor, "r s"]:
        out = []
        for s in range(self.space.n_stops):
            head = self.space.stops.text_ids(s)
            rows = [(*head, *self.problems[p].evidence) for p in problem.tolist()]
            value = torch.zeros(len(rows), device=problem.device, dtype=cache.last.dtype)
            length = torch.tensor([len(r) for r in rows], device=problem.device)
            for y in length.unique().tolist():
                if y == len(head):
                    continue
                pick = (length == y).nonzero().squeeze(1)
                part = cache if len(pick) == len(rows) else self.lm.take(cache, pick)
                ids = torch.tensor([rows[i] for i in pick.tolist()], device=problem.device)
                value[pick] = self.lm.peek(part, ids)[:, len(head) :].sum(1).to(value.dtype)
            out.append(value)
        return torch.stack(out, 1)

    def _start(self, problem: Tensor, prompts: list[tuple[int, ...]]) -> LookaheadCarry:
        seen: dict[tuple[int, tuple[int, ...]], int] = {}
        keys = [(p, tuple(x)) for p, x in zip(problem.tolist(), prompts, strict=True)]
        rows = torch.tensor([seen.setdefault(k, len(seen)) for k in keys], device=problem.device)
        cache, _ = self.lm.encode([x for _, x in seen], room=self.space.max_moves)
        owner = torch.tensor([p for p, _ in seen], device=problem.device)
        return LookaheadCarry(cache, owner, rows, self._value(cache, owner))

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
        return LookaheadCarry(cache, problem, rows, self._value(cache, problem))

    def take(self, c: LookaheadCarry, index: Tensor) -> LookaheadCarry:
        """Rows ``index``; the cache is gathered only at the next step."""
        return LookaheadCarry(c.cache, c.problem, c.rows[index], c.value)

    def log_psi(self, c: LookaheadCarry, s: StringState) -> Float[Tensor, " b"]:
        """power * log p(Y | X, prefix, stop), the best stop where there are several (0 for complete rows)."""
        value = c.value[c.rows].amax(-1) * self.power
        return torch.where(value > NEG_INF, value, torch.full_like(value, -1e4))

    def end_terms(self, c: LookaheadCarry) -> dict[str, Float[Tensor, "b s"]]:
        """Terms of stopping now that are already computed: the likelihood itself."""
        return {"likelihood": c.value[c.rows]}
