"""A served language model as a policy over strings: it samples, and scores whole objects.

What was sampled is known as ids, never re-tokenised. With every sampled token the server also says log p of each stop
and of each banned id, so that log q over the menu, and log q of stopping after every prefix, are the server's own:

    log q(move | prefix) = log p(move | prefix) - log(1 - sum_banned p - [may not stop yet] sum_stops p)
"""

from __future__ import annotations

import math
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Int
from torch import Tensor

from retrodict.errors import InputError, nearest
from retrodict.models.server import PROCESSED, RAW, ServerLM, sampled_values
from retrodict.numerics import NEG_INF
from retrodict.policies.lm import LMPolicy
from retrodict.protocols import Problems
from retrodict.records import FREE, PAD, Rollouts, Scores
from retrodict.spaces.limits import may_stop
from retrodict.spaces.strings import Strings

SAMPLES = 64
"""Most strings drawn by one request; more of one prompt become several, which several servers share."""

WATCHED = 128
"""Most ids whose log p comes with each sampled token (vLLM's ``logprob_token_ids``)."""

COOLEST, HOTTEST = 0.01, 4.0
"""Temperatures a server draws at as asked: vLLM rounds up below, and above it the ban (-100 nats / T) wears thin."""

UNKNOWN = float("nan")
"""What a server did not say. A weight or a loss made from it is NaN, never a wrong number."""


