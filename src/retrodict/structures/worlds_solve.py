"""The posterior over consistent worlds: listed where it can be, thinned without bias where it cannot.

Statements that no chain of constraints joins are independent given the constraints, so worlds are built component by
component: Z is a product. Within one, statements are decided one after the other; partial worlds that break a
constraint are dropped as soon as its last statement is decided. While no more than ``most`` partial worlds stand, that
is enumeration, exact. Beyond, each of several runs keeps ``particles`` of them by Fearnhead and Clifford's (2003)
resampling without replacement, whose new weights have the old ones' expectation:

    E[Z-hat] = Z, and E[weight of A] = its share of Z for every legal A, at every number of particles

Marginals are ratios of such sums over the pooled runs (bias O(1/particles)). Worlds that no run met leave no mark.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from retrodict.errors import InputError, ZeroWeights
from retrodict.numerics import NEG_INF, jackknife_log_mean, log_mean_exp
from retrodict.rng import generator
from retrodict.samplers.resampling import without_replacement
from retrodict.spaces.dags import acyclic
from retrodict.structures.worlds import Belief, Constraint, Grounded, check, ground

MOST = 100_000
"""Partial worlds up to which a component is listed."""
PARTICLES = 10_000
"""Partial worlds that each run keeps beyond."""


@dataclass(frozen=True)
class Component:
    """Legal worlds of statements that constraints join.

    Attributes:
        statements: their indices.
        worlds: distinct legal truth assignments (a world met by several runs stands once a run).
        log_w: log weights, which sum to Z (its estimate); runs share them equally.
        runs: log Z-hat of each run; one, exact, where the component was listed.
    """

    statements: tuple[int, ...]
    worlds: Bool[Tensor, "m n"]
    log_w: Float[Tensor, " m"]
    runs: Float[Tensor, " r"]

    @property
    def exact(self) -> bool:
        """Whether every legal world is here."""
        return len(self.runs) == 1

    @property
    def log_z(self) -> float:
        """log of the mass of legal worlds."""
        return float(log_mean_exp(self.runs, 0))

    @property
    def error(self) -> float:
        """Jackknife standard error of log Z over runs; 0 where it is exact."""
        return 0.0 if self.exact else float(jackknife_log_mean(self.runs)[1])

    @property
    def marginals(self) -> Float[Tensor, " n"]:
        """Posterior probability of each of its statements."""
        return self.log_w.softmax(0) @ self.worlds.double()


@dataclass(frozen=True)
class Worlds:
    """The posterior over worlds: a product over components."""

    beliefs: tuple[Belief, ...]
    constraints: tuple[Constraint, ...]
    components: tuple[Component, ...]

    @property
    def exact(self) -> bool:
        """Whether every component was listed."""
        return all(c.exact for c in self.components)

    @property
    def log_z(self) -> float:
        """log of the mass that independent beliefs give to legal worlds."""
        return math.fsum(c.log_z for c in self.components)

    @property
    def log_z_error(self) -> float:
        """Its standard error, 0 where exact."""
        return math.hypot(*(c.error for c in self.components))

    @property
    def inconsistency(self) -> float:
        """1 - Z: the mass of worlds that break a constraint."""
        return -math.expm1(min(0.0, self.log_z))

    @property
    def before(self) -> Float[Tensor, " n"]:
        """What was believed of each statement alone."""
        return torch.tensor([b.p for b in self.beliefs], dtype=torch.float64)

    @property
    def after(self) -> Float[Tensor, " n"]:
        """Posterior probability of each statement."""
        out = torch.empty(len(self.beliefs), dtype=torch.float64)
        for c in self.components:
            out[list(c.statements)] = c.marginals
        return out

    def top(self, k: int = 3) -> list[tuple[float, list[bool]]]:
        """The k most probable worlds with their probability (among those met), best first."""
        best: list[tuple[float, dict[int, bool]]] = [(0.0, {})]
        for c in self.components:
            worlds, place = torch.unique(c.worlds, dim=0, return_inverse=True)
            share = torch.zeros(len(worlds), dtype=torch.float64).index_add(0, place, c.log_w.softmax(0)).log()
            some = share.topk(min(k, len(worlds)))
            each = [(float(x), dict(zip(c.statements, worlds[i].tolist(), strict=True)))
                    for x, i in zip(some.values, some.indices.tolist(), strict=True)]  # fmt: skip
            best = sorted(((x + y, {**v, **w}) for x, v in best for y, w in each), key=lambda t: -t[0])[:k]
        return [(math.exp(x), [w[i] for i in range(len(self.beliefs))]) for x, w in best]

    def sample(self, n: int, seed: int = 0) -> Bool[Tensor, "n s"]:
        """n worlds drawn from the posterior."""
        out, gen = torch.empty(n, len(self.beliefs), dtype=torch.bool), generator(seed)
        for c in self.components:
            row = torch.multinomial(c.log_w.softmax(0), n, replacement=True, generator=gen)
            out[:, list(c.statements)] = c.worlds[row]
        return out


def posterior(
    beliefs: Sequence[Belief],
    constraints: Sequence[Constraint],
    *,
    most: int = MOST,
    particles: int = PARTICLES,
    runs: int = 4,
    seed: int = 0,
) -> Worlds:
    """Worlds that keep the constraints, in proportion to the beliefs.

    Args:
        beliefs: statements with probabilities.
        constraints: rules that every world keeps.
        most: partial worlds up to which a component is listed; beyond, it is sampled.
        particles, runs: of sampled components.
        seed: one seed, one result.

    Raises:
        InputError: statements that stand twice, a constraint on none of them, or rules and certain beliefs that
            contradict each other, which are named.
        ZeroWeights: no run met a legal world of a component too large to list.
    """
    check(beliefs)
    rules = [ground(beliefs, c) for c in constraints]
    parts = []
    for k, (statements, inside) in enumerate(components(beliefs, rules)):
        part = _listed(beliefs, statements, inside, most)
        if part is None:
            part = _sampled(beliefs, statements, inside, particles, runs, seed, k)
        if not len(part.worlds):
            if part.exact:
                told = contradiction(beliefs, statements, inside, most)
                raise InputError(f"no world is left: {' and '.join(told)} contradict each other; drop or soften one")
            raise ZeroWeights(f"none of {runs} runs met a world of {len(statements)} statements that keeps "
                              f"{', '.join(r.constraint.name for r in inside)}; give more particles")  # fmt: skip
        parts.append(part)
    return Worlds(tuple(beliefs), tuple(constraints), tuple(parts))


def components(beliefs: Sequence[Belief], rules: Sequence[Grounded]) -> list[tuple[list[int], list[Grounded]]]:
    """Statements joined by clauses or graphs, in the order in which they are decided, with the rules on them."""
    parent = list(range(len(beliefs)))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    groups = [sorted({i for i, _ in clause}) for rule in rules for clause in rule.clauses]
    groups += [sorted({i for i, _, _ in rule.edges}) for rule in rules if rule.edges]
    for first, *rest in groups:
        for i in rest:
            parent[root(i)] = root(first)
    rank: dict[str, int] = {}
    for b in beliefs:
        for entity in (b.a, b.b):
            rank.setdefault(entity, len(rank))

    def late(i: int) -> tuple[int, int]:
        """All pairs among the first entities come before any pair of a later one: constraints close early."""
        return max(rank[beliefs[i].a], rank[beliefs[i].b]), i

    found: dict[int, list[int]] = {}
    for i in range(len(beliefs)):
        found.setdefault(root(i), []).append(i)
    out = []
    for members in found.values():
        inside = [part for rule in rules if len((part := _restricted(rule, set(members))).variables)]
        out.append((sorted(members, key=late), inside))
    return out


def _restricted(rule: Grounded, members: set[int]) -> Grounded:
    clauses = tuple(c for c in rule.clauses if c[0][0] in members)
    edges = rule.edges if rule.edges and rule.edges[0][0] in members else ()
    return Grounded(rule.constraint, clauses, edges, rule.nodes)


def _listed(beliefs: Sequence[Belief], order: list[int], rules: Sequence[Grounded], most: int) -> Component | None:
    found = _grow(beliefs, order, rules, most, None)
    if found is None:
        return None
    worlds, log_w = found
    return Component(tuple(order), worlds, log_w, log_w.logsumexp(0)[None])


def _sampled(
    beliefs: Sequence[Belief], order: list[int], rules: Sequence[Grounded], particles: int, runs: int, seed: int, k: int
) -> Component:
    if not (particles > 0 and runs > 1):
        raise InputError(f"sampling worlds needs particles and at least two runs, not {particles} and {runs}")
    found = [_grow(beliefs, order, rules, particles, generator(seed, "cpu", k, r)) for r in range(runs)]
    parts = [x for x in found if x is not None]
    log_z = torch.stack([w.logsumexp(0) for _, w in parts])
    return Component(tuple(order), torch.cat([x for x, _ in parts]), torch.cat([w for _, w in parts]) - math.log(runs),
                     log_z)  # fmt: skip


def _grow(
    beliefs: Sequence[Belief], order: list[int], rules: Sequence[Grounded], most: int, gen: torch.Generator | None
) -> tuple[Bool[Tensor, "m n"], Float[Tensor, " m"]] | None:
    """Decide statements one by one. Over ``most`` partial worlds: None, or with a generator, thinned to ``most``."""
    place = {i: k for k, i in enumerate(order)}
    clauses: dict[int, list[list[tuple[int, bool]]]] = {}
    for clause in (c for rule in rules for c in rule.clauses):
        local = [(place[i], want) for i, want in clause]
        clauses.setdefault(max(k for k, _ in local), []).append(local)
    graphs = [([(place[i], u, v) for i, u, v in rule.edges], rule.nodes) for rule in rules if rule.edges]
    worlds = torch.zeros(1, len(order), dtype=torch.bool)
    log_w = torch.zeros(1, dtype=torch.float64)
    for k, i in enumerate(order):
        p = torch.tensor([1 - beliefs[i].p, beliefs[i].p], dtype=torch.float64).log()
        worlds, log_w = worlds.repeat(2, 1), torch.cat([log_w + p[0], log_w + p[1]])
        worlds[len(worlds) // 2 :, k] = True
        keep = log_w > NEG_INF
        for clause in clauses.get(k, ()):
            keep &= torch.stack([worlds[:, j] == want for j, want in clause]).any(0)
        for edges, nodes in graphs:
            if any(j == k for j, _, _ in edges):
                keep &= _no_cycle(worlds, [e for e in edges if e[0] <= k], nodes, keep & worlds[:, k])
        worlds, log_w = worlds[keep], log_w[keep]
        if len(worlds) > most:
            if gen is None:
                return None
            worlds, log_w = _thinned(worlds, log_w, most, gen)
    return worlds, log_w


def _no_cycle(
    worlds: Bool[Tensor, "m n"], edges: list[tuple[int, int, int]], nodes: int, ask: Bool[Tensor, " m"]
) -> Bool[Tensor, " m"]:
    """Whether the edges that a world says are true close no cycle; only worlds in ``ask`` are looked at."""
    fine, rows = torch.ones(len(worlds), dtype=torch.bool), ask.nonzero().squeeze(1)
    k, u, v = torch.tensor(edges).unbind(1)
    for part in rows.split(20_000):
        graph = torch.zeros(len(part), nodes, nodes, dtype=torch.bool)
        graph[:, u, v] = worlds[part][:, k]
        fine[part] = acyclic(graph)
    return fine


def _thinned(
    worlds: Bool[Tensor, "m n"], log_w: Float[Tensor, " m"], most: int, gen: torch.Generator
) -> tuple[Bool[Tensor, "k n"], Float[Tensor, " k"]]:
    """``most`` of them without replacement, with new weights of the same expectation."""
    top = log_w.max()
    index, weight = without_replacement((log_w - top).exp()[None], most, gen)
    return worlds[index[0]], weight[0].log() + top


def contradiction(
    beliefs: Sequence[Belief], statements: Sequence[int], rules: Sequence[Grounded], most: int = MOST
) -> list[str]:
    """Rules and certain beliefs that contradict each other and of which none can be left out (deletion filter)."""
    soft = [Belief(b.says, 0.5, b.relation, b.a, b.b) for b in beliefs]
    sure: list[int | Grounded] = [i for i in statements if beliefs[i].p in (0.0, 1.0)]
    core: list[int | Grounded] = [*rules, *sure]

    def empty(items: Sequence[int | Grounded]) -> bool:
        here = list(soft)
        for i in items:
            if isinstance(i, int):
                here[i] = beliefs[i]
        found = _grow(here, list(statements), [r for r in items if isinstance(r, Grounded)], most, None)
        return found is not None and not len(found[0])

    for item in list(core):
        without = [x for x in core if x is not item]
        if empty(without):
            core = without
    return [f"{beliefs[x].says!r} (p = {beliefs[x].p:g})" if isinstance(x, int) else x.constraint.name for x in core]
