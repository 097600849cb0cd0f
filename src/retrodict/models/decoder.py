"""A decoder-only transformer (Llama family) in plain torch: fused projections, grouped attention, static cache.

One set of weights serves the tiny random model of the tests and any Llama-like Hugging Face checkpoint
(``models.hf.adopt``). Rotary positions, RMS norm and gated MLP as in Touvron et al. 2023; grouped queries as in
Ainslie et al. 2023. Norms are computed in float32, as the reference models do.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from retrodict.models.cached import CachedLM
from retrodict.models.graph import GraphPool
from retrodict.models.kv import KVCache
from retrodict.numerics import NEG_INF


@dataclass
class LowRank:
    """An adapter (Hu et al. 2022, LoRA) of the projections that share one fused weight: y += (x A') B'.

    ``a`` and ``b`` are what passes read: in the model's dtype, B block-diagonal with the scale folded in. ``parts``
    are the tensors they stand for, one tuple a projection: (A, B, scale, rows of the fused output). Two products a
    weight instead of a dozen small ones: on a GPU launches are what a training step is made of.
    """

    a: Float[Tensor, "rank in"]
    b: Float[Tensor, "out rank"]
    parts: list[tuple[Tensor, Tensor, float, slice]]

    @classmethod
    def fuse(cls, weight: Tensor, parts: list[tuple[Tensor, Tensor, float, slice]]) -> LowRank:
        """Buffers for these parts, filled."""
        rank = sum(a.shape[0] for a, *_ in parts)
        new = cls(weight.new_zeros(rank, weight.shape[1]), weight.new_zeros(weight.shape[0], rank), parts)
        if parts[0][0].requires_grad:
            new.a.requires_grad_()
            new.b.requires_grad_()
        refresh([new])
        return new

    def __call__(self, x: Tensor) -> Tensor:
        """What the adapter adds."""
        return F.linear(F.linear(x, self.a), self.b)

    def views(self, a: Tensor, b: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Where each part lies in tensors shaped like the buffers."""
        at, mine = 0, ([], [])
        for part, _, _, rows in self.parts:
            mine[0].append(a[at : at + len(part)])
            mine[1].append(b[rows, at : at + len(part)])
            at += len(part)
        return mine


@torch.no_grad()
def refresh(adapters: list[LowRank]) -> None:
    """Copy parts into the buffers, in place: captured graphs see the new weights."""
    to, of = [], []
    for x in adapters:
        a, b = x.views(x.a, x.b)
        to += a + b
        of += [p[0] for p in x.parts] + [p[1] * p[2] if p[2] != 1 else p[1] for p in x.parts]
    if to:
        torch._foreach_copy_(to, of)  # pyright: ignore[reportPrivateImportUsage]


@torch.no_grad()
def settle(adapters: list[LowRank]) -> None:
    """After a backward pass: add the buffers' gradients to those of the parts, in the parts' dtype, and clear them."""
    for x in adapters:
        if x.a.grad is None or x.b.grad is None:
            continue
        for (pa, pb, scale, _), ga, gb in zip(x.parts, *x.views(x.a.grad, x.b.grad), strict=True):
            for p, g in ((pa, ga.to(pa.dtype)), (pb, gb.to(pb.dtype) * scale)):
                p.grad = g.clone() if p.grad is None else p.grad + g
        x.a.grad = x.b.grad = None


@dataclass
class Linear:
    """y = x W' + b, plus the low-rank adapter of each name that has one."""

    weight: Float[Tensor, "out in"]
    bias: Float[Tensor, " out"] | None = None
    lora: dict[str, LowRank] = field(default_factory=dict)

    def __call__(self, x: Tensor, adapter: str | None) -> Tensor:
        y = F.linear(x, self.weight, self.bias)
        return y + self.lora[adapter](x) if adapter in self.lora else y


@dataclass
class Layer:
    """One block: attention (fused qkv) and gated MLP (fused gate and up)."""

    norm1: Tensor
    qkv: Linear
    out: Linear
    norm2: Tensor
    gate_up: Linear
    down: Linear
    q_norm: Tensor | None = None
    k_norm: Tensor | None = None


@dataclass
class Weights:
    """A whole model. ``cos`` and ``sin`` are tables over positions ``[context, head_dim]``."""

    layers: list[Layer]
    embed: Float[Tensor, "v d"]
    head: Float[Tensor, "v d"]
    norm: Tensor
    cos: Float[Tensor, "context hd"]
    sin: Float[Tensor, "context hd"]
    heads: int
    kv_heads: int
    head_dim: int
    eps: float
    scale: float


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Root-mean-square norm, in float32 (Zhang and Sennrich 2019)."""
    if x.is_cuda or x.dtype in (torch.float32, torch.float64):  # the fused kernel works in float32 inside
        return F.rms_norm(x, (x.shape[-1],), weight, eps)
    return weight * F.rms_norm(x.float(), (x.shape[-1],), None, eps).to(x.dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding (Su et al. 2021), halves convention."""
    half = x.shape[-1] // 2
    return x * cos + torch.cat([-x[..., half:], x[..., :half]], -1) * sin


class Decoder(CachedLM):
    """A :class:`LanguageModel` over :class:`Weights`; ``adapter`` picks the view."""

    def __init__(self, weights: Weights, adapter: str | None = None) -> None:
        self.w = weights
        self.adapter = adapter
        self.checkpointing = False
        self.vocab_size = weights.embed.shape[0]
        self.context = weights.cos.shape[0]
        self.device = weights.embed.device
        self.graphed = self.device.type == "cuda"
        self.graphs = GraphPool(self)
        self.accum = torch.float64 if weights.embed.dtype == torch.float64 else torch.float32

    def view(self, adapter: str | None) -> Decoder:
        """The same weights with another adapter, or (None) without."""
        return self if adapter == self.adapter else Decoder(self.w, adapter)

    @torch.no_grad()
    def step(self, cache: KVCache, ids: Int[Tensor, " r"]) -> tuple[KVCache, Float[Tensor, "r v"]]:
        """Append one token a row; on a GPU by a captured graph."""
        if not self.graphed:
            return super().step(cache, ids)
        self._count(ids)
        cache = self.graphs.place(cache)
        return cache, cache.graph.step(cache, ids)

    def take(self, cache: KVCache, index: Int[Tensor, " r2"]) -> KVCache:
        """Gather rows; on a GPU inside the graph's buffers."""
        return self.graphs.place(cache, index) if self.graphed else super().take(cache, index)

    def _head(self, x: Tensor) -> Float[Tensor, "c v"]:
        return F.linear(x, self.w.head)

    def _qkv(self, layer: Layer, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Rotated queries [r, hk, g, q, d], keys and values [r, hk, q, d]."""
        w = self.w
        r, q, _ = x.shape
        qkv = layer.qkv(x, self.adapter).view(r, q, w.heads + 2 * w.kv_heads, w.head_dim)
        qk, v = qkv[:, :, : w.heads + w.kv_heads], qkv[:, :, w.heads + w.kv_heads :]
        if layer.q_norm is not None and layer.k_norm is not None:
            qk = torch.cat([rms_norm(qk[:, :, : w.heads], layer.q_norm, w.eps),
                            rms_norm(qk[:, :, w.heads :], layer.k_norm, w.eps)], 2)  # fmt: skip
        qk = rotate(qk, cos, sin)
        queries = qk[:, :, : w.heads].view(r, q, w.kv_heads, -1, w.head_dim).permute(0, 2, 3, 1, 4)
        return queries, qk[:, :, w.heads :].transpose(1, 2), v.transpose(1, 2)

    def _mlp(self, layer: Layer, x: Tensor) -> Tensor:
        gate, up = layer.gate_up(x, self.adapter).chunk(2, -1)
        return layer.down(F.silu(gate) * up, self.adapter)

    def _run(
        self,
        ids: Int[Tensor, "r q"],
        pos: Int[Tensor, "r q"],
        block: int,
        cache: KVCache | None,
        visible: Bool[Tensor, "r n T"] | None,
        keep: bool = True,
    ) -> tuple[Tensor, Tensor, Tensor]:
        w = self.w
        x = F.embedding(ids, w.embed)
        cos, sin = w.cos[pos][:, :, None], w.sin[pos][:, :, None]
        keys, values = [], []
        bias = _bias(visible, x.dtype) if visible is not None else None
        again: Any = checkpoint
        run: Any = self._block
        for i, layer in enumerate(w.layers):
            old = None if cache is None else (cache.k[i, :, :, : cache.used], cache.v[i, :, :, : cache.used])
            if self.checkpointing and torch.is_grad_enabled():
                x, k, v = again(run, layer, x, cos, sin, old, bias, block, use_reentrant=False)
            else:
                x, k, v = run(layer, x, cos, sin, old, bias, block)
            if keep or i == 0:
                keys.append(k)
                values.append(v)
        return rms_norm(x, w.norm, w.eps), torch.stack(keys), torch.stack(values)

    def _block(self, layer, x, cos, sin, old, bias, block) -> tuple[Tensor, Tensor, Tensor]:  # noqa: ANN001
        """One layer: (x, new keys, new values)."""
        w = self.w
        qs, k, v = self._qkv(layer, rms_norm(x, layer.norm1, w.eps), cos, sin)
        if old is None:
            a = F.scaled_dot_product_attention(qs.flatten(1, 2), *_repeat(qs, k, v), is_causal=True, scale=w.scale)
            a = a.view(qs.shape)
        else:
            a = attend(qs, old[0], old[1], k, v, bias, block, w.scale)
        x = x + layer.out(a.permute(0, 3, 1, 2, 4).reshape(*x.shape[:2], -1), self.adapter)
        return x + self._mlp(layer, rms_norm(x, layer.norm2, w.eps)), k, v


def _repeat(qs: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    g = qs.shape[2]
    return k.repeat_interleave(g, 1), v.repeat_interleave(g, 1)


def _bias(visible: Bool[Tensor, "r n T"], dtype: torch.dtype) -> Tensor | None:
    """Additive mask, or None where everything is visible."""
    if visible.all():
        return None
    return torch.zeros(visible.shape, dtype=dtype, device=visible.device).masked_fill(~visible, NEG_INF)


def attend(
    qs: Float[Tensor, "r h g q d"],
    ck: Float[Tensor, "r h T d"],
    cv: Float[Tensor, "r h T d"],
    k: Float[Tensor, "r h q d"],
    v: Float[Tensor, "r h q d"],
    bias: Float[Tensor, "r n T"] | None,
    block: int,
    scale: float,
) -> Float[Tensor, "r h g q d"]:
    """Attention of n = q/block causal blocks to a shared cache and to themselves, with one softmax over both.

    The cache is read once for all blocks; each block's own scores are block x block, never (n*block)^2.
    """
    r, h, g, q, d = qs.shape
    n, t = q // block, ck.shape[2]
    qs = qs * scale
    old = (qs.reshape(r, h, g * q, d) @ ck.transpose(2, 3)).view(r, h, g, n, block, t)
    if bias is not None:
        old = old + bias[:, None, None, :, None, :]
    if block == 1:
        new = (qs.view(r, h, g, n, 1, d) * k.view(r, h, 1, n, 1, d)).sum(-1, keepdim=True)
    else:
        new = qs.view(r, h, g, n, block, d) @ k.view(r, h, 1, n, block, d).transpose(-1, -2)
        causal = torch.ones(block, block, dtype=torch.bool, device=qs.device).tril()
        new = new.masked_fill(~causal, NEG_INF)
    p = torch.cat([old, new], -1).softmax(-1, dtype=torch.float32 if qs.dtype != torch.float64 else None).to(qs.dtype)
    a = (p[..., :t].reshape(r, h, g * q, t) @ cv).view(r, h, g, n, block, d)
    return (a + p[..., t:] @ v.view(r, h, 1, n, block, d)).view(r, h, g, q, d)
