"""Twists on small targets: a table that can be any psi, the optimal one by enumeration, and the gates of any twist.

    psi*(x_1..t) = sum over endings of gamma / p(x_1..t)

With psi* in the table every run of SMC gives Z exactly. A random one leaves every sampler unbiased.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

import torch
from jaxtyping import Float
from torch import Tensor

from retrodict.guides.twist import BOUND, TwistGuide, hard_part
from retrodict.models.tabular import TabularLM
from retrodict.models.tiny import TinyLM
from retrodict.numerics import NEG_INF
from retrodict.objectives.table import TWISTS
from retrodict.policies.twisted import TwistedPolicy
from retrodict.records import Problem, Rollouts, Scores
from retrodict.rng import generator
from retrodict.samplers.importance import importance
from retrodict.samplers.smc import smc
from retrodict.spaces.enumerate import enumerate_objects
from retrodict.spaces.strings import Strings, StringState
from retrodict.targets.algebra import Target
from retrodict.targets.ready import continuation, including, infill, posterior, scored
from retrodict.targets.verifier import verifier
from retrodict.testing.bugs import Bug, KeepsTwist, _run
from retrodict.testing.gates import _conditional, _mh, _weighted
from retrodict.testing.oracle import Gate, enumerate_target, evidence_gates
from retrodict.testing.targets import Case
from retrodict.training.twist import twist_for

if TYPE_CHECKING:
    from retrodict.testing.testtime import Pair

# -- a table ----------------------------------------------------------------------------------------------------------


class TableHead:
    """log psi of each symbol after each prefix: one number each, float64. Reads its node from the last feature."""

    bound = BOUND

    def __init__(self, nodes: Mapping[tuple[int, ...], int], moves: int, stops: int) -> None:
        self.nodes, self.moves = nodes, moves
        self.psi = torch.zeros(len(nodes), moves + stops, dtype=torch.float64, requires_grad=True)

    def parameters(self) -> Mapping[str, Tensor]:
        """The table."""
        return {"psi": self.psi}

    def __call__(
        self, x: Tensor, left: Tensor, automaton: Tensor, about: Tensor, ids: Tensor | None = None,
        after: Tensor | None = None,
    ) -> tuple[Float[Tensor, "c k"], Float[Tensor, "c s"]]:  # fmt: skip
        """See ``TwistHead``."""
        rows = self.psi[x[:, -1].long()]
        move = rows[:, : self.moves]
        return move if ids is None else move.gather(1, ids), rows[:, self.moves :]


class TableTwist(TwistGuide):
    """A twist that knows every prefix by name."""

    def _nodes(self, problem: Tensor, tokens: Tensor, n: Tensor) -> Float[Tensor, " b"]:
        each = zip(problem.tolist(), tokens.tolist(), n.tolist(), strict=True)
        return torch.tensor([self.head.nodes[(m, *z[:k])] for m, z, k in each], dtype=torch.float64)

    def features(self, s: StringState, base: Any) -> Float[Tensor, "b e"]:
        """The model's state, and the node."""
        return torch.cat([super().features(s, base), self._nodes(s.problem, s.tokens, s.n)[:, None]], 1)

    def states(self, rollouts: Rollouts) -> Float[Tensor, "b t1 e"]:
        """The same of every prefix (past the end that of the whole)."""
        r = rollouts
        at = [self._nodes(r.problem, r.moves, r.n.clamp_max(i)) for i in range(r.moves.shape[1] + 1)]
        return torch.cat([super().states(r), torch.stack(at, 1)[:, :, None]], 2)

    def logits(self, x: Float[Tensor, "b e"]) -> Float[Tensor, "b v"]:
        """Without the node."""
        return super().logits(x[:, :-1])


