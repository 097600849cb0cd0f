"""Small targets with exact answers: every ready-made one under every limit, and the corners that went wrong before.

Each :class:`Case` also says how its factors look to a person with a pencil, so that :func:`by_hand` can recompute
log gamma of every object from next-token log-probabilities alone, with none of the library's scoring code.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor

from retrodict.guides.base import BaseGuide
from retrodict.models.tabular import TabularLM
from retrodict.models.tiny import TinyLM
from retrodict.numerics import NEG_INF
from retrodict.policies.base import FiniteStepper
from retrodict.policies.lm import LMPolicy
from retrodict.protocols import LanguageModel
from retrodict.records import Problem, Rollouts
from retrodict.rng import generator
from retrodict.spaces.limits import Limit
from retrodict.spaces.stops import Stops
from retrodict.spaces.strings import Strings, StringState
from retrodict.targets.algebra import Target, temper
from retrodict.targets.constraint import short_words
from retrodict.targets.ready import continuation, including, infill, of_length, posterior, scored, until
from retrodict.targets.verifier import verifier
from retrodict.testing.sets import SetPolicy, SetTerm, set_target

LOG = Callable[[str], float]
"""log-value of a factor, from an object's text."""


@dataclass(frozen=True)
class Case:
    """A small target.

    Attributes:
        name: how tables call it.
        target: the target; its spaces are enumerable.
        policy: what to propose from; ``None`` means the target's own prior.
        factors: factors other than prior and likelihood, as functions of the text, for :func:`by_hand`.
    """

    name: str
    target: Target
    policy: FiniteStepper | None = None
    factors: Mapping[str, LOG] = field(default_factory=dict)


class TableGuide(BaseGuide):
    """A soft guide that knows nothing: psi is a random table over (length, last token), as are its values of stopping.

    Any positive psi must leave every answer as it is; this one lists its moves, so that proposals bend as well.
    """

    def __init__(self, space: Strings, seed: int = 0, scale: float = 0.7) -> None:
        v, gen = space.vocab_size, generator(seed)
        size = (space.max_moves + 1, v + 1)
        self.psi = scale * torch.randn(size, generator=gen, dtype=torch.float64)
        self.end = scale * torch.randn(*size, space.n_stops, generator=gen, dtype=torch.float64)
        self.v = v

    def start(self, problem: Int[Tensor, " b"]) -> Int[Tensor, " b"]:
        """No last token yet."""
        return torch.full_like(problem, self.v)

    def start_at(self, rollouts: Rollouts, upto: Int[Tensor, " b"]) -> Int[Tensor, " b"]:
        """The last token before ``upto``."""
        last = self.start(rollouts.problem)
        if rollouts.moves.shape[1]:
            before = rollouts.moves.gather(1, (upto - 1).clamp_min(0)[:, None]).squeeze(1)
            last = torch.where(upto > 0, before, last)
        return last

    def step(self, c: Int[Tensor, " b"], s: StringState, move: Int[Tensor, " b"]) -> Int[Tensor, " b"]:
        """The move."""
        return move

    def log_psi(self, c: Int[Tensor, " b"], s: StringState) -> Float[Tensor, " b"]:
        """Read off the table."""
        return self.psi[s.n, c]

    def log_next(self, c: Int[Tensor, " b"], s: StringState) -> Float[Tensor, "b v"]:
        """psi of every next state (the last column is "no token"); at the limit there is none, and 0 is given."""
        return self.psi[(s.n + 1).clamp_max(len(self.psi) - 1), : self.v]

    def log_end(self, c: Int[Tensor, " b"], s: StringState) -> Float[Tensor, "b s"]:
        """Random too."""
        return self.end[s.n, c]


# -- the pencil ---------------------------------------------------------------------------------------------------


