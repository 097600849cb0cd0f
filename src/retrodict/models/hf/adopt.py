"""Adopt a Llama-like Hugging Face module: its weights, fused, in our own decoder.

The module's own parameters become views of the fused ones, so nothing is held twice and both stay in step.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from retrodict.models.decoder import Layer, Linear, LowRank, Weights

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
    if not plain or any(
        getattr(c, "use_dora", False) or getattr(c, "lora_bias", False) or c.bias != "none" for c in configs.values()
    ):
        return False
    known = {id(p) for block in _unwrapped(module).model.layers for parts in _projections(block) for p in parts}
    return all(id(m) in known for m in module.modules() if hasattr(m, "lora_A") or hasattr(m, "token_adapter"))


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
    return Linear(weight, bias, {name: found for name in _names(parts) if (found := _lora(parts, weight, name))})


def _names(parts: list[Any]) -> list[str]:
    return sorted({n for p in parts for n in getattr(p, "lora_A", {})})


def _lora(parts: list[Any], weight: Tensor, name: str) -> LowRank | None:
    """The low-rank parts of one adapter, over the rows of the fused output that are each projection's."""
    found, at = [], 0
    for p in parts:
        rows = _plain(p).weight.shape[0]
        if name in getattr(p, "lora_A", {}):
            found.append((p.lora_A[name].weight, p.lora_B[name].weight, float(p.scaling[name]), slice(at, at + rows)))
        at += rows
    return LowRank.fuse(weight, found) if found else None


def _projections(block: Any) -> list[list[Any]]:
    """The modules behind each fused weight of a block, in the order of :class:`Layer`'s."""
    a, f = block.self_attn, block.mlp
    return [[a.q_proj, a.k_proj, a.v_proj], [a.o_proj], [f.gate_proj, f.up_proj], [f.down_proj]]


@torch.no_grad()
def attach(module: nn.Module, weights: Weights, name: str) -> None:
    """Give adopted weights an adapter that the module has got since."""
    for block, layer in zip(_unwrapped(module).model.layers, weights.layers, strict=True):
        fused = (layer.qkv, layer.out, layer.gate_up, layer.down)
        for parts, linear in zip(_projections(block), fused, strict=True):
            if found := _lora(parts, linear.weight, name):
                linear.lora[name] = found


@torch.no_grad()
def adopt(module: nn.Module) -> Weights:
    """Weights of a supported module (see :func:`adoptable`), adapters included."""
    base = _unwrapped(module)
    config, body = base.config, base.model
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    layers = []
    for block in body.layers:
        a = block.self_attn
        qkv, out, gate_up, down = (_fuse(parts) for parts in _projections(block))
        layers.append(
            Layer(
                norm1=block.input_layernorm.weight.data,
                qkv=qkv,
                out=out,
                norm2=block.post_attention_layernorm.weight.data,
                gate_up=gate_up,
                down=down,
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
