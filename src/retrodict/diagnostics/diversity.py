"""How different the objects of a sample are from one another: id sequences and weights in, numbers out.

Sequences are ids (``Particles.keys``, or moves up to n), so nothing here depends on a tokenizer or an embedding.
Pairwise means weigh a pair by w_i w_j over pairs of different rows, sum_{i != j} w_i w_j d_ij / sum_{i != j} w_i w_j:
the expected distance of two draws, and without weights the plain mean over pairs.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from retrodict.errors import InputError

Ids = Sequence[Sequence[int]]
CELLS = 500_000_000
"""Work limit of the edit distance, in cells of its tables (about a second); fewer rows are compared above it."""


@dataclass(frozen=True)
class PairMean:
    """A mean over pairs; ``used`` rows of ``total`` were compared (evenly spaced ones where fewer)."""

    value: float
    used: int
    total: int

    def __float__(self) -> float:
        return self.value

    def __str__(self) -> str:
        return f"{self.value:.3f}" + (f" (on {self.used} of {self.total})" if self.used < self.total else "")


def distinct_n(sequences: Ids, n: int = 2) -> float:
    """Distinct n-grams over all n-grams, in (0, 1]; falls with the sample's size. NaN where no sequence has n ids."""
    grams = [tuple(s[i : i + n]) for s in sequences for i in range(len(s) - n + 1)]
    return len(set(grams)) / len(grams) if grams else math.nan


def effective_distinct(counts: Mapping[Any, float] | Sequence[float]) -> float:
    """exp of the entropy of the (weighted) counts of distinct objects: 1 for one object, d for d equal ones.

    Takes ``Particles.counts()``. From k draws it is at most k, and low for a flat posterior. 0 for no weight at all.
    """
    w = [x for x in (counts.values() if isinstance(counts, Mapping) else counts) if x > 0]
    total = math.fsum(w)
    return math.exp(-math.fsum(x / total * math.log(x / total) for x in w)) if w else 0.0


def length_histogram(n: Int[Tensor, " b"], weights: Float[Tensor, " b"] | None = None) -> Float[Tensor, " length"]:
    """Share of the weight at each length 0, 1, ..., max(n); zeros where every weight is zero."""
    w = torch.ones(len(n), dtype=torch.float64) if weights is None else weights.double().cpu()
    counts = torch.bincount(n.long().cpu(), w)
    return counts / counts.sum().clamp_min(1e-300)