def by_hand(case: Case) -> list[dict[tuple[int, ...], float]]:
    """log gamma of every object of every problem, string by string in plain loops."""
    target = case.target
    if not isinstance(target.space, Strings):
        return [_sets_by_hand(target)]
    lm = cast(LanguageModel, cast(LMPolicy, target.prior).lm)
    seen: dict[tuple[int, ...], list[float]] = {}

    def log_p(ids: Sequence[int], token: int) -> float:
        if tuple(ids) not in seen:
            seen[tuple(ids)] = lm.encode([list(ids)])[1][0].double().log_softmax(-1).tolist()
        return seen[tuple(ids)][token]

    return [_strings_by_hand(case, target.space, p, log_p) for p in target.problems]


def _strings_by_hand(
    case: Case, space: Strings, problem: Problem, log_p: Callable[[Sequence[int], int], float]
) -> dict[tuple[int, ...], float]:
    stops, betas, out = space.stops, case.target.betas, {}
    assert space.tokenizer is not None
    decode = space.tokenizer.decode

    def sentence(ids: Sequence[int], more: Sequence[int]) -> float:
        return sum(log_p([*ids, *more[:i]], token) for i, token in enumerate(more))

    def add(z: tuple[int, ...], s: int, prior: float) -> None:
        latent = [*z, *([stops.ids[s]] if stops.in_text else [])]
        values = {"prior": prior, "likelihood": sentence([*problem.context, *latent], problem.evidence)}
        values |= {name: log(decode(latent)) for name, log in case.factors.items()}
        out[(*z, -1 - s)] = sum(
            float(temper(torch.tensor(values[f], dtype=torch.float64), betas[f])) for f in case.target.factors
        )

    def grow(z: tuple[int, ...]) -> None:
        here = [*problem.context, *z]
        path, last = sentence(problem.context, z), len(z) == space.max_moves
        prices = [log_p(here, i) for i in stops.ids]
        if prices and not stops.in_text:
            prices = [float(torch.tensor(prices, dtype=torch.float64).logsumexp(0))]
        if stops.predicate is not None and stops.predicate(decode(z)):
            return add(z, 0, path)  # the string is over, whatever p would have said next
        if last:  # the stop is forced: the first id, free under "force", at its own price elsewhere
            free = space.limit in ("force", "exact_prefix")
            return add(z, 0, path if free else path + prices[0] if prices else NEG_INF)
        if not space.limit.startswith("exact") and len(z) >= space.min_moves:
            for s, price in enumerate(prices):
                add(z, s, path + price)
        for token in range(space.vocab_size):
            if token not in stops.ids and token not in space.banned:
                grow((*z, token))

    grow(())
    return out


def _sets_by_hand(target: Target) -> dict[tuple[int, ...], float]:
    term = cast(SetTerm, target.factors["table"])
    atoms = target.space.max_moves
    members = ([i for i in range(atoms) if bits >> i & 1] for bits in range(2**atoms))
    return {(*m, -1): target.betas["table"] * float(term.table[sum(2**i for i in m)]) for m in members}


# -- the cases ----------------------------------------------------------------------------------------------------


def _count_a(texts: Sequence[str], rows: Sequence[Mapping[str, Any]]) -> list[float]:
    return [0.1 + 0.2 * min(t.count("a"), 4) for t in texts]


def _log_count_a(text: str) -> float:
    return float(torch.tensor(0.1 + 0.2 * min(text.count("a"), 4), dtype=torch.float64).log())


def _with_ab(text: str) -> float:
    good = re.search(r"(?<![ab])ab(?![ab])", text) and not re.search(r"(?<![ab])ba(?![ab])", text)
    return 0.0 if good else NEG_INF


def _short(text: str) -> float:
    return NEG_INF if re.search("[a-z]{2}", text) else 0.0


def _many(lm: LanguageModel) -> Target:
    ids = lm.tokenizer.encode
    pairs = [("a", "b "), ("ab b", "aa"), (" ", "a")]
    data = [Problem(tuple(ids(x)), tuple(ids(y)), name=f"{x}|{y}") for x, y in pairs]
    return posterior(lm, data, stop=".", max_tokens=3, limit="own_stop")


