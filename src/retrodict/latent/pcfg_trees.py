"""Trees of a sentence under a known grammar: exact draws, the best tree, and the posterior as a policy.

Two ways to draw from p(tree | sentence), which share the chart and nothing else:

- top down (Goodman 1998, section 4.4): split the span of A into B and C with probability in proportion to
  p(A -> B C) beta(B, i, k) beta(C, k, j), from the root to the words;
- left to right, as a policy over shift and reduce: a move has probability in proportion to the weight of all trees
  that make it, p(rule) times what the rest may add (``charts.wanted_next``): log q is log p(tree | sentence).

``laws`` compares any policy with the posterior tree by tree: every tree of a sentence is listed, so there is no Monte
Carlo error in a total variation.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from retrodict.errors import InputError
from retrodict.latent.pcfg import PCFG, TreeTerm, leaves, log_evidence
from retrodict.numerics import NEG_INF, sample_categorical
from retrodict.particles import Particles
from retrodict.policies.base import FiniteStepper, over_menu
from retrodict.protocols import Policy, Problems
from retrodict.records import Menu, Rollouts, Trace, cat_rollouts
from retrodict.rng import generator
from retrodict.samplers.common import finish, positive
from retrodict.spaces.charts import Futures, Join, best, closure, inside, sums, wanted_first
from retrodict.spaces.enumerate import enumerate_objects
from retrodict.spaces.parses import Parses, ParseState
from retrodict.targets.algebra import Target


def grammar_of(target: Target) -> PCFG:
    """The grammar of a target over trees. Raises InputError for any other target."""
    term = target.factors.get("grammar")
    if not isinstance(term, TreeTerm) or len(target.factors) != 1:
        raise InputError("this needs a target of a grammar alone; build it with pcfg_target(grammar, sentences)")
    return term.pcfg


def sample_trees(target: Target, problem: Int[Tensor, " b"], gen: torch.Generator) -> Rollouts:
    """One exact posterior draw a row, top down."""
    return _top_down(target, problem, sums, gen)


def exact_trees(target: Target, n: int, seed: int) -> Particles:
    """n exact posterior draws of each sentence, as a sampler gives them: equal weights and log Z itself."""
    positive(n=n)
    began, m = time.perf_counter(), len(target.problems)
    rows = target.terms(sample_trees(target, torch.arange(m).repeat_interleave(n), generator(seed)))
    log_z = log_evidence(grammar_of(target), [p.context for p in target.problems])[:, None]
    return finish(target, rows, log_z.expand(m, n), log_z, Trace("exact trees", {"n": n, "seed": seed}), began)


def best_trees(target: Target) -> tuple[Rollouts, Float[Tensor, " m"]]:
    """The most probable tree of each sentence (Viterbi) and log p(tree, sentence)."""
    rows = _top_down(target, torch.arange(len(target.problems)), best, None)
    return rows, target.log_gamma(rows)


def _top_down(target: Target, problem: Int[Tensor, " b"], join: Join, gen: torch.Generator | None) -> Rollouts:
    """Rewrite spans from the root on, the last first; read backwards that is post-order. Without ``gen`` the best."""
    pcfg, space = grammar_of(target), target.space
    assert isinstance(space, Parses)
    s, b = len(space.labels), len(problem)
    beta = inside(pcfg.binary, leaves(pcfg.lexical, space.word[:, :-1]), join)
    n, row, most = space.lengths[problem], torch.arange(b), 2 * int(space.lengths.max()) - 1
    stack, depth = torch.zeros(b, space.longest + 2, 3, dtype=torch.long), torch.ones_like(problem)  # label, from, to
    stack[:, 0, 2] = n
    moves = torch.zeros(b, most, dtype=torch.long)
    for t in range(most):
        a, i, j = stack[row, (depth - 1).clamp_min(0)].unbind(1)
        move = torch.where(j - i > 1, s + a, a)
        moves[:, t] = move
        grow = ((j - i > 1) & (depth > 0)).nonzero().squeeze(1)
        if len(grow):
            p, top = problem[grow], depth[grow] - 1
            left, k, right = _split(pcfg.binary[a[grow]], beta[p], i[grow], j[grow], gen)
            stack[grow, top] = torch.stack([left, i[grow], k], 1)
            stack[grow, top + 1] = torch.stack([right, k, j[grow]], 1)
        depth = torch.where(depth > 0, depth + torch.where(j - i > 1, 1, -1), 0)
    back = (2 * n[:, None] - 2 - torch.arange(most)).clamp_min(0)
    return space.record(problem, moves.gather(1, back))


def _split(
    rule: Float[Tensor, "g s s"], beta: Float[Tensor, "g l1 l1 s"], i: Tensor, j: Tensor, gen: torch.Generator | None
) -> tuple[Tensor, Tensor, Tensor]:
    """(left symbol, where to split, right symbol) of spans i..j."""
    row, s, l1 = torch.arange(len(i)), rule.shape[1], beta.shape[1]
    left, right = beta[row, i], beta[row, :, j]  # [g, k, s]
    k = torch.arange(l1)
    inner = (k > i[:, None]) & (k < j[:, None])
    value = rule[:, None] + left[:, :, :, None] + right[:, :, None, :]
    value = value.masked_fill(~inner[:, :, None, None], NEG_INF).flatten(1)
    choice = value.argmax(1) if gen is None else sample_categorical(value, gen)
    return choice // s % s, choice // (s * s), choice % s


# -- the posterior as a policy ---------------------------------------------------------------------------------------


class ParsePosterior(FiniteStepper):
    """p(tree | sentence) as a policy: what a trained parser approximates, and a sampler of exact trees.

    It carries the numbers of the lowest m subtrees' stacks, m = 0 .. the depth, in a table of weights (``Futures``).
    """

    def __init__(self, target: Target) -> None:
        space = target.space
        assert isinstance(space, Parses)
        self.target, self.space, self.problems = target, space, target.problems
        pcfg = grammar_of(target)
        rule, leaf = pcfg.binary.exp(), leaves(pcfg.lexical, space.word)
        closed = closure(rule, inside(pcfg.binary, leaf[:, :-1]).exp())
        self.leaf = leaf.exp()
        self.futures = Futures(rule, closed, wanted_first(closed, space.root, len(space.labels), space.lengths))

    def on(self, problems: Problems) -> ParsePosterior:
        """The same grammar's posterior of other sentences."""
        return ParsePosterior(self.target.on(problems))

    def start(self, problem: Int[Tensor, " b"]) -> Int[Tensor, "b l1"]:
        """Empty stacks."""
        return problem[:, None].repeat(1, self.space.longest + 1)

    def start_at(self, rollouts: Rollouts, upto: Int[Tensor, " b"]) -> Int[Tensor, "b l1"]:
        """By stepping."""
        c = self.start(rollouts.problem)
        for i in range(int(upto.max()) if len(upto) else 0):
            on = (i < upto).nonzero().squeeze(1)
            rows = rollouts.take(on)
            c[on] = self.step(c[on], self.space.replay(rows, torch.full_like(on, i)), rows.moves[:, i])
        return c

    def step(self, c: Int[Tensor, "b l1"], s: ParseState, move: Int[Tensor, " b"]) -> Int[Tensor, "b l1"]:
        """The new top lies on the stack below it."""
        size = len(self.space.labels)
        at = (s.depth + torch.where(move < size, 0, -2))[:, None]
        return c.scatter(1, at + 1, self.futures.after(c.gather(1, at).squeeze(1), move % size)[:, None])

    def take(self, c: Int[Tensor, "b l1"], index: Tensor) -> Tensor:
        """Rows ``index``."""
        return c[index]

    def log_probs(
        self, c: Int[Tensor, "b l1"], s: ParseState, menu: Menu, raw: bool = False
    ) -> tuple[Float[Tensor, "b v"], Float[Tensor, "b s"]]:
        """A shift weighs p(A -> word) wanted(A), a reduce p(P -> B C) wanted(P) over what the two on top became.

        Both leave out the inside weight of what is on the stack, which all of a state's trees share. ``raw`` is the
        same.
        """
        row, below = torch.arange(len(s.depth)), (s.depth - 2).clamp_min(0)
        left, right = s.labels[row, below], s.labels[row, (s.depth - 1).clamp_min(0)]
        ahead = (s.shifted + 1).clamp_max(self.space.longest)
        shift = self.leaf[s.problem, s.shifted] * self.futures.at(c[row, s.depth], ahead)
        join = self.futures.rule[:, left, right].T * self.futures.at(c[row, below], s.shifted)
        weight = torch.cat([shift, join], 1)
        return over_menu(weight.log(), torch.zeros(len(row), 1, dtype=torch.float64), menu)


