"""JSON schemas and Lark grammars as hard guides, by the token masks of llguidance.

    psi(z_1..t) = 1 where the grammar's parser is alive after the bytes of z_1..t, else 0
    q(v | z_1..t) = p(v | z_1..t) psi(z_1..t v) / m_t,     m_t = sum of p over the allowed v (and the stop)

Drawing from q alone is local masking, whose law is not p(z | legal): what is lost at each step, log m_t, is never paid.
Here q is a proposal and samplers divide by it, so that a weight holds the product of the m_t.

A mask allows every token whose bytes the parser can read, whatever the tokenizer would have written. (By itself
llguidance lets only one spelling of a forced text through. The others have probability under p, and weights cannot
bring back what is never proposed; its option ``no_forcing`` is set.) The parser looks ahead without end but not to a
length limit, so that a particle may reach max_tokens inside the grammar: its weight is zero, and the answer says how
many did. Whether anything fits at all is looked for before sampling (``guides.shortest``). Regular expressions and
choices have automata instead, which see the limit coming (``guides.regex``).

Source: llguidance (github.com/guidance-ai/llguidance, docs/syntax.md and docs/json_schema.md). How local masks distort:
Park et al. 2024 (arXiv 2405.21047). Weights: Lew et al. 2023 (arXiv 2306.03081).
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from retrodict.errors import InputError, MissingExtra
from retrodict.guides.base import BaseGuide
from retrodict.numerics import NEG_INF
from retrodict.records import Rollouts
from retrodict.spaces.strings import Strings, StringState

EVERY_SPELLING = '\n%llguidance {"no_forcing": true}\n'
_BITS = torch.where((torch.arange(256)[:, None] >> torch.arange(8) & 1).bool(), 0.0, NEG_INF)


def engine() -> Any:
    """The llguidance package, or MissingExtra."""
    try:
        import llguidance
        import llguidance.numpy
    except ImportError:
        raise MissingExtra("llguidance", "constraints") from None
    return llguidance


@dataclass(frozen=True)
class Grammar:
    """A grammar that compiles: Lark text as llguidance reads it (JSON schemas are one rule of it), and what it is."""

    text: str
    kind: str
    tight: str = ""
    """Text of a part of the language that has its shortest strings, where that is quicker to search."""

    def compact(self) -> Grammar:
        """The grammar to look for short strings in."""
        return Grammar(self.tight, self.kind) if self.tight else self

    @property
    def label(self) -> str:
        """How tables call it: its kind and a fingerprint."""
        return f"{self.kind} {hashlib.sha256(self.text.encode()).hexdigest()[:6]}"

    def matcher(self, tokens: Any) -> Any:
        """A parser at the grammar's start, over the tokens of an ``LLTokenizer``."""
        return engine().LLMatcher(tokens, self.text + EVERY_SPELLING, log_level=0)


def lark(text: str) -> Grammar:
    """A context-free grammar in Lark's syntax (llguidance's docs/syntax.md says which parts of it)."""
    _validate(text, "Lark grammar")
    return Grammar(text, "Lark grammar")


def json_schema(schema: Mapping[str, Any] | str, whitespace: bool = True) -> Grammar:
    """The JSON texts that a schema allows; one newline may follow, so that it can be the stop.

    Args:
        schema: the schema, or its JSON text. Keywords that llguidance does not know are refused.
        whitespace: whether JSON's free whitespace is legal; False: exactly as ``json.dumps`` writes, ", " and ": ".
    """
    if isinstance(schema, str):
        try:
            schema = json.loads(schema)
        except json.JSONDecodeError as error:
            raise InputError(f"JSON schema, line {error.lineno}, column {error.colno}: {error.msg}") from None
    if not isinstance(schema, Mapping):
        raise InputError(f"a JSON schema is an object such as {{'type': 'string'}}, not a {type(schema).__name__}")
    try:
        free, tight, dumped = (_rule(schema, **how) for how in ({}, _tight(",", ":"), _tight(", ", ": ")))
    except (TypeError, ValueError) as error:
        raise InputError(f"JSON schema: {error}; use only what JSON can hold") from None
    text = free if whitespace else dumped
    _validate(text, "JSON schema")
    return Grammar(text, "JSON schema", tight if whitespace else "")


def _rule(schema: Mapping[str, Any], **how: Any) -> str:
    """A schema as a Lark rule; ``how`` sets llguidance's options of its JSON."""
    return 'start: value "\\n"?\nvalue: %json ' + json.dumps({**schema, "x-guidance": how} if how else dict(schema))


