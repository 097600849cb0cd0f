"""A static key-value cache that is shared and gathered.

Cache column is not position: prompts are padded on the right, rows may have holes, and every row keeps its own next
position. Buffers are written in place, so ``step`` and ``take`` consume the cache they are given.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


@dataclass
class KVCache:
    """Keys and values of r rows.

    Attributes:
        k, v: buffers of ``capacity`` columns.
        valid: which columns hold a token of the row.
        used: columns in use (the same for all rows).
        pos: next position of each row.
        last: logits after each row's last token, and ``state`` what the head read to make them.
        graph: the CUDA graph whose buffers these are, if any.
    """

    k: Float[Tensor, "layer r h T d"]
    v: Float[Tensor, "layer r h T d"]
    valid: Bool[Tensor, "r T"]
    used: int
    pos: Int[Tensor, " r"]
    last: Float[Tensor, "_ v"]
    graph: Any = None
    state: Float[Tensor, "_ e"] | None = None

    @property
    def rows(self) -> int:
        """Number of rows."""
        return self.valid.shape[0]

    def reserve(self, columns: int) -> None:
        """Make room for ``columns`` more columns."""
        need, have = self.used + columns, self.k.shape[3]
        if need <= have:
            return
        self.graph = None
        extra = max(need, 2 * have) - have
        grow = (*self.k.shape[:3], extra, self.k.shape[4])
        self.k = torch.cat([self.k, self.k.new_zeros(grow)], 3)
        self.v = torch.cat([self.v, self.v.new_zeros(grow)], 3)
        self.valid = torch.cat([self.valid, self.valid.new_zeros(self.rows, extra)], 1)

    def append(self, k: Tensor, v: Tensor, valid: Bool[Tensor, "r y"]) -> None:
        """Store y more columns of all layers; ``valid`` says which rows they belong to."""
        y = valid.shape[1]
        self.reserve(y)
        self.k[:, :, :, self.used : self.used + y] = k
        self.v[:, :, :, self.used : self.used + y] = v
        self.valid[:, self.used : self.used + y] = valid
        self.used += y
        self.pos = self.pos + valid.sum(1)

    def take(self, index: Int[Tensor, " r2"]) -> KVCache:
        """Rows ``index`` (repeats allowed); only used columns are copied."""
        k = self.k.new_empty((self.k.shape[0], len(index), *self.k.shape[2:]))
        v = torch.empty_like(k)
        u = self.used
        k[:, :, :, :u] = self.k[:, :, :, :u].index_select(1, index)
        v[:, :, :, :u] = self.v[:, :, :, :u].index_select(1, index)
        state = None if self.state is None else self.state[index]
        return KVCache(k, v, self.valid[index], u, self.pos[index], self.last[index], state=state)