def table_twist(target: Target) -> TableTwist:
    """psi = 1 in a table for every prefix of a small target."""
    space = cast(Strings, target.space)
    nodes: dict[tuple[int, ...], int] = {}
    for m in range(len(target.problems)):
        r = enumerate_objects(space, m)
        for z, n in zip(r.moves.tolist(), r.n.tolist(), strict=True):
            for i in range(n + 1):
                nodes.setdefault((m, *z[:i]), len(nodes))
    head = TableHead(nodes, space.vocab_size, space.n_stops)
    return TableTwist(target.prior, head, hard_part(target.guide), target.betas.get("prior", 1.0))


def optimal(target: Target) -> Float[Tensor, "nodes a"]:
    """log psi* of every symbol after every prefix, by enumeration; ``BOUND`` below where it is zero."""
    twist = table_twist(target)
    head, v = twist.head, cast(Strings, target.space).vocab_size
    out = torch.full(head.psi.shape, NEG_INF, dtype=torch.float64)
    for m in range(len(target.problems)):
        r = enumerate_objects(target.space, m)
        gamma = target.log_gamma(r).double()
        raw = cast(Any, target.prior).score(r, raw=True)
        beta = target.betas.get("prior", 1.0)
        path = beta * torch.cat([raw.log_q.new_zeros(len(r), 1), raw.log_q.cumsum(1)], 1).double()
        for k, (z, n, s) in enumerate(zip(r.moves.tolist(), r.n.tolist(), r.stop.tolist(), strict=True)):
            if gamma[k] == NEG_INF:
                continue
            for i in range(n):
                cell = (head.nodes[(m, *z[:i])], z[i])
                out[cell] = torch.logaddexp(out[cell], gamma[k] - path[k, i + 1])
            cell = (head.nodes[(m, *z[:n])], v + s)
            out[cell] = gamma[k] - path[k, n] - beta * float(raw.log_stop[k, n, s])
    return out.clamp_min(-BOUND)


def set_table(twist: TwistGuide, value: Float[Tensor, "nodes a"]) -> None:
    """Write a table."""
    with torch.no_grad():
        twist.head.psi.copy_(value)


# -- gradients by enumeration -----------------------------------------------------------------------------------------


def all_rows(target: Target, twist: TwistGuide) -> tuple[Rollouts, Scores, Float[Tensor, " b"]]:
    """Every path of problem 0 once, as if drawn from the uniform law over paths: its normalised weights are exact.

    log_b is that law, symbol by symbol: the share of paths through a prefix that take the next symbol.
    """
    r = enumerate_objects(target.space, 0)
    each = [(*z[:n], -1 - s) for z, n, s in zip(r.moves.tolist(), r.n.tolist(), r.stop.tolist(), strict=True)]
    count: dict[tuple[int, ...], int] = {}
    for key in each:
        for i in range(len(key) + 1):
            count[key[:i]] = count.get(key[:i], 0) + 1
    log_b = torch.zeros(len(r), r.moves.shape[1] + 1, dtype=torch.float64)
    for k, key in enumerate(each):
        for i in range(len(key)):
            log_b[k, i] = torch.tensor(count[key[: i + 1]] / count[key[:i]], dtype=torch.float64).log()
    r = replace(r, log_b=log_b)
    return r, TwistedPolicy(twist).score(r, grad=True), target.log_gamma(r).double()


def gradient(twist: TwistGuide, loss: Tensor) -> Float[Tensor, "nodes a"]:
    """Of a loss by the table."""
    return torch.autograd.grad(loss, twist.head.psi, retain_graph=True, allow_unused=True)[0]


