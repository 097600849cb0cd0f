"""A language model behind OpenAI-compatible servers (vLLM), for scoring: token ids out, log-probabilities back.

A server scores what it is given - log p of recorded moves, of the recorded stop, log p(Y | X, z) - through
``prompt_logprobs``. It does not list log p of every token after every prefix, and has no cache to step: decoding here,
guides, and rewards of every prefix need a local model, and are refused with that advice.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NoReturn

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from retrodict.errors import InputError
from retrodict.models.cached import unique_rows
from retrodict.models.endpoints import AWAY, Endpoints, Failed, Refused
from retrodict.numerics import NEG_INF
from retrodict.protocols import Tokenizer

ABSENT = -9998.0
"""Log-probabilities at or below this stand for minus infinity, which JSON cannot say (vLLM writes -9999)."""

RAW, PROCESSED = "raw", "processed"
"""What a server's log-probabilities of sampled tokens are: the model's own, or after bias, masks and temperature."""


class ServerLM:
    """The served ``model`` as a LanguageModel that scores.

    Args:
        urls: one server or several that serve the same model.
        model: its name there (``--served-model-name``).
        tokenizer: of the same model. ``HFTokenizer`` brings the vocabulary's size, ends and special ids along; for
            any other give them.
        adapter: name of a LoRA adapter the servers know, see :meth:`load_adapter`.
        at_once: sequences in one scoring request. 1 also sends one request at a time: for vLLM on a CPU with
            ``--enable-lora``, whose engine dies of two (seen in 0.32).

    ``urls`` may be an :class:`Endpoints` with settings of its own (key, timeout, patience).
    """

    device = torch.device("cpu")

    def __init__(
        self,
        urls: str | Sequence[str] | Endpoints,
        model: str,
        tokenizer: Tokenizer,
        *,
        vocab_size: int | None = None,
        end_ids: Sequence[int] | None = None,
        special_ids: Sequence[int] | None = None,
        token_bytes: Sequence[bytes] = (),
        adapter: str | None = None,
        at_once: int = 64,
    ) -> None:
        self.at_once = at_once
        self.endpoints = urls if isinstance(urls, Endpoints) else Endpoints(urls)
        self.model, self.adapter = model, adapter
        self.tokenizer = tokenizer
        size = vocab_size if vocab_size is not None else getattr(tokenizer, "size", None)
        if size is None:
            raise InputError(f"a server does not say how large the vocabulary of {model!r} is; give vocab_size=...")
        self.vocab_size = int(size)
        own_ends: Any = getattr(tokenizer, "end_ids", tuple)
        self.end_ids = tuple(own_ends() if end_ids is None else end_ids)
        self.special_ids = tuple(getattr(tokenizer, "special_ids", ()) if special_ids is None else special_ids)
        own_bytes: Any = getattr(tokenizer, "token_bytes", tuple)
        self.token_bytes: Sequence[bytes] = token_bytes or own_bytes()
        self.tokens_run = self.forwards = 0
        self._folders: dict[str, tuple[Path, str]] = {}
        self.context = self._longest()

    @property
    def served(self) -> str:
        """The name requests go to: the adapter's, or the model's."""
        return self.adapter or self.model

    @property
    def name(self) -> str:
        """How tables call it."""
        return self.model if self.adapter is None else f"{self.model}+{self.adapter}"

    @property
    def version(self) -> str:
        """Names only: a server tells no fingerprint of its weights (``policies.agreement`` compares numbers)."""
        return f"server:{self.name}"

    def _longest(self) -> int:
        """Longest sequence the servers take, less the one token a request must draw."""
        cards = self.endpoints.get("/v1/models").get("data") or []
        card = next((m for m in cards if m.get("id") == self.model), None)
        if card is None:
            names = ", ".join(repr(m.get("id")) for m in cards) or "nothing"
            raise InputError(f"{self.endpoints.urls[0]} does not serve {self.model!r} but {names}; give that name")
        return int(card.get("max_model_len") or 1 << 30) - 1

    def view(self, adapter: str | None) -> ServerLM:
        """The same servers with another adapter, or (None) without."""
        other = copy.copy(self)
        other.adapter, other.tokens_run, other.forwards = adapter, 0, 0
        return other

    # -- requests -----------------------------------------------------------------------------------------------

    def complete(self, bodies: Sequence[Mapping[str, Any]], parallel: int | None = None) -> list[list[dict[str, Any]]]:
        """``/v1/completions`` on token ids, requests spread over the servers; each one's choices in their order."""
        sent = [{"model": self.served, "return_token_ids": True, "add_special_tokens": False, **b} for b in bodies]
        answers = self.endpoints.map("/v1/completions", sent, self._mend, parallel)
        out = []
        for body, answer in zip(sent, answers, strict=True):
            choices = sorted(answer.get("choices") or [], key=lambda c: c.get("index", 0))
            rows = 1 if body["prompt"] and isinstance(body["prompt"][0], int) else len(body["prompt"])
            if len(choices) != rows * body.get("n", 1):
                raise InputError(f"the server gave {len(choices)} answers where {rows * body.get('n', 1)} were asked "
                                 "for; is it an OpenAI-compatible /v1/completions?")  # fmt: skip
            usage = answer.get("usage") or {}
            self.tokens_run += int(usage.get("total_tokens") or 0)
            self.forwards += 1
            out.append(choices)
        return out

    def log_probs_of(self, prompts: Sequence[Sequence[int]], tails: Sequence[Sequence[int]]) -> list[list[float]]:
        """log p of each token of each row's tail after its prompt (raw: no temperature, no mask), in nats."""
        rows = [tuple([*p, *t]) for p, t in zip(prompts, tails, strict=True)]
        if any(len(p) == 0 for p in prompts):
            raise InputError("empty prompt: the model needs at least one token to read; give it a first word")
        longest = max(map(len, rows), default=0)
        if longest > self.context:
            raise InputError(
                f"a sequence of {longest} tokens is over what {self.name} is served with ({self.context} and one of "
                "its own); start the server with a larger --max-model-len, or shorten the prompt"
            )
        distinct, index = unique_rows(rows)
        bodies = [
            {"prompt": [list(r) for r in distinct[i : i + self.at_once]], "max_tokens": 1, "prompt_logprobs": 0,
             "temperature": 1.0}
            for i in range(0, len(distinct), self.at_once)
        ]  # fmt: skip
        choices = [c for part in self.complete(bodies, 1 if self.at_once == 1 else None) for c in part]
        values = [_prompt_values(row, c) for row, c in zip(distinct, choices, strict=True)]
        return [values[i][len(values[i]) - len(t) :] for i, t in zip(index, tails, strict=True)]

    # -- LanguageModel: scoring ----------------------------------------------------------------------------------

    def score(
        self,
        prompts: Sequence[Sequence[int]],
        moves: Int[Tensor, "b t"],
        n: Int[Tensor, " b"],
        stops: Sequence[int] = (),
        legal: Bool[Tensor, " v"] | None = None,
    ) -> tuple[Float[Tensor, "b t"], Float[Tensor, "b t1 s"], Float[Tensor, "b t1"]]:
        """log p(move i | prefix), as ``CachedLM.score`` gives it; stops after every prefix are not to be had.

        Raises InputError where stops or the mass of legal tokens are asked for.
        """
        if stops or legal is not None:
            self._cannot(
                "log p of every stop, or the mass of the legal tokens, after every prefix",
                "score with the local policy, or ServerPolicy.score(rollouts, raw=True) for the stop taken",
            )
        b, t = moves.shape
        tails = [row[:k] for row, k in zip(moves.tolist(), n.tolist(), strict=True)]
        out = torch.zeros(b, t)
        for i, row in enumerate(self.log_probs_of(prompts, tails)):
            out[i, : len(row)] = torch.tensor(row)
        return out, torch.zeros(b, t + 1, 0), torch.zeros(b, t + 1)

    def score_suffixes(
        self,
        prompts: Sequence[Sequence[int]],
        moves: Int[Tensor, "b t"],
        n: Int[Tensor, " b"],
        suffixes: Sequence[Sequence[Sequence[int]]],
        every: bool = True,
        skip: int = 0,
    ) -> Float[Tensor, "b t1 s"]:
        """log p(suffix | prompt, moves) after the last move, as ``CachedLM.score_suffixes`` with ``every=False``."""
        if every:
            self._cannot(
                "the evidence after every prefix",
                "use an objective on whole objects (VarGrad, TB) with Likelihood(..., prefixes=False)",
            )
        b, t = moves.shape
        lengths = n.tolist()
        heads = [[*p, *row[:k]] for p, row, k in zip(prompts, moves.tolist(), lengths, strict=True)]
        asked = [(*head, *y[:skip]) for rows in suffixes for head, y in zip(heads, rows, strict=True)]
        values = self.log_probs_of(asked, [y[skip:] for rows in suffixes for y in rows])
        out = torch.zeros(b, t + 1, len(suffixes))
        total = torch.tensor([sum(v) for v in values]).view(len(suffixes), b)
        out[torch.arange(b), torch.tensor(lengths)] = total.T
        return out

    def _cannot(self, what: str, instead: str) -> NoReturn:
        raise InputError(f"a server does not give {what}: {instead}")

    def encode(self, prompts: Sequence[Sequence[int]], room: int = 0) -> tuple[Any, Float[Tensor, "r v"]]:
        """Refused: a server has no cache to step."""
        self._cannot("a cache to decode with", "draw with ServerPolicy, or load the model here with rd.load")

    def step(self, cache: Any, ids: Int[Tensor, " r"]) -> tuple[Any, Float[Tensor, "r v"]]:
        """Refused, as :meth:`encode`."""
        self._cannot("a cache to decode with", "draw with ServerPolicy, or load the model here with rd.load")

    def take(self, cache: Any, index: Int[Tensor, " r2"]) -> Any:
        """Refused, as :meth:`encode`."""
        self._cannot("a cache to decode with", "draw with ServerPolicy, or load the model here with rd.load")

    def peek(self, cache: Any, ids: Int[Tensor, "p y"], rows: Int[Tensor, " p"] | None = None) -> Tensor:
        """Refused, as :meth:`encode`."""
        self._cannot("a cache to decode with", "draw with ServerPolicy, or load the model here with rd.load")

    # -- what its log-probabilities are --------------------------------------------------------------------------

    @cached_property
    def mode(self) -> str:
        """``"raw"`` or ``"processed"`` (vLLM's ``--logprobs-mode``), found out by one token drawn from two.

        Raises InputError for servers that return logits, or no log-probabilities.
        """
        two = [0, 1]
        body = {"prompt": [two[-1]], "max_tokens": 1, "temperature": 1.0, "allowed_token_ids": two, "logprobs": 0,
                "logprob_token_ids": two, "return_tokens_as_token_ids": True, "seed": 0}  # fmt: skip
        (choice,) = self.complete([body])[0]
        (known,) = sampled_values(choice)
        mass = torch.tensor([known.get(i, NEG_INF) for i in two], dtype=torch.float64).exp().sum().item()
        if mass > 1.01:
            raise InputError("the server returns logits; start it with --logprobs-mode raw_logprobs")
        return PROCESSED if abs(mass - 1.0) < 1e-3 else RAW

    # -- adapters -----------------------------------------------------------------------------------------------

    def load_adapter(self, folder: str | Path) -> str:
        """Load a PEFT folder into every server that is up (the others follow when they ask for it); its name there.

        The name holds a digest of the weights. The servers read the folder themselves, now and after a restart: it
        must be on a disk they share, and stay as it is until the adapter is unloaded.
        """
        path = Path(folder).expanduser().resolve()
        digest = _digest(path)
        name = f"{path.name}-{digest[:12]}"
        self._folders[name] = (path, digest)
        if not self._load_everywhere(name):
            self.endpoints.get("/v1/models")  # waits until one is back
            self._load_everywhere(name)
        return name

    def _load_everywhere(self, name: str) -> int:
        up = 0
        for url in self.endpoints.urls:
            try:
                self._load(url, name)
                up += 1
            except AWAY:
                continue
        return up

    def unload_adapter(self, name: str) -> None:
        """Take an adapter out of every server that is up; one that does not have it is content."""
        self._folders.pop(name, None)
        for url in self.endpoints.urls:
            try:
                self.endpoints.once(url, "POST", "/v1/unload_lora_adapter", {"lora_name": name})
            except (*AWAY, Refused):
                continue

    def _load(self, url: str, name: str) -> None:
        path, _ = self._folders[name]
        try:
            self.endpoints.once(url, "POST", "/v1/load_lora_adapter", {"lora_name": name, "lora_path": str(path)})
        except (Refused, Failed) as error:
            if "already" in error.message:
                return
            if error.status == 503:
                raise
            raise InputError(
                f"{url} did not load the adapter in {path}: {error.status}: {error.message}; the server must see that "
                "folder, and needs --enable-lora, --max-lora-rank of at least the adapter's rank, and "
                "VLLM_ALLOW_RUNTIME_LORA_UPDATING=True in its environment"
            ) from error

    def _mend(self, url: str, message: str) -> bool:
        """A server that was restarted has lost its adapters: load the one asked for again."""
        if self.adapter is None or self.adapter not in self._folders:
            return False
        path, digest = self._folders[self.adapter]
        if _digest(path) != digest:
            raise InputError(
                f"{url} has lost adapter {self.adapter!r} and {path} has changed since it was pushed; give every "
                "push a folder of its own"
            )
        self._load(url, self.adapter)
        return True