def _tight(item: str, key: str) -> dict[str, Any]:
    return {"whitespace_flexible": False, "item_separator": item, "key_separator": key}


def _validate(text: str, kind: str) -> None:
    """InputError with the line and column where llguidance tells them; for a schema, what it cannot do."""
    wrong, said = engine().LLMatcher.validate_grammar_with_warnings(text)
    if not wrong:
        return
    message = " ".join(re.split(r"\n\s+\d+ \| ", said[0])[0].split())
    place = re.match(r"(?:at )?(\d+)\((\d+)\): (.*)", message)
    what = place[3] if place else message
    if kind == "JSON schema":
        what = what.removeprefix("failed to compile JSON schema: ")
        keys = re.match(r"Unimplemented keys: \[(.*)\]", what)
        raise InputError(f"{kind}: " + (f"unsupported keywords {keys[1]}; leave them out" if keys else what))
    raise InputError(f"{kind}{f', line {place[1]}, column {place[2]}' if place else ''}: {what}")


class Pieces:
    """What llguidance asks of a tokenizer: bytes of each id, and one more id for the end. It writes no text itself."""

    is_tokenizer_wrapper = True
    bos_token_id = None

    def __init__(self, token_bytes: Sequence[bytes]) -> None:
        self.eos_token_id = len(token_bytes)
        self.special_token_ids = [self.eos_token_id]
        self.tokens = [*token_bytes, b"<end>"]

    def __call__(self, text: str) -> list[int]:
        return []


@lru_cache(maxsize=8)
def tokens_of(token_bytes: tuple[bytes, ...]) -> Any:
    """llguidance's trie of a vocabulary (0.2 s for 50,000 tokens)."""
    return engine().LLTokenizer(Pieces(token_bytes))


class Prefix:
    """A parser after some tokens; ``None`` where they break the grammar. Never changed: :meth:`after` copies (4 us)."""

    def __init__(self, matcher: Any, stops: tuple[int, ...]) -> None:
        self.matcher, self.stops = matcher, stops
        self.mask: UInt8[np.ndarray, " bytes"] | None = None
        """Allowed tokens as bits, once asked for."""

    def after(self, *ids: int) -> Prefix:
        """The parser after more tokens."""
        copy = None if self.matcher is None else self.matcher.deep_copy()
        if copy is not None and copy.try_consume_tokens(list(ids)) < len(ids):
            sound(copy)
            copy = None
        return Prefix(copy, self.stops)

    @cached_property
    def ends(self) -> list[bool]:
        """Whether each stop is legal here: the text is complete, after the stop's own text where that belongs to it."""
        whole = [self.after(i) for i in self.stops] or [self]
        return [p.matcher is not None and p.matcher.is_accepting() for p in whole]


def sound(matcher: Any) -> None:
    """InputError where a parser gave up (its limits on size), which is not the same as refusing a token."""
    if matcher.is_error() and not matcher.get_error().startswith(
        "NoExtensionBias"
    ):  # that is a dead end: no token goes on
        raise InputError(f"the grammar is too complex: {matcher.get_error().splitlines()[0]}; simplify it")


@dataclass
class GrammarCarry:
    """Distinct prefixes, and which of them each row is."""

    prefixes: list[Prefix]
    rows: Int[Tensor, " b"]


