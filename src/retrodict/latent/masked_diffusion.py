"""Masked diffusion language models, and their posteriors by relative trajectory balance.

Training. With absorbing noise a token is masked or itself, and the negative evidence bound is a weighted masked
cross-entropy (Sahoo et al. 2024, arXiv:2406.07524, eq. 11; Shi et al. 2024, arXiv:2406.04329; in the form without time,
Ou et al. 2024, arXiv:2406.03736, and Hoogeboom et al. 2022):

    -log p(x) <= L E_{n ~ U(1..L)} E_{n of the L tokens masked} [ 1/n sum_{masked i} -log p(x_i | x_unmasked) ]

which is the expected negative log-probability of x's path under a uniform order of revealing: the bound is tight where
the conditionals agree between orders. One token a step therefore samples an exact any-order model,

    p(x) = 1/L! sum_orders prod_t p(x_{o_t} | x_{o_<t}),

and :func:`string_law` sums it over orders by dynamic programming over masked strings, (v + 1)^L of them.

k tokens a step are drawn independently given what was there before: no network, however good, is exact then. Given the
true law :class:`ExactReader` gives its conditionals, the optimum of the bound; the law of this sampler at k tokens a
step is the floor that k leaves.

Posterior. Tokens given (``Masked.given``), a likelihood of noisy tokens, a classifier: gamma(path) = p(path) r(x). RTB
(Venkatraman et al. 2024) has log q(path) where others would need P_B: paths are counted by p.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from retrodict.errors import InputError
from retrodict.numerics import NEG_INF
from retrodict.policies.layers import MLP
from retrodict.policies.masked import MaskedMLP, MaskedPolicy, Order
from retrodict.records import Problem, Rollouts
from retrodict.rng import generator
from retrodict.spaces.masked import Masked, MaskedState
from retrodict.targets.algebra import Target
from retrodict.targets.prior import Prior
from retrodict.training.amortize import amortize
from retrodict.training.fit import maximise
from retrodict.training.threads import one_thread

CHUNK = 1 << 15
"""States a pass."""


# -- the model --------------------------------------------------------------------------------------------------------


def bound(net: MaskedMLP, tokens: Int[Tensor, "b l"], gen: torch.Generator) -> Float[Tensor, " b"]:
    """An unbiased estimate of the evidence bound of each sequence (nats), from one draw of what is masked."""
    b, length = tokens.shape
    n = torch.randint(1, length + 1, (b, 1), generator=gen)
    hidden = torch.rand(b, length, generator=gen).argsort(1).argsort(1) < n
    what, _ = net(tokens.masked_fill(hidden, net.vocab))
    log_p = what.log_softmax(2).gather(2, tokens[:, :, None]).squeeze(2)
    return length * torch.where(hidden, log_p, 0.0).sum(1) / n.squeeze(1)


def train_masked(
    space: Masked,
    tokens: Int[Tensor, "r l"],
    *,
    steps: int = 2000,
    batch: int = 256,
    lr: float = 3e-3,
    hidden: int = 128,
    layers: int = 2,
    seed: int = 0,
) -> MaskedPolicy:
    """A masked diffusion model of a text, given as rows of tokens. Raises InputError for tokens that are none."""
    if tokens.dim() != 2 or tokens.shape[1] != space.length or not len(tokens):
        raise InputError(f"the text must be rows of {space.length} tokens, not {list(tokens.shape)}")
    if int(tokens.min()) < 0 or int(tokens.max()) >= space.vocab:
        raise InputError(f"the text has tokens outside 0..{space.vocab - 1}")
    net = MaskedMLP(space.length, space.vocab, hidden, layers, seed)
    policy, gen = MaskedPolicy(space, [Problem((), name="text")], net), generator(seed, "cpu", 1)
    even = torch.full((len(tokens),), 1 / len(tokens))
    with one_thread():
        maximise(policy, lambda rows: bound(net, tokens[rows], gen), even, steps=steps, lr=lr, batch=batch, micro=batch,
                 seed=seed)  # fmt: skip
    return policy


@torch.no_grad()
def evidence_bound(policy: MaskedPolicy, tokens: Int[Tensor, "r l"], orders: int = 8, seed: int = 0) -> float:
    """The mean bound of held-out sequences (nats), each under ``orders`` random orders of revealing."""
    rows = tokens.repeat(orders, 1)
    order = torch.rand(rows.shape, generator=generator(seed)).argsort(1)
    space = policy.space
    path = space.left_to_right(rows)
    moves = order * space.vocab + rows.gather(1, order)
    log_p = policy.score(replace(path, moves=moves), raw=True).log_q.double().sum(1).mean()
    return float(log_p) + math.lgamma(space.length + 1)  # an order has probability 1/L!


# -- exact laws -------------------------------------------------------------------------------------------------------


@dataclass
class ExactReader:
    """The conditionals of a law over all strings: log p(x_i = a, what is seen) for every i and a; all orders agree.

    ``table`` has v + 1 entries an axis, the last of which is the sum over the others: what is masked is summed out.
    """

    table: Float[Tensor, "..."]
    parameters: dict[str, Tensor]

    def __call__(self, seen: Int[Tensor, "u l"]) -> tuple[Float[Tensor, "u l v"], Float[Tensor, "u l"]]:
        """Logits of tokens (even ones where the law gives what is seen no mass), and of positions."""
        u, length = seen.shape
        v = self.table.shape[0] - 1
        asked = seen[:, None, None, :].repeat(1, length, v, 1)
        i = torch.arange(length)
        asked[:, i, :, i] = torch.arange(v)[None, None, :].expand(length, u, v)
        found = self.table[asked.unbind(3)]
        dead = found.sum(2, keepdim=True) <= 0
        return torch.where(dead, 0.0, found.log()), torch.zeros(u, length, dtype=found.dtype)


def exact_reader(log_p: Float[Tensor, " n"], length: int) -> ExactReader:
    """The reader of a law given in the order of ``Masked.enumerate``."""
    v = round(len(log_p) ** (1 / length))
    table = log_p.double().softmax(0).view([v] * length)
    for axis in range(length):
        table = torch.cat([table, table.sum(axis, keepdim=True)], axis)
    return ExactReader(table, {})


@torch.no_grad()
def string_law(policy: MaskedPolicy, problem: int = 0, raw: bool = False) -> Float[Tensor, " n"]:
    """log probability of every string under a policy, in the order of ``Masked.enumerate``.

    Forward over the number of revealed tokens; states that are alike are one. ``raw`` gives the model's own joint
    probability of a string and of what the problem gives: -inf where they differ, and a sum below one.
    """
    space = policy.space
    full = space.vocab**space.length
    one = torch.tensor([problem])
    s, log_reach = space.start(one), torch.zeros(1, dtype=torch.float64)
    for _ in range(space.length):
        parts = [
            _onward(policy, space.take(s, at), log_reach[at], raw) for at in torch.arange(len(log_reach)).split(CHUNK)
        ]
        s, log_reach = _merge(space, [p[0] for p in parts], torch.cat([p[1] for p in parts]))
    return torch.full((full,), NEG_INF, dtype=torch.float64).scatter(0, space.number(s.tokens), log_reach)


def _onward(policy: MaskedPolicy, s: MaskedState, log_reach: Tensor, raw: bool) -> tuple[MaskedState, Tensor]:
    """Every state that one move leads to, and the log probability of coming there this way."""
    menu = policy.space.menu(s)
    assert menu.legal is not None
    log_move, _ = policy.log_probs(s.problem, s, menu, raw)
    row, move = (menu.legal & (log_move > NEG_INF)).nonzero().unbind(1)
    return policy.space.step(policy.space.take(s, row), move), log_reach[row] + log_move[row, move].double()


def _merge(space: Masked, parts: Sequence[MaskedState], log_reach: Tensor) -> tuple[MaskedState, Tensor]:
    """States once each, with their probabilities added up."""
    tokens, seen = torch.cat([p.tokens for p in parts]), torch.cat([p.seen for p in parts])
    base = (space.vocab + 1) ** torch.arange(space.length)
    both = (tokens * base).sum(1) * (space.vocab + 1) ** space.length + (seen * base).sum(1)
    code, of = torch.unique(both, return_inverse=True)
    first = torch.full_like(code, len(of)).scatter_reduce(0, of, torch.arange(len(of)), "amin")
    top = log_reach.max()
    mass = torch.zeros(len(code), dtype=torch.float64).index_add(0, of, (log_reach - top).exp())
    problem = parts[0].problem[:1].expand(len(code))
    return MaskedState(problem, tokens[first], seen[first]), mass.log() + top


@torch.no_grad()
def log_gamma_law(target: Target, problem: int = 0) -> Float[Tensor, " n"]:
    """log gamma of every string: the prior summed over its orders, times the other factors. Its logsumexp is log Z."""
    prior, space = target.prior, target.space
    if not isinstance(prior, MaskedPolicy) or not isinstance(space, Masked):
        raise InputError("this lists the strings of a masked prior; use rd.exact for other targets")
    if target.betas["prior"] != 1:
        raise InputError("a power of the prior's path density is no power of a string's; leave the prior's exponent 1")
    total = string_law(prior, problem, raw=True)
    live = (total > NEG_INF).nonzero().squeeze(1)
    rows = space.left_to_right(space.enumerate()[live], problem)
    for name, term in target.factors.items():
        if name != "prior":
            total[live] += target.betas[name] * term(rows).double()
    return total


# -- the posterior ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class StringTerm:
    """log r(x) of a finished string, by a function of its tokens."""

    name: str
    space: Masked
    value: Callable[[Int[Tensor, "b l"]], Float[Tensor, " b"]]
    version: str = "1"
    noise: str = "none"
    prefixes: bool = False

    def __call__(self, rollouts: Rollouts, every_prefix: bool = False) -> Tensor:
        """``[b]``."""
        with torch.no_grad():
            return self.value(self.space.tokens(rollouts))


def noisy_tokens(space: Masked, observed: Sequence[int], error: float) -> StringTerm:
    """log p(y | x) of tokens y, each x's own with probability 1 - error, else any other one; -1: not observed."""
    if not 0 < error < 1:
        raise InputError(f"error is the chance of a wrong token, above 0 and below 1, not {error}")
    y = torch.tensor(list(observed))
    if len(y) != space.length or int(y.max()) >= space.vocab:
        raise InputError(f"give {space.length} observed tokens below {space.vocab}, -1 for none, not {list(observed)}")
    right, wrong = math.log1p(-error), math.log(error / (space.vocab - 1))

    def value(tokens: Int[Tensor, "b l"]) -> Float[Tensor, " b"]:
        return torch.where(y < 0, 0.0, torch.where(tokens == y, right, wrong)).sum(1)

    return StringTerm("evidence", space, value)


