"""Directed acyclic graphs (DAGs) over d nodes, built by adding edges; every state may stop.

A move is the integer i*d + j, the edge i -> j. What may be added is known without a search: with T the reflexive and
transitive closure of the reversed graph (T[i, j]: j is i or an ancestor of i), the edge i -> j closes a cycle exactly
where T[i, j] holds, and adding s -> t needs one outer product (Giudici and Castelo 2003; Deleu et al. 2022,
arXiv:2202.13903, section 3.1):

    T |= T[:, t] (descendants of t)  x  T[s, :] (ancestors of s)            O(d^2), all graphs of a batch at once

Removing an edge of a DAG leaves a DAG, within every limit below, so a graph of n added edges is reached by n! paths
and any of its added edges may have been the last: log P_B = -log n.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache

import torch
from jaxtyping import Bool, Float, Int, Int64
from torch import Tensor

from retrodict.errors import InputError
from retrodict.records import CHOOSE, FREE, MUST_STOP, Menu, Rollouts

Edge = tuple[int, int]

MAX_NODES = 57
"""Nodes up to which a node's parents and the node itself fit one 64-bit number."""
MAX_LISTED = 5
"""Nodes up to which all graphs are listed: 29,281 of them; with 6 there are 3,781,503."""


def closure(graph: Bool[Tensor, "b d d"]) -> Bool[Tensor, "b d d"]:
    """T[i, j]: j is i or an ancestor of i; Warshall's d rounds on rows of bits, all graphs at once."""
    node = torch.arange(graph.shape[1], device=graph.device)
    reach = parent_masks(graph) | 2**node  # bit j of row i
    for k in node.tolist():
        reach = torch.where((reach >> k & 1).bool(), reach | reach[:, k, None], reach)
    return (reach[:, :, None] >> node & 1).bool()


def outer(rows: Bool[Tensor, "b d"], columns: Bool[Tensor, "b d"]) -> Bool[Tensor, "b d d"]:
    """Where both hold; as bytes, which torch multiplies out faster than booleans."""
    return (rows.view(torch.uint8)[:, :, None] & columns.view(torch.uint8)[:, None, :]).view(torch.bool)


def acyclic(graph: Bool[Tensor, "b d d"]) -> Bool[Tensor, " b"]:
    """Whether each graph has no cycle: no edge i -> j whose head is an ancestor of its tail."""
    return ~(graph & closure(graph)).flatten(1).any(1)


def parent_masks(graph: Bool[Tensor, "b d d"]) -> Int64[Tensor, "b d"]:
    """The parents of each node as a bit mask: sum over i of A[i, j] 2^i."""
    bits = 2 ** torch.arange(graph.shape[1], device=graph.device)
    return (graph * bits[:, None]).sum(1)


def mask_to_adjacency(masks: Int64[Tensor, "b d"]) -> Bool[Tensor, "b d d"]:
    """The graphs whose parent masks are given."""
    bits = torch.arange(masks.shape[1], device=masks.device)
    return (masks[:, None, :] >> bits[:, None] & 1).bool()


@cache
def all_dags(d: int) -> Bool[Tensor, "n d d"]:
    """All DAGs over d nodes, by number of edges, then by their edges read as a number. Not to be written to.

    Raises InputError for d over 5.
    """
    if not 1 <= d <= MAX_LISTED:
        raise InputError(f"the graphs of {d} nodes are too many to list (at most {MAX_LISTED}): use a sampler")
    upper, lower = torch.triu_indices(d, d, 1)
    pairs = len(upper)
    way = torch.arange(3**pairs)[:, None] // 3 ** torch.arange(pairs) % 3  # none, forward or backward, for each pair
    graph = torch.zeros(len(way), d, d, dtype=torch.bool)
    graph[:, upper, lower], graph[:, lower, upper] = way == 1, way == 2
    graph = graph[acyclic(graph)]
    order = graph_codes(graph) + (graph.flatten(1).sum(1) << d * d)
    return graph[order.argsort()]


def graph_codes(graph: Bool[Tensor, "b d d"]) -> Int64[Tensor, " b"]:
    """Each graph as one number, the sum over its edges of 2^(i*d + j); for d up to 7."""
    d = graph.shape[1]
    return (graph.flatten(1) * 2 ** torch.arange(d * d, device=graph.device)).sum(1)


def markov_classes(graph: Bool[Tensor, "b d d"]) -> Int64[Tensor, " b"]:
    """The Markov equivalence class of each graph, numbered from 0: same skeleton and same v-structures.

    Verma and Pearl (1990). A v-structure is i -> j <- k with i and k not adjacent.
    """
    joined = graph | graph.transpose(1, 2)
    apart = ~joined & ~torch.eye(graph.shape[1], dtype=torch.bool, device=graph.device)
    collider = graph[:, :, None, :] & graph[:, None, :, :] & apart[:, :, :, None]
    key = torch.cat([joined.flatten(1), collider.flatten(1)], 1)
    return torch.unique(key.to(torch.uint8), dim=0, return_inverse=True)[1]