def ctl_gradient(target: Target, twist: TwistGuide) -> Float[Tensor, "nodes a"]:
    """E_pi_t - E_sigma of grad log psi_t, a mean over t, symbol by symbol in plain loops (problem 0, no hard guide)."""
    r = enumerate_objects(target.space, 0)
    raw = cast(Any, target.prior).score(r, raw=True)
    v, nodes, beta = cast(Strings, target.space).vocab_size, twist.head.nodes, target.betas.get("prior", 1.0)
    table, gamma = twist.head.psi.detach(), target.log_gamma(r).double().exp()
    columns = r.moves.shape[1] + 1
    out = torch.zeros_like(table)
    for t in range(columns):
        mass: dict[tuple[int, ...], tuple[float, tuple[int, int] | None]] = {}
        positive: dict[tuple[int, ...], float] = {}
        for k, (z, n, s) in enumerate(zip(r.moves.tolist(), r.n.tolist(), r.stop.tolist(), strict=True)):
            if n < t:  # stopped before: its own mass, and no psi
                mass[(*z[:n], -1 - s)] = (float(gamma[k]), None)
                continue
            key = tuple(z[: t + 1]) if t < n else (*z[:n], -1 - s)
            cell = (nodes[(0, *z[:t])], z[t] if t < n else v + s)
            log_p = float(beta * raw.log_q[k, : min(t + 1, n)].sum())
            log_p += beta * float(raw.log_stop[k, n, s]) if t == n else 0.0
            mass[key] = (float(torch.tensor(log_p).exp() * table[cell].exp()), cell)
            positive[key] = positive.get(key, 0.0) + float(gamma[k])
        whole, z_all = sum(x for x, _ in mass.values()), float(gamma.sum())
        for key, (value, cell) in mass.items():
            if cell is not None:
                out[cell] += (value / whole - positive[key] / z_all) / columns
    return out


# -- the gates --------------------------------------------------------------------------------------------------------

ROWS = 1024
"""Rows behind one estimate of a gradient: normalised weights are biased O(1/ROWS), far below the noise."""