def classifier(
    space: Masked, tokens: Int[Tensor, "r l"], labels: Tensor, *, steps: int = 400, hidden: int = 32, seed: int = 0
) -> StringTerm:
    """log p(label = 1 | x) of a small network trained on labelled strings."""
    policy = _Labels(MLP(space.n_features, 1, hidden, 2, seed), space)
    sign = labels.float() * 2 - 1
    even = torch.full((len(tokens),), 1 / len(tokens))
    with one_thread():
        maximise(
            policy, lambda r: policy(tokens[r], sign[r]), even, steps=steps, lr=3e-3, batch=256, micro=256, seed=seed
        )
    return StringTerm("classifier", space, lambda x: policy(x, torch.ones(len(x))))


class _Labels:
    """A binary classifier, as ``training.fit`` trains it."""

    name = "classifier"

    def __init__(self, net: MLP, space: Masked) -> None:
        self.net, self.space = net, space

    def __call__(self, tokens: Int[Tensor, "b l"], sign: Float[Tensor, " b"]) -> Float[Tensor, " b"]:
        s = MaskedState(torch.zeros(len(tokens), dtype=torch.long), tokens, tokens)
        return torch.nn.functional.logsigmoid(sign * self.net(self.space.features(s)).squeeze(1))

    def parameters(self) -> dict[str, Tensor]:
        return self.net.parameters

    def settle(self) -> None: ...
    def refresh(self) -> None: ...