def edit_distance(sequences: Ids, weights: Sequence[float] | Tensor | None = None, limit: int = 256) -> PairMean:
    """Mean pairwise Levenshtein distance, each divided by the longer length, in [0, 1].

    At most ``limit`` rows are compared, fewer where their tables would pass CELLS cells: evenly spaced rows, the same
    on every call, so with weights order the rows by anything but weight. Equal rows are compared once.
    """

    def distances(unique: list[tuple[int, ...]], i: np.ndarray, j: np.ndarray) -> np.ndarray:
        width = max(map(len, unique))
        ids = np.full((len(unique), width), -1, np.int64)
        for row, s in enumerate(unique):
            ids[row, : len(s)] = s
        ids = np.unique(ids, return_inverse=True)[1].reshape(ids.shape).astype(np.int32)
        size = np.array([len(s) for s in unique])
        out = np.concatenate([_levenshtein(ids, size, a, b) for a, b in _chunks(i, j)])
        return out / np.maximum(np.maximum(size[i], size[j]), 1)

    longest = max(map(len, sequences), default=0)
    limit = max(min(limit, int(math.sqrt(2 * CELLS)) // max(longest, 1)), 2)
    return _pair_mean(sequences, weights, limit, distances)


def ngram_diversity(
    sequences: Ids, n: int = 2, weights: Sequence[float] | Tensor | None = None, limit: int = 1024
) -> PairMean:
    """One minus the mean pairwise Jaccard similarity of n-gram sets, in [0, 1]. Shorter sequences are one gram.

    At most ``limit`` evenly spaced rows are compared.
    """

    def distances(unique: list[tuple[int, ...]], i: np.ndarray, j: np.ndarray) -> np.ndarray:
        sets = [{s[a : a + n] for a in range(len(s) - n + 1)} or {s} for s in unique]
        column = {g: c for c, g in enumerate(sorted(set().union(*sets)))}
        both = np.zeros((len(sets), len(sets)))
        for start in range(0, len(column), 8192):
            has = np.zeros((len(sets), min(8192, len(column) - start)), np.float32)
            for row, grams in enumerate(sets):
                has[row, [column[g] - start for g in grams if 0 <= column[g] - start < has.shape[1]]] = 1
            both += has @ has.T
        size = np.array([len(g) for g in sets])
        return 1 - both[i, j] / (size[i] + size[j] - both[i, j])

    return _pair_mean(sequences, weights, limit, distances)


def _pair_mean(sequences: Ids, weights: Sequence[float] | Tensor | None, limit: int, distances: Any) -> PairMean:
    total = len(sequences)
    w = np.ones(total) if weights is None else torch.as_tensor(weights).double().cpu().numpy()
    if len(w) != total:
        raise InputError(f"{len(w)} weights for {total} sequences")
    used = min(total, limit)
    rows = [i * total // used for i in range(used)]
    mass: defaultdict[tuple[int, ...], float] = defaultdict(float)
    for r in rows:
        if w[r] > 0:
            mass[tuple(sequences[r])] += float(w[r])
    weight, unique = np.array(list(mass.values())), list(mass)
    pairs = weight.sum() ** 2 - float((w[rows] ** 2).sum())
    if len(unique) < 2 or pairs <= 0:
        return PairMean(0.0, used, total)
    i, j = np.triu_indices(len(unique), 1)
    return PairMean(float(2 * (weight[i] * weight[j] * distances(unique, i, j)).sum() / pairs), used, total)


def _chunks(i: np.ndarray, j: np.ndarray, size: int = 4096) -> list[tuple[np.ndarray, np.ndarray]]:
    return [(i[a : a + size], j[a : a + size]) for a in range(0, len(i), size)]


def _levenshtein(ids: np.ndarray, size: np.ndarray, i: np.ndarray, j: np.ndarray) -> np.ndarray:
    """Levenshtein distance of rows i and j, a column of each pair's table as bits (Myers 1999, Hyyrö's blocks).

    Bit a of ``up`` (``down``) says D[a+1, b] - D[a, b] is +1 (-1); a block of 64 rows hands its horizontal step on.
    """
    m, n, one = size[i], size[j], np.uint64(1)
    top = np.uint64(63)
    words = max(-(-int(m.max()) // 64), 1)
    left = np.full((len(i), 64 * words), -2, ids.dtype)
    left[:, : ids.shape[1]] = ids[i, : 64 * words]
    up, down = np.full((words, len(i)), ~np.uint64(0)), np.zeros((words, len(i)), np.uint64)
    last_word, last_bit = (m - 1) // 64, ((m - 1) % 64).astype(np.uint64)
    out = m.copy()
    for b in range(int(n.max())):
        same = np.packbits(left == ids[j, b][:, None], axis=1, bitorder="little").view("<u8").T
        plus, minus = np.ones(len(i), np.uint64), np.zeros(len(i), np.uint64)
        for w in range(words):
            vertical = same[w] | down[w]
            match = same[w] | minus
            across = (((match & up[w]) + up[w]) ^ up[w]) | match
            rise, fall = down[w] | ~(across | up[w]), up[w] & across
            here = (last_word == w) & (b < n)
            out += np.where(here, ((rise >> last_bit) & one).astype(int) - ((fall >> last_bit) & one).astype(int), 0)
            handed, rise, fall = (rise >> top, fall >> top), (rise << one) | plus, (fall << one) | minus
            (plus, minus), up[w], down[w] = handed, fall | ~(vertical | rise), rise & vertical
    return np.where(m == 0, n, out)