# -- exact laws ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Laws:
    """Every tree of every sentence, with its posterior log-probability and a policy's."""

    rows: Rollouts
    log_p: Float[Tensor, " r"]
    log_q: Float[Tensor, " r"]
    trees: Int[Tensor, " m"]

    @property
    def total_variation(self) -> Float[Tensor, " m"]:
        """1/2 sum |q - p| of each sentence."""
        each = (self.log_p.exp() - self.log_q.exp()).abs() / 2
        return torch.zeros(len(self.trees), dtype=torch.float64).index_add(0, self.rows.problem, each)


@torch.no_grad()
def laws(target: Target, policy: Policy | None = None) -> Laws:
    """The posterior by listing all trees, and the law of a policy over them (the posterior's own by default)."""
    assert isinstance(target.space, Parses)
    parts = [enumerate_objects(target.space, p) for p in range(len(target.problems))]
    rows = cat_rollouts(parts)
    value = target.log_gamma(rows)
    log_p = torch.cat([x - x.logsumexp(0) for x in value.split([len(r) for r in parts])])
    log_q = log_p
    if policy is not None:
        log_q = torch.cat([policy.score(x).log_q.double().sum(1) for x in _chunks(rows)])
    return Laws(rows, log_p, log_q, torch.tensor([len(r) for r in parts]))


def _chunks(rows: Rollouts, size: int = 4096) -> list[Rollouts]:
    return [rows.take(at) for at in torch.arange(len(rows)).split(size)]
