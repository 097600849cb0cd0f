"""Adopt a Llama-like Hugging Face module: its weights, fused, in our own decoder.

The module's own parameters become views of the fused ones, so nothing is held twice and both stay in step.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from retrodict.models.decoder import Layer, Linear, Weights

ADOPTED = {"LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"}
"""Architectures whose blocks are exactly those of ``models.decoder``."""


def adoptable(module: nn.Module) -> bool:
    """Whether our decoder computes what this module computes."""
    base = _unwrapped(module)
    config = base.config
    window = getattr(config, "sliding_window", None)
    slides = window is not None and "sliding_attention" in (
        getattr(config, "layer_types", None) or ["sliding_attention"]
    )
    return (
        type(base).__name__ in ADOPTED
        and config.hidden_act == "silu"
        and not slides
        and (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
        in ("default", "llama3", "linear")
        and _only_lora(module)
    )


def _unwrapped(module: nn.Module) -> Any:
    """The transformers module inside a PEFT wrapper, or the module itself."""
    return module.get_base_model() if hasattr(module, "peft_config") else module  # pyright: ignore[reportCallIssue]


def _only_lora(module: nn.Module) -> bool:
    configs = getattr(module, "peft_config", {})
    plain = all(
        str(getattr(c.peft_type, "value", c.peft_type)) == "LORA" and not c.modules_to_save for c in configs.values()
    )
    return plain and not any(getattr(c, "use_dora", False) or c.bias != "none" for c in configs.values())


def _plain(linear: Any) -> nn.Linear:
    """The base layer of a LoRA layer, or the layer itself."""
    return getattr(linear, "base_layer", linear)


def _fuse(parts: list[Any]) -> Linear:
    """One weight for several projections of one input; the modules keep views of it. LoRA parts are stacked."""
    plain = [_plain(p) for p in parts]
    weight = torch.cat([p.weight.data for p in plain]) if len(plain) > 1 else plain[0].weight.data
    has_bias = any(p.bias is not None for p in plain)
    bias = None
    if has_bias:
        bias = torch.cat([p.bias.data if p.bias is not None else p.weight.new_zeros(p.out_features) for p in plain])
    at = 0
    for p in plain:
        rows = p.weight.shape[0]
        p.weight.data = weight[at : at + rows]
        if p.bias is not None and bias is not None:
            p.bias.data = bias[at : at + rows]
        at += rows
    return Linear(weight, bias, _loras(parts, weight))


def _loras(parts: list[Any], weight: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """For each adapter: A' s stacked along rank, B block-diagonal with the scale folded in."""
    names = sorted({n for p in parts for n in getattr(p, "lora_A", {})})
    out = {}
    for name in names:
        a_rows, b_blocks, at = [], [], 0
        for p in parts:
            rows = _plain(p).weight.shape[0]
            if name in getattr(p, "lora_A", {}):
                a, b = p.lora_A[name].weight, p.lora_B[name].weight
                block = weight.new_zeros(weight.shape[0], a.shape[0])
                block[at : at + rows] = (b.data * p.scaling[name]).to(weight.dtype)
                a_rows.append(a.data.to(weight.dtype))
                b_blocks.append(block)
            at += rows
        out[name] = (torch.cat(a_rows), torch.cat(b_blocks, 1))
    return out


@torch.no_grad()
def adopt(module: nn.Module) -> Weights:
    """Weights of a supported module (see :func:`adoptable`), adapters included."""
    base = _unwrapped(module)
    config, body = base.config, base.model
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    layers = []
    for block in body.layers:
        a, f = block.self_attn, block.mlp
        layers.append(
            Layer(
                norm1=block.input_layernorm.weight.data,
                qkv=_fuse([a.q_proj, a.k_proj, a.v_proj]),
                out=_fuse([a.o_proj]),
                norm2=block.post_attention_layernorm.weight.data,
                gate_up=_fuse([f.gate_proj, f.up_proj]),
                down=_fuse([f.down_proj]),
                q_norm=a.q_norm.weight.data if hasattr(a, "q_norm") else None,
                k_norm=a.k_norm.weight.data if hasattr(a, "k_norm") else None,
            )
        )
    embed = body.embed_tokens.weight.data
    positions = torch.arange(config.max_position_embeddings, device=embed.device)[None]
    cos, sin = body.rotary_emb(embed[:1], positions)
    return Weights(
        layers, embed, base.lm_head.weight.data, body.norm.weight.data, cos[0].to(embed.dtype), sin[0].to(embed.dtype),
        config.num_attention_heads, config.num_key_value_heads, head_dim, config.rms_norm_eps, head_dim**-0.5,
    )  # fmt: skip
