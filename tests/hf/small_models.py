"""A tiny model, its tokenizer and texts that several test modules share."""

from __future__ import annotations

import pytest
import torch

transformers = pytest.importorskip("transformers")

TEXTS = [
    "The cat was hungry.",
    " Now  the cat   is sleepy,\n\n\tnot hungry.\r\n",
    "Café naïve — 日本語 עברית 🙂👩‍👩‍👧 🏳️‍🌈",
    "x = 3.14159; y  12 ½ １２ ²",
    "\x00\x7f\u00a0\u200b\ufeff ",
    "",
]


def tiny_tokenizer():
    """A byte-level tokenizer with an added special token, trained on the spot."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tok.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tok.train_from_iterator(TEXTS * 3, trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet))
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tok, eos_token="</s>")
    fast.add_special_tokens({"additional_special_tokens": ["<|call|>"]})
    return fast


def tiny_model(seed: int = 0, layers: int = 2, **more):
    """A Llama of a few thousand weights; its table has more rows than the tokenizer has tokens."""
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=320,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=128,
        **more,
    )
    return transformers.LlamaForCausalLM(config)
