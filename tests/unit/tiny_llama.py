"""A transformers Llama of a few thousand random weights with a byte-level tokenizer, for tests that train."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from retrodict.models.load import load
from retrodict.protocols import LanguageModel


def tokenizer() -> Any:
    """One token a byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tok = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tok.pre_tokenizer, tok.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tok, eos_token="</s>")


def tiny_llama(dtype: torch.dtype = torch.float32, seed: int = 0) -> LanguageModel:
    """The same weights at every call and in every process."""
    config = transformers.LlamaConfig(
        vocab_size=264,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        module: Any = transformers.LlamaForCausalLM(config)
    return load((module.to(dtype), tokenizer()))
