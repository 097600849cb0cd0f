"""Policies over graphs: one network reads a partial graph and gives P(stop) and the odds of each edge.

    log q(stop | G) = log sigmoid(u(G)),      log q(i -> j | G) = log sigmoid(-u(G)) + log softmax over legal edges

Two heads, as in Deleu et al. 2022 (arXiv:2202.13903, section 4.2), so that the chance of stopping does not fall with
the number of edges that could be added. Where none can be, q(stop) = 1. A problem whose row has ``features [d, d, c]``
(``structures.train`` makes them from a data set) is read beside the graph: one policy then serves many data sets.

Scoring runs the network once on the distinct states of a batch, not step by step. Small nets are fastest on one thread.
"""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from retrodict.errors import InputError
from retrodict.numerics import NEG_INF
from retrodict.policies.layers import MLP, layer_norm, linear
from retrodict.policies.stateless import StatelessPolicy
from retrodict.protocols import Problems
from retrodict.records import PAD, Menu, Rollouts, Scores
from retrodict.rng import generator
from retrodict.spaces.dags import Dags, DagState, adjacency, closure, edges_to_graph

CODED = 7
"""Nodes up to which a graph and its problem fit one 64-bit number, so that equal states of a batch are found by it."""


@runtime_checkable
class Net(Protocol):
    """From graphs (and features of their problems) to a logit of stopping and one of each edge. Float32."""

    parameters: dict[str, Tensor]

    def __call__(
        self, graph: Bool[Tensor, "u d d"], features: Float[Tensor, "u d d c"] | None
    ) -> tuple[Float[Tensor, " u"], Float[Tensor, "u e"]]: ...


class GraphMLP(MLP):
    """A multi-layer perceptron on the d^2 entries of the adjacency matrix (and the features): for small d."""

    def __init__(self, d: int, features: int = 0, hidden: int = 256, layers: int = 2, seed: int = 0) -> None:
        super().__init__(d * d * (1 + features), d * d + 1, hidden, layers, seed)

    def __call__(
        self, graph: Bool[Tensor, "u d d"], features: Float[Tensor, "u d d c"] | None
    ) -> tuple[Float[Tensor, " u"], Float[Tensor, "u e"]]:
        """Logits of stopping and of each edge."""
        x = graph.flatten(1).float()
        out = super().__call__(x if features is None else torch.cat([x, features.flatten(1)], 1))
        return out[:, 0], out[:, 1:]


class GraphAttention:
    """Self-attention over one token for each of the d^2 possible edges: for larger d, at d^4 a layer.

    A token holds whether its edge is there, the embeddings of its tail and of its head, and the edge's features.
    """

    def __init__(
        self, d: int, features: int = 0, width: int = 64, layers: int = 2, heads: int = 4, seed: int = 0
    ) -> None:
        if width % heads:
            raise InputError(f"the width {width} does not divide into {heads} heads; give a multiple")
        gen, w = generator(seed), {}
        self.parameters: dict[str, Tensor] = w
        self.layers, self.heads = layers, heads
        for name, rows in (("there", 2), ("tail", d), ("head", d)):
            w[name] = torch.randn(rows, width, generator=gen).mul_(0.5).requires_grad_()
        if features:
            linear(w, "features", features, width, gen)
        for k in range(layers):
            linear(w, f"{k}.qkv", width, 3 * width, gen)
            linear(w, f"{k}.mix", width, width, gen, gain=0.5)
            linear(w, f"{k}.up", width, 2 * width, gen, gain=2**0.5)
            linear(w, f"{k}.down", 2 * width, width, gen, gain=0.5)
        linear(w, "edge", width, 1, gen, gain=0.1)
        linear(w, "stop", width, 1, gen, gain=0.1)

    def __call__(
        self, graph: Bool[Tensor, "u d d"], features: Float[Tensor, "u d d c"] | None
    ) -> tuple[Float[Tensor, " u"], Float[Tensor, "u e"]]:
        """Logits of stopping and of each edge."""
        w = self.parameters
        x = w["there"][graph.long()] + w["tail"][:, None] + w["head"]
        if features is not None:
            x = x + self._linear("features", features)
        x = x.flatten(1, 2)
        for k in range(self.layers):
            x = x + self._linear(f"{k}.mix", self._attend(self._linear(f"{k}.qkv", layer_norm(x))))
            x = x + self._linear(f"{k}.down", F.gelu(self._linear(f"{k}.up", layer_norm(x))))
        x = layer_norm(x)
        return self._linear("stop", x.mean(1)).squeeze(1), self._linear("edge", x).squeeze(2)

    def _linear(self, name: str, x: Tensor) -> Tensor:
        return F.linear(x, self.parameters[f"{name}.weight"], self.parameters[f"{name}.bias"])

    def _attend(self, qkv: Float[Tensor, "u e w3"]) -> Float[Tensor, "u e w"]:
        q, k, v = (x.unflatten(2, (self.heads, -1)).transpose(1, 2) for x in qkv.chunk(3, -1))
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


