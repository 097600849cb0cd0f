"""A language model that is a table: exact, enumerable, differentiable. The oracle of the tests and tutorials.

p(v | history) depends on the last ``order`` tokens. Every method is written the plain way, one position at a time, so
that it can serve as a check on the fast engine.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from retrodict.errors import InputError
from retrodict.models.cached import unique_rows
from retrodict.numerics import NEG_INF
from retrodict.rng import generator


class CharTokenizer:
    """One character a token; ``alphabet[i]`` is token i."""

    def __init__(self, alphabet: str) -> None:
        self.alphabet = alphabet

    def encode(self, text: str) -> list[int]:
        """Ids of the characters; raises InputError for one outside the alphabet."""
        bad = sorted(set(text) - set(self.alphabet))
        if bad:
            raise InputError(f"character {bad[0]!r} is not in this model's alphabet {self.alphabet!r}")
        return [self.alphabet.index(c) for c in text]

    def decode(self, ids: Sequence[int]) -> str:
        """The characters joined."""
        return "".join(self.alphabet[i] for i in ids)


@dataclass
class TableCache:
    """The last ``order`` tokens of each row (filled with v, "no token") and the logits after them."""

    history: Int[Tensor, "r order"]
    last: Float[Tensor, "r v"]


class TabularLM:
    """p(v | last ``order`` tokens) = softmax(table[history]); ``table`` is [(v+1)^order, v], float64."""

    context = 1 << 20

    def __init__(self, table: Float[Tensor, "h v"], order: int, alphabet: str, name: str = "tabular") -> None:
        self.table, self.order, self.name = table, order, name
        self.vocab_size = table.shape[1]
        self.device = table.device
        self.tokenizer = CharTokenizer(alphabet)
        self.token_bytes = [c.encode() for c in alphabet]
        self.end_ids: tuple[int, ...] = (0,)
        self.special_ids: tuple[int, ...] = ()
        self.version = f"{name}:{float(table.detach().double().sum()):.12g}"
        self.tokens_run = self.forwards = 0
        self.trained: dict[str, Tensor] = {}
        if len(alphabet) != self.vocab_size:
            raise InputError(f"alphabet of {len(alphabet)} characters for a table of {self.vocab_size} tokens")

    @classmethod
    def random(cls, alphabet: str, order: int = 2, seed: int = 0, scale: float = 1.0) -> TabularLM:
        """A table of normal logits of standard deviation ``scale``."""
        v = len(alphabet)
        table = scale * torch.randn((v + 1) ** order, v, generator=generator(seed), dtype=torch.float64)
        return cls(table, order, alphabet, name=f"tabular({v}, order={order}, seed={seed})")

    def view(self, adapter: str | None) -> TabularLM:
        """A table has no adapters."""
        if adapter is not None:
            raise InputError(f"a tabular model has no adapter {adapter!r}")
        return self

    # -- training -------------------------------------------------------------------------------------------------

    adapters: tuple[str, ...] = ()

    def add_adapter(self, name: str, *lora: object) -> TabularLM:
        """A copy whose whole table is trained; it starts as this one. What shapes a LoRA adapter means nothing here."""
        copy = TabularLM(self.table.detach().clone().requires_grad_(), self.order, self.tokenizer.alphabet,
                         f"{self.name}+{name}")  # fmt: skip
        copy.trained = {"table": copy.table}
        return copy

    def parameters(self) -> dict[str, Tensor]:
        """The table, where it is trained."""
        return self.trained

    def settle(self) -> None:
        """Gradients are where they belong."""

    def refresh(self) -> None:
        """The version moves with every update; nothing is copied."""
        base, _, updates = self.version.partition("@")
        self.version = f"{base}@{int(updates or 0) + 1}"

    def _logits(self, history: Int[Tensor, "r order"]) -> Float[Tensor, "r v"]:
        base = (self.vocab_size + 1) ** torch.arange(self.order, device=self.device)
        return self.table[(history * base).sum(1)]

    def encode(self, prompts: Sequence[Sequence[int]], room: int = 0) -> tuple[TableCache, Float[Tensor, "r v"]]:
        """Histories of the prompts (which may be empty: a table knows what to say first)."""
        history = torch.full((len(prompts), self.order), self.vocab_size, dtype=torch.long)
        for i, p in enumerate(prompts):
            for j, token in enumerate(list(p)[-self.order :][::-1]):
                history[i, self.order - 1 - j] = token
        cache = TableCache(history.to(self.device), self._logits(history.to(self.device)))
        self.forwards += 1
        return cache, cache.last

    def step(self, cache: TableCache, ids: Int[Tensor, " r"]) -> tuple[TableCache, Float[Tensor, "r v"]]:
        """Append one token a row."""
        self.tokens_run += len(ids)
        self.forwards += 1
        history = torch.cat([cache.history[:, 1:], ids[:, None]], 1)
        cache = TableCache(history, self._logits(history))
        return cache, cache.last

    def take(self, cache: TableCache, index: Int[Tensor, " r2"]) -> TableCache:
        """Gather rows."""
        return TableCache(cache.history[index], cache.last[index])

    def peek(self, cache: TableCache, ids: Int[Tensor, "p y"], rows: Int[Tensor, " p"] | None = None) -> Tensor:
        """log p ``[p, y]`` of given tokens after each row (of ``rows``)."""
        cache = cache if rows is None else self.take(cache, rows)
        out = []
        for j in range(ids.shape[1]):
            out.append(cache.last.log_softmax(-1).gather(1, ids[:, j : j + 1]))
            cache, _ = self.step(cache, ids[:, j])
        return torch.cat(out, 1)

    def state(self, cache: TableCache) -> Float[Tensor, "r e"]:
        """A table's hidden state: its history, one-hot."""
        return torch.nn.functional.one_hot(cache.history, self.vocab_size + 1).flatten(1).to(self.table.dtype)

    def states(
        self, prompts: Sequence[Sequence[int]], moves: Int[Tensor, "b t"], n: Int[Tensor, " b"]
    ) -> Float[Tensor, "b t1 e"]:
        """The state after each prefix."""
        cache, _ = self.encode(prompts)
        out = [self.state(cache)]
        for i in range(moves.shape[1]):
            cache, _ = self.step(cache, moves[:, i])
            out.append(self.state(cache))
        return torch.stack(out, 1)

    def logits(self, state: Float[Tensor, "c e"]) -> Float[Tensor, "c v"]:
        """Logits of such states."""
        return self._logits(state.view(len(state), self.order, -1).argmax(-1))

    def score(
        self,
        prompts: Sequence[Sequence[int]],
        moves: Int[Tensor, "b t"],
        n: Int[Tensor, " b"],
        stops: Sequence[int] = (),
        legal: Bool[Tensor, " v"] | None = None,
        grad: bool = False,
    ) -> tuple[Float[Tensor, "b t"], Float[Tensor, "b t1 s"], Float[Tensor, "b t1"]]:
        """As ``CachedLM.score``, by stepping; a table of one's own is always differentiable, a trained one if asked."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and (grad or not self.trained)):
            return self._score(prompts, moves, stops, legal)

    def _score(self, prompts, moves, stops, legal) -> tuple[Tensor, Tensor, Tensor]:  # noqa: ANN001
        b, t = moves.shape
        cache, _ = self.encode(prompts)
        log_p, log_stop, mass = [], [], []
        for i in range(t + 1):
            lp = cache.last.log_softmax(-1)
            log_stop.append(lp[:, list(stops)])
            mass.append(lp.new_zeros(b) if legal is None else lp.masked_fill(~legal, NEG_INF).logsumexp(-1))
            if i < t:
                log_p.append(lp.gather(1, moves[:, i : i + 1]).squeeze(1))
                cache, _ = self.step(cache, moves[:, i])
        first = torch.stack(log_p, 1) if t else self.table.new_zeros(b, 0)
        return first, torch.stack(log_stop, 1), torch.stack(mass, 1)

    def score_suffixes(
        self,
        prompts: Sequence[Sequence[int]],
        moves: Int[Tensor, "b t"],
        n: Int[Tensor, " b"],
        suffixes: Sequence[Sequence[Sequence[int]]],
        every: bool = True,
        skip: int = 0,
    ) -> Float[Tensor, "b t1 s"]:
        """As ``CachedLM.score_suffixes``, one prefix at a time."""
        return naive_suffixes(self, prompts, moves, n, suffixes, every, skip)


def naive_suffixes(lm, prompts, moves, n, suffixes, every: bool = True, skip: int = 0) -> Float[Tensor, "b t1 s"]:  # noqa: ANN001
    """The definition of ``score_suffixes``: every (prompt, prefix, suffix) from the start. For tests and baselines."""
    b, t = moves.shape
    out = []
    for rows in suffixes:
        value = torch.zeros(b, t + 1, dtype=torch.float64)
        for i in range(t + 1):
            live = [r for r in range(b) if (i <= n[r] if every else i == n[r])]
            if not live:
                continue
            full = [[*prompts[r], *moves[r, :i].tolist()] for r in live]
            distinct, index = unique_rows([[*p, *rows[r]] for p, r in zip(full, live, strict=True)])
            tails = {tuple(d): len(rows[live[index.index(j)]]) for j, d in enumerate(distinct)}
            y = torch.zeros(len(distinct), max(tails.values()), dtype=torch.long)
            heads = []
            for j, d in enumerate(distinct):
                k = tails[tuple(d)]
                heads.append(d[: len(d) - k])
                y[j, :k] = torch.tensor(list(d[len(d) - k :]), dtype=torch.long)
            length = torch.tensor([tails[tuple(d)] for d in distinct])
            log_p, _, _ = lm.score(heads, y, length)
            keep = (torch.arange(y.shape[1]) < length[:, None]) & (torch.arange(y.shape[1]) >= skip)
            total = torch.where(keep, log_p.double().cpu(), torch.zeros(())).sum(1)
            value[live, i] = total[torch.tensor(index)]
        out.append(value)
    return torch.stack(out, 2)