class ServerPolicy:
    """log q of a served model, renormalised over the space's menu.

    Args:
        server: the model, on its servers.
        space: strings that end with a token; limit ``force`` or ``own_stop``.
        problems: the questions.
        adapter: name of a LoRA adapter on the servers; see :meth:`push`.
        reads: what the model sees before the latent, as in ``LMPolicy``.
    """

    def __init__(
        self,
        server: ServerLM,
        space: Strings,
        problems: Problems,
        adapter: str | None = None,
        reads: Literal["context", "q_prompt"] = "context",
    ) -> None:
        _check(server, space)
        self.server = server.view(adapter)
        self.space, self.problems = space, problems
        self.reads: Literal["context", "q_prompt"] = reads
        self._lock = threading.RLock()

    @property
    def lm(self) -> ServerLM:
        """The model with the present adapter."""
        return self.server

    @property
    def adapter(self) -> str | None:
        """Name of the adapter that the next samples come from."""
        return self.server.adapter

    @property
    def version(self) -> str:
        """Model, adapter and what it reads."""
        return f"{self.server.version}/{self.reads}"

    def on(self, problems: Problems) -> ServerPolicy:
        """The same served model on other problems."""
        return ServerPolicy(self.server, self.space, problems, self.adapter, self.reads)

    prompts = LMPolicy.prompts

    def push(self, folder: str | Path) -> str:
        """Sample from the PEFT adapter in ``folder`` from now on; the one before is unloaded. Its name is returned.

        The name holds a digest of the weights and is recorded with every sample. Waits for samples under way.
        """
        with self._lock:
            old, name = self.adapter, self.server.load_adapter(folder)
            self.server = self.server.view(name)
            if old not in (None, name):
                self.server.unload_adapter(str(old))
            return name

    # -- sampling -----------------------------------------------------------------------------------------------

    def sample(
        self, problem: Int[Tensor, " b"], gen: torch.Generator, behaviour: Mapping[str, Any] | None = None
    ) -> Rollouts:
        """Draw one string a row: one request for each distinct prompt, seeded from ``gen``.

        ``log_q`` and ``log_stop`` are at temperature one, ``log_b`` is the density drawn from. A server gives one of
        the two where the behaviour's temperature is not one: raw log-probabilities give the first, processed ones the
        second; the other is NaN, and ``behaviour["log_q"]``, ``behaviour["log_b"]`` say which is ``"exact"`` and which
        ``"unknown"``. A string cut at the limit is a forced stop.
        """
        temperature = _temperature(behaviour)
        with self._lock:
            mode = self.server.mode
            rows: dict[tuple[int, ...], list[int]] = {}
            for i, prompt in enumerate(self.prompts(problem)):
                rows.setdefault(tuple(prompt), []).append(i)
            jobs = [(p, found[i : i + SAMPLES]) for p, found in rows.items() for i in range(0, len(found), SAMPLES)]
            seeds = torch.randint(1 << 62, (len(jobs),), generator=gen, device=gen.device).tolist()
            asked = [self._request(p, len(r), seed, temperature) for (p, r), seed in zip(jobs, seeds, strict=True)]
            answers = self.server.complete(asked)
            adapter = self.adapter
        tape = _Tape(self.space, len(problem))
        for (prompt, index), choices in zip(jobs, answers, strict=True):
            for i, choice in zip(index, choices, strict=True):
                tape.write(i, prompt, choice)
        tape.settle(mode)
        return tape.rollouts(problem, mode, temperature, {**(behaviour or {}), "adapter": adapter})

    def _request(self, prompt: Sequence[int], n: int, seed: int, temperature: float) -> dict[str, Any]:
        """The body of a completion request; every setting is said, so that no default of the server's enters."""
        space, watched = self.space, _watched(self.space)
        if len(prompt) + space.max_moves > self.server.context + 1:
            raise InputError(
                f"prompt {len(prompt)} + latent {space.max_moves} tokens are over what {self.server.name} is served "
                f"with ({self.server.context + 1}); start the server with a larger --max-model-len"
            )
        return {
            "prompt": list(prompt), "n": n, "seed": seed, "max_tokens": space.max_moves, "temperature": temperature,
            "top_p": 1.0, "top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0, "presence_penalty": 0.0,
            "frequency_penalty": 0.0, "stop_token_ids": list(space.stops.ids), "ignore_eos": True,
            "min_tokens": space.min_moves, "logit_bias": {str(i): -100.0 for i in space.banned},
            "logprobs": 0, "return_tokens_as_token_ids": True,
        } | ({"logprob_token_ids": watched} if watched else {})  # fmt: skip

    # -- scoring ------------------------------------------------------------------------------------------------

    def score(self, rollouts: Rollouts, raw: bool = False) -> Scores:
        """The model's own log p of every recorded move and of the stop that was taken (``raw=True`` only).

        Stops that were not taken are NaN: a server offers terms of whole objects. Raises InputError for
        ``raw=False``: log q over the menu needs the mass of all legal tokens, which prompts are not scored with.
        """
        if not raw:
            raise InputError(
                "a server does not give log q over the menu for given strings; score them with the local policy, or "
                "use score(rollouts, raw=True) for the model's own log p"
            )
        space, (b, t) = self.space, rollouts.moves.shape
        n, stop = rollouts.n.cpu(), rollouts.stop.cpu()
        ends = [self._ends(s) for s in stop.tolist()]
        found = zip(self.prompts(rollouts.problem), rollouts.moves.tolist(), n.tolist(), ends, strict=True)
        asked = [(prompt, [*row[:k], *end]) for prompt, row, k, e in found for end in e]
        values = iter(self.server.log_probs_of([p for p, _ in asked], [tail for _, tail in asked]))
        log_p, paid = torch.zeros(b, t), torch.full((b, space.n_stops), NEG_INF)
        for i, (k, s) in enumerate(zip(n.tolist(), stop.tolist(), strict=True)):
            rows = [next(values) for _ in ends[i]]
            log_p[i, :k] = torch.tensor(rows[0][:k])
            paid[i, s] = torch.tensor([sum(r[k:]) for r in rows]).logsumexp(0)
        taken = space.log_p_stop(paid, n, torch.zeros(b, dtype=torch.bool))
        at = torch.arange(t + 1)
        log_stop = torch.where((at <= n[:, None])[:, :, None], UNKNOWN, NEG_INF).repeat(1, 1, space.n_stops)
        log_stop[torch.arange(b), n, stop] = taken[torch.arange(b), stop]
        free = rollouts.kind.cpu() == FREE
        device = rollouts.n.device
        return Scores(torch.where(free, log_p, 0.0).to(device), log_stop.to(device))

    def _ends(self, stop: int) -> list[tuple[int, ...]]:
        """Ids that end a string by stop s: its own, or each of those that count as one."""
        stops = self.space.stops
        if not stops.acts:
            return [()]
        return [(stops.ids[stop],)] if stops.in_text else [(i,) for i in stops.ids]