@dataclass(frozen=True)
class DagState:
    """b graphs under construction.

    Attributes:
        problem: index of each row's problem.
        graph: A[i, j], the edge i -> j.
        ancestors: T[i, j], j is i or an ancestor of i.
        n: number of edges added.
    """

    problem: Int[Tensor, " b"]
    graph: Bool[Tensor, "b d d"]
    ancestors: Bool[Tensor, "b d d"]
    n: Int[Tensor, " b"]


@dataclass(frozen=True)
class Dags:
    """DAGs over d nodes. A move adds an edge; one may stop at any time, and must when nothing can be added.

    Attributes:
        d: number of nodes.
        required: edges that every graph has; it starts from them.
        forbidden: edges that no graph has.
        max_parents: most parents of a node.
        max_edges: most edges of a graph, the required ones included.
        names: of the nodes, for people; their numbers by default.

    Raises:
        InputError: constraints that contradict each other, with the edges that do.
    """

    d: int
    required: tuple[Edge, ...] = ()
    forbidden: tuple[Edge, ...] = ()
    max_parents: int | None = None
    max_edges: int | None = None
    names: tuple[str, ...] = ()
    n_stops: int = 1

    def __post_init__(self) -> None:
        if not 1 <= self.d <= MAX_NODES:
            raise InputError(f"a graph has 1 to {MAX_NODES} nodes, not {self.d}")
        if self.names and len(set(self.names)) != self.d:
            raise InputError(f"names must be {self.d} different words, one a node, not {', '.join(self.names)}")
        check_edges(self)

    @property
    def max_moves(self) -> int:
        """Edges that can be added, at most: those of a complete order, within the limits."""
        most = sum(min(k, self.max_parents if self.max_parents is not None else k) for k in range(self.d))
        if self.max_edges is not None:
            most = min(most, self.max_edges)
        return most - len(set(self.required))

    @property
    def n_moves(self) -> int:
        """Ordered pairs of nodes; those of a node with itself are never legal."""
        return self.d * self.d

    @property
    def n_features(self) -> int:
        """One a pair."""
        return self.d * self.d

    def features(self, s: DagState) -> Float[Tensor, "b f"]:
        """1 for each edge."""
        return s.graph.flatten(1).float()

    def name(self, node: int) -> str:
        """How people call a node."""
        return self.names[node] if self.names else str(node)

    def edge(self, i: int, j: int) -> str:
        """An edge in words."""
        return f"{self.name(i)} -> {self.name(j)}"

    # -- the process --------------------------------------------------------------------------------------------------

    def start(self, problem: Int[Tensor, " b"]) -> DagState:
        """b graphs of the required edges alone."""
        graph = edges_to_graph(self.required, self.d, problem.device).expand(len(problem), -1, -1)
        return DagState(problem, graph, closure(graph[:1]).expand(len(problem), -1, -1), torch.zeros_like(problem))

    def menu(self, s: DagState) -> Menu:
        """Every edge that closes no cycle and keeps the limits, or the stop."""
        legal = ~(s.graph | s.ancestors)
        if self.forbidden:
            legal &= ~edges_to_graph(self.forbidden, self.d, legal.device)
        if self.max_parents is not None:
            legal &= (s.graph.sum(1) < self.max_parents)[:, None, :]
        if self.max_edges is not None:
            legal &= (s.n < self.max_edges - len(set(self.required)))[:, None, None]
        legal = legal.flatten(1)
        must = torch.where(legal.view(torch.uint8).amax(1).bool(), CHOOSE, MUST_STOP)  # faster than any()
        return Menu(legal, torch.ones_like(must, dtype=torch.bool), must)

    def step(self, s: DagState, move: Int[Tensor, " b"]) -> DagState:
        """Add one edge a row, and what it makes ancestors of what."""
        row = torch.arange(len(move), device=move.device)
        tail, head = move // self.d, move % self.d
        graph = s.graph.flatten(1).scatter(1, move[:, None], True).view_as(s.graph)
        below, above = s.ancestors[row, :, head], s.ancestors[row, tail]
        return DagState(s.problem, graph, s.ancestors | outer(below, above), s.n + 1)

    def take(self, s: DagState, index: Tensor) -> DagState:
        """Rows ``index``."""
        return DagState(s.problem[index], s.graph[index], s.ancestors[index], s.n[index])

    def replay(self, rollouts: Rollouts, upto: Int[Tensor, " b"]) -> DagState:
        """The graphs after the first ``upto`` moves."""
        graph = adjacency(rollouts, self.d, self.required, upto)
        return DagState(rollouts.problem, graph, closure(graph), upto)

    def log_pb(self, s: DagState) -> Float[Tensor, " b"]:
        """Any edge that was added may have been the last: -log n."""
        return -s.n.clamp_min(1).double().log()

    # -- identity, and lists -----------------------------------------------------------------------------------------

    def graphs(self, rollouts: Rollouts) -> Bool[Tensor, "b d d"]:
        """The finished graph of each row, required edges included."""
        return adjacency(rollouts, self.d, self.required)

    def keys(self, rollouts: Rollouts) -> list[tuple[int, ...]]:
        """The sorted edges, required ones included, then the stop (as in strings, -1)."""
        fixed = sorted({i * self.d + j for i, j in self.required})
        each = zip(rollouts.moves.tolist(), rollouts.n.tolist(), strict=True)
        return [(*sorted([*fixed, *z[:k]]), -1) for z, k in each]

    def show(self, rollouts: Rollouts) -> list[str]:
        """Each graph in words: its edges."""
        return [", ".join(self.edge(*divmod(e, self.d)) for e in k[:-1]) or "no edges" for k in self.keys(rollouts)]

    def enumerate(self) -> Bool[Tensor, "n d d"]:
        """Every graph of the space once, in the order of :func:`all_dags`. Raises InputError for d over 5."""
        graph = all_dags(self.d)
        keep = torch.ones(len(graph), dtype=torch.bool)
        for i, j in self.required:
            keep &= graph[:, i, j]
        for i, j in self.forbidden:
            keep &= ~graph[:, i, j]
        if self.max_parents is not None:
            keep &= graph.sum(1).amax(1) <= self.max_parents
        if self.max_edges is not None:
            keep &= graph.flatten(1).sum(1) <= self.max_edges
        return graph[keep]


