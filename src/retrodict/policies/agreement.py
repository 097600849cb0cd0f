"""Do a server and the policy here give the same log-probabilities? A mismatch is an error that names its cause.

Both sides score the same ids, so in bfloat16 they differ by rounding only. Off-policy objectives tolerate a stale
sampler; none tolerates another model behind the same name. Causes are tried, not guessed: the local policy is scored
again under each, and the one that fits is named. A young adapter changes less than rounding does; so that one which
never reached the server is seen, other adapters are compared token by token: one that fits better, significantly, is
an error within the tolerance too.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from retrodict.errors import InputError
from retrodict.policies.base import FiniteStepper, tempered
from retrodict.policies.lm import LMPolicy
from retrodict.protocols import Policy
from retrodict.records import FREE, Rollouts, Scores

MEAN, WORST = 0.08, 1.0
"""Nats a token may differ by, on average and at most; docs/training/servers.md has the figures seen."""

ROWS = 16
"""Strings that causes are tried on."""

SIGMAS = 5.0
"""Standard errors by which another adapter must fit better."""

TEMPERATURES = (0.5, 0.6, 0.7, 0.8, 0.9, 1.2, 1.5, 2.0)


@dataclass(frozen=True)
class Agreement:
    """Server against local log-probabilities, per token (stops that were chosen count), in nats.

    Attributes:
        tokens: how many were compared.
        mean: mean of the absolute difference, and ``worst`` its maximum.
        kl: mean of server minus local: estimates KL(server || local) per token for samples at temperature one.
    """

    tokens: int
    mean: float
    worst: float
    kl: float

    def __str__(self) -> str:
        return (
            f"{self.tokens} tokens: mean difference {self.mean:.4f}, largest {self.worst:.3f}, "
            f"KL(server || local) {self.kl:+.5f} nats a token"
        )


NOTHING = Agreement(0, 0.0, 0.0, 0.0)


def agreement(
    local: Policy,
    rollouts: Rollouts,
    *,
    others: Mapping[str, Policy] | None = None,
    mean: float = MEAN,
    worst: float = WORST,
) -> Agreement:
    """Compare the log q that came with a server's samples with the local policy's.

    Args:
        local: what the server should be sampling from.
        rollouts: from ``ServerPolicy.sample`` at temperature one.
        others: further policies that the server may be sampling from by mistake, by name (last step's adapter, ...).
            The local model without its adapter, and with each other it has, are always tried.
        mean, worst: nats a token may differ by.

    Raises:
        InputError: the two disagree, or another adapter fits better; the message says what does.
    """
    if rollouts.behaviour.get("log_q", "exact") != "exact" or rollouts.log_q.isnan().any():
        raise InputError(
            "these samples carry no log q to compare; draw a batch at temperature 1 (and, where more than 128 ids are "
            "banned, start the server with --logprobs-mode processed_logprobs)"
        )
    own = _apart(rollouts, local.score(rollouts))
    found = _summary(own)
    if found.tokens == 0:
        raise InputError("nothing to compare: every move and stop of these samples was forced")
    if found.mean > mean or found.worst > worst:
        why = _cause(local, rollouts, others or {}, mean)
        raise InputError(f"the server and the local policy disagree ({found}): {why}")
    rivals = [(text, _apart(rollouts, p.score(rollouts))) for text, p in _policies(local, others or {})]
    text, apart = max(rivals, key=lambda x: _closer(x[1], own), default=("", own))
    if (sigmas := _closer(apart, own)) > SIGMAS:
        raise InputError(f"{text} (it fits better by {sigmas:.0f} standard errors: {_summary(apart)}, not {found})")
    return found


def _taken(log_q: Float[Tensor, "b t"], log_stop: Tensor, rollouts: Rollouts) -> Float[Tensor, "b t1"]:
    """log q of every free move and of the stop taken; NaN where nothing was chosen."""
    b, t = rollouts.moves.shape
    out = torch.full((b, t + 1), float("nan"), dtype=torch.float64)
    out[:, :t] = torch.where(rollouts.kind == FREE, log_q, float("nan")).double().cpu()
    rows = torch.arange(b)
    n, stop = rollouts.n.cpu(), rollouts.stop.cpu()
    end = log_stop.double().cpu()[rows, n, stop]
    out[rows, n] = torch.where(end == 0.0, float("nan"), end)  # forced: log 0
    return out


def _apart(rollouts: Rollouts, scores: Scores, shift: int = 0) -> Float[Tensor, "b t1"]:
    """Recorded log q less scores, NaN where nothing was chosen; with a shift, record i less score i + shift."""
    ours, theirs = _taken(scores.log_q, scores.log_stop, rollouts), _taken(rollouts.log_q, rollouts.log_stop, rollouts)
    if shift:
        ours = ours.roll(-shift, 1)
        ours[:, -1 if shift > 0 else 0] = float("nan")
    return theirs - ours


def _summary(apart: Float[Tensor, "b t1"]) -> Agreement:
    """Figures of the differences that there are."""
    x = apart[~apart.isnan()]
    return Agreement(len(x), x.abs().mean().item(), x.abs().max().item(), x.mean().item()) if len(x) else NOTHING


def _closer(other: Float[Tensor, "b t1"], own: Float[Tensor, "b t1"]) -> float:
    """By how many standard errors ``other`` is smaller than ``own``, token by token; 0 where they are the same."""
    gain = (own.abs() - other.abs()).flatten()
    gain = gain[~gain.isnan()]
    spread = gain.std().item() / len(gain) ** 0.5 if len(gain) > 1 else 0.0
    return gain.mean().item() / spread if spread > 0 else 0.0


# -- causes -----------------------------------------------------------------------------------------------------------


def _cause(local: Policy, rollouts: Rollouts, others: Mapping[str, Policy], mean: float) -> str:
    """The cause that fits best, or what the pattern says where none fits."""
    rows = rollouts.take(torch.arange(min(ROWS, len(rollouts)), device=rollouts.n.device))
    own = _summary(_apart(rows, local.score(rows)))
    tried = [(found.mean, text) for text, found in _tries(local, rows, others) if found.tokens]
    best = min(tried, default=(float("inf"), ""))
    if best[0] <= max(mean, own.mean / 4) and best[0] < own.mean:
        return f"{best[1]} (then the mean difference is {best[0]:.4f})"
    adapter = rollouts.behaviour.get("adapter")
    which = "without an adapter" if adapter is None else f"with adapter {adapter!r}"
    return (
        f"another model or other weights (the server samples {which}; no adapter, prompt, temperature or shift tried "
        f"here explains it); serve the model that {getattr(local, 'version', 'the local policy')} was loaded from, in "
        "the same precision, and push the adapter again"
    )


def _tries(local: Policy, rows: Rollouts, others: Mapping[str, Policy]) -> Iterator[tuple[str, Agreement]]:
    """Each cause in words, with the agreement under it."""
    for text, policy in _policies(local, others):
        yield text, _scored(policy, rows)
    text = "its log-probabilities are not renormalised over the space's menu: banned tokens or early stops were left in"
    yield text, _summary(_apart(rows, local.score(rows, raw=True)))
    mine = local.score(rows)
    for shift in (1, -1):
        yield f"its log-probabilities are shifted by {shift:+d} token", _summary(_apart(rows, mine, shift))
    if isinstance(local, LMPolicy):
        for text, policy in _prompted(local):
            yield text, _scored(policy, rows)
    if isinstance(local, FiniteStepper):
        for at in TEMPERATURES:
            yield (f"its log-probabilities are processed at temperature {at:g}: they are log b, not log q; start "
                   "the server with --logprobs-mode raw_logprobs"), _scored(_Tempered(local, at), rows)  # fmt: skip


def _scored(policy: Policy, rows: Rollouts) -> Agreement:
    return _summary(_apart(rows, policy.score(rows)))


def _policies(local: Policy, others: Mapping[str, Policy]) -> Iterator[tuple[str, Policy]]:
    """What else a server may be sampling from: what the caller names, and the local model's other adapters."""
    for name, policy in others.items():
        yield f"the server samples from {name}; push the adapter you train, or compare with {name}", policy
    if isinstance(local, LMPolicy):
        lm: Any = local.lm
        for adapter in (None, *getattr(lm, "adapters", ())):
            if adapter != getattr(lm, "adapter", None):
                served = "without the adapter" if adapter is None else f"with adapter {adapter!r}"
                yield (f"the server samples {served}: push the one you compare with",
                       LMPolicy(lm.view(adapter), local.space, local.problems, local.reads))  # fmt: skip


def _prompted(local: LMPolicy) -> Iterator[tuple[str, LMPolicy]]:
    """The same model reading otherwise: the other prompt, a token or a template put before it."""
    lm: Any = local.lm
    other = "context" if local.reads == "q_prompt" else "q_prompt"
    if any(p.q_prompt is not None and p.q_prompt != p.context for p in local.problems):
        yield (f"the server policy reads {other!r} and the local one {local.reads!r}; give both the same reads=",
               LMPolicy(lm, local.space, local.problems, other))  # fmt: skip
    bos = getattr(getattr(lm.tokenizer, "raw", None), "bos_token_id", None)
    if bos is not None:
        yield ("the server puts a beginning-of-sequence token before the prompt", _reading(local, lambda p: (bos, *p)))
    if getattr(lm.tokenizer, "has_chat", False):
        yield ("the server wraps the prompt in a chat template; use /v1/completions, or chat='auto' on both sides",
               _reading(local, lambda p: tuple(lm.tokenizer.chat(lm.tokenizer.decode(p)))))  # fmt: skip


def _reading(local: LMPolicy, change: Any) -> LMPolicy:
    """The local policy on prompts that were changed."""
    index = torch.arange(len(local.problems))
    told = [tuple(change(tuple(p))) for p in local.prompts(index)]
    new = [dataclasses.replace(p, q_prompt=x) for p, x in zip(local.problems, told, strict=True)]
    return LMPolicy(local.lm, local.space, new, "q_prompt")


class _Tempered(FiniteStepper):
    """A policy whose log-probabilities are those of another temperature."""

    def __init__(self, base: FiniteStepper, temperature: float) -> None:
        self.base, self.temperature = base, temperature
        self.space, self.problems = base.space, base.problems
        self.start, self.step, self.take, self.start_at = base.start, base.step, base.take, base.start_at

    def log_probs(self, c: Any, s: Any, menu: Any, raw: bool = False) -> tuple[Tensor, Tensor]:
        """The base's, tempered over the menu."""
        return tempered(*self.base.log_probs(c, s, menu), self.temperature)
