"""A network that reads a picture through the strokes it could be made of.

    r       =  +1 / -1 for ink / paper where nothing is drawn yet, else 0
    g_i     =  gain of item i:  log p(x | canvas + i) - log p(x | canvas)  =  log((1 - flip) / flip) <r, drawing_i>
    A_v(T)  =  log of the sum over items i that token v may still become of  p(i) exp(g_i / T)
    logits  =  A(1) for the last item a program may have;  before it
               sum over temperatures T of w_T A(T)  +  MLP([state, r, all A(T)]),      w = (1, 0, 0) + W state

The drawings are known, so the first layer is given, not learned (matched filters), and A is its sum over what a token
leaves open: one look-up in a cumulative sum, since the items below a node of the prefix tree are neighbours. For the
last item A(1) is the exact posterior, length limit included; before it the network must learn what later items will
explain. Untrained (MLP and W begin at 0) it is a one-item look-ahead, a baseline of its own.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from retrodict.policies.layers import MLP
from retrodict.structures.strokes import SIZE, Strokes

TEMPERATURES = (1.0, 3.0, 9.0)
FLOOR = -30.0
"""Nats below the best token at which a look-ahead is cut off."""


class LookAhead:
    """From [features of a state of ``Strokes``, a picture] to logits of all tokens and the stop."""

    def __init__(
        self, space: Strokes, flip: float = 0.1, stop: float = 0.5, hidden: int = 128, layers: int = 2, seed: int = 0
    ) -> None:
        self.space, self.v, self.odds = space, space.n_moves, math.log((1 - flip) / flip)
        self.stop = math.log(stop / (1 - stop))
        self.drawings = space.images[:-1].T.float().contiguous()
        self.log_prior = _log_prior(space)
        self.low, self.high = _below(space)
        self.path = self.v * space.tree.path.shape[1]
        self.code = space.n_features - SIZE**2
        inputs = self.code + SIZE**2 + len(TEMPERATURES) * (self.v + 2)
        self.mlp = MLP(inputs, self.v + 1, hidden, layers, seed, gain=0.0)
        self.share = MLP(self.code, len(TEMPERATURES), layers=0, seed=seed, gain=0.0)
        self.parameters = self.mlp.parameters | {f"share.{k}": w for k, w in self.share.parameters.items()}

    def __call__(self, x: Float[Tensor, "b i"]) -> Float[Tensor, "b o"]:
        """Logits, float32."""
        code, canvas, picture = x.split([self.code, SIZE**2, SIZE**2], 1)
        left = (1 - canvas) * (2 * picture - 1)
        ahead, level = self.ahead(code, left)
        done = code[:, self.path : -1] @ torch.arange(1.0, self.space.most + 1)
        earlier = (done < self.space.most - 1).float()[:, None]
        seen = torch.cat([code, left, ahead.flatten(1) / 10, level / 30], 1)
        learned = (self.share(code)[:, :, None] * ahead).sum(1) + self.mlp(seen)
        return ahead[:, 0] + earlier * learned

    @torch.no_grad()
    def ahead(
        self, code: Float[Tensor, "b c"], left: Float[Tensor, "b 256"]
    ) -> tuple[Float[Tensor, "b temps o"], Float[Tensor, "b temps"]]:
        """A(T) of every token, and of stopping (which gains nothing), less the best's; and the best's."""
        node, used = self._node(code)
        room = self.space.longest - used
        mark = left.double() @ torch.arange(1, SIZE**2 + 1, dtype=torch.float64).sqrt() + 1e6 * room
        _, at = torch.unique(mark, return_inverse=True)  # rows of one canvas, picture and room share their gains
        first = torch.zeros(int(at.max()) + 1, dtype=torch.long).scatter_(0, at, torch.arange(len(at)))
        gain, prior = self.odds * (left[first] @ self.drawings), self.log_prior[room[first]]
        low, high, out, level = self.low[node], self.high[node], [], []
        for t in TEMPERATURES:
            value = gain / t + prior
            value = value.double() if t == 1 else value  # of differences in a cumulative sum
            top = value.amax(1, keepdim=True)
            mass = F.pad((value - top).exp().cumsum(1), (1, 0))[at]
            below = (mass.gather(1, high) - mass.gather(1, low)).clamp_min(0).log()
            each = torch.cat([below + top[at], torch.full((len(at), 1), self.stop)], 1)
            best = each.amax(1, keepdim=True)
            out.append((each - best).clamp_min(FLOOR).float())
            level.append(best.float())
        return torch.stack(out, 1), torch.cat(level, 1)

    def _node(self, code: Float[Tensor, "b c"]) -> tuple[Int[Tensor, " b"], Int[Tensor, " b"]]:
        """The node of the prefix tree, read off the one-hots of the tokens that led to it; tokens used before these."""
        node = torch.zeros(len(code), dtype=torch.long)
        for k in range(self.path // self.v):
            there, token = code[:, k * self.v : (k + 1) * self.v].max(1)
            node = torch.where(there > 0, self.space.tree.child[node, token], node)
        tokens = code[:, -1] * self.space.longest - code[:, : self.path].sum(1)
        return node, tokens.round().long()


def _log_prior(space: Strokes) -> Float[Tensor, "rooms items"]:
    """log p of every item by even choices where so many tokens are left; -inf where it does not fit.

    Where none fits nothing may be drawn, and the row is 0.
    """
    tree, room = space.tree, torch.arange(space.longest + 1)
    log_p = torch.zeros(len(tree.ends), len(room))
    out = torch.full((len(room), len(space.phrases)), -torch.inf)
    depth = (tree.path >= 0).sum(1)
    for node, item in enumerate(tree.ends.tolist()):  # parents come before their children
        if item >= 0:
            out[:, item] = torch.where(room >= depth[node], log_p[node], -torch.inf)
            continue
        options = (tree.need[node] <= (room - depth[node])[:, None]).sum(1).float().log()
        log_p[tree.child[node][tree.child[node] >= 0]] = log_p[node] - options
    return torch.where((out > -torch.inf).any(1, keepdim=True), out, 0.0)


def _below(space: Strokes) -> tuple[Int[Tensor, "nodes v"], Int[Tensor, "nodes v"]]:
    """The items [low, high) that each token at each node may become; none where it is not legal."""
    tree = space.tree
    low, high = torch.full((len(tree.ends),), len(space.phrases)), torch.zeros(len(tree.ends), dtype=torch.long)
    for node in range(len(tree.ends) - 1, -1, -1):  # children come after their parents
        below = tree.child[node][tree.child[node] >= 0]
        item = int(tree.ends[node])
        low[node] = item if item >= 0 else low[below].min()
        high[node] = item + 1 if item >= 0 else high[below].max()
    legal = tree.child >= 0
    return torch.where(legal, low[tree.child], 0), torch.where(legal, high[tree.child], 0)
