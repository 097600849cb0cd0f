"""Policies trained through the loop on targets that can be listed, against their posteriors.

A table of logits can be any distribution, so what an objective leaves of the distance to the posterior is the
objective's fault (or the loop's), and total variation says how much:

    TV = max over problems of 1/2 sum over paths |q(path) - target(path)|

over paths and not objects: q must also share an object's mass among its paths as P_B does (or, for an objective whose
prior is over paths, as that prior does).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from retrodict.models.tabular import TabularLM
from retrodict.numerics import NEG_INF, at_end
from retrodict.objectives.mle import object_log_q
from retrodict.protocols import Carry, Problems, State, Term
from retrodict.records import FREE, PAD, Menu, Problem, Rollouts, Scores, cat_rollouts
from retrodict.rng import generator
from retrodict.spaces.enumerate import enumerate_objects
from retrodict.spaces.stops import Stops
from retrodict.spaces.strings import Strings
from retrodict.spaces.tools import Tool, with_tool
from retrodict.targets.algebra import Target
from retrodict.targets.likelihood import Likelihood
from retrodict.targets.ready import from_prior, posterior
from retrodict.testing.sets import SetPolicy, SetTerm, Subsets
from retrodict.testing.table import TablePolicy
from retrodict.testing.targets import cases
from retrodict.training.amortize import amortize
from retrodict.training.loop import begin, steps
from retrodict.training.settings import settings

BAR = 1e-2
"""Total variation that training must get below."""

MIXTURES: dict[str, dict[str, Any]] = {
    "on policy": {},
    "tempered, epsilon": {"tempered": 0.5, "temperatures": (0.5, 2.0), "epsilon": 0.2},
    "replay": {"replay": 0.5, "capacity": 100},
    "all": {"tempered": 0.25, "epsilon": 0.2, "replay": 0.25, "priority": "recency"},
}
"""What a step's samples are drawn from, by name."""

PLAN: dict[str, Any] = {
    "steps": 300,
    "samples": 96,
    "lr": 0.15,
    "lr_end": 0.01,
    "lr_log_z": 0.3,
    "evaluate": 2,
    "seed": 0,
}
"""One plan for all objectives, targets and mixtures."""

GFLOWNET = ("pooled", "subtb", "vargrad", "tb", "db", "rtb")
"""Objectives whose optimum is the posterior under any mixture."""


class Table(TablePolicy):
    """A TablePolicy that reads menus off the list of all paths: the same law, in one look-up."""

    def __init__(self, space: Any, problems: Problems, moves: int, seed: int = 0, scale: float = 0.0) -> None:
        super().__init__(space, problems, moves, seed, scale)
        self.legal = torch.zeros(self.logits.shape, dtype=torch.bool)
        for m in range(len(problems)):
            r = enumerate_objects(space, m)
            node = self.at(r)
            row, i = (r.kind != PAD).nonzero().unbind(1)
            self.legal[node[row, i], r.moves[row, i]] = True
            self.legal[node[torch.arange(len(r)), r.n], moves + r.stop] = True

    def at(self, r: Rollouts) -> Tensor:
        """The node of every prefix ``[b, t+1]``; 0 past the end."""
        out = torch.zeros(len(r), r.moves.shape[1] + 1, dtype=torch.long)
        for k, (m, z, n) in enumerate(zip(r.problem.tolist(), r.moves.tolist(), r.n.tolist(), strict=True)):
            out[k, : n + 1] = torch.tensor([self.nodes[(m, *z[:i])] for i in range(n + 1)])
        return out

    def law(self) -> Float[Tensor, "nodes a"]:
        """Log-probabilities of every action at every node; -inf where it is not legal."""
        return self.logits.masked_fill(~self.legal, NEG_INF).log_softmax(-1)

    def log_probs(
        self, c: Carry, s: State, menu: Menu, raw: bool = False
    ) -> tuple[Float[Tensor, "b v"], Float[Tensor, "b s"]]:
        """See ``protocols.Stepper``."""
        rows = self.law()[torch.tensor([self.nodes[key] for key in c], dtype=torch.long)]
        return rows[:, : self.moves], rows[:, self.moves :]

    def score(self, rollouts: Rollouts, raw: bool = False, grad: bool = False) -> Scores:
        """Read off the table."""
        with torch.set_grad_enabled(grad):
            return self.read(self.law(), rollouts)

    def read(self, law: Float[Tensor, "nodes a"], r: Rollouts) -> Scores:
        """Scores of rows under a law of the nodes."""
        node = self.at(r)
        log_q = torch.where(r.kind == FREE, law[node[:, :-1], r.moves], 0.0)
        inside = torch.arange(node.shape[1]) <= r.n[:, None]
        return Scores(log_q, torch.where(inside[:, :, None], law[node][:, :, self.moves :], NEG_INF))


