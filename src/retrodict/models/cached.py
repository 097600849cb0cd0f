"""A language model on top of one primitive: run a block of tokens against a cache.

Everything the library asks of a model - encode prompts once, step, peek at a continuation, score all moves and all
stops of many strings in one pass, score the suffix after every prefix - is that primitive with another visibility
mask. Logits are taken only where they are read, and their log-softmax is computed in float32, in chunks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from retrodict.errors import InputError
from retrodict.models.kv import KVCache
from retrodict.numerics import NEG_INF, log_prob_of
from retrodict.protocols import Tokenizer

CHUNK = 1 << 25
"""Logits held at once while scoring, in numbers (128 MiB in float32)."""

GROUP = 16
"""Fewest rows in a group of similar lengths."""


def pad_ids(rows: Sequence[Sequence[int]], device: torch.device) -> tuple[Int[Tensor, "r t"], Int[Tensor, " r"]]:
    """Right-padded ids (with 0) and the lengths."""
    n = torch.tensor([len(r) for r in rows], device=device)
    ids = torch.zeros(len(rows), int(n.max()) if len(rows) else 0, dtype=torch.long)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.as_tensor(list(row), dtype=torch.long)
    return ids.to(device), n


def unique_rows(rows: Sequence[Sequence[int]]) -> tuple[list[Sequence[int]], list[int]]:
    """The distinct rows in order of first appearance, and each row's index among them."""
    seen: dict[tuple[int, ...], int] = {}
    index = [seen.setdefault(tuple(r), len(seen)) for r in rows]
    return list(seen), index