class GraphPolicy(StatelessPolicy):
    """A network over the menus of a space of DAGs. Trainable by every objective of ``objectives.table``."""

    def __init__(self, space: Dags, problems: Problems, net: Net) -> None:
        self.space, self.problems, self.net = space, problems, net
        self.features = features_of(space, problems)
        super().__init__()

    def on(self, problems: Problems) -> GraphPolicy:
        """The same network on other problems."""
        return GraphPolicy(self.space, problems, self.net)

    def log_probs(
        self, c: Int[Tensor, " b"], s: DagState, menu: Menu, raw: bool = False
    ) -> tuple[Float[Tensor, "b v"], Float[Tensor, "b s"]]:
        """See ``protocols.Stepper``; it is no prior, so ``raw`` is the same."""
        assert menu.legal is not None
        u, edges = self.net(s.graph, None if self.features is None else self.features[c])
        return two_heads(u, edges, menu.legal)

    # -- all at once --------------------------------------------------------------------------------------------------

    def score(self, rollouts: Rollouts, raw: bool = False, grad: bool = False) -> Scores:
        """log q of all moves and stops: one pass over the distinct states of the rows, differentiable where asked."""
        t1 = rollouts.moves.shape[1] + 1
        inside = torch.arange(t1, device=rollouts.n.device) <= rollouts.n[:, None]
        s, state = self._states(rollouts, inside)
        with torch.set_grad_enabled(grad):
            moves, stop = self.log_probs(s.problem, s, self.space.menu(s))
            log_stop = torch.where(inside, stop.squeeze(1)[state], NEG_INF)
            log_q = moves[state[:, :-1], rollouts.moves]
            return Scores(torch.where(rollouts.kind != PAD, log_q, 0.0), log_stop[:, :, None])

    def _states(self, r: Rollouts, inside: Bool[Tensor, "b t1"]) -> tuple[DagState, Int[Tensor, "b t1"]]:
        """The states that rows pass through, and which of them each prefix is; equal ones once for small d."""
        d, row = self.space.d, r.problem[:, None].expand(-1, inside.shape[1])
        if d <= CODED:
            fixed = sum(2 ** (i * d + j) for i, j in set(self.space.required))
            code = F.pad(torch.where(r.kind != PAD, 2**r.moves, 0).cumsum(1), (1, 0)) + fixed
            found, state = torch.unique(code * len(self.problems) + row, return_inverse=True)
            code, problem = found // len(self.problems), found % len(self.problems)
            graph = (code[:, None] >> torch.arange(d * d, device=code.device) & 1).bool().view(-1, d, d)
        else:
            b, upto = inside.nonzero().unbind(1)
            state = torch.zeros_like(row).masked_scatter(inside, torch.arange(len(b), device=b.device))
            problem, graph = r.problem[b], adjacency(r.take(b), d, self.space.required, upto)
        n = (graph & ~edges_to_graph(self.space.required, d, graph.device)).flatten(1).sum(1)
        return DagState(problem, graph, closure(graph), n), state


def two_heads(
    u: Float[Tensor, " u"], edges: Float[Tensor, "u e"], legal: Bool[Tensor, "u e"]
) -> tuple[Float[Tensor, "u e"], Float[Tensor, "u 1"]]:
    """Log-probabilities of each edge and of stopping, from their logits."""
    some = legal.any(1, keepdim=True)
    given = edges.masked_fill(~legal & some, NEG_INF).log_softmax(1)  # a row with no legal edge keeps finite values
    log_stop = torch.where(some, F.logsigmoid(u)[:, None], 0.0)
    return torch.where(legal, F.logsigmoid(-u)[:, None] + given, NEG_INF), log_stop


def features_of(space: Dags, problems: Problems) -> Float[Tensor, "m d d c"] | None:
    """What the rows of problems say of each edge, or None where none says anything."""
    given = [p.row.get("features") for p in problems]
    if all(x is None for x in given):
        return None
    rows = [None if x is None else torch.as_tensor(x, dtype=torch.float32) for x in given]
    shapes = {() if x is None else tuple(x.shape) for x in rows}
    shape = next(iter(shapes))
    if len(shapes) > 1 or len(shape) != 3 or shape[:2] != (space.d, space.d):
        raise InputError(f"every problem needs features of one shape [{space.d}, {space.d}, c], not {sorted(shapes)}")
    return torch.stack([x for x in rows if x is not None])
