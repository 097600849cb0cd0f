"""Consistent worlds: what a model believes, statement by statement, made into one posterior over what can be true.

A world A says of each statement whether it is true. Beliefs are asked one by one and may contradict each other;
constraints say which worlds are legal:

    p(A) = 1/Z  prod_i p_i^A_i (1 - p_i)^(1 - A_i)    on legal worlds, 0 elsewhere
    Z    = mass that independent beliefs give to legal worlds;  1 - Z is the inconsistency mass

Constraints on a relation hold among the statements that are listed: a chain a, b, c whose statement about (a, c) is
missing is not constrained by transitivity. Every constraint becomes clauses ("at least one of these literals"), but
for acyclic ones, which are checked as graphs.

Assumption: given the constraints, beliefs are independent pieces of evidence. Related: BeliefBank (weighted MaxSAT:
the best world only) and LoCo-LM (arXiv:2409.13724, training); here the answer is the whole posterior.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import permutations

from retrodict.errors import InputError, nearest

Literal = tuple[int, bool]
"""A statement's index, and what it must be."""
Clause = tuple[Literal, ...]


@dataclass(frozen=True)
class Belief:
    """One statement.

    Attributes:
        says: the statement in words.
        p: probability that the model gives it, asked alone; 0 and 1 are hard.
        relation, a, b: where it says that a relation holds from a to b.
        truth: whether it is true, where that is known; calibration reads it.
    """

    says: str
    p: float = 0.5
    relation: str = ""
    a: str = ""
    b: str = ""
    truth: bool | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.p <= 1:
            raise InputError(f"the belief {self.says!r} has p = {self.p}; a probability lies between 0 and 1")


@dataclass(frozen=True)
class Constraint:
    """A rule on worlds: ``kind`` is one of RULES, ``on`` the relation it is about, or the statements."""

    kind: str
    on: tuple[str, ...]

    def __post_init__(self) -> None:
        if self.kind not in RULES:
            raise InputError(f"unknown constraint {self.kind!r}{nearest(self.kind, RULES)}")
        want = 1 if self.kind in OF_RELATION else 2
        if len(self.on) != want:
            told = "one relation" if want == 1 else "two statements"
            raise InputError(f"{self.kind} is about {told}, not {len(self.on)}: {', '.join(self.on)}")

    @property
    def name(self) -> str:
        """As people read it: ``acyclic(father)``, ``negation(a | b)``."""
        return f"{self.kind}({' | '.join(self.on)})"


@dataclass(frozen=True)
class Grounded:
    """A constraint on given statements: clauses, or (acyclic) the edges among ``nodes`` nodes by statement index."""

    constraint: Constraint
    clauses: tuple[Clause, ...] = ()
    edges: tuple[tuple[int, int, int], ...] = ()
    nodes: int = 0

    @property
    def variables(self) -> frozenset[int]:
        """Statements it reads."""
        return frozenset(i for c in self.clauses for i, _ in c) | frozenset(i for i, _, _ in self.edges)


Pairs = dict[tuple[str, str], int]
"""Index of the statement that a relation holds from a to b."""


def _antisymmetric(at: Pairs) -> list[Clause]:
    return [((i, False), (at[b, a], False)) for (a, b), i in at.items() if a < b and (b, a) in at]


def _symmetric(at: Pairs) -> list[Clause]:
    return [((i, False), (at[b, a], True)) for (a, b), i in at.items() if a != b and (b, a) in at]


def _transitive(at: Pairs) -> list[Clause]:
    after: dict[str, list[str]] = {}
    for a, b in at:
        after.setdefault(a, []).append(b)
    return [((at[a, b], False), (at[b, c], False), (at[a, c], True)) for a, b in at for c in after.get(b, ())
            if len({a, b, c}) == 3 and (a, c) in at]  # fmt: skip


def _functional(at: Pairs) -> list[Clause]:
    return [((i, False), (j, False)) for (a, _), i in at.items() for (c, _), j in at.items() if a == c and i < j]


def _inverse(at: Pairs) -> list[Clause]:
    return _functional({(b, a): i for (a, b), i in at.items()})


OF_RELATION: dict[str, Callable[[Pairs], list[Clause]] | None] = {
    "acyclic": None,  # a graph, not clauses
    "transitive": _transitive,
    "antisymmetric": _antisymmetric,
    "symmetric": _symmetric,
    "functional": _functional,
    "inverse_functional": _inverse,
}
"""Rules on a relation. functional: each a has at most one b; inverse_functional: each b has at most one a."""
OF_STATEMENTS: dict[str, Callable[[int, int], list[Clause]]] = {
    "negation": lambda i, j: [((i, True), (j, True)), ((i, False), (j, False))],
    "exclusive": lambda i, j: [((i, False), (j, False))],
    "implies": lambda i, j: [((i, False), (j, True))],
}
"""Rules on two statements. negation: exactly one is true; exclusive: at most one."""
RULES = (*OF_RELATION, *OF_STATEMENTS)


def ground(beliefs: Sequence[Belief], constraint: Constraint) -> Grounded:
    """A constraint on these statements. Raises InputError for a relation or statement that is not among them."""
    if constraint.kind in OF_STATEMENTS:
        at = {b.says: i for i, b in enumerate(beliefs)}
        for says in constraint.on:
            if says not in at:
                raise InputError(f"{constraint.kind}: no belief says {says!r}{nearest(says, at)}")
        i, j = (at[says] for says in constraint.on)
        return Grounded(constraint, tuple(OF_STATEMENTS[constraint.kind](i, j)))
    relation = constraint.on[0]
    pairs: Pairs = {(b.a, b.b): i for i, b in enumerate(beliefs) if b.relation == relation}
    if not pairs:
        known = sorted({b.relation for b in beliefs if b.relation})
        raise InputError(f"{constraint.kind}: no belief is about the relation {relation!r}{nearest(relation, known)}")
    rule = OF_RELATION[constraint.kind]
    if rule is not None:
        return Grounded(constraint, tuple(rule(pairs)))
    number = {e: k for k, e in enumerate(dict.fromkeys(e for pair in pairs for e in pair))}
    return Grounded(constraint, (), tuple((i, number[a], number[b]) for (a, b), i in pairs.items()), len(number))


def check(beliefs: Sequence[Belief]) -> None:
    """Refuse a statement, or a pair of a relation, that stands twice."""
    if not beliefs:
        raise InputError("no beliefs; give at least one statement")
    for key, what in ((lambda b: b.says, "statement"), (lambda b: (b.relation, b.a, b.b), "pair")):
        seen = set()
        for belief in beliefs:
            if what == "pair" and not belief.relation:
                continue
            if key(belief) in seen:
                raise InputError(f"the {what} of {belief.says!r} stands twice; drop one")
            seen.add(key(belief))


def among(relation: str, says: str, entities: Sequence[str]) -> list[Belief]:
    """A belief for every ordered pair of entities; ``says`` is a template of {a} and {b}."""
    return [Belief(says.format(a=a, b=b), 0.5, relation, a, b) for a, b in permutations(entities, 2)]
