"""An in-process server that speaks vLLM's JSON and samples from a table: /v1/models, /v1/completions, adapters.

Written from vLLM's documented behaviour, one token at a time, without the library's own policies. ``faults`` makes it
misbehave as a real one may.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch

from retrodict.models.tabular import TabularLM

Reply = tuple[int, dict[str, Any] | str]


class FakeServer:
    """Serves ``models`` by name; an adapter's folder names (in ``which.txt``) the model it turns the base into."""

    def __init__(self, models: Mapping[str, TabularLM], base: str = "base", mode: str = "raw") -> None:
        self.models, self.base, self.mode = dict(models), base, mode
        self.loaded: dict[str, str] = {}
        self.faults: set[str] = set()
        self.fail_next = 0
        self.seen: list[tuple[str, dict[str, Any]]] = []
        self.port = 0
        self._http: ThreadingHTTPServer | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> FakeServer:
        fake = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self._reply(fake.answer(self.path, {}))

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                self._reply(fake.answer(self.path, json.loads(body)))

            def _reply(self, reply: Reply) -> None:
                status, body = reply
                if status == 0:  # die in the middle of an answer
                    self.send_response(200)
                    self.send_header("Content-Length", "1000")
                    self.end_headers()
                    self.wfile.write(b'{"choi')
                    self.close_connection = True
                    return
                text = body.encode() if isinstance(body, str) else json.dumps(body).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(text)))
                self.end_headers()
                self.wfile.write(text)

            def log_message(self, *args: Any) -> None:
                pass

        self._http = ThreadingHTTPServer(("127.0.0.1", self.port), Handler)
        self.port = self._http.server_address[1]
        threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return self

    def kill(self) -> None:
        """Stop listening and forget adapters, as a killed process does. ``start`` brings it back on its port."""
        assert self._http is not None
        self._http.shutdown()
        self._http.server_close()
        self.loaded = {}

    # -- answers ------------------------------------------------------------------------------------------------

    def answer(self, path: str, body: dict[str, Any]) -> Reply:
        self.seen.append((path, body))
        if self.fail_next and path == "/v1/completions":
            self.fail_next -= 1
            return (500, {"error": {"message": "EngineDeadError", "code": 500}}) if self.fail_next % 2 else (0, "")
        if path == "/v1/models":
            names = [self.base, *self.loaded]
            return 200, {"data": [{"id": x, "max_model_len": 64 if x == self.base else None} for x in names]}
        if path == "/v1/load_lora_adapter":
            return self._load(body["lora_name"], Path(body["lora_path"]))
        if path == "/v1/unload_lora_adapter":
            if self.loaded.pop(body["lora_name"], None) is None:
                return 404, {"error": {"message": "cannot be found", "code": 404}}
            return 200, "Success"
        if path == "/v1/completions":
            return self._complete(body)
        return 404, {"detail": "Not Found"}

    def _load(self, name: str, folder: Path) -> Reply:
        if name in self.loaded:
            return 400, {"error": {"message": f"The lora adapter '{name}' has already been loaded.", "code": 400}}
        which = (folder / "which.txt").read_text()
        if which == "too large":
            return 500, {"error": {"message": "LoRA rank 128 is greater than max_lora_rank 64", "code": 500}}
        self.loaded[name] = which
        return 200, f"Success: LoRA adapter '{name}' added successfully."

    def _complete(self, body: dict[str, Any]) -> Reply:
        name = body["model"]
        if name != self.base and name not in self.loaded:
            return 404, {"error": {"message": f"The model `{name}` does not exist.", "code": 404}}
        lm = self.models[self.base if "deaf" in self.faults else self.loaded.get(name, self.base)]
        many = body["prompt"] if isinstance(body["prompt"][0], list) else [body["prompt"]]
        if max(len(p) for p in many) + body["max_tokens"] > 64:
            return 400, {"error": {"message": "This model's maximum context length is 64 tokens.", "code": 400}}
        choices: list[dict[str, Any]] = []
        for prompt in many:
            for i in range(body.get("n", 1)):
                gen = torch.Generator().manual_seed(body.get("seed", 0) + i)
                choices.append({"index": len(choices), **self._choice(lm, prompt, body, gen)})
        used = sum(map(len, many)) + sum(len(c["token_ids"]) for c in choices)
        return 200, {"choices": choices[::-1], "usage": {"total_tokens": used}}

    def _choice(self, lm: TabularLM, prompt: list[int], body: dict[str, Any], gen: torch.Generator) -> dict[str, Any]:
        if "bos" in self.faults:
            prompt = [lm.vocab_size - 1, *prompt]
        stops = set(body.get("stop_token_ids", ()))
        ids: list[int] = []
        tops: list[dict[str, float]] = []
        while len(ids) < body["max_tokens"]:
            raw = _next(lm, [*prompt, *ids])
            done = self._process(raw.clone(), body, len(ids))
            token = int(torch.multinomial(done.exp(), 1, generator=gen))
            shown = raw if self.mode == "raw" else done if self.mode == "processed" else raw + 7.0
            ids.append(token)
            watched = {token, *body.get("logprob_token_ids", ())}
            tops.append({f"token_id:{x}": max(float(shown[x]), -9999.0) for x in watched})
            if token in stops and "no stop" not in self.faults:
                break
        said = [top[f"token_id:{x}"] for top, x in zip(tops, ids, strict=True)]
        said = said[:1] + said[:-1] if "shift" in self.faults else said
        scored: list[dict[str, Any] | None] | None = None
        if body.get("prompt_logprobs") is not None:
            scored = [None, *({str(x): {"logprob": float(_next(lm, prompt[:j])[x]), "rank": 1}}
                              for j, x in enumerate(prompt) if j)]  # fmt: skip
        end = "stop" if ids[-1] in stops else "length"
        return {"token_ids": ids, "finish_reason": end, "prompt_logprobs": scored, "text": "not to be read",
                "prompt_token_ids": None if "mute" in self.faults else prompt,
                "logprobs": {"token_logprobs": said, "top_logprobs": tops}}  # fmt: skip

    def _process(self, log_p: torch.Tensor, body: dict[str, Any], done: int) -> torch.Tensor:
        """Log-probabilities that are drawn from: bias, masks, then temperature."""
        if "no bias" not in self.faults:
            for token, bias in (body.get("logit_bias") or {}).items():
                log_p[int(token)] += bias
        if done < body.get("min_tokens", 0) and "no min" not in self.faults:
            log_p[list(body["stop_token_ids"])] = -torch.inf
        if body.get("allowed_token_ids"):
            off = torch.ones_like(log_p, dtype=torch.bool)
            off[body["allowed_token_ids"]] = False
            log_p[off] = -torch.inf
        return (log_p / body["temperature"]).log_softmax(-1)


def _next(lm: TabularLM, ids: list[int]) -> torch.Tensor:
    return _after(lm, tuple(ids[-lm.order :]))


@lru_cache(maxsize=4096)
def _after(lm: TabularLM, ids: tuple[int, ...]) -> torch.Tensor:
    return lm.encode([ids])[1][0].double().log_softmax(-1)


@contextmanager
def serving(*fakes: FakeServer) -> Iterator[tuple[FakeServer, ...]]:
    """The servers, up."""
    for fake in fakes:
        fake.start()
    try:
        yield fakes
    finally:
        for fake in fakes:
            fake.kill()