class _Tape:
    """Answers as they come in, then the record. Log-probabilities in float64 until the end."""

    def __init__(self, space: Strings, b: int) -> None:
        self.space = space
        t = space.max_moves
        self.moves = torch.zeros(b, t, dtype=torch.long)
        self.n = torch.zeros(b, dtype=torch.long)
        self.ended = torch.zeros(b, dtype=torch.bool)
        self.stop = torch.zeros(b, dtype=torch.long)
        self.log_p = torch.zeros(b, t, dtype=torch.float64)
        self.ends = torch.full((b, t + 1, max(1, len(space.stops.ids))), UNKNOWN, dtype=torch.float64)
        self.banned = torch.zeros(b, t + 1, dtype=torch.float64)

    def write(self, i: int, prompt: Sequence[int], choice: Mapping[str, Any]) -> None:
        """Row i: the tokens of a choice, its stop, and what was said of log p at each of them."""
        known = sampled_values(choice)
        ids = [int(x) for x in choice["token_ids"]]
        _check_choice(self.space, prompt, ids, choice)
        stops, banned = self.space.stops.ids, self.space.banned
        self.ended[i] = bool(ids) and ids[-1] in stops
        moves = ids[:-1] if self.ended[i] else ids
        k = len(moves)
        self.n[i] = k
        if self.ended[i]:
            self.stop[i] = stops.index(ids[-1]) if self.space.stops.in_text else 0
        if k:
            self.moves[i, :k] = torch.tensor(moves)
            self.log_p[i, :k] = torch.tensor([known[j][x] for j, x in enumerate(moves)], dtype=torch.float64)
        for j, said in enumerate(known):
            for s, x in enumerate(stops):
                self.ends[i, j, s] = said.get(x, UNKNOWN)
            self.banned[i, j] = sum(math.exp(said.get(x, UNKNOWN)) for x in banned)

    def settle(self, mode: str) -> None:
        """Renormalise over the menu; processed log-probabilities already are. NaN where ids went unwatched."""
        space = self.space
        t = space.max_moves
        at = torch.arange(t + 1).expand(len(self.n), -1)
        forced = at == t
        may = may_stop(space.limit, at, space.min_moves, t) & space.stops.acts
        self.can_stop = (at <= self.n[:, None]) & (forced | may)
        log_stop = self.ends if space.stops.in_text else self.ends.logsumexp(-1, keepdim=True)
        early = log_stop.exp().sum(-1) if space.stops.acts else torch.zeros_like(self.banned)
        off = self.banned + torch.where(may, 0.0, early)
        norm = torch.zeros_like(off) if mode == PROCESSED else torch.log1p(-off.clamp_max(1 - 1e-12))
        self.log_move = torch.where(at[:, :t] < self.n[:, None], self.log_p - norm[:, :t], 0.0)
        only_first = torch.full_like(log_stop, NEG_INF)
        only_first[:, :, 0] = 0.0
        log_stop = torch.where(forced[:, :, None], only_first, log_stop - norm[:, :, None])
        self.log_stop = torch.where(self.can_stop[:, :, None], log_stop, NEG_INF)

    def rollouts(self, problem: Tensor, mode: str, temperature: float, behaviour: Mapping[str, Any]) -> Rollouts:
        """The record, cut to the longest row, on the device of ``problem``."""
        b, t = len(self.n), int(self.n.max()) if len(self.n) else 0
        rows = torch.arange(b)
        log_b = torch.cat([self.log_move, torch.zeros(b, 1)], 1)
        log_b[rows, self.n] = self.log_stop[rows, self.n, self.stop]
        log_q, log_stop, at = self.log_move, self.log_stop, torch.arange(self.space.max_moves + 1)
        if temperature != 1.0 and mode == PROCESSED:
            log_q = torch.where(at[:-1] < self.n[:, None], UNKNOWN, log_q)
            log_stop = torch.where((self.can_stop & (at < self.space.max_moves))[:, :, None], UNKNOWN, log_stop)
        if temperature != 1.0 and mode == RAW:
            log_b = torch.where(at < (self.n + self.ended)[:, None], UNKNOWN, log_b)
        words = {"log_q": _word(log_q, log_stop), "log_b": _word(log_b)}
        said = {"temperature": temperature, "logprobs": mode, **words}
        kind = torch.where(torch.arange(t) < self.n[:, None], FREE, PAD).to(torch.int8)
        return Rollouts(
            problem=problem.cpu(), moves=self.moves[:, :t], kind=kind, n=self.n, stop=self.stop,
            can_stop=self.can_stop[:, : t + 1], log_q=log_q[:, :t].float(), log_stop=log_stop[:, : t + 1].float(),
            log_b=log_b[:, : t + 1].float(), log_pb=torch.zeros(b, t), behaviour={**behaviour, **said},
        ).to(problem.device)  # fmt: skip