def _digest(path: Path) -> str:
    file = path / "adapter_model.safetensors"
    if not file.is_file() or not (path / "adapter_config.json").is_file():
        raise InputError(f"no adapter in {str(path)!r}: a PEFT folder with adapter_config.json and "
                         "adapter_model.safetensors is needed")  # fmt: skip
    return hashlib.sha256((path / "adapter_config.json").read_bytes() + file.read_bytes()).hexdigest()


def _number(value: float) -> float:
    return NEG_INF if value <= ABSENT else float(value)


def _prompt_values(row: Sequence[int], choice: Mapping[str, Any]) -> list[float]:
    """log p of each token of ``row`` but the first, checked to be those ids."""
    given = choice.get("prompt_logprobs")
    if not given:
        raise InputError("the server returns no prompt_logprobs; scoring needs vLLM's /v1/completions")
    if len(given) != len(row):
        raise InputError(f"the server read {len(given)} tokens where {len(row)} were sent: it adds tokens of its own")
    out = []
    for token, entry in zip(row[1:], given[1:], strict=True):
        if str(token) not in entry:
            raise InputError(f"the server scored tokens {', '.join(entry)} where {token} was sent")
        out.append(_number(entry[str(token)]["logprob"]))
    return out


def sampled_values(choice: Mapping[str, Any]) -> list[dict[int, float]]:
    """What a choice says of log p at each sampled position: by token id, the sampled one included."""
    said = choice.get("logprobs") or {}
    ids, values = choice.get("token_ids"), said.get("token_logprobs")
    if ids is None or values is None or len(ids) != len(values):
        raise InputError("the server does not return token ids with their log-probabilities (return_token_ids, "
                         "logprobs); a recent vLLM does")  # fmt: skip
    tops = said.get("top_logprobs") or [None] * len(ids)
    out = []
    for token, value, top in zip(ids, values, tops, strict=True):
        known = {int(k.removeprefix("token_id:")): _number(v) for k, v in (top or {}).items()
                 if k.startswith("token_id:")}  # fmt: skip
        out.append({**known, int(token): _number(value)})
    return out