class CachedLM:
    """Base of every model with a key-value cache. Subclasses give ``_run`` and ``_head``."""

    name: str = "model"
    version: str = ""
    vocab_size: int
    context: int
    device: torch.device
    tokenizer: Tokenizer
    end_ids: tuple[int, ...] = ()
    special_ids: tuple[int, ...] = ()
    token_bytes: Sequence[bytes] = ()
    accum: torch.dtype = torch.float32
    tokens_run: int = 0
    forwards: int = 0

    # -- the primitive ------------------------------------------------------------------------------------------

    def _run(
        self,
        ids: Int[Tensor, "r q"],
        pos: Int[Tensor, "r q"],
        block: int,
        cache: KVCache | None,
        visible: Bool[Tensor, "r n T"] | None,
        keep: bool = True,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Run q = n*block tokens a row: n blocks, causal within a block, blind to the other blocks.

        ``visible`` says which of the cache's used columns each block sees. Returns what ``_head`` reads, ``[r, q, .]``,
        and the new keys and values ``[layer, r, h, q, d]`` (nothing of use where ``keep`` is off: it saves their copy).
        """
        raise NotImplementedError  # abstract

    def _head(self, x: Tensor) -> Float[Tensor, "c v"]:
        """Logits of some rows of what ``_run`` returned."""
        raise NotImplementedError  # abstract

    def _count(self, ids: Tensor) -> None:
        self.tokens_run += ids.numel()
        self.forwards += 1

    # -- decoding -----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def encode(self, prompts: Sequence[Sequence[int]], room: int = 0) -> tuple[KVCache, Float[Tensor, "r v"]]:
        """Run prompts, one row each; ``room`` columns are reserved for what follows.

        Raises InputError for an empty prompt or one longer than the context.
        """
        self.check_prompts(prompts)
        ids, n = pad_ids(prompts, self.device)
        r, t = ids.shape
        pos = torch.arange(t, device=self.device).expand(r, t)
        self._count(ids)
        x, k, v = self._run(ids, pos, t, None, None)
        state = x[torch.arange(r, device=self.device), n - 1]
        last = self._head(state)
        shape = (*k.shape[:3], t + room, k.shape[4])
        cache = KVCache(k.new_zeros(shape), v.new_zeros(shape), torch.zeros(r, t + room, dtype=torch.bool,
                        device=self.device), 0, torch.zeros_like(n), last, state=state)  # fmt: skip
        cache.append(k, v, pos < n[:, None])
        return cache, last

    def check_prompts(self, prompts: Sequence[Sequence[int]]) -> None:
        """Raise InputError for an empty prompt or one longer than the context."""
        for p in prompts:
            if len(p) == 0:
                raise InputError("empty prompt: the model needs at least one token to read; give it a first word")
            if len(p) > self.context:
                raise InputError(
                    f"prompt of {len(p)} tokens is over the context of {self.name} ({self.context} tokens); shorten it"
                )

    @torch.no_grad()
    def step(self, cache: KVCache, ids: Int[Tensor, " r"]) -> tuple[KVCache, Float[Tensor, "r v"]]:
        """Append one token a row."""
        self._count(ids)
        u = cache.used
        x, k, v = self._run(ids[:, None], cache.pos[:, None], 1, cache, cache.valid[:, None, :u])
        cache.append(k, v, torch.ones(len(ids), 1, dtype=torch.bool, device=ids.device))
        cache.state = x[:, 0]
        cache.last = self._head(cache.state)
        return cache, cache.last

    def take(self, cache: KVCache, index: Int[Tensor, " r2"]) -> KVCache:
        """Gather rows (repeats allowed). Prefer it to re-encoding: an index_select of the used columns."""
        return cache.take(index)

    @torch.no_grad()
    def extend(self, cache: KVCache, ids: Int[Tensor, "r t"], n: Int[Tensor, " r"]) -> tuple[KVCache, Tensor]:
        """Append up to t tokens a row (right-padded, n of them real); returns what ``_head`` reads at each."""
        r, t = ids.shape
        self._count(ids)
        steps = torch.arange(t, device=ids.device)
        x, k, v = self._run(ids, cache.pos[:, None] + steps, t, cache, cache.valid[:, None, : cache.used])
        cache.append(k, v, steps < n[:, None])
        return cache, x

    @torch.no_grad()
    def peek(self, cache: KVCache, ids: Int[Tensor, "p y"], rows: Int[Tensor, " p"] | None = None) -> Tensor:
        """log p ``[p, y]`` of given tokens after each row (of ``rows``), without changing the cache."""
        part = cache if rows is None else cache.take(rows)
        first = log_prob_of(part.last).gather(1, ids[:, :1])
        if ids.shape[1] == 1:
            return first
        self._count(ids[:, 1:])
        block = ids.shape[1] - 1
        steps = torch.arange(block, device=ids.device)
        seen = part.valid[:, None, : part.used]
        x, _, _ = self._run(ids[:, :-1], part.pos[:, None] + steps, block, part, seen, keep=False)
        rest = self._log_p(x.flatten(0, 1), ids[:, 1:].flatten())
        return torch.cat([first, rest.view(len(ids), -1)], 1)

    # -- hidden states ------------------------------------------------------------------------------------------

    def state(self, cache: KVCache) -> Float[Tensor, "r e"]:
        """What the head read after each row's last token (whole logits for a model whose head is not apart)."""
        assert cache.state is not None
        return cache.state

    @torch.no_grad()
    def states(
        self, prompts: Sequence[Sequence[int]], moves: Int[Tensor, "b t"], n: Int[Tensor, " b"]
    ) -> Float[Tensor, "b t1 e"]:
        """What the head reads after each prefix, in one pass; entries past n are meaningless."""
        distinct, index = unique_rows(prompts)
        cache, _ = self.encode(distinct, room=moves.shape[1])
        cache = cache.take(torch.tensor(index, device=self.device))
        first = self.state(cache)[:, None]
        if not moves.shape[1]:
            return first
        return torch.cat([first, self.extend(cache, moves.to(self.device), n.to(self.device))[1]], 1)

    def logits(self, state: Float[Tensor, "c e"]) -> Float[Tensor, "c v"]:
        """Logits of hidden states."""
        return self._head(state)

    # -- teacher forcing ----------------------------------------------------------------------------------------

    def _read(self, x: Tensor, read: Callable[[Tensor, slice], None]) -> None:
        """Give ``read`` float32 log-softmaxes of rows of x, chunk by chunk."""
        size = max(1, CHUNK // self.vocab_size)
        for i in range(0, len(x), size):
            read(log_prob_of(self._head(x[i : i + size])), slice(i, i + size))

    def _log_p(self, x: Float[Tensor, "c d"], ids: Int[Tensor, " c"]) -> Float[Tensor, " c"]:
        out = torch.empty(len(x), device=x.device, dtype=self.accum)

        def read(log_p: Tensor, rows: slice) -> None:
            out[rows] = log_p.gather(1, ids[rows, None]).squeeze(1)

        self._read(x, read)
        return out

    def _zeros(self, *shape: int) -> Tensor:
        return torch.zeros(*shape, device=self.device, dtype=self.accum)

    def _by_length(self, n: Int[Tensor, " b"]) -> list[tuple[Int[Tensor, " g"], int]]:
        """Groups of rows of similar length and each group's longest: on a CPU padding is paid for in full."""
        if self.device.type != "cpu" or len(n) < 2 * GROUP or int(n.min()) == int(n.max()):
            return [(torch.arange(len(n), device=n.device), int(n.max()) if len(n) else 0)]
        parts = n.argsort().chunk(min(4, len(n) // GROUP))
        return [(rows, int(n[rows].max())) for rows in parts]

    def _trunk(
        self, prompts: Sequence[Sequence[int]], moves: Int[Tensor, "b t"], n: Int[Tensor, " b"]
    ) -> tuple[KVCache, Tensor | None, Float[Tensor, "b v"]]:
        """Encode distinct prompts once, gather them to rows, run all moves: (cache, head inputs, first logits)."""
        distinct, index = unique_rows(prompts)
        cache, _ = self.encode(distinct, room=moves.shape[1])
        cache = cache.take(torch.tensor(index, device=self.device))
        first = cache.last
        if not moves.shape[1]:
            return cache, None, first
        cache, x = self.extend(cache, moves.to(self.device), n.to(self.device))
        return cache, x, first

    def _trunk_with_grad(
        self, prompts: Sequence[Sequence[int]], moves: Int[Tensor, "b t"]
    ) -> tuple[Tensor | None, Float[Tensor, "b v"]]:
        """As ``_trunk`` with the graph kept, and so without a buffer that is written in place."""
        self.check_prompts(prompts)
        distinct, index = unique_rows(prompts)
        ids, n = pad_ids(distinct, self.device)
        at = torch.tensor(index, device=self.device)
        steps = torch.arange(ids.shape[1], device=self.device)
        self._count(ids)
        x, k, v = self._run(ids, steps.expand(ids.shape), ids.shape[1], None, None)
        first = self._head(x[torch.arange(len(n), device=self.device), n - 1])[at]
        if not moves.shape[1]:
            return None, first
        valid = (steps < n[:, None])[at]
        cache = KVCache(k[:, at], v[:, at], valid, ids.shape[1], n[at], first)
        pos = n[at, None] + torch.arange(moves.shape[1], device=self.device)
        self._count(moves)
        return self._run(moves, pos, moves.shape[1], cache, valid[:, None], keep=False)[0], first

    def score(
        self,
        prompts: Sequence[Sequence[int]],
        moves: Int[Tensor, "b t"],
        n: Int[Tensor, " b"],
        stops: Sequence[int] = (),
        legal: Bool[Tensor, " v"] | None = None,
        grad: bool = False,
    ) -> tuple[Float[Tensor, "b t"], Float[Tensor, "b t1 s"], Float[Tensor, "b t1"]]:
        """One teacher-forced pass over b continuations, with gradient in the adapter's weights where asked for.

        Returns log p(move i | prefix), log p(stop id | prefix i) for i = 0..t, and the log of the mass that the
        ``legal`` tokens have after prefix i (0 where ``legal`` is None). Entries past n are meaningless.
        """
        with torch.set_grad_enabled(grad):
            return self._score(prompts, moves, n, stops, legal)

    def _score(self, prompts, moves, n, stops, legal) -> tuple[Tensor, Tensor, Tensor]:  # noqa: ANN001
        b, t = moves.shape
        groups = self._by_length(n)
        if len(groups) > 1:
            out = (self._zeros(b, t), self._zeros(b, t + 1, len(stops)), self._zeros(b, t + 1))
            for rows, top in groups:
                part = self._score([prompts[i] for i in rows.tolist()], moves[rows, :top], n[rows], stops, legal)
                for whole, some in zip(out, part, strict=True):
                    whole[rows, : some.shape[1]] = some
            return out
        if torch.is_grad_enabled():
            x, first = self._trunk_with_grad(prompts, moves.to(self.device))
        else:
            _, x, first = self._trunk(prompts, moves, n)
        moves, n = moves.to(self.device), n.to(self.device)
        stop_ids = torch.tensor(list(stops), dtype=torch.long, device=self.device)
        padded = torch.cat([moves, moves.new_zeros(b, 1)], 1)  # no move follows the last state

        def read(logits: Tensor, move: Tensor) -> Tensor:
            """log p of the move, of each stop id, and the legal mass: ``[c, 2 + s]``."""
            lp = log_prob_of(logits)
            mass = lp.new_zeros(len(lp)) if legal is None else lp.masked_fill(~legal, NEG_INF).logsumexp(-1)
            return torch.cat([lp.gather(1, move[:, None]), mass[:, None], lp[:, stop_ids]], 1)

        out = self._zeros(b, t + 1, 2 + len(stops))
        out[:, 0] = read(first, padded[:, 0])
        if x is not None:
            i, j = (torch.arange(1, t + 1, device=self.device) <= n[:, None]).nonzero().unbind(1)
            out[i, j + 1] = self._by_chunk(x[i, j], padded[i, j + 1], read)
        return out[:, :t, 0], out[:, :, 2:], out[:, :, 1]

    def _by_chunk(self, x: Tensor, move: Tensor, read: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """``read`` of the logits of rows of x, chunk by chunk; with gradient, logits are made again when needed."""
        size = max(1, CHUNK // self.vocab_size)
        parts = list(zip(x.split(size), move.split(size), strict=True))
        if not torch.is_grad_enabled() or len(parts) == 1:
            return torch.cat([read(self._head(part), ids) for part, ids in parts])
        again: Any = checkpoint
        return torch.cat([again(lambda h, m: read(self._head(h), m), *p, use_reentrant=False) for p in parts])

    @torch.no_grad()
    def score_suffixes(
        self,
        prompts: Sequence[Sequence[int]],
        moves: Int[Tensor, "b t"],
        n: Int[Tensor, " b"],
        suffixes: Sequence[Sequence[Sequence[int]]],
        every: bool = True,
        skip: int = 0,
    ) -> Float[Tensor, "b t1 s"]:
        """log p(suffix | prompt, moves[:i]) after every prefix i (or, with ``every=False``, after the last).

        ``suffixes[s][row]`` are the ids appended under stop s; their first ``skip`` tokens (the stop's own text) are
        fed but not scored. The prompt and the moves are run once; each prefix gets one copy of the suffix that sees
        the prompt, its own prefix and itself: |X| + L + (L+1)|Y| tokens instead of sum_i (|X| + i + |Y|).
        Entries past n are meaningless.
        """
        b, t = moves.shape
        groups = self._by_length(n)
        if len(groups) > 1:
            out = self._zeros(b, t + 1, len(suffixes))
            for rows, top in groups:
                some = [[suffix[i] for i in rows.tolist()] for suffix in suffixes]
                heads = [prompts[i] for i in rows.tolist()]
                out[rows, : top + 1] = self.score_suffixes(heads, moves[rows, :top], n[rows], some, every, skip)
            return out
        cache, x, first = self._trunk(prompts, moves, n)
        out = self._zeros(b, t + 1, len(suffixes))
        n = n.to(self.device)
        for s, rows in enumerate(suffixes):
            ids, length = pad_ids(rows, self.device)
            for y in length.unique().tolist():
                pick = (length == y).nonzero().squeeze(1)
                self._branches(cache, x, first, ids[:, :y], pick, n, t, every, skip, out[:, :, s])
        return out

    def _branches(self, cache, x, first, ids, pick, n, t, every, skip, out) -> None:  # noqa: ANN001
        """Fill ``out[pick]``: the packed pass for rows whose suffix has the same length."""
        y = ids.shape[1]
        if y == skip:
            return
        where = torch.arange(t + 1, device=self.device)[None].expand(len(pick), -1)
        live = where <= n[pick, None] if every else where == n[pick, None]
        value = self._zeros(len(pick), t + 1)
        if skip == 0:  # the first suffix token is predicted by the trunk itself
            i, j = live.nonzero().unbind(1)
            root = j == 0
            target = ids[pick, 0]
            value[i[root], 0] = log_prob_of(first[pick][i[root]]).gather(1, target[i[root], None]).squeeze(1)
            if x is not None:
                value[i[~root], j[~root]] = self._log_p(x[pick[i[~root]], j[~root] - 1], target[i[~root]])
        if y > 1:
            value = value + self._branch_pass(cache, ids, pick, n, t, every, skip)
        out[pick] = torch.where(live, value, torch.zeros_like(value))

    def _branch_pass(self, cache, ids, pick, n, t, every, skip) -> Tensor:  # noqa: ANN001
        y = ids.shape[1]
        base = cache.used - t  # the prompt's columns, then the t moves
        rows_at_once = max(1, CHUNK // max(1, (t + 1) * y * 2048))
        value = self._zeros(len(pick), t + 1)
        for a in range(0, len(pick), rows_at_once):
            rows = pick[a : a + rows_at_once]
            ends = torch.arange(t + 1, device=self.device)[None].expand(len(rows), -1) if every else n[rows, None]
            columns = torch.arange(cache.used, device=self.device)
            visible = cache.valid[rows, None, : cache.used] & (columns < base + ends[:, :, None])
            start = (cache.pos[rows] - n[rows])[:, None] + ends
            pos = start[:, :, None] + torch.arange(y - 1, device=self.device)
            feed = ids[rows, None, : y - 1].expand(-1, ends.shape[1], -1)
            part = KVCache(cache.k[:, rows], cache.v[:, rows], cache.valid[rows], cache.used, cache.pos[rows],
                           cache.last[:0]) if len(rows) < cache.rows else cache  # fmt: skip
            self._count(feed)
            x, _, _ = self._run(feed.flatten(1), pos.flatten(1), y - 1, part, visible, keep=False)
            x = x.view(len(rows), ends.shape[1], y - 1, -1)
            keep = max(skip - 1, 0)  # position k of the block predicts suffix token k+1
            x = x[:, :, keep:]
            real = ends <= n[rows, None]
            target = ids[rows, None, keep + 1 : y].expand(-1, ends.shape[1], -1)[real]
            log_p = self._log_p(x[real].flatten(0, 1), target.flatten()).view(target.shape).sum(-1)
            i, j = real.nonzero().unbind(1)
            value[a + i, ends[i, j] if not every else j] = log_p
        return value