@dataclass(frozen=True)
class Listed:
    """A factor whose values were computed once, for every path."""

    name: str
    noise: str
    version: str
    prefixes: bool
    row: Mapping[tuple[int, ...], int]
    values: Tensor

    def __call__(self, rollouts: Rollouts, every_prefix: bool = False) -> Tensor:
        """``[b]``, or of every prefix ``[b, t+1, s]``."""
        r = rollouts
        each = zip(r.problem.tolist(), r.stop.tolist(), r.moves.tolist(), r.n.tolist(), strict=True)
        found = self.values[[self.row[(m, stop, *z[:n])] for m, stop, z, n in each]]
        if every_prefix or not self.prefixes:
            return found[:, : r.moves.shape[1] + 1] if every_prefix else found
        return at_end(found[:, : r.moves.shape[1] + 1], r.n, r.stop)


def listed(target: Target) -> Target:
    """The same target, read off a list of the values of all its paths: training asks for them thousands of times."""
    rows = cat_rollouts([enumerate_objects(target.space, m) for m in range(len(target.problems))])
    each = zip(rows.problem.tolist(), rows.stop.tolist(), rows.moves.tolist(), rows.n.tolist(), strict=True)
    row = {(m, stop, *z[:n]): i for i, (m, stop, z, n) in enumerate(each)}

    def once(term: Term) -> Term:
        with torch.no_grad():
            values = term(rows, term.prefixes)
        return Listed(term.name, term.noise, term.version, term.prefixes, row, values)

    return replace(target, factors={name: once(term) for name, term in target.factors.items()})


def posterior_paths(target: Target, problem: int, backward: bool = True) -> tuple[Rollouts, Float[Tensor, " n"]]:
    """Every path of a problem and its log share of the target, with P_B or (a prior over paths) without."""
    r = enumerate_objects(target.space, problem)
    with torch.no_grad():
        value = target.log_gamma(r).double() + (r.log_pb.double().sum(1) if backward else 0.0)
    return r, value - value.logsumexp(0)


def total_variation(target: Target, policy: TablePolicy, backward: bool = True) -> float:
    """The largest over problems, between q's paths and the target's."""
    found = []
    for m in range(len(target.problems)):
        r, log_p = posterior_paths(target, m, backward)
        with torch.no_grad():
            found.append(float((object_log_q(policy.score(r), r).exp() - log_p.exp()).abs().sum() / 2))
    return max(found)


def moves_of(target: Target) -> int:
    """How many moves a space has: tokens, or atoms of a set."""
    space = target.space
    return space.vocab_size if isinstance(space, Strings) else space.max_moves


def fresh(target: Target, kind: type[Table] = Table) -> Table:
    """A table that knows nothing: uniform over each menu."""
    return kind(target.space, target.problems, moves_of(target))


def train(
    target: Target, objective: str, mixture: str = "on policy", kind: type[Table] = Table, **changes: Any
) -> Table:
    """A table trained on a listed target by ``amortize``."""
    plan = {**PLAN, **MIXTURES[mixture], **changes}
    return amortize(target, fresh(target, kind), objective=objective, **plan)


# -- the targets ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PathPrior:
    """log p of a whole path under a policy: a factor that objects reached by several paths do not have."""

    policy: SetPolicy
    name: str = "prior"
    noise: str = "none"
    prefixes: bool = False
    version: str = "1"

    def __call__(self, rollouts: Rollouts, every_prefix: bool = False) -> Tensor:
        """``[b]``."""
        return object_log_q(self.policy.score(rollouts), rollouts)


def set_paths(atoms: int = 3) -> Target:
    """Subsets under a prior over paths that does not treat their orders alike."""
    space, problems = Subsets(atoms), [Problem((), name="sets")]
    logits = torch.randn(atoms + 1, generator=generator(7), dtype=torch.float64)
    table = torch.randn(2**atoms, generator=generator(8), dtype=torch.float64)
    factors = {"prior": PathPrior(SetPolicy(space, problems, logits)), "table": SetTerm(table)}
    return Target(space, problems, factors)


def _tool(text: str) -> str | None:
    return (None, "12", "1")[text.count("1") % 3]


