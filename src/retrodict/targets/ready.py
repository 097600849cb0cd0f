"""Ready-made targets: the talk's list of intractable problems in language models, each one call.

Tempered continuation p^(1/T); text of a given length; text with a given suffix (infilling); text with words it must
contain or avoid; the product of a model with a verifier's score.
"""

from __future__ import annotations

from collections.abc import Sequence

from retrodict.errors import InputError
from retrodict.guides.lookahead import LookaheadGuide
from retrodict.policies.lm import LMPolicy
from retrodict.protocols import LanguageModel, Problems
from retrodict.records import Problem
from retrodict.spaces.limits import Limit
from retrodict.spaces.stops import EndsWith, Stops
from retrodict.spaces.strings import Strings
from retrodict.spaces.tools import Tool, with_tool
from retrodict.targets.algebra import Target
from retrodict.targets.constraint import with_words
from retrodict.targets.likelihood import Likelihood
from retrodict.targets.prior import Prior
from retrodict.targets.problems import TextProblem, tokenise
from retrodict.targets.verifier import Verifier

Stop = str | int | Sequence[int] | Stops | None


def stops_of(lm: LanguageModel, stop: Stop) -> Stops:
    """What a user's ``stop`` means under a model.

    ``"eos"``: all of the model's ends, counted as one. A string that is one token (``"."``, ``"\\n"``): that token, an
    action whose text belongs to the latent. Ids: likewise. ``None``: none. A :class:`Stops`: itself.

    Raises InputError for a string that the tokenizer cannot produce as one token; :func:`until` takes any string.
    """
    if stop is None:
        return Stops()
    if isinstance(stop, Stops):
        return stop
    if isinstance(stop, str):
        if stop == "eos":
            if not lm.end_ids:
                raise InputError(f"{lm.name} has no end-of-sequence token; name a stop, e.g. stop='.'")
            return Stops(tuple(lm.end_ids), in_text=False, label="eos")
        ids = lm.tokenizer.encode(stop)
        if len(ids) != 1 or lm.tokenizer.decode(ids) != stop:
            raise InputError(
                f"the tokenizer cannot produce the stop {stop!r} as one token (it takes {len(ids)}); "
                f"use stop=rd.until({stop!r}), which ends the text wherever it contains that string"
            )
        return Stops(tuple(ids), in_text=True, label=repr(stop))
    ids = (stop,) if isinstance(stop, int) else tuple(stop)
    return Stops(ids, in_text=True, label=repr(lm.tokenizer.decode(ids)))


def until(text: str) -> Stops:
    """A predicate stop: the latent ends as soon as its text contains ``text``."""
    if not text:
        raise InputError("until('') would end at once; give a string")
    return Stops(predicate=EndsWith(text), label=f"until {text!r}")


def strings(
    lm: LanguageModel, stop: Stop = "eos", max_tokens: int = 32, limit: Limit = "force", min_tokens: int = 0
) -> Strings:
    """The strings of a model's tokens that end at ``stop``; its other special tokens are never moves."""
    stops = stops_of(lm, stop)
    banned = tuple(sorted({*lm.special_ids, *lm.end_ids} - set(stops.ids)))
    if isinstance(lm.special_ids, tuple) and not lm.special_ids:  # a table or tiny model: its end is a plain token
        banned = ()
    return Strings(lm.vocab_size, stops, max_tokens, limit, min_tokens, banned, lm.tokenizer)


def from_prior(lm: LanguageModel, data: Problems, space: Strings) -> Target:
    """The model itself on a space of strings: gamma = p."""
    for p in data:
        over = len(p.context) + space.max_moves + space.stops.acts + len(p.evidence) - lm.context
        if over > 0:
            raise InputError(
                f"problem {p.name!r}: prompt {len(p.context)} + latent {space.max_moves} + evidence {len(p.evidence)} "
                f"tokens are {over} over the context of {lm.name} ({lm.context}); shorten the prompt or max_tokens"
            )
    policy = LMPolicy(lm, space, data)
    return Target(space, data, {"prior": Prior(policy)}, prior=policy)


