"""Tokenizers: bytes of every token, special ids, ends, chat."""

from __future__ import annotations

import pytest
from small_models import TEXTS, tiny_tokenizer

from retrodict.errors import InputError

transformers = pytest.importorskip("transformers")

from retrodict.models.hf.tokens import HFTokenizer, byte_alphabet  # noqa: E402

pytestmark = pytest.mark.hf


def test_byte_alphabet_is_gpt2s():
    table = byte_alphabet()
    assert len(table) == 256 and sorted(table.values()) == list(range(256))
    assert (table["Ġ"], table["Ċ"], table["A"], table["Ń"]) == (0x20, 0x0A, 0x41, 0xAD)


@pytest.mark.parametrize("which", ["tiny", "smollm2"])
def test_token_bytes_join_to_the_text(which, request):
    tok = HFTokenizer(tiny_tokenizer(), 320) if which == "tiny" else request.getfixturevalue("small").tokenizer
    table = tok.token_bytes()
    assert len(table) == tok.size
    for text in TEXTS:
        ids = tok.encode(text)
        assert b"".join(table[i] for i in ids) == text.encode()
        assert tok.decode(ids) == text


def test_token_bytes_of_a_sentencepiece_vocabulary():
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers

    vocab = {"<s>": 0, "▁": 1, "a": 2, "▁a": 3, **{f"<0x{b:02X}>": b + 4 for b in range(256)}}
    tok = Tokenizer(models.BPE(vocab=vocab, merges=[("▁", "a")], byte_fallback=True))
    tok.normalizer = normalizers.Replace(" ", "▁")
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tok.decoder = decoders.Sequence(steps)
    tok.add_special_tokens([AddedToken("<s>", special=True)])
    wrapped = HFTokenizer(transformers.PreTrainedTokenizerFast(tokenizer_object=tok, bos_token="<s>"))
    table = wrapped.token_bytes()
    for text in ("a a  a", "a é\n🙂"):
        assert (
            b"".join(table[i] for i in wrapped.encode(text))
            == text.encode()
            == wrapped.decode(wrapped.encode(text)).encode()
        )
    assert table[0] == b"<s>" and table[1] == b" "


def test_specials_and_ends_of_padded_tables():
    tok = HFTokenizer(tiny_tokenizer(), 320)
    known = len(tok.raw)
    assert known < 320 and len(tok) == 320
    call, end = tok.raw.convert_tokens_to_ids(["<|call|>", "</s>"])
    assert tok.special_ids == tuple(sorted({call, end} | set(range(known, 320))))
    assert tok.token_bytes()[known:] == [b""] * (320 - known) and tok.token_bytes()[call] == b"<|call|>"
    config = transformers.GenerationConfig(eos_token_id=[7, end])
    assert tok.end_ids() == (end,) and tok.end_ids(config) == (end, 7)
    assert not tok.has_chat
    with pytest.raises(InputError, match="no chat template"):
        tok.chat("hello")


def test_smollm2_specials_ends_and_chat(small):
    tok = small.tokenizer
    assert small.special_ids == tuple(range(17)) and small.end_ids == (2, 0)
    assert [tok.decode([i]) for i in small.end_ids] == ["<|im_end|>", "<|endoftext|>"]
    assert tok.has_chat and tok.encode("<|im_end|>") == [2]
    ids = tok.chat("Say hi.")
    assert tok.decode(ids).endswith("<|im_start|>user\nSay hi.<|im_end|>\n<|im_start|>assistant\n")
    assert ids == tok.chat([{"role": "user", "content": "Say hi."}])
    with pytest.raises(InputError, match="needs 'role' and 'content'"):
        tok.chat([{"user": "hi"}])


def test_smollm2_takes_digits_alone(small):
    """As its own tokenizer does: the space before a number joins the spaces before it, never the digit."""
    spell = small.tokenizer.token_bytes()
    assert [spell[i] for i in small.tokenizer.encode("hello  12 3")] == [b"hello", b"  ", b"1", b"2", b" ", b"3"]
