"""A posterior over graphs as a Target: a product of modular factors (scores of data, priors, a language model's).

    log gamma(G) = sum_f beta_f sum_j f(j, Pa(j))

Adding i -> j changes one local term, so the values of all prefixes of a trajectory are a running sum of differences:

    log f(G_k) = log f(G_0) + sum_{l<=k} [f(j_l, Pa_{l-1} + i_l) - f(j_l, Pa_{l-1})]

taken for all graphs and all times at once: two look-ups a move, no loop. Exact; a prefix whose parent set is forbidden
(-inf) is -inf, and may recover where a larger set is allowed.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from retrodict.errors import InputError
from retrodict.numerics import NEG_INF
from retrodict.protocols import Problems
from retrodict.records import PAD, Problem, Rollouts
from retrodict.spaces.dags import Dags, edges_to_graph, parent_masks
from retrodict.structures.modular import Modular
from retrodict.targets.algebra import Target


@dataclass(frozen=True)
class GraphTerm:
    """One modular factor, of every prefix. ``scores`` has one for each problem (data set)."""

    name: str
    space: Dags
    problems: Problems
    scores: tuple[Modular, ...]
    noise: str = "none"
    prefixes: bool = True

    @property
    def version(self) -> str:
        """Those of the scores."""
        return ",".join(dict.fromkeys(s.version for s in self.scores))

    def on(self, problems: Problems) -> GraphTerm:
        """The same factor on some of its problems. Raises InputError for others: each has a data set of its own."""
        known = list(self.problems)
        if any(p not in known for p in problems):
            raise InputError(f"the factor {self.name!r} has no score of this data; build its target with graph_target")
        return replace(self, problems=problems, scores=tuple(self.scores[known.index(p)] for p in problems))

    def __call__(self, rollouts: Rollouts, every_prefix: bool = False) -> Tensor:
        """``[b]``, or of every prefix ``[b, t+1, 1]`` (-inf past the end)."""
        value = torch.full((len(rollouts), rollouts.moves.shape[1] + 1), NEG_INF, dtype=torch.float64)
        for m, score in enumerate(self.scores):
            rows = (rollouts.problem == m).nonzero().squeeze(1)
            if len(rows):
                value[rows] = prefix_values(score, self.space, rollouts.take(rows))
        return value[:, :, None] if every_prefix else value[torch.arange(len(value)), rollouts.n]


def prefix_values(score: Modular, space: Dags, r: Rollouts) -> Float[Tensor, "b t1"]:
    """log f of the graph after every prefix; -inf past the end."""
    start = parent_masks(edges_to_graph(space.required, space.d))[0]
    there = r.kind != PAD
    tail, head = r.moves // space.d, r.moves % space.d
    before = _parents_before(tail, head, there, start)
    both = torch.stack([before, before | 2**tail]).flatten()
    old, new = score.gather(head.flatten().repeat(2), both).view(2, *head.shape)
    root = score.gather(torch.arange(space.d), start)
    local = (root, old, new)
    finite = _running(*(torch.where(x == NEG_INF, 0.0, x) for x in local), there=there)
    zeros = _running(*((x == NEG_INF).double() for x in local), there=there)
    inside = torch.arange(r.moves.shape[1] + 1) <= r.n[:, None]
    return torch.where(inside & (zeros < 0.5), finite, NEG_INF)


def _running(root: Tensor, old: Tensor, new: Tensor, there: Tensor) -> Float[Tensor, "b t1"]:
    """The sum over nodes at the root, and after each move."""
    change = torch.where(there, new - old, 0.0)
    return torch.cat([change.new_zeros(len(change), 1), change.cumsum(1)], 1) + root.sum()


def _parents_before(tail: Tensor, head: Tensor, there: Tensor, start: Int64[Tensor, " d"]) -> Int64[Tensor, "b t"]:
    """The parent mask of each move's head just before the move."""
    same = (head[:, :, None] == head[:, None, :]) & there[:, None, :]
    earlier = same & torch.ones(head.shape[1], head.shape[1], dtype=torch.bool).tril(-1)
    return start[head] + torch.where(earlier, 2 ** tail[:, None, :], 0).sum(2)


def graph_target(
    space: Dags,
    factors: Mapping[str, Modular | Sequence[Modular]],
    betas: Mapping[str, float] | None = None,
    problems: Problems | None = None,
) -> Target:
    """The posterior over the graphs of a space.

    Args:
        space: what is possible; its names are the variables'.
        factors: by name; a factor that differs between problems (data sets) gives one score for each.
        betas: exponents, by name (alpha of a language model's prior); 1 by default.
        problems: one for each data set, with ``row["features"]`` where a policy is to read the data; one by default.

    Raises:
        InputError: no factor, or one over another number of variables or problems.
    """
    if not factors:
        raise InputError("a posterior over graphs needs a factor, such as a score of data: factors={'data': bge(...)}")
    asked = problems if problems is not None else [Problem((), name="graph")]
    terms = {}
    for name, given in factors.items():
        scores = tuple(given) if isinstance(given, Sequence) else (given,) * len(asked)
        if len(scores) != len(asked):
            raise InputError(f"the factor {name!r} has {len(scores)} scores for {len(asked)} problems; give one each")
        if any(s.d != space.d for s in scores):
            raise InputError(f"the factor {name!r} is over {scores[0].d} variables, and the space over {space.d}")
        terms[name] = GraphTerm(name, space, asked, scores)
    unknown = set(betas or {}) - set(terms)
    if unknown:
        raise InputError(f"no factor {sorted(unknown)[0]!r} to temper; the factors are {', '.join(terms)}")
    return Target(space, asked, terms, dict(betas or {}))