def _word(*values: Tensor) -> str:
    return "unknown" if any(x.isnan().any() for x in values) else "exact"


def _watched(space: Strings) -> list[int]:
    """Ids whose log p is asked for at each position: all that the menu's normaliser needs, or the stops alone."""
    every = [*space.stops.ids, *space.banned]
    return every if len(every) <= WATCHED else list(space.stops.ids)


def _check(server: ServerLM, space: Strings) -> None:
    """Raise InputError for a space that a server cannot sample exactly."""
    if space.stops.predicate is not None:
        raise InputError("a server ends a string at a token, not at a condition on its text; use stop='.' or ids, or "
                         "draw with the local policy")  # fmt: skip
    if space.max_free != space.max_moves:
        raise InputError("a tool writes into these strings, and a server does not ask it; draw with the local policy")
    if space.limit not in ("force", "own_stop"):
        raise InputError(
            f"limit {space.limit!r} is not drawn by a server; use 'force' or 'own_stop', or the local policy"
        )
    if space.max_moves < 1:
        raise InputError("a server draws at least one token; give max_tokens of 1 or more")
    if space.vocab_size != server.vocab_size:
        raise InputError(
            f"the space has {space.vocab_size} tokens and the served model {server.vocab_size}; build both from one "
            "model"
        )
    loose = set(server.end_ids) - set(space.stops.ids) - set(space.banned)
    if space.min_moves and loose:
        raise InputError(
            f"a server keeps its end of sequence (id {sorted(loose)[0]}) back for the first min_tokens, where this "
            "space allows it as a move; ban it, make it a stop, or use min_tokens=0"
        )


def _temperature(behaviour: Mapping[str, Any] | None) -> float:
    given = behaviour or {}
    for name in set(given) - {"temperature"}:
        if given[name] not in (0, 0.0, None):
            raise InputError(f"a server draws with a temperature, not with {name!r}{nearest(name, ['temperature'])}; "
                             "leave it out, or draw with the local policy")  # fmt: skip
    value = float(given.get("temperature", 1.0))
    if not COOLEST <= value <= HOTTEST:
        raise InputError(f"temperature {value:g}: a server draws at {COOLEST} to {HOTTEST:g}")
    return value


def _check_choice(space: Strings, prompt: Sequence[int], ids: Sequence[int], choice: Mapping[str, Any]) -> None:
    """Raise InputError where a server read or did something else than it was asked."""
    read = choice.get("prompt_token_ids")
    if read is not None and list(read) != list(prompt):
        raise InputError(
            f"the server read {len(read)} tokens where {len(prompt)} were sent: it adds tokens or a chat template"
        )
    wrong = set(ids) & set(space.banned)
    if wrong:
        raise InputError(f"the server drew token {sorted(wrong)[0]}, which is no move: it ignores logit_bias")
    ended = bool(ids) and ids[-1] in space.stops.ids
    if set(ids[: len(ids) - ended]) & set(space.stops.ids) or (ended and len(ids) <= space.min_moves):
        raise InputError("the server went on after a stop, or stopped before min_tokens: it ignores stop_token_ids or "
                         "min_tokens")  # fmt: skip
    if not ended and len(ids) != space.max_moves:
        raise InputError(
            f"the server ended a string after {len(ids)} of {space.max_moves} tokens without a stop "
            f"({choice.get('finish_reason')}); start it with --generation-config vllm and room for the whole string"
        )
