"""Charts of binary grammars: the inside recursion over all spans of all sentences at once.

    beta(A, i, i+1) = leaf(A, i),      beta(A, i, j) = sum_{i<k<j} sum_{B,C} rule(A, B, C) beta(B, i, k) beta(C, k, j)

(Baker 1979; Lari and Young 1990), in logs and by width, so that a pass has no loop but over widths. Rules of weight one
count trees, probabilities give p(words i..j | A), :func:`best` in the place of the sums the best tree (Viterbi).

What may still come is the outside half, on stacks of finished subtrees A_1 .. A_k from left to right, A_m ending at
e_m. ``wanted_m(X, e)`` is the weight of all ways to go on once an X from e_m to e lies on A_1 .. A_m:

    wanted_m(X, e) = sum_P rule(P, A_m, X) wanted_{m-1}(P, e)                                X ends the P that A_m began
                   + sum_{Q, C, e'} rule(Q, X, C) beta(C, e, e') wanted_m(Q, e')                  X begins a Q: closure

with the root over the whole sentence in the first line's place at m = 0. The second line is linear in wanted_m with
e < e', so its closure is one triangular inverse a sentence. Time and memory for it: O((n S)^2) a sentence of n words.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

NEVER = -1e30
"""log 0 inside a chart: finite, so that derivatives of sums of nothing are 0 and not NaN."""
CELLS = 2**23
"""Numbers of a temporary above which sentences are taken in parts."""
Join = Callable[[Tensor, Tensor, Tensor], Tensor]
"""From log rules ``[s, s, s]`` and the parts of spans, ``[m, spans, splits, s]`` twice, to ``[m, spans, s]``."""


def sums(rule: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """log of the sum over splits and pairs, as products of what is scaled to a largest entry of 1 a span.

    What lies over 700 nats below the best of its span is lost to underflow; all else is exact to rounding.
    """
    a, b = (x.detach().amax((2, 3), keepdim=True) for x in (left, right))
    pairs = torch.einsum("mikb,mikc->mibc", (left - a).exp(), (right - b).exp()).flatten(2)
    total = pairs @ rule.exp().flatten(1).T
    value = total.clamp_min(torch.finfo(total.dtype).tiny).log() + (a + b)[:, :, 0]
    return torch.where(total > 0, value, NEVER)


def best(rule: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """The largest over splits and pairs."""
    pairs = (left[..., :, None] + right[..., None, :]).amax(2).flatten(2)
    return (pairs[:, :, None] + rule.flatten(1)).amax(3)


def inside(rule: Float[Tensor, "s s s"], leaf: Float[Tensor, "m l s"], join: Join = sums) -> Float[Tensor, "m l1 l1 s"]:
    """log beta(A, i, j) at ``[:, i, j, A]``; below NEVER / 2 where no tree is. Differentiable in both tables.

    Args:
        rule: log weight of A -> B C at ``[A, B, C]``.
        leaf: log weight of A -> word i; of sentences shorter than l, -inf past their end.
        join: :func:`sums`, or :func:`best` for the best tree.
    """
    m, length, s = leaf.shape
    most = max(1, CELLS // max(1, length * s * s * max(s, length)))
    if m > most:
        return torch.cat([inside(rule, part, join) for part in leaf.split(most)])
    rule = rule.clamp_min(NEVER)
    by_width = [leaf.clamp_min(NEVER)]
    for w in range(2, length + 1):
        spans = length - w + 1
        left = torch.stack([by_width[k - 1][:, :spans] for k in range(1, w)], 2)
        right = torch.stack([by_width[w - k - 1][:, k : k + spans] for k in range(1, w)], 2)
        by_width.append(join(rule, left, right).clamp_min(NEVER))
    none = leaf.new_full((m, 1, s), NEVER)
    rows = []
    for i in range(length + 1):  # row i of the chart: nothing up to i, then the widths 1, 2, ...
        rows.append(torch.stack([none[:, 0]] * (i + 1) + [by_width[w][:, i] for w in range(length - i)], 1))
    return torch.stack(rows, 1)


def closure(rule: Float[Tensor, "s s s"], beta: Float[Tensor, "m l1 l1 s"]) -> Float[Tensor, "m k k"]:
    """(I - M)^-1 with M((e, X), (e', Q)) = sum_C rule(Q, X, C) beta(C, e, e'), on weights (no logs); k = (l + 1) S."""
    k = beta.shape[1] * beta.shape[3]
    step = torch.einsum("qxc,mefc->mexfq", rule, beta).reshape(len(beta), k, k)
    unit = torch.eye(k, dtype=beta.dtype)
    return torch.linalg.solve_triangular(unit - step, unit.expand_as(step), upper=True, unitriangular=True)


def wanted_first(closed: Shaped[Tensor, "m k k"], root: int, s: int, n: Int[Tensor, " m"]) -> Shaped[Tensor, "m k"]:
    """What an empty stack waits for: the root (of s symbols) over all n words, and whatever may begin it."""
    return closed[torch.arange(len(n)), :, n * s + root]


def wanted_next(
    rule: Float[Tensor, "s s s"], closed: Float[Tensor, "b k k"], below: Float[Tensor, "b k"], top: Int[Tensor, " b"]
) -> Float[Tensor, "b k"]:
    """What a stack waits for whose top is ``top``, from what the stack ``below`` it waits for."""
    s = len(rule)
    direct = torch.bmm(below.view(len(top), -1, s), rule[:, top].transpose(0, 1))  # over e and P: [b, e, x]
    return torch.bmm(closed, direct.reshape(len(top), -1, 1)).squeeze(2)


class Futures:
    """What every stack met so far waits for, once each, by number: stacks of equal labels over one sentence are one.

    Number i < m is the empty stack of sentence i. Others are made when they are first asked for, so that on sentences
    that come again a step is one look-up.

    Args:
        rule: weight of A -> B C at ``[A, B, C]``.
        closed: from :func:`closure`; booleans where only what is possible matters.
        first: what empty stacks wait for, of the same type.
    """

    def __init__(
        self, rule: Float[Tensor, "s s s"], closed: Shaped[Tensor, "m k k"], first: Shaped[Tensor, "m k"]
    ) -> None:
        self.rule, self.closed, self.size = rule, closed, len(first)
        self.wanted, self.problem = first, torch.arange(len(first))
        self.next = torch.full((len(first), len(rule)), -1)

    def after(self, stack: Int[Tensor, " b"], top: Int[Tensor, " b"]) -> Int[Tensor, " b"]:
        """The numbers of the stacks with one more subtree on top."""
        found = self.next[stack, top]
        new = found < 0
        if bool(new.any()):
            self._meet(torch.unique(stack[new] * len(self.rule) + top[new]))
            found = self.next[stack, top]
        return found

    def at(self, stack: Int[Tensor, " b"], end: Int[Tensor, " b"]) -> Shaped[Tensor, "b s"]:
        """What they wait for that ends at ``end``, a label."""
        s = len(self.rule)
        return self.wanted[stack[:, None], end[:, None] * s + torch.arange(s)]

    def _meet(self, code: Int[Tensor, " u"]) -> None:
        below, top = code // len(self.rule), code % len(self.rule)
        need = self.size + len(code)
        if need > len(self.next):  # room for twice as many
            room = 2 * need - len(self.next)
            self.wanted = torch.cat([self.wanted, self.wanted.new_zeros(room, self.wanted.shape[1])])
            self.problem = torch.cat([self.problem, self.problem.new_zeros(room)])
            self.next = torch.cat([self.next, self.next.new_full((room, len(self.rule)), -1)])
        made, of = torch.arange(self.size, need), self.problem[below]
        dtype = self.rule.dtype
        for at in torch.arange(len(code)).split(512):
            found = wanted_next(self.rule, self.closed[of[at]].to(dtype), self.wanted[below[at]].to(dtype), top[at])
            self.wanted[made[at]] = found.to(self.wanted.dtype)
        self.problem[made], self.next[below, top], self.size = of, made, need
