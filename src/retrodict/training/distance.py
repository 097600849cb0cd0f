"""How far apart two token sequences are, in tokens: what the replay buffer calls near duplicates.

Both run from 0 to len a + len b at most, so that a tolerance is a share of the two lengths together.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

Distance = Callable[[Sequence[int], Sequence[int]], float]
"""Symmetric, in tokens, and 0 for equal sequences."""


def edit_distance(a: Sequence[int], b: Sequence[int]) -> float:
    """Levenshtein distance: insertions, deletions and replacements of one token, each at cost 1.

    A common head and tail are cut off. The rest is Myers' bit-parallel recurrence (J. ACM 1999, as given by Hyyro
    2003): the column of differences lives in two Python integers, so a pair costs len b steps and not len a * len b.
    """
    head = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    a, b = a[head:], b[head:]
    most = min(len(a), len(b))
    tail = next((i for i in range(most) if a[-1 - i] != b[-1 - i]), most)
    a, b = a[: len(a) - tail], b[: len(b) - tail]
    if not a or not b:
        return float(len(a) + len(b))
    return float(_myers(a, b))


def _myers(a: Sequence[int], b: Sequence[int]) -> int:
    full, last = (1 << len(a)) - 1, 1 << (len(a) - 1)
    where: dict[int, int] = {}
    for i, x in enumerate(a):
        where[x] = where.get(x, 0) | 1 << i
    up, down, distance = full, 0, len(a)  # rows where the column rises by one, where it falls by one; its last entry
    for y in b:
        match = where.get(y, 0)
        diagonal = (((match & up) + up) ^ up) | match | down
        rises, falls = down | ~(diagonal | up) & full, diagonal & up
        distance += bool(rises & last) - bool(falls & last)
        rises, falls = (rises << 1 | 1) & full, falls << 1 & full
        up, down = falls | ~(diagonal | rises) & full, rises & diagonal
    return distance


def bag_distance(a: Sequence[int], b: Sequence[int]) -> float:
    """Tokens that one has and the other lacks, counted with multiplicity; their order is ignored.

    Over len a + len b this is the Bray-Curtis dissimilarity of the two bags of tokens.
    """
    x, y = Counter(a), Counter(b)
    return float((x - y).total() + (y - x).total())


DISTANCES: dict[str, Distance] = {"edit": edit_distance, "bag": bag_distance}
