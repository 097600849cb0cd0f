"""A transformers tokenizer behind the library's own door: text to ids and back, chat turns, bytes, ends.

Ids are what the library works on. Text goes in once, as it is (no special tokens added), and comes out for people.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

from retrodict.errors import InputError

END_TEXTS = frozenset(
    {"<|im_end|>", "<|endoftext|>", "<|end_of_text|>", "<|eot_id|>", "<end_of_turn>", "</s>", "<eos>"}
)
"""Special tokens that end a turn or a document wherever a vocabulary has them, also where the model's own files
name only one of them (SmolLM2 names ``<|im_end|>`` and leaves out ``<|endoftext|>``)."""

_HEX = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def byte_alphabet() -> dict[str, int]:
    """The printable character that stands for each byte in a byte-level vocabulary (GPT-2's table), inverted."""
    shown = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [b for b in range(256) if b not in set(shown)]
    return {chr(b): b for b in shown} | {chr(256 + i): b for i, b in enumerate(hidden)}


class HFTokenizer:
    """Text to ids and back through a transformers tokenizer.

    Args:
        tokenizer: the transformers tokenizer; kept as ``raw``.
        size: rows of the model's vocabulary. Models pad their tables: rows without a token have no bytes and count as
            special. Default: the tokenizer's own size.
    """

    def __init__(self, tokenizer: Any, size: int | None = None) -> None:
        self.raw = tokenizer
        self.size = max(size or 0, len(tokenizer))

    def __len__(self) -> int:
        return self.size

    def __repr__(self) -> str:
        return f"HFTokenizer({type(self.raw).__name__}, size={self.size}, chat={self.has_chat})"

    # -- text ---------------------------------------------------------------------------------------------------

    def encode(self, text: str) -> list[int]:
        """Ids of the text as it is: nothing is put before or after it.

        The spelling of a special token in the text becomes that token. Sentencepiece vocabularies of the Llama-2 kind
        put a space before the first word of every text; encode a continuation together with what it follows there.
        """
        return list(self.raw.encode(text, add_special_tokens=False, verbose=False))

    def decode(self, ids: Sequence[int]) -> str:
        """The text of the ids, special tokens included and spaces as they are."""
        return self.raw.decode([int(i) for i in ids], skip_special_tokens=False, clean_up_tokenization_spaces=False)

    @property
    def has_chat(self) -> bool:
        """Whether the tokenizer brings a chat template."""
        return bool(getattr(self.raw, "chat_template", None))

    def chat(self, messages: str | Sequence[Mapping[str, str]]) -> list[int]:
        """Ids of a conversation up to where the assistant's answer begins; a plain string is one user turn."""
        if not self.has_chat:
            raise InputError("this model has no chat template; use chat=False, or a model tuned for chat")
        turns = [{"role": "user", "content": messages}] if isinstance(messages, str) else [dict(m) for m in messages]
        if bad := [m for m in turns if not {"role", "content"} <= set(m)]:
            raise InputError(f"a chat message needs 'role' and 'content'; got {bad[0]!r}")
        try:
            ids = self.raw.apply_chat_template(turns, tokenize=True, add_generation_prompt=True, return_dict=False)
        except Exception as error:  # templates raise what they like: jinja's errors, KeyError, TypeError
            raise InputError(f"the chat template refused these messages: {first_line(error)}") from error
        ids = ids["input_ids"] if hasattr(ids, "keys") else ids
        return [int(i) for i in ids]

    # -- the vocabulary -----------------------------------------------------------------------------------------

    @cached_property
    def pieces(self) -> list[str | None]:
        """The vocabulary's own spelling of each id; ``None`` for rows without a token."""
        known = len(self.raw)
        found = list(self.raw.convert_ids_to_tokens(list(range(known))))
        vocab = self.raw.get_vocab()
        if len(vocab) < known:  # holes: ids that no token has
            taken = set(vocab.values())
            found = [p if i in taken else None for i, p in enumerate(found)]
        return found + [None] * (self.size - known)

    @cached_property
    def special_ids(self) -> tuple[int, ...]:
        """Ids that are no text: special and control tokens, added ones too, and rows without a token."""
        ids = {int(i) for i in self.raw.all_special_ids}
        ids |= {int(i) for i, t in self.raw.added_tokens_decoder.items() if t.special}
        ids |= {i for i, p in enumerate(self.pieces) if p is None}
        return tuple(sorted(ids))

    def end_ids(self, generation_config: Any = None) -> tuple[int, ...]:
        """Every id that ends an answer, the tokenizer's own end first.

        Together: the tokenizer's end, the ends the model's generation config lists (a chat model often has several),
        and special tokens that end turns or documents by convention (:data:`END_TEXTS`).
        """
        ends = [self.raw.eos_token_id, getattr(generation_config, "eos_token_id", None)]
        flat = [int(i) for e in ends if e is not None for i in (e if isinstance(e, (list, tuple)) else [e])]
        flat += [i for i in self.special_ids if self.pieces[i] in END_TEXTS]
        return tuple(dict.fromkeys(i for i in flat if 0 <= i < self.size))

    def token_bytes(self) -> list[bytes]:
        """The bytes that each id adds to a text; joined, they are the UTF-8 of what was encoded.

        Exact for byte-level vocabularies (GPT-2's and its heirs) and for sentencepiece ones, where a text's first
        word may bring a space of its own (see :meth:`encode`). Special tokens give their spelling, rows without a
        token nothing. Other vocabularies (WordPiece) give the text of the id decoded alone, which may lack a space.
        """
        return self._bytes

    @cached_property
    def _bytes(self) -> list[bytes]:
        added = {int(i): t.content for i, t in self.raw.added_tokens_decoder.items()}
        kinds = self._decoders()
        if "ByteLevel" in kinds:
            table = byte_alphabet()

            def spell(i: int, piece: str) -> bytes:
                return bytes(table[c] for c in piece) if all(c in table for c in piece) else piece.encode()
        elif kinds & {"Metaspace", "ByteFallback", "▁"}:

            def spell(i: int, piece: str) -> bytes:
                byte = _HEX.fullmatch(piece)
                return bytes([int(byte[1], 16)]) if byte else piece.replace("▁", " ").encode()
        else:

            def spell(i: int, piece: str) -> bytes:
                return self.decode([i]).encode()

        return [
            added[i].encode() if i in added else b"" if piece is None else spell(i, piece)
            for i, piece in enumerate(self.pieces)
        ]

    def _decoders(self) -> set[str]:
        """Kinds of the decoder's steps; '▁' where pieces mark spaces with it."""
        backend = getattr(self.raw, "backend_tokenizer", None)
        if backend is not None and backend.decoder is not None:
            return set(_kinds(json.loads(backend.decoder.__getstate__())))
        return {"▁"} if any(p and p.startswith("▁") for p in self.pieces) else set()


def _kinds(step: Mapping[str, Any]) -> Iterator[str]:
    """Types of a decoder and of the steps inside it."""
    yield str(step.get("type"))
    if step.get("type") == "Replace" and "▁" in json.dumps(step.get("pattern"), ensure_ascii=False):
        yield "▁"
    for inner in step.get("decoders", ()):
        yield from _kinds(inner)


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its type where it has none."""
    return next((s.strip() for s in str(error).splitlines() if s.strip()), type(error).__name__)