def cases(quick: bool = False) -> list[Case]:
    """All small targets; ``quick`` keeps one of each kind."""
    lm = TabularLM.random(".ab ", order=3, seed=1)
    mild = TabularLM.random(".ab ", order=3, seed=1, scale=0.6)
    two = TabularLM.random(".!ab ", order=2, seed=2, scale=0.6)
    score = {"verifier": _log_count_a}
    out: list[Case] = []
    limits: tuple[Limit, ...] = ("force", "own_stop", "exact")
    for limit in limits[: 1 if quick else 3]:
        cool = continuation(lm, "a", temperature=0.5, stop=".", max_tokens=4, min_tokens=1, limit=limit)
        out.append(Case(f"tempered, {limit}", cool))
    for limit in limits:
        middle = infill(lm, "ab", "ba", stop=".", max_tokens=4, limit=limit, join="")
        out.append(Case(f"infill, {limit}", middle))
    for limit in limits[1 if quick else 0 : 2 if quick else 3]:
        words = including(lm, "a ", contain=["ab"], avoid=["ba"], stop=".", max_tokens=4, limit=limit)
        out.append(Case(f"including, {limit}", words, None, {"words": _with_ab}))
    for limit in limits[: 1 if quick else 3]:
        liked = scored(lm, "a", verifier(_count_a), stop=".", max_tokens=4, limit=limit)
        out.append(Case(f"scored, {limit}", liked, None, score))
    free = of_length(lm, "a", tokens=4, stop=None) * verifier(_count_a)
    out += [
        Case("of length, exact", of_length(lm, "a", tokens=4, stop=".")),
        Case("of length, prefix", free, None, score),
    ]
    out.append(Case("batch of problems", _many(mild)))
    short = continuation(lm, "a ", stop=".", max_tokens=4, limit="own_stop") * short_words(1)
    out.append(Case("short words", short, None, {"words<=1": _short}))
    out.append(Case("sets", set_target(3), SetPolicy(set_target(3).space, set_target(3).problems)))  # pyright: ignore[reportArgumentType]
    if quick:
        return out

    ask = [Problem((2,), (2, 3), name="two stops")]
    sharp = posterior(two, ask, stop=(0, 1), max_tokens=4, min_tokens=1, limit="own_stop").with_betas(likelihood=0.5)
    out.append(Case("two stops, likelihood^0.5", sharp))
    ends = posterior(two, ask, stop=Stops((0, 1), label="ends"), max_tokens=3, limit="own_stop")
    out.append(Case("two ends as one", ends))
    say = [Problem((1,), (2, 1), name="until")]
    out.append(Case("until, force", posterior(mild, say, stop=until("b "), max_tokens=4)))
    few = TabularLM.random(".ab", order=2, seed=2, scale=0.6)
    own = posterior(few, say, stop=until("b"), max_tokens=5, limit="own_stop", verifier=verifier(_count_a))
    out.append(Case("until, own_stop", own, None, score))

    steep = scored(lm, "a", verifier(_count_a, kind="reward", beta=0.3), stop=".", max_tokens=4)
    reward: dict[str, LOG] = {"verifier": lambda t: (0.1 + 0.2 * min(t.count("a"), 4)) / 0.3}
    out.append(Case("reward", steep, None, reward))

    other = TabularLM.random(".ab ", order=2, seed=9, scale=0.5)
    asked = posterior(mild, [Problem((1, 2), (2, 1), q_prompt=(2, 1, 3), name="q")], stop=".", max_tokens=4)
    proposal = LMPolicy(other, cast(Strings, asked.space), asked.problems, reads="q_prompt")
    out.append(Case("another model proposes", asked, proposal))

    bent = continuation(lm, "a", temperature=0.7, stop=".", max_tokens=4)
    out.append(Case("random twist", bent.with_guide(TableGuide(cast(Strings, bent.space)))))

    tiny = TinyLM(".ab ", seed=3, dtype=torch.float64)
    out.append(Case("transformer", infill(tiny, "ab", "ba", stop=".", max_tokens=3, join="")))
    return out