class GrammarGuide(BaseGuide):
    """psi = 1 while the parser is alive, else 0; a stop is legal where the text is complete."""

    hard = True

    def __init__(
        self, grammar: Grammar, space: Strings, token_bytes: Sequence[bytes], device: torch.device | str = "cpu"
    ) -> None:
        if not token_bytes:
            raise InputError(f"this model does not tell its tokens' bytes; a {grammar.kind} needs them")
        self.grammar, self.space, self.device, self.label = grammar, space, torch.device(device), grammar.label
        self.token_bytes = tuple(token_bytes)
        self.v = len(self.token_bytes)
        self.bits = _BITS.to(self.device)
        matcher = grammar.matcher(tokens_of(self.token_bytes))
        sound(matcher)
        self.root = Prefix(matcher, space.stops.ids if space.stops.in_text else ())
        self.executor = engine().LLExecutor(torch.get_num_threads())

    # -- the carry ------------------------------------------------------------------------------------------------

    def start(self, problem: Int[Tensor, " b"]) -> GrammarCarry:
        """The grammar's start, whatever the problem."""
        return GrammarCarry([self.root], torch.zeros_like(problem))

    def start_at(self, rollouts: Rollouts, upto: Int[Tensor, " b"]) -> GrammarCarry:
        """Fresh parsers over the first ``upto`` moves, one a distinct prefix."""
        seen: dict[tuple[int, ...], int] = {}
        cut = [tuple(row[:k]) for row, k in zip(rollouts.moves.tolist(), upto.tolist(), strict=True)]
        rows = torch.tensor([seen.setdefault(z, len(seen)) for z in cut], dtype=torch.long, device=upto.device)
        return GrammarCarry([self.root.after(*z) for z in seen], rows)

    def step(self, c: GrammarCarry, s: StringState, move: Int[Tensor, " b"]) -> GrammarCarry:
        """Rows with the same prefix and move share a parser."""
        pairs, rows = torch.unique(c.rows * self.v + move, return_inverse=True)
        return GrammarCarry([c.prefixes[i // self.v].after(i % self.v) for i in pairs.tolist()], rows)

    def take(self, c: GrammarCarry, index: Tensor) -> GrammarCarry:
        """Rows ``index``; no parser is copied."""
        return GrammarCarry(c.prefixes, c.rows[index])

    # -- psi ------------------------------------------------------------------------------------------------------

    def log_psi(self, c: GrammarCarry, s: StringState) -> Float[Tensor, " b"]:
        """0 where the parser is alive, else -inf."""
        alive = torch.tensor([p.matcher is not None for p in c.prefixes], device=c.rows.device)[c.rows]
        return torch.where(alive, 0.0, NEG_INF)

    def log_next(self, c: GrammarCarry, s: StringState) -> Float[Tensor, "b v"]:
        """0 / -inf for every token: each distinct prefix's bits, spread once."""
        packed = torch.from_numpy(self._masks(c.prefixes)).to(self.device)
        spread = self.bits[packed.long()].flatten(1)[:, : self.v]
        same = len(spread) == len(c.rows) and torch.equal(c.rows, torch.arange(len(spread), device=c.rows.device))
        return spread if same else spread[c.rows]

    def log_end(self, c: GrammarCarry, s: StringState) -> Float[Tensor, "b s"]:
        """0 / -inf for every stop."""
        ends = torch.tensor([p.ends for p in c.prefixes], device=c.rows.device)
        return torch.where(ends, 0.0, NEG_INF)[c.rows]

    def _masks(self, prefixes: Sequence[Prefix]) -> UInt8[np.ndarray, "r bytes"]:
        """The allowed tokens of each prefix as bits; those not known yet are computed together."""
        words = (self.v + 32) // 32  # the last id is the engine's own end
        todo = [p for p in prefixes if p.mask is None]
        out = np.zeros((len(todo), words), dtype=np.int32)
        live = [(p.matcher, i) for i, p in enumerate(todo) if p.matcher is not None]
        if live:
            engine().numpy.fill_next_token_bitmask_par(self.executor, live, out)
        for p, bits in zip(todo, out, strict=True):
            if p.matcher is not None:
                sound(p.matcher)
            p.mask = bits.view(np.uint8)
        return np.stack([p.mask for p in prefixes if p.mask is not None])

    # -- whole strings --------------------------------------------------------------------------------------------

    def score(self, rollouts: Rollouts) -> Float[Tensor, " b"]:
        """0 / -inf of complete strings: their ids, then the stop, through a fresh parser."""
        c = self.start_at(rollouts, rollouts.n)
        ends = torch.tensor([p.ends for p in c.prefixes], device=c.rows.device)
        return torch.where(ends[c.rows, rollouts.stop], 0.0, NEG_INF)

    def remarks(self, rollouts: Rollouts) -> tuple[str, ...]:
        """How many rows ended inside the grammar: at the length limit, or where nothing legal goes on."""
        c, space = self.start_at(rollouts, rollouts.n), self.space
        alive = torch.tensor([p.matcher is not None for p in c.prefixes], device=c.rows.device)[c.rows]
        full = space.counted(space.replay(rollouts, rollouts.n)) >= space.max_free
        cut = alive & full & (self.score(rollouts) == NEG_INF)
        said = {
            f"ran into the limit of {space.max_free} tokens inside the grammar; raise max_tokens": int(cut.sum()),
            "came to a dead end inside the grammar: no token that every constraint allows": int((~alive).sum()),
        }
        return tuple(f"{k} of {len(alive)} particles {what}" for what, k in said.items() if k)