def gradient_gates(loss_of: Callable[..., tuple[Tensor, dict[str, float]]], seeds: int) -> list[Gate]:
    """CTL's gradient from rows of the twist's own proposal, along the enumerated one, over independent seeds."""
    target = _story("own_stop")
    twist = table_twist(target)
    set_table(twist, 0.7 * torch.randn(twist.head.psi.shape, generator=generator(3), dtype=torch.float64))
    truth, policy = ctl_gradient(target, twist), TwistedPolicy(twist)
    along = truth / truth.norm()
    found = []
    for seed in range(min(12, max(seeds // 10, 5))):
        r = policy.sample(torch.zeros(ROWS, dtype=torch.long), generator(seed))
        loss, _ = loss_of(policy.score(r, grad=True), r, target.log_gamma(target.terms(r)))
        found.append(float((gradient(twist, loss) * along).sum()))
    each = torch.tensor(found, dtype=torch.float64)
    z = (each.mean() - truth.norm()) / (each.std() / len(each) ** 0.5)
    return [Gate("|z| of the gradient", float(z.abs()), 4.5, f"{len(each)} x {ROWS} rows")]


def unweighted_positives(scores: Scores, rollouts: Rollouts, log_gamma: Tensor) -> tuple[Tensor, dict[str, float]]:
    """CTL that takes its samples for draws of the posterior."""
    inside = torch.arange(rollouts.log_b.shape[1]) <= rollouts.n[:, None]
    return TWISTS["ctl"](scores, rollouts, torch.where(inside, rollouts.log_b, 0.0).sum(1))


def raw_negatives(scores: Scores, rollouts: Rollouts, log_gamma: Tensor) -> tuple[Tensor, dict[str, float]]:
    """CTL whose negatives are rows of q as they are, not reweighted to p psi."""
    assert scores.log_psi is not None
    inside = torch.arange(rollouts.log_b.shape[1]) <= rollouts.n[:, None]
    w = (log_gamma - torch.where(inside, rollouts.log_b, 0.0).sum(1)).softmax(0)
    v = inside / inside.sum(0)
    return torch.where(inside, (v - w[:, None]) * scores.log_psi, 0.0).sum(0).mean(), {}


def _story(limit: str) -> Target:
    lm = TabularLM.random(".ab ", order=3, seed=1)
    return infill(lm, "ab", "ba", stop=".", max_tokens=3, limit=limit, join="", lookahead=None)


def _count_a(texts: Any, rows: Any) -> list[float]:
    return [0.1 + 0.2 * min(t.count("a"), 4) for t in texts]


def random_twist(target: Target, seed: int = 0, scale: float = 0.6) -> TwistGuide:
    """A head that knows nothing, of some nats' spread."""
    twist = twist_for(target, rank=8, hidden=8, seed=seed)
    gen = generator(seed + 1)
    with torch.no_grad():
        for name in ("token", "level", "stop", "next"):
            p = twist.head.parameters()[name]
            p.copy_(scale / max(1, p.shape[0] // 2) ** 0.5 * torch.randn(p.shape, generator=gen).to(p))
    return twist


def twist_cases(quick: bool) -> list[Case]:
    """Small targets under every limit, with hard constraints, verifiers, several problems, two stops, a transformer."""
    lm = TabularLM.random(".ab ", order=3, seed=1, scale=0.7)
    two = TabularLM.random(".!ab ", order=2, seed=2, scale=0.6)
    ids = lm.tokenizer.encode
    several = [Problem(tuple(ids(x)), tuple(ids(y)), name=f"{x}|{y}") for x, y in (("a", "b "), ("ab b", "aa"))]
    ask = [Problem((2,), (2, 3), name="two stops")]
    made = {
        "infill, own_stop": lambda: infill(lm, "ab", "ba", stop=".", max_tokens=4, limit="own_stop", join="",
                                           lookahead=None),
        "including, force": lambda: including(lm, "a ", contain=["ab"], avoid=["ba"], stop=".", max_tokens=4),
        "tempered, force": lambda: continuation(lm, "a", temperature=0.5, stop=".", max_tokens=4, min_tokens=1),
        "infill, exact": lambda: infill(lm, "ab", "ba", stop=".", max_tokens=4, limit="exact", join="", lookahead=None),
        "scored, own_stop": lambda: scored(lm, "a", verifier(_count_a), stop=".", max_tokens=4, limit="own_stop"),
        "batch of problems": lambda: posterior(lm, several, stop=".", max_tokens=3, limit="own_stop", lookahead=None),
        "two stops, likelihood^0.5": lambda: posterior(two, ask, stop=(0, 1), max_tokens=3, lookahead=None,
                                                       limit="own_stop").with_betas(likelihood=0.5),
        "transformer": lambda: infill(TinyLM(".ab ", seed=3, dtype=torch.float64), "ab", "ba", stop=".", max_tokens=3,
                                      join="", lookahead=None),
    }  # fmt: skip
    keep = list(made)[: 2 if quick else None]
    out = []
    for name in keep:
        target = made[name]()
        out.append(Case(f"twist: {name}", target.with_guide(random_twist(target))))
    return out


def pairs(quick: bool) -> list[Pair]:
    """A random twist as the guide of SMC, and as a proposal of importance sampling, conditional SMC and MH."""
    from retrodict.testing.testtime import Pair

    out = []
    for case in twist_cases(quick):
        proposes = replace(case, policy=TwistedPolicy(cast(TwistGuide, case.target.guide)))
        out.append(Pair("smc, twist", case, _weighted(smc)))
        out.append(Pair("importance, twist", proposes, _weighted(importance)))
        if not quick:
            out.append(Pair("conditional smc, twist", case, _conditional))
            out.append(Pair("mh, twist", proposes, _mh("suffix", 6)))
    return out


def _kept(seeds: int) -> list[Gate]:
    target = _story("own_stop")
    target = target.with_guide(random_twist(target))
    return evidence_gates(enumerate_target(target), lambda r, s: _run(KeepsTwist, target, None, r, s), seeds)


BUGS: tuple[Bug, ...] = (
    Bug("twist not divided out at the stop", "smc", _kept),
    Bug("positives of CTL unweighted", "ctl", lambda seeds: gradient_gates(unweighted_positives, seeds)),
    Bug("negatives of CTL not reweighted to p psi", "ctl", lambda seeds: gradient_gates(raw_negatives, seeds)),
)
