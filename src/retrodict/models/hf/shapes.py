"""Models of known shapes with random weights: for timing, for memory, and for tests that need no download.

``rd.load("random:7b")`` and the like; one token a byte, ids above 258 have no text.
"""

from __future__ import annotations

from typing import Any

import torch

from retrodict.errors import InputError, nearest
from retrodict.rng import generator

SHAPES: dict[str, dict[str, int]] = {
    "tiny": {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 172, "num_hidden_layers": 2,
             "num_attention_heads": 4, "num_key_value_heads": 2},
    "135m": {"vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
             "num_attention_heads": 9, "num_key_value_heads": 3},
    "7b": {"vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
           "num_attention_heads": 32, "num_key_value_heads": 8},
}  # fmt: skip
"""Llama-like: our tests' size, SmolLM2-135M's, and Mistral-7B's (arXiv:2310.06825)."""
PREFIX = "random:"


def random_model(name: str, dtype: torch.dtype, device: torch.device) -> tuple[Any, Any]:
    """Module and tokenizer of a shape, the same weights at every call: N(0, 0.02^2), norms 1."""
    import transformers

    shape = name.removeprefix(PREFIX)
    if shape not in SHAPES:
        raise InputError(f"no shape {shape!r}{nearest(shape, SHAPES)}")
    config = transformers.LlamaConfig(**SHAPES[shape], max_position_embeddings=2048, tie_word_embeddings=False)  # pyright: ignore[reportArgumentType]
    rng = torch.random.get_rng_state()
    with device:
        module: Any = transformers.LlamaForCausalLM._from_config(config, dtype=dtype)
    torch.random.set_rng_state(rng)
    with torch.no_grad():
        for i, p in enumerate(module.parameters()):
            if p.dim() > 1:
                p.normal_(0.0, 0.02, generator=generator(0, device, i))
    return module, byte_tokenizer()


def byte_tokenizer() -> Any:
    """One token a byte, and an end of sequence."""
    import transformers
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tok = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore[reportAttributeAccessIssue]
    tok.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tok, eos_token="</s>")