def masked_target(prior: MaskedPolicy, *terms: StringTerm, space: Masked | None = None) -> Target:
    """p(path) times the terms' values of its string.

    Args:
        prior: a trained model.
        terms: likelihoods, classifiers; none where only given tokens are conditioned on.
        space: one with ``given`` (a problem for each of its rows), or another ``per_step``; the prior's by default.
    """
    over = space or prior.space
    problems = [Problem((), name=over.text([over.mask if x < 0 else x for x in row])) for row in over.given]
    mine = MaskedPolicy(over, problems or prior.problems, prior.net)
    factors: dict[str, Any] = {"prior": Prior(mine, prefixes=False), **{t.name: t for t in terms}}  # pyright: ignore[reportArgumentType]
    return Target(over, mine.problems, factors, prior=mine)


PLAN: dict[str, Any] = {
    "objective": "rtb", "steps": 600, "samples": 256, "lr": 4e-3, "lr_end": 0.01, "evaluate": 2,
}  # fmt: skip
"""Settings that work on short strings."""


def tune_masked(target: Target, *, order: Order = "learned", seed: int = 0, **given: Any) -> MaskedPolicy:
    """Fine-tune a copy of the prior's network to draw from the posterior: ``retrodict.amortize`` under :data:`PLAN`.

    ``given`` are its settings; they replace those of the plan. For ``order`` see ``policies.masked``.
    """
    prior = target.prior
    if not isinstance(prior, MaskedPolicy) or not isinstance(prior.net, MaskedMLP):
        raise InputError("only a trained masked prior can be copied; for another pass a policy to retrodict.amortize")
    policy = MaskedPolicy(prior.space, prior.problems, prior.net.copy(), order)
    with one_thread():
        return amortize(target, policy, seed=seed, **{**PLAN, **given})
