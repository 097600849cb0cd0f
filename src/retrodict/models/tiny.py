"""A tiny seeded random transformer: the real engine at a size where everything can be enumerated or timed."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from retrodict.models.decoder import Decoder, Layer, Linear, Weights
from retrodict.models.tabular import CharTokenizer
from retrodict.rng import generator


def rope_tables(context: int, head_dim: int, theta: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin over positions, both halves repeated: ``[context, head_dim]``."""
    inv = 1.0 / theta ** (torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    angle = torch.outer(torch.arange(context, dtype=torch.float64), inv)
    return torch.cat([angle, angle], 1).cos().to(dtype), torch.cat([angle, angle], 1).sin().to(dtype)


def random_weights(
    v: int,
    d: int = 16,
    layers: int = 2,
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int = 8,
    ffn: int = 32,
    context: int = 256,
    seed: int = 0,
    scale: float = 1.0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Weights:
    """Weights drawn from N(0, scale^2/fan_in); shapes as in the Llama family."""
    gen = generator(seed)

    def matrix(out: int, fan_in: int, gain: float = 1.0) -> Tensor:
        w = torch.randn(out, fan_in, generator=gen) * (gain * scale / math.sqrt(fan_in))
        return w.to(device=device, dtype=dtype)

    ones = torch.ones(d, dtype=dtype, device=device)
    stack = [
        Layer(
            norm1=ones,
            qkv=Linear(matrix((heads + 2 * kv_heads) * head_dim, d)),
            out=Linear(matrix(d, heads * head_dim)),
            norm2=ones,
            gate_up=Linear(matrix(2 * ffn, d)),
            down=Linear(matrix(d, ffn)),
        )
        for _ in range(layers)
    ]
    embed = matrix(v, d, math.sqrt(d))
    cos, sin = (x.to(device) for x in rope_tables(context, head_dim, 10000.0, dtype))
    head = matrix(v, d, 2.0)
    return Weights(stack, embed, head, ones, cos, sin, heads, kv_heads, head_dim, 1e-5, head_dim**-0.5)


class TinyLM(Decoder):
    """A random transformer over a small alphabet, one character a token; token 0 is its end."""

    def __init__(
        self, alphabet: str = ".abcdefgh", seed: int = 0, dtype: torch.dtype = torch.float32, **shape: int
    ) -> None:
        super().__init__(random_weights(len(alphabet), seed=seed, dtype=dtype, **shape))  # pyright: ignore[reportArgumentType]
        self.name = f"tiny({len(alphabet)}, seed={seed})"
        self.version = self.name
        self.tokenizer = CharTokenizer(alphabet)
        self.token_bytes: Sequence[bytes] = [c.encode() for c in alphabet]
        self.end_ids = (0,)

    def view(self, adapter: str | None) -> TinyLM:
        """A tiny model has no adapters: every view is itself."""
        return self
