"""Parsing by prompting: the same language model asked, after worked examples, what a sentence means.

Two ways, neither of which knows p(f) or R(f): the glosses of the forms that a sentence may say are scored as whole
strings after the prompt and renormalised over them (so it is told the candidates), or an answer is decoded greedily
and counts where it is a gloss of the language, to the letter but for case and punctuation.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from retrodict.models.cached import pad_ids
from retrodict.numerics import NEG_INF
from retrodict.structures.forms_parse import Parser, as_text, words_of

SHOTS = (
    ("every boy read a book", "for each boy, some book or other was read by it"),
    ("the nurse hit the clerk with the bag", "the clerk had the bag, and was hit by the nurse"),
    ("it is not true that Sue sang and Max left", "the following is false: both Sue sang and Max left"),
    ("Max left or Sue sang and Kim cried", "two things: Max left or Sue sang; and in any case Kim cried"),
    ("every nurse did not leave", "none of the nurses left"),
    ("a boy read every book", "one and the same boy read all the books"),
)
"""Worked examples in other words than the language's."""
HEAD = "Say in clear words what each sentence means.\n\n"


def prompt_of(shots: Sequence[tuple[str, str]] = SHOTS) -> str:
    """The instruction, the examples, and the beginning of the next."""
    return HEAD + "".join(f"Sentence:{as_text(s)}\nMeaning:{as_text(g)}\n\n" for s, g in shots) + "Sentence:"


def ask_of(sentence: str) -> str:
    """What follows the prompt."""
    return f"{as_text(sentence)}\nMeaning:"


@torch.no_grad()
def by_glosses(lm: Any, parser: Parser, sentence: Int[Tensor, " b"], prompt: str = "") -> Float[Tensor, "b n"]:
    """log p of each form a sentence may say: its gloss's probability after the prompt, renormalised; -inf elsewhere."""
    encode = lm.tokenizer.encode
    each = [(parser.log_say[:, s] > NEG_INF).nonzero().squeeze(1).tolist() for s in sentence.tolist()]
    most = max(map(len, each))
    gloss = [[encode(as_text(parser.space.forms[f].gloss)) for f in forms] for forms in each]
    suffixes = [[g[min(k, len(g) - 1)] for g in gloss] for k in range(most)]
    moves, n = pad_ids([encode(ask_of(parser.sentences[s])) for s in sentence.tolist()], torch.device("cpu"))
    found = lm.score_suffixes([encode(prompt or prompt_of())] * len(n), moves, n, suffixes, every=False)
    found = found[torch.arange(len(n)), n].double().cpu()
    out = torch.full((len(n), len(parser.log_prior)), NEG_INF, dtype=torch.float64)
    for row, forms in enumerate(each):
        out[row, forms] = found[row, : len(forms)].log_softmax(0)
    return out


@torch.no_grad()
def by_decoding(
    lm: Any, parser: Parser, sentence: Int[Tensor, " b"], prompt: str = "", tokens: int = 24
) -> tuple[Int[Tensor, " b"], list[str]]:
    """The form whose gloss the model writes greedily, -1 where it writes none; and what it wrote."""
    encode = lm.tokenizer.encode
    ask = [encode(ask_of(parser.sentences[s])) for s in sentence.tolist()]
    longest = max(map(len, ask))
    cache, logits = lm.encode([encode(prompt or prompt_of())], room=longest + tokens)
    rows = torch.zeros(len(ask), dtype=torch.long, device=lm.device)
    cache, logits = lm.take(cache, rows), logits[rows]
    written: list[list[int]] = [[] for _ in ask]
    for t in range(longest + tokens):
        free = logits.argmax(1).tolist()
        ids = [a[t] if t < len(a) else free[i] for i, a in enumerate(ask)]
        for i, a in enumerate(ask):
            if len(a) <= t < len(a) + tokens:
                written[i].append(ids[i])
        cache, logits = lm.step(cache, torch.tensor(ids, device=lm.device))
    said = [lm.tokenizer.decode(w).split("\n")[0].split(".")[0].strip() for w in written]
    known = {words_of(f.gloss): i for i, f in enumerate(parser.space.forms)}
    return torch.tensor([known.get(words_of(text), -1) for text in said]), said
