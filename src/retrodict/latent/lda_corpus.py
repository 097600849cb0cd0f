"""A small made-up corpus with known topics, some of whose words belong to two of them."""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from retrodict.numerics import sample_categorical
from retrodict.rng import generator

TOPICS: dict[str, str] = {
    "money": "loan interest credit cash account bank bank note note",
    "river": "water fish boat shore mud bank bank current bass",
    "music": "song guitar drum singer band bass bass note note",
}
"""What each topic says; a word that stands twice is twice as likely."""
VOCABULARY: tuple[str, ...] = tuple(dict.fromkeys(" ".join(TOPICS.values()).split()))


def true_log_phi(blur: float = 0.02) -> Float[Tensor, "k v"]:
    """log phi of the topics above; ``blur`` of each topic's mass is spread over the whole vocabulary."""
    phi = torch.zeros(len(TOPICS), len(VOCABULARY), dtype=torch.float64)
    for k, text in enumerate(TOPICS.values()):
        for w in text.split():
            phi[k, VOCABULARY.index(w)] += 1
    return ((1 - blur) * phi / phi.sum(1, keepdim=True) + blur / len(VOCABULARY)).log()


def corpus(n: int, length: int = 16, alpha: float = 0.5, seed: int = 0) -> list[tuple[int, ...]]:
    """n documents of the topics above, of ``length`` / 2 to ``length`` words, as numbers into ``VOCABULARY``."""
    gen, draw, log_phi = generator(seed), np.random.default_rng(seed), true_log_phi()
    sizes = torch.randint((length + 1) // 2, length + 1, (n,), generator=gen).tolist()
    made = []
    for size in sizes:
        share = torch.from_numpy(draw.dirichlet([alpha] * len(TOPICS)))
        z = torch.multinomial(share, size, replacement=True, generator=gen)
        made.append(tuple(sample_categorical(log_phi[z], gen).tolist()))
    return made