def posterior(
    lm: LanguageModel,
    data: Sequence[TextProblem | Problem],
    *,
    stop: Stop = "eos",
    max_tokens: int = 32,
    min_tokens: int = 0,
    limit: Limit = "force",
    verifier: Verifier | None = None,
    lookahead: float | None = 0.5,
    tool: Tool | None = None,
) -> Target:
    """p(Z | X, Y) for a user's own problems: prior * likelihood (where there is evidence) * verifier.

    Args:
        lm: the model; prior and likelihood are two views of it.
        data: from :func:`problems`, or ids.
        stop: how the latent ends, see :func:`stops_of`; Y follows a stop with text, and replaces end-of-sequence.
        max_tokens, min_tokens, limit: see ``spaces.limits``.
        verifier: a factor on complete texts.
        lookahead: exponent of p(Y | X, z_1..t) as the guide of SMC; ``None`` for no guide.
        tool: what writes into the latent, see ``spaces.tools``; ``max_tokens`` counts free tokens only.
    """
    ids = tokenise(lm, data)
    space = strings(lm, stop, max_tokens, limit, min_tokens)
    if tool is not None:
        space = with_tool(space, tool)
    target = from_prior(lm, ids, space)
    if any(p.evidence for p in ids):
        likelihood = Likelihood(lm, space, ids)
        guide = None if lookahead is None else LookaheadGuide(lm, space, ids, lookahead)
        follows = "follows the stop's text" if space.stops.in_text else "replaces the end of sequence"
        target = target._with({"likelihood": likelihood}, {}, guide, None)
        target = Target(space, ids, target.factors, target.betas, target.prior, target.guide, f"Y {follows}")
    return target if verifier is None else target * verifier


def infill(
    lm: LanguageModel,
    before: str,
    after: str,
    *,
    stop: Stop = ".",
    max_tokens: int = 24,
    min_tokens: int = 1,
    limit: Limit = "force",
    join: str = " ",
    lookahead: float | None = 0.5,
    name: str = "story",
) -> Target:
    """The missing middle: Z between ``before`` and ``after``, gamma(Z) = p(Z | before) p(join + after | before, Z).

    ``join`` goes into Y's ids ahead of ``after`` (a lost space costs 7 nats); ``""`` where ``after`` brings its own.
    """
    if not after:
        raise InputError("infill needs the text after the gap; for plain continuation use rd.continuation")
    data = [TextProblem(before, join + after, {"before": before, "after": after}, name, chat=False)]
    return posterior(lm, data, stop=stop, max_tokens=max_tokens, min_tokens=min_tokens, limit=limit,
                     lookahead=lookahead)  # fmt: skip


def continuation(
    lm: LanguageModel,
    prompt: str,
    *,
    temperature: float = 1.0,
    stop: Stop = "eos",
    max_tokens: int = 32,
    min_tokens: int = 0,
    limit: Limit = "force",
) -> Target:
    """p(Z | prompt)^(1/T), the *sequence* at a temperature (not each token, which is another distribution)."""
    if not temperature > 0:
        raise InputError(f"temperature must be positive, not {temperature}")
    data = tokenise(lm, [TextProblem(prompt, name="continuation", chat=False)])
    return from_prior(lm, data, strings(lm, stop, max_tokens, limit, min_tokens)) ** (1.0 / temperature)


def of_length(lm: LanguageModel, prompt: str, *, tokens: int, stop: Stop = "eos") -> Target:
    """p(Z | prompt, Z has exactly ``tokens`` tokens and then stops); without a stop, the first ``tokens`` tokens."""
    data = tokenise(lm, [TextProblem(prompt, name=f"{tokens} tokens", chat=False)])
    limit: Limit = "exact" if stop is not None else "exact_prefix"
    return from_prior(lm, data, strings(lm, stop, tokens, limit))


def including(
    lm: LanguageModel,
    prompt: str,
    *,
    contain: Sequence[str] = (),
    avoid: Sequence[str] = (),
    stop: Stop = "eos",
    max_tokens: int = 32,
    limit: Limit = "force",
) -> Target:
    """p(Z | prompt, Z contains these whole words and avoids those)."""
    if not contain and not avoid:
        raise InputError("give words to contain or to avoid")
    return continuation(lm, prompt, stop=stop, max_tokens=max_tokens, limit=limit) * with_words(contain, avoid)


def scored(
    lm: LanguageModel,
    prompt: str,
    verifier: Verifier,
    *,
    stop: Stop = "eos",
    max_tokens: int = 32,
    limit: Limit = "force",
) -> Target:
    """The product of the model with a verifier's score: p(Z | prompt) * verifier(Z)."""
    return continuation(lm, prompt, stop=stop, max_tokens=max_tokens, limit=limit) * verifier
