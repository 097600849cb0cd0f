"""What an HMM is fitted on: texts that the language model wrote, and what it might have written instead.

At every step the whole next-token distribution is at hand; its likeliest tokens and the ends are kept, and what is left
over stands for the token that was drawn, where that is none of them: an unbiased record of the distribution.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields

import torch
from jaxtyping import Float, Int
from torch import Tensor

from retrodict.errors import InputError
from retrodict.numerics import log_prob_of, sample_categorical
from retrodict.protocols import LanguageModel
from retrodict.rng import generator

OPENINGS = (
    "The train to the coast was", "My neighbour told me that", "In the middle of the night",
    "We walked along the river and", "The first thing he saw was", "I opened the letter and", "After the meeting, they",
    "The children ran into", "It is often said that", "Last summer we went to", "The recipe calls for",
    "He has always wanted to", "According to the report,", "The new teacher asked the class to",
    "When the phone rang, she", "A good way to learn is", "The old house at the corner", "On the way home I",
    "The price of bread has", "Nobody knew why the", "The film was about", "If you want to sleep well,",
    "Our team lost because", "The doctor said that", "In 1969, the", "The cat sat by the window and",
    "Before you start, make sure", "She was born in", "The garden is full of", "They sold the car for",
    "This morning I found", "The river was so cold that", "Most people think that", "The king had three sons and",
    "At the market you can buy", "I would like to thank", "The computer stopped working after",
    "There was once a man who", "In this chapter we", "The boat left the harbour at", "My sister works as",
    "The music began and", "For many years, scientists", "He took off his coat and", "The bird built its nest in",
    "You should never", "The mountain is known for", "We had a long talk about", "The shop on the hill sells",
    "While she was cooking,", "The soldiers waited for", "One of the best things about",
    "The picture on the wall shows", "Dear Anna, I", "The moon rose over", "What I like about this town is",
    "The dog next door", "It took them two hours to", "The farmer looked at the sky and", "Some of the boys were",
    "The answer is simple:", "To make tea, you", "I have never seen", "The city was built on", "Every Sunday my father",
    "The judge decided that", "His hands were", "The lake in winter is", "A few days later,", "The box was full of",
    "When I was young, I", "The bus stopped near", "She smiled and said,", "The table in the kitchen is",
    "People who live by the sea", "The story begins with", "The best part of my job is", "Tom and his friend",
    "The wind blew all night and", "In the end, we", "The baby was", "I think the most important thing is",
    "The queen asked for", "They had not eaten since", "The museum is open", "Her favourite song is",
    "The paint on the door was", "As soon as he arrived,", "The rules of the game are", "My friend gave me",
    "The hotel was", "Between the two world wars,", "The light in the room was", "Please remember to",
    "The fire started in", "We could hear the",
)  # fmt: skip
"""Beginnings of texts of no particular kind, written for this purpose."""

TOP, AXES, ROWS = 64, 64, 256
"""Tokens kept of each distribution; dimensions of its sketch; texts written at once."""


@dataclass(frozen=True)
class Written:
    """b texts with their openings, and the distributions of the c tokens that the model chose.

    Attributes:
        tokens: opening and text, padded; ``n`` of them count, the first ``lead`` are the opening.
        row: text of each distribution, and ``at`` the place of the token it is of.
        ids: its tokens kept, and ``probs`` theirs. Repeated ids add up.
        sketch: random projection of its square roots: distances are Hellinger's.
        entropy: in nats.
    """

    tokens: Int[Tensor, "b t"]
    n: Int[Tensor, " b"]
    lead: Int[Tensor, " b"]
    row: Int[Tensor, " c"]
    at: Int[Tensor, " c"]
    ids: Int[Tensor, "c k"]
    probs: Float[Tensor, "c k"]
    sketch: Float[Tensor, "c d"]
    entropy: Float[Tensor, " c"]

    def take(self, rows: Int[Tensor, " b2"]) -> Written:
        """Some of the texts."""
        place = torch.full((len(self.n),), -1)
        place[rows] = torch.arange(len(rows))
        of = place[self.row]
        kept = {f.name: getattr(self, f.name)[of >= 0] for f in fields(self)[3:]} | {"row": of[of >= 0]}
        return Written(self.tokens[rows], self.n[rows], self.lead[rows], **kept)


@torch.no_grad()
def write(
    lm: LanguageModel,
    prompts: Sequence[Sequence[int]],
    texts: int,
    length: int,
    seed: int,
    on_step: Callable[[int, int], None] | None = None,
) -> Written:
    """``texts`` texts of at most ``length`` tokens, from the prompts in turn, each up to and with its end."""
    if not prompts or texts < 1 or length < 2:
        raise InputError("an HMM is fitted on texts: give prompts, one text or more, of two tokens or more")
    gen, k = generator(seed, lm.device), min(TOP, lm.vocab_size)
    axes = torch.randn(lm.vocab_size, AXES, generator=generator(seed)).to(lm.device) / AXES**0.5
    ends = torch.tensor(lm.end_ids, dtype=torch.long, device=lm.device)
    rows: list[list[int]] = []
    lead: list[int] = []
    parts: list[tuple[Tensor, ...]] = []
    for first in range(0, texts, ROWS):
        turn = [list(prompts[i % len(prompts)]) for i in range(first, min(first + ROWS, texts))]
        distinct = sorted({tuple(p) for p in turn})
        cache, logits = lm.encode(distinct, room=length)
        pick = torch.tensor([distinct.index(tuple(p)) for p in turn], device=lm.device)
        cache, logits = lm.take(cache, pick), logits[pick]
        on = torch.arange(len(turn), device=lm.device)
        for t in range(length):
            log_p = log_prob_of(logits)
            token = sample_categorical(log_p, gen)
            where = torch.tensor([len(turn[i]) for i in on.tolist()])
            parts.append((on.cpu() + first, where, *(x.cpu() for x in _keep(log_p, token, ends, axes, k))))
            for i, x in zip(on.tolist(), token.tolist(), strict=True):
                turn[i].append(x)
            more = (~torch.isin(token, ends)).nonzero().squeeze(1)
            if t + 1 == length or not len(more):
                break
            if len(more) < len(on):
                cache, on, token = lm.take(cache, more), on[more], token[more]
            cache, logits = lm.step(cache, token)
        rows += turn
        lead += [len(prompts[i % len(prompts)]) for i in range(first, first + len(turn))]
        if on_step is not None:
            on_step(len(rows), texts)
    n = torch.tensor([len(r) for r in rows])
    tokens = torch.zeros(len(rows), int(n.max()), dtype=torch.long)
    for i, r in enumerate(rows):
        tokens[i, : len(r)] = torch.tensor(r)
    return Written(tokens, n, torch.tensor(lead), *(torch.cat(x) for x in zip(*parts, strict=True)))


def _keep(
    log_p: Float[Tensor, "a v"], token: Int[Tensor, " a"], ends: Int[Tensor, " e"], axes: Tensor, k: int
) -> tuple[Tensor, ...]:
    """(ids, probs, sketch, entropy) of distributions: top k, the ends that are not among them, the drawn token."""
    p = log_p.exp()
    probs, ids = p.topk(k, 1)
    known = (ids[:, :, None] == ends).any(1)
    stop = torch.where(known, 0.0, p[:, ends])
    drawn = (ids == token[:, None]).any(1) | torch.isin(token, ends)
    rest = torch.where(drawn, 0.0, 1.0)[:, None]
    entropy = -(p * log_p.clamp_min(-1e4)).sum(1)
    ids = torch.cat([ids, ends.expand(len(p), -1), token[:, None]], 1)
    return ids, torch.cat([probs, stop, rest], 1).float(), p.sqrt().float() @ axes, entropy.float()
