"""Probabilistic context-free grammars in Chomsky normal form: trees as latents of sentences.

    p(tree, sentence) = prod over nodes of p(A -> B C) or p(A -> word),    p(sentence) = beta(S, 0, n)

The sum over all trees is the inside recursion (Baker 1979; ``spaces.charts``), its derivative by the log of a rule's
probability the expected number of times that rule is used (Lari and Young 1990; Eisner 2016). A target over trees has
log gamma = log p(tree, sentence), so log Z = log p(sentence). Exact in float64; no bias anywhere in this file.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from jaxtyping import Float, Int
from torch import Tensor

from retrodict.errors import InputError, nearest
from retrodict.numerics import NEG_INF, sample_categorical
from retrodict.protocols import Problems
from retrodict.records import Problem, Rollouts
from retrodict.spaces.charts import NEVER, inside
from retrodict.spaces.parses import BINARY, LEXICAL, Parses
from retrodict.targets.algebra import Target

ROUNDS = 10_000
"""Of the fixed point that gives the chance that a derivation ends."""
Sentences = Sequence[str] | Sequence[Sequence[int]]
"""Sentences as texts of words between spaces, or as word numbers."""


@dataclass(frozen=True, eq=False)
class PCFG:
    """A grammar by its tables of log-probabilities (-inf where there is no rule). Symbol 0 is the root.

    Attributes:
        labels: names of the symbols.
        words: the words.
        binary: log p(A -> B C) at ``[A, B, C]``.
        lexical: log p(A -> w) at ``[A, w]``.
    """

    labels: tuple[str, ...]
    words: tuple[str, ...]
    binary: Float[Tensor, "s s s"]
    lexical: Float[Tensor, "s w"]

    @property
    def version(self) -> str:
        """Moves with the probabilities."""
        return hashlib.sha1(self.binary.numpy().tobytes() + self.lexical.numpy().tobytes()).hexdigest()[:12]

    @cached_property
    def mass(self) -> float:
        """The chance that a derivation from the root ends: below 1 where recursive rules weigh too much.

        The smallest fixed point of q = p(words) + sum p(A -> B C) q_B q_C, from 0 (Booth and Thompson 1973).
        """
        ends, rule = self.lexical.exp().sum(1), self.binary.exp()
        q = torch.zeros_like(ends)
        for _ in range(ROUNDS):
            new = ends + torch.einsum("abc,b,c->a", rule, q, q)
            if bool((new - q).abs().max() < 1e-13):
                break
            q = new
        return float(q[0])

    def encode(self, sentences: Sentences) -> list[tuple[int, ...]]:
        """Word numbers. Raises InputError for an unknown word or number, and says which."""
        known, out = {w: i for i, w in enumerate(self.words)}, []
        for x in sentences:
            if not isinstance(x, str):
                if x and not 0 <= min(x) <= max(x) < len(self.words):
                    raise InputError(f"word numbers go from 0 to {len(self.words) - 1}; a sentence has {list(x)}")
                out.append(tuple(int(w) for w in x))
                continue
            for i, w in enumerate(x.split()):
                if w not in known:
                    hint = nearest(w, known) if len(known) <= 40 else ""
                    raise InputError(f"the grammar knows no word {w!r}, which is word {i + 1} of {x!r}{hint}")
            out.append(tuple(known[w] for w in x.split()))
        return out

    def text(self, sentence: Sequence[int]) -> str:
        """A sentence as people read it."""
        return " ".join(self.words[w] for w in sentence)

    def space(self, sentences: Sentences, longest: int = 0) -> Parses:
        """All trees of some sentences. Raises InputError for one outside the grammar."""
        rules = [tuple(x) for x in (self.binary > NEG_INF).nonzero().tolist()]
        tags = [tuple(x) for x in (self.lexical > NEG_INF).nonzero().tolist()]
        return Parses(tuple(rules), tuple(tags), tuple(self.encode(sentences)), self.labels, self.words, 0, longest)  # pyright: ignore[reportArgumentType]

    def show(self, least: float = 0.0) -> str:
        """The rules of probability above ``least``, as :func:`grammar` reads them."""
        lines = []
        for a, name in enumerate(self.labels):
            found = [(float(p), f"{self.labels[i // len(self.labels)]} {self.labels[i % len(self.labels)]}")
                     for i, p in enumerate(self.binary[a].flatten().exp())]  # fmt: skip
            found += [(float(p), repr(w)) for w, p in zip(self.words, self.lexical[a].exp(), strict=True)]
            lines += [f"{name} -> {right} {p:.4g}" for p, right in sorted(found, reverse=True) if p > least]
        return "\n".join(lines)


# -- text ------------------------------------------------------------------------------------------------------------

_LINE = re.compile(r"(\S+)\s*->\s*(\S.*)")
_RIGHT = re.compile(r"(?:(['\"])(?P<word>.+?)\1|(?P<left>\S+)(?:\s+(?P<right>\S+))?)\s+\[?(?P<p>[0-9.eE+-]+)\]?")


def grammar(text: str) -> PCFG:
    """Read a grammar, one left side a line: ``S -> NP VP 1.0`` and ``N -> 'dog' 0.3 | 'cat' 0.7``; # begins a comment.

    The first left side is the root. Raises InputError naming the line (no rule, or one not in Chomsky normal form) or
    the symbol (no rules; rules that do not sum to one; recursion that need not end).
    """
    rules: dict[tuple[str, ...], float] = {}
    labels: dict[str, None] = {}
    for number, line in enumerate(text.splitlines(), 1):
        line = line.split("#")[0].strip()
        if not line:
            continue
        found = _LINE.fullmatch(line)
        if found is None:
            raise InputError(f"line {number}, {line!r}, is no rule; write S -> NP VP 0.4 or N -> 'dog' 0.3")
        labels[found[1]] = None
        for part in re.split(r"\s\|\s", found[2]):
            key, p = _rule(found[1], part.strip(), number)
            if key in rules:
                raise InputError(f"line {number} gives {' '.join(key)} a second time; add the two up")
            rules[key] = p
    _check_rules(rules, labels)
    return _tables(rules, tuple(labels))


def _rule(left: str, part: str, number: int) -> tuple[tuple[str, ...], float]:
    found = _RIGHT.fullmatch(part)
    where = f"line {number}, {left} -> {part}"
    if found is None:
        raise InputError(f"{where}: the right side is two symbols or one quoted word, then its probability")
    p = float(found["p"]) if re.fullmatch(r"[0-9]*\.?[0-9]+(?:[eE][+-]?[0-9]+)?|[0-9]+\.", found["p"]) else -1.0
    if not 0 < p <= 1:
        raise InputError(f"{where}: {found['p']} is no probability above 0 and at most 1")
    if found["word"] is not None:
        return (left, repr(found["word"])), p
    if found["right"] is None:
        raise InputError(f"{where}: Chomsky normal form has no single symbol on the right; give {left} the rules of "
                         f"{found['left']}, each times {p:g}")  # fmt: skip
    return (left, found["left"], found["right"]), p


def _check_rules(rules: dict[tuple[str, ...], float], labels: dict[str, None]) -> None:
    if not rules:
        raise InputError("a grammar needs a rule; write S -> NP VP 1.0 on a line of its own")
    for key in rules:
        for symbol in key[1:] if len(key) == 3 else ():
            if symbol not in labels:
                raise InputError(f"{' '.join(key)}: {symbol!r} has no rules of its own{nearest(symbol, labels)}")
    for symbol in labels:
        total = sum(p for key, p in rules.items() if key[0] == symbol)
        if abs(total - 1.0) > 1e-6:
            raise InputError(f"the rules of {symbol} sum to {total:.6g}, not 1")


def _tables(rules: dict[tuple[str, ...], float], labels: tuple[str, ...]) -> PCFG:
    words = tuple(dict.fromkeys(key[1][1:-1] for key in rules if len(key) == 2))
    at, word = {x: i for i, x in enumerate(labels)}, {w: i for i, w in enumerate(words)}
    s = len(labels)
    binary, lexical = torch.zeros(s, s, s, dtype=torch.float64), torch.zeros(s, len(words), dtype=torch.float64)
    for key, p in rules.items():
        if len(key) == 2:
            lexical[at[key[0]], word[key[1][1:-1]]] = p
        else:
            binary[at[key[0]], at[key[1]], at[key[2]]] = p
    made = PCFG(labels, words, binary.log(), lexical.log())
    if made.mass < 1 - 1e-3:
        raise InputError(f"a derivation from {labels[0]} ends with probability {made.mass:.3g} only: its recursive "
                         "rules weigh too much; give them less")  # fmt: skip
    return made


# -- sums over trees -------------------------------------------------------------------------------------------------


def leaves(lexical: Float[Tensor, "s w"], word: Int[Tensor, "m l"]) -> Float[Tensor, "m l s"]:
    """log p(A -> word i), -inf past the end of a sentence (where ``word`` is the number of words)."""
    past = torch.full((len(lexical), 1), NEG_INF, dtype=lexical.dtype)
    return torch.cat([lexical, past], 1).T[word]


def padded(sentences: Sequence[Sequence[int]], end: int) -> tuple[Int[Tensor, "m l"], Int[Tensor, " m"]]:
    """Sentences as one tensor, ``end`` past their ends, and their lengths."""
    n = [len(x) for x in sentences]
    word = torch.full((len(n), max(n)), end)
    for i, x in enumerate(sentences):
        word[i, : n[i]] = torch.tensor(x)
    return word, torch.tensor(n)


def log_evidence(pcfg: PCFG, sentences: Sentences) -> Float[Tensor, " m"]:
    """log p(sentence), nats; -inf for sentences without a tree."""
    word, n = padded(pcfg.encode(sentences), len(pcfg.words))
    found = inside(pcfg.binary, leaves(pcfg.lexical, word))[torch.arange(len(n)), 0, n, 0]
    return torch.where(found > NEVER / 2, found, NEG_INF)


@dataclass(frozen=True)
class Counts:
    """How often each rule is used, in expectation or in weighted trees, summed over sentences."""

    binary: Float[Tensor, "s s s"]
    lexical: Float[Tensor, "s w"]


def expected_counts(pcfg: PCFG, sentences: Sequence[Sequence[int]]) -> tuple[Counts, float]:
    """Posterior expectations of rule counts, summed over sentences, and the sum of log p(sentence).

    The derivative of log p by the log of each rule: what an outside pass computes.
    """
    binary, lexical = pcfg.binary.clone().requires_grad_(), pcfg.lexical.clone().requires_grad_()
    word, n = padded(sentences, len(pcfg.words))
    with torch.enable_grad():
        total = inside(binary, leaves(lexical, word))[torch.arange(len(n)), 0, n, 0].sum()
        if float(total.detach()) < NEVER / 2:
            pcfg.space(sentences)  # says which sentence has no tree, and why
        found = torch.autograd.grad(total, [binary, lexical])
    return Counts(*found), float(total.detach())


def tree_counts(space: Parses, rollouts: Rollouts, weights: Float[Tensor, " b"]) -> Counts:
    """Rule counts of weighted trees."""
    s, v = len(space.labels), len(space.words)
    kind, a, left, right = space.nodes(rollouts).unbind(2)
    w = weights.double()[:, None].expand_as(kind)
    binary, lexical = torch.zeros(s**3, dtype=torch.float64), torch.zeros(s * v, dtype=torch.float64)
    at = kind == BINARY
    binary.index_add_(0, ((a * s + left) * s + right)[at], w[at])
    at = kind == LEXICAL
    lexical.index_add_(0, (a * v + left)[at], w[at])
    return Counts(binary.view(s, s, s), lexical.view(s, v))


# -- the target ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TreeTerm:
    """log p(tree, sentence), of whole trees: no state before the last may stop, so prefixes have no values to use."""

    pcfg: PCFG
    space: Parses
    name: str = "grammar"
    noise: str = "none"
    prefixes: bool = False

    @property
    def version(self) -> str:
        """That of the grammar."""
        return self.pcfg.version

    def on(self, problems: Problems) -> TreeTerm:
        """The same grammar over other sentences."""
        return replace(self, space=self.space.on(problems))

    def __call__(self, rollouts: Rollouts, every_prefix: bool = False) -> Float[Tensor, " b"]:
        """The sum over nodes of the log-probabilities of their rules."""
        kind, a, left, right = self.space.nodes(rollouts).clamp_min(-1).unbind(2)
        word = left.clamp_max(len(self.space.words) - 1)
        label = left.clamp_max(len(self.space.labels) - 1)
        value = torch.where(kind == BINARY, self.pcfg.binary[a, label, right], self.pcfg.lexical[a, word])
        return torch.where(kind >= 0, value, 0.0).sum(1)


def sentence_problems(pcfg: PCFG, sentences: Sentences) -> list[Problem]:
    """One problem a sentence: its word numbers are the context."""
    return [Problem(x, name=pcfg.text(x)) for x in pcfg.encode(sentences)]


def pcfg_target(pcfg: PCFG, sentences: Sentences, longest: int = 0) -> Target:
    """log gamma(tree) = log p(tree, sentence), one problem a sentence.

    Args:
        pcfg: the grammar.
        sentences: texts, or word numbers.
        longest: words of the longest sentence that a policy over this space shall read; the longest here by default.

    Raises:
        InputError: an unknown word, or a sentence without a tree (its widest part that has one is named).
    """
    problems = sentence_problems(pcfg, sentences)
    space = pcfg.space([p.context for p in problems], longest)
    return Target(space, problems, {"grammar": TreeTerm(pcfg, space)})


# -- draws from the grammar ------------------------------------------------------------------------------------------


def simulate(
    pcfg: PCFG, n: int, gen: torch.Generator, longest: int = 8
) -> tuple[list[tuple[int, ...]], Int[Tensor, "n t"]]:
    """n sentences of at most ``longest`` words with their trees (as moves of ``Parses``), from p(tree, sentence).

    Longer ones are drawn again, so sentences come from p(. | length), and trees from p(tree | sentence) all the same.
    Raises InputError where hardly any is short enough.
    """
    sentences: list[tuple[int, ...]] = []
    rows: list[Tensor] = []
    for _ in range(200):
        need = n - len(sentences)
        if need <= 0:
            break
        moves, words, size = _derive(pcfg, max(64, need), gen, longest)
        for z, x, k in zip(moves, words.tolist(), size.tolist(), strict=True):
            if k and len(sentences) < n:
                sentences.append(tuple(x[:k]))
                rows.append(z)
    if len(sentences) < n:
        raise InputError(f"hardly any sentence of this grammar has {longest} words or fewer; raise longest")
    return sentences, torch.stack(rows)


def _derive(
    pcfg: PCFG, b: int, gen: torch.Generator, longest: int
) -> tuple[Int[Tensor, "b t"], Int[Tensor, "b l"], Int[Tensor, " b"]]:
    """b derivations: moves in post-order, words, and how many of these (0 where there were too many).

    The last symbol is rewritten first, so what is written, read backwards, is in post-order.
    """
    s, t = len(pcfg.labels), 2 * longest - 1
    table = torch.cat([pcfg.binary.flatten(1), pcfg.lexical], 1)
    stack, depth = torch.zeros(b, t + 2, dtype=torch.long), torch.ones(b, dtype=torch.long)
    moves, words = torch.zeros(b, t, dtype=torch.long), torch.zeros(b, longest, dtype=torch.long)
    said, row = torch.zeros(b, dtype=torch.long), torch.arange(b)
    made = torch.zeros(b, dtype=torch.long)
    for i in range(t):
        on = depth > 0
        top = stack[row, (depth - 1).clamp_min(0)]
        choice = sample_categorical(table[top], gen)
        word = choice >= s * s
        moves[:, i] = torch.where(word, top, s + top)
        at = said.clamp_max(longest - 1)
        words[row, at] = torch.where(word & on, choice - s * s, words[row, at])
        said += (word & on).long()
        stack[row, (depth - 1).clamp_min(0)] = torch.where(word, 0, choice // s)
        stack[row, depth.clamp_max(t + 1)] = torch.where(word, 0, choice % s)
        depth = torch.where(on, depth + torch.where(word, -1, 1), depth)
        made += on.long()
        depth = torch.where(said + depth > longest, -1, depth)  # too long: given up
    good = depth == 0
    back = (made[:, None] - 1 - torch.arange(t)).clamp_min(0)
    moves = torch.where(torch.arange(t) < made[:, None], moves.gather(1, back), 0)
    turn = (said[:, None] - 1 - torch.arange(longest)).clamp_min(0)
    return moves, words.gather(1, turn), torch.where(good, said, 0)