def tool_target() -> Target:
    """Strings over ``.=12`` in which a tool answers each "=" with up to two tokens."""
    lm = TabularLM.random(".=12", order=3, seed=1, scale=0.7)
    problems = [Problem((2,), (3, 2), name="tool")]
    plain = Strings(4, Stops((0,)), 3, "own_stop", tokenizer=lm.tokenizer)
    space = with_tool(plain, Tool(_tool, room=3))
    return from_prior(lm, problems, space)._with({"likelihood": Likelihood(lm, space, problems)}, {}, None, None)


def apart() -> Target:
    """Two problems whose log Z are nats apart."""
    lm = TabularLM.random(".ab ", order=3, seed=1, scale=0.6)
    problems = [Problem((1,), (2,), name="near"), Problem((1, 2, 3, 2), (1, 1, 3, 2, 2, 1, 3, 3, 2), name="far")]
    return posterior(lm, problems, stop=".", max_tokens=3, limit="own_stop")


NAMES = (
    "tempered, force",
    "infill, force",
    "infill, own_stop",
    "infill, exact",
    "problems apart",
    "two stops, likelihood^0.5",
    "sets",
    "tool",
)
"""Rewards of every prefix under a least length, forced stops, stops of its own, an exact length, several problems,
several stop ids, several paths to an object, insertions."""


@cache
def training_targets() -> dict[str, Target]:
    """The targets above, listed; sets under a prior over paths; and a batch of problems with like log Z."""
    made = {"tool": tool_target(), "problems apart": apart(), "paths of sets": set_paths()}
    found: dict[str, Target] = {c.name: c.target for c in cases() if c.name in (*NAMES, "batch of problems")}
    return {name: listed(t) for name, t in {**found, **made}.items()}


def pairs(objectives: Sequence[str] = GFLOWNET) -> list[tuple[str, str, str]]:
    """(objective, target, mixture): each objective on each target, and with each mixture twice."""
    out, mixtures = [], list(MIXTURES)
    for i, objective in enumerate(objectives):
        for j, name in enumerate(NAMES):
            own = "paths of sets" if (objective, name) == ("rtb", "sets") else name
            out.append((objective, own, mixtures[(i + j) % len(mixtures)]))
    return out


# -- what other objectives converge to --------------------------------------------------------------------------------

SHOWN: dict[str, tuple[dict[str, Any], str]] = {
    "reinforce": ({}, "no entropy: climbs to the mode"),
    "mle": ({}, "imitates its annotations"),
    "sir": ({}, "KL(posterior, q) by weighted draws, self-normalised"),
    "grpo": ({"options": {"beta": 1.0}}, "beta = 1: KL(q, posterior), noise divided by its own size"),
    "ppo": ({"options": {"beta": 1.0}}, "beta = 1: KL(q, posterior), the ratio clipped"),
}
"""Objective: what it is given, and what to expect of it."""

ANNOTATIONS = 3
"""Strings that maximum likelihood is shown: draws from the posterior, as a person's would be at best."""


def show(objective: str, **changes: Any) -> list[tuple[str, float, str]]:
    """(metric, value, note) of a baseline trained on "infill, own_stop" by the same plan."""
    target = training_targets()["infill, own_stop"]
    given, note = SHOWN[objective]
    if objective == "mle":
        policy, chosen = _imitate(target, {**PLAN, **changes})
        metric = f"q of its {ANNOTATIONS} annotations"
    else:
        policy = train(target, objective, **given, **changes)
        chosen = posterior_paths(target, 0)[1].argmax()[None]
        metric = "q of the mode"
    r, log_p = posterior_paths(target, 0)
    with torch.no_grad():
        q = object_log_q(policy.score(r), r).exp()
    there = f"the posterior gives {float(log_p[chosen].exp().sum()):.3f}"
    return [("total variation", total_variation(target, policy), note), (metric, float(q[chosen].sum()), there)]


def _imitate(target: Target, plan: Mapping[str, Any]) -> tuple[Table, Tensor]:
    """Maximum likelihood on a few annotations, which fill the replay buffer and are all a step sees."""
    r, log_p = posterior_paths(target, 0)
    chosen = torch.multinomial(log_p.exp(), ANNOTATIONS, generator=generator(0))
    run = begin(target, fresh(target), settings(objective="mle", replay=1.0, **plan))
    rows = target.terms(r.take(chosen), every_prefix=True)
    run.replay.add(rows, target.log_gamma(rows), target.space.keys(rows))
    for _ in steps(run):
        pass
    return run.policy, chosen  # pyright: ignore[reportReturnType]
