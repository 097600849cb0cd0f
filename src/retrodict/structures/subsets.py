"""Exact edge probabilities for up to 12 nodes, by dynamic programming over subsets of nodes.

Tian and He 2009 (UAI), for any modular density over DAGs, the uniform prior included (over DAGs, not over
orders). Let B_j(P) = exp f(j, P) and A_j(U) = sum over P in U of B_j(P). Every DAG on S has a nonempty set of sinks,
and inclusion-exclusion over the sets T of nodes that are sinks gives the sum over DAGs on S

    R(S) = sum over nonempty T in S of (-1)^(|T|+1) R(S - T) prod over j in T of A_j(S - T),      R(empty) = 1

3^d terms. log Z = log R(V), and P(i -> j) = sum over P with i of B_j(P) dlog Z / dB_j(P), from one backward pass of the
same size.

The sum alternates. Expanded, its absolute terms come to at most R(V) times the number of ordered set partitions of the
nodes (2.8e10 for 12), and those of a derivative are among them. With at most 2^d additions to a value, d levels deep,
decimals of ``DIGITS`` digits keep the relative error below 2^d d 2.8e10 10^-DIGITS < 1e-34; what is left is that of the
float64 scores. It holds for every table. A decimal's unlimited exponent is needed: scores differ by thousands of nats.
"""

from __future__ import annotations

import decimal
import time
from collections.abc import Sequence
from decimal import Decimal

import torch
from jaxtyping import Float
from torch import Tensor

from retrodict.errors import InputError
from retrodict.numerics import NEG_INF
from retrodict.structures.modular import Modular, tabulate
from retrodict.structures.posterior import GraphPosterior, named

DIGITS = 50
MOST = 12
"""Nodes up to which it takes seconds (3^12 terms in Python); each more takes three times as long."""

Numbers = list[Decimal]


def subset_marginals(score: Modular, names: Sequence[str] = ()) -> GraphPosterior:
    """Exact edge marginals and log Z; it has no graphs to show."""
    d = score.d
    if d > MOST:
        raise InputError(f"{d} variables are too many for sums over all subsets (at most {MOST}): use the method order "
                         "or structure")  # fmt: skip
    began = time.perf_counter()
    with decimal.localcontext(decimal.Context(prec=DIGITS, Emax=decimal.MAX_EMAX, Emin=decimal.MIN_EMIN)):
        b = [[Decimal(0) if x == NEG_INF else Decimal(x).exp() for x in row] for row in tabulate(score).tolist()]
        a = [_over_subsets(row) for row in b]
        r = _forward(a, d)
        if r[-1] <= 0:
            raise InputError("every graph has density zero: the constraints exclude each other")
        slope = [_over_supersets(row) for row in _backward(a, r, d)]
        parent = [[float(x * y / r[-1]) for x, y in zip(*rows, strict=True)] for rows in zip(b, slope, strict=True)]
        log_z = float(r[-1].ln())
    marginals = _edges(torch.tensor(parent, dtype=torch.float64))
    cost = {"terms": 3.0**d, "seconds": time.perf_counter() - began}
    return GraphPosterior(named(names, d), "subsets", marginals, log_z=log_z, exact=True, counts=cost)


def _over_subsets(row: Numbers) -> Numbers:
    """out[U] = sum over P in U of row[P]."""
    out, bit = list(row), 1
    while bit < len(out):
        for u in range(len(out)):
            if u & bit:
                out[u] += out[u ^ bit]
        bit *= 2
    return out


def _over_supersets(row: Numbers) -> Numbers:
    """out[P] = sum over U that hold P of row[U]."""
    return _over_subsets(row[::-1])[::-1]


def _sinks(u: int, d: int) -> list[int]:
    """The subsets of the nodes outside u, growing as numbers, from the empty set."""
    rest, t, out = (2**d - 1) & ~u, 0, [0]
    while t != rest:
        t = (t - rest) & rest
        out.append(t)
    return out


def _products(a: Sequence[Numbers], u: int, sets: Sequence[int]) -> dict[int, Decimal]:
    """T -> (-1)^(|T|+1) prod over j in T of A_j(u): each set from the one without its lowest node."""
    out = {0: Decimal(-1)}
    for t in sets[1:]:
        low = t & -t
        out[t] = -out[t ^ low] * a[low.bit_length() - 1][u]
    return out


def _forward(a: Sequence[Numbers], d: int) -> Numbers:
    """R of every subset; u's own value is complete when its turn comes, since it is the larger number."""
    r = [Decimal(1), *[Decimal(0)] * (2**d - 1)]
    for u in range(2**d - 1):
        sets = _sinks(u, d)
        product = _products(a, u, sets)
        for t in sets[1:]:
            r[u | t] += product[t] * r[u]
    return r


def _backward(a: Sequence[Numbers], r: Numbers, d: int) -> list[Numbers]:
    """dR(V)/dA_j(u), for every j and u: the reverse of ``_forward`` and of ``_products``."""
    to_r = [*[Decimal(0)] * (2**d - 1), Decimal(1)]
    to_a = [[Decimal(0)] * 2**d for _ in range(d)]
    for u in range(2**d - 2, -1, -1):
        sets = _sinks(u, d)
        product = _products(a, u, sets)
        to_product = {t: r[u] * to_r[u | t] for t in sets}
        to_r[u] = sum((product[t] * to_r[u | t] for t in sets[1:]), Decimal(0))
        for t in reversed(sets[1:]):
            low = t & -t
            j = low.bit_length() - 1
            to_a[j][u] -= to_product[t] * product[t ^ low]
            to_product[t ^ low] -= to_product[t] * a[j][u]
    return to_a


def _edges(parent: Float[Tensor, "d masks"]) -> Float[Tensor, "d d"]:
    """P(i -> j) from the probability of every parent set of every node."""
    d, mask = len(parent), torch.arange(parent.shape[1])
    return torch.stack([parent[:, (mask >> i) & 1 == 1].sum(1) for i in range(d)])