def edges_to_graph(edges: Iterable[Edge], d: int, device: torch.device | str | None = None) -> Bool[Tensor, "1 d d"]:
    """One graph of the given edges."""
    graph = torch.zeros(1, d, d, dtype=torch.bool)
    for i, j in edges:
        graph[0, i, j] = True
    return graph.to(device) if device is not None else graph


def adjacency(
    rollouts: Rollouts, d: int, required: Sequence[Edge] = (), upto: Int[Tensor, " b"] | None = None
) -> Bool[Tensor, "b d d"]:
    """The graph of each row after its first ``upto`` moves (all by default), ``required`` edges included."""
    n = rollouts.n if upto is None else upto
    graph = edges_to_graph(required, d, n.device).repeat(len(n), 1, 1).flatten(1)
    inside = torch.arange(rollouts.moves.shape[1], device=n.device) < n[:, None]
    row, at = inside.nonzero().unbind(1)
    graph[row, rollouts.moves[row, at]] = True
    return graph.view(-1, d, d)


def rollouts_of(space: Dags, graph: Bool[Tensor, "b d d"], problem: int = 0) -> Rollouts:
    """One path to each given graph: its edges in the order of their numbers. What a listed target is valued on."""
    added = (graph & ~edges_to_graph(space.required, space.d, graph.device)).flatten(1)
    n = added.sum(1)
    t = int(n.max()) if len(n) else 0
    moves = (~added).to(torch.int8).argsort(dim=1, stable=True)[:, :t]
    here = torch.arange(t + 1, device=n.device)
    inside = here[1:] <= n[:, None]
    back = torch.where(inside, -here[1:].clamp_min(1).double().log(), 0.0)
    blank = back.new_zeros(len(n), t + 1)
    return Rollouts(
        problem=torch.full_like(n, problem), moves=torch.where(inside, moves, 0), kind=(inside * FREE).to(torch.int8),
        n=n, stop=torch.zeros_like(n), can_stop=here <= n[:, None], log_q=blank[:, :t], log_stop=blank[:, :, None],
        log_b=blank, log_pb=back,
    )  # fmt: skip


def check_edges(space: Dags) -> None:
    """Refuse constraints that no graph can meet, and name the edges that contradict each other."""
    required, d = sorted(set(space.required)), space.d
    for i, j in (*required, *space.forbidden):
        if not (0 <= i < d and 0 <= j < d):
            raise InputError(f"the edge {i} -> {j} names a node outside 0 to {d - 1}")
    named = [space.edge(i, j) for i, j in required]
    for i, j in required:
        if (i, j) in set(space.forbidden):
            raise InputError(f"the edge {space.edge(i, j)} is both required and forbidden: drop one of the two")
    graph = edges_to_graph(required, d)
    around = graph & closure(graph)
    if around.any():
        loop = ", ".join(space.edge(i, j) for _, i, j in around.nonzero().tolist())
        raise InputError(f"the required edges {loop} lie on a cycle: drop one of them")
    if space.max_edges is not None and len(required) > space.max_edges:
        raise InputError(f"{len(required)} edges are required ({', '.join(named)}), and max_edges is {space.max_edges}")
    for j, parents in enumerate(graph[0].sum(0).tolist()):
        if space.max_parents is not None and parents > space.max_parents:
            into = ", ".join(space.edge(i, k) for i, k in required if k == j)
            raise InputError(f"{parents} parents are required ({into}), and max_parents is {space.max_parents}")
