"""One decoding step as a CUDA graph: launches, not arithmetic, bound small models on a GPU.

A graph owns static buffers for r rows and T columns. A cache that is stepped on a GPU moves into the buffers of a
free graph of the next size up and stays there; ``take`` gathers inside them. Captured graphs are kept and reused.
"""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from retrodict.models.kv import KVCache
from retrodict.numerics import NEG_INF

if TYPE_CHECKING:
    from retrodict.models.decoder import Decoder


def bucket(rows: int) -> int:
    """The next of 1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, ... at or above ``rows``."""
    if rows <= 8:
        return 1 << (rows - 1).bit_length()
    power = 1 << (rows - 1).bit_length()
    return power * 3 // 4 if rows <= power * 3 // 4 else power


class StepGraph:
    """A captured step of ``model`` for ``rows`` rows and ``columns`` columns."""

    def __init__(self, model: Decoder, rows: int, columns: int) -> None:
        w, device, dtype = model.w, model.device, model.w.embed.dtype
        self.model, self.rows, self.columns = model, rows, columns
        shape = (len(w.layers), rows, w.kv_heads, columns, w.head_dim)
        self.k, self.v = torch.zeros(shape, dtype=dtype, device=device), torch.zeros(shape, dtype=dtype, device=device)
        self.valid = torch.zeros(rows, columns, dtype=torch.bool, device=device)
        self.ids = torch.zeros(rows, dtype=torch.long, device=device)
        self.pos = torch.zeros(rows, dtype=torch.long, device=device)
        self.column = torch.zeros(1, dtype=torch.long, device=device)
        self.owner: weakref.ref[KVCache] | None = None
        self.valid[:, 0] = True
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream), torch.no_grad():
            for _ in range(3):
                self._forward()
        torch.cuda.current_stream().wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph), torch.no_grad():
            self.logits = self._forward()

    def _forward(self) -> Float[Tensor, "r v"]:
        model, w = self.model, self.model.w
        from retrodict.models.decoder import rms_norm

        r = self.rows
        x = F.embedding(self.ids[:, None], w.embed)
        cos, sin = w.cos[self.pos][:, None, None], w.sin[self.pos][:, None, None]
        self.valid.index_fill_(1, self.column, True)
        h, g, d, t = w.kv_heads, w.heads // w.kv_heads, w.head_dim, self.columns
        bias = torch.zeros(r, h, g, t, dtype=x.dtype, device=x.device)
        bias = bias.masked_fill_(~self.valid[:, None, None], NEG_INF).view(r * h, g, t)
        for i, layer in enumerate(w.layers):
            qs, k, v = model._qkv(layer, rms_norm(x, layer.norm1, w.eps), cos, sin)
            self.k[i].index_copy_(2, self.column, k)
            self.v[i].index_copy_(2, self.column, v)
            # two batched products: faster here than every fused kernel at one query a row (bench speed)
            keys, values = self.k[i].view(r * h, t, d), self.v[i].view(r * h, t, d)
            p = torch.baddbmm(bias, qs.reshape(r * h, g, d), keys.transpose(1, 2), alpha=w.scale).softmax(-1)
            a = torch.bmm(p, values)
            x = x + layer.out(a.reshape(r, 1, -1), model.adapter)
            x = x + model._mlp(layer, rms_norm(x, layer.norm2, w.eps))
        self.state = rms_norm(x, w.norm, w.eps)[:, 0]
        return model._head(self.state)

    @property
    def free(self) -> bool:
        """Whether no living cache is in these buffers."""
        return self.owner is None or self.owner() is None

    def adopt(self, cache: KVCache, index: Int[Tensor, " r"] | None = None) -> KVCache:
        """Move a cache (rows ``index`` of it) into the buffers."""
        index = torch.arange(cache.rows, device=self.pos.device) if index is None else index
        r, u = len(index), cache.used
        last, pos, valid = cache.last[index], cache.pos[index], cache.valid[index][:, :u]
        for mine, its in ((self.k, cache.k), (self.v, cache.v)):
            mine[:, :r, :, :u] = its[:, :, :, :u].index_select(1, index)
        self.valid.zero_()
        self.valid[:, 0] = True  # idle rows must see something
        self.valid[:r, :u] = valid
        state = None if cache.state is None else cache.state[index]
        new = KVCache(self.k[:, :r], self.v[:, :r], self.valid[:r], u, pos, last, graph=self, state=state)
        self.owner = weakref.ref(new)
        return new

    def step(self, cache: KVCache, ids: Int[Tensor, " r"]) -> Float[Tensor, "r v"]:
        """Append one token a row, in place."""
        r = len(ids)
        self.ids[:r], self.pos[:r] = ids, cache.pos
        self.column.fill_(cache.used)
        self.graph.replay()
        cache.used += 1
        cache.pos = cache.pos + 1
        cache.last, cache.state = self.logits[:r], self.state[:r]
        return cache.last


class GraphPool:
    """The captured graphs of one view of a model."""

    def __init__(self, model: Decoder) -> None:
        self.model = model
        self.graphs: list[StepGraph] = []

    def place(self, cache: KVCache, index: Int[Tensor, " r"] | None = None) -> KVCache:
        """A cache in the buffers of a graph that fits; captured where there is none free."""
        rows = cache.rows if index is None else len(index)
        size, columns = bucket(rows), -(-max(cache.k.shape[3], cache.used + 1) // 32) * 32
        here = cache.graph
        if here is not None and here.rows == size and cache.used < here.columns:
            return here.adopt(cache, index) if index is not None else cache
        for graph in self.graphs:
            if graph.free and graph.rows == size and graph.columns == columns:
                return graph.adopt(cache, index)
        self.graphs.append(StepGraph(self.model, size, columns))
        return self.graphs[-1].adopt(cache, index)
