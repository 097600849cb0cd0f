"""The served policy and scorer against a real vLLM, bfloat16 on a CPU. Each test prints the figures it judges by."""

from __future__ import annotations

import math
import threading
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

import retrodict as rd
from retrodict.errors import InputError
from retrodict.models.endpoints import Endpoints
from retrodict.models.server import ServerLM
from retrodict.policies.agreement import agreement
from retrodict.policies.base import tempered
from retrodict.policies.lm import LMPolicy
from retrodict.policies.server import ServerPolicy
from retrodict.rng import generator
from retrodict.targets.likelihood import Likelihood

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(1200)]


@pytest.fixture(scope="session")
def lm() -> Any:
    return rd.load("smollm2", dtype="float32", device="cpu")


@pytest.fixture(scope="session")
def story(lm: Any) -> Any:
    return rd.infill(lm, before="The cat was hungry.", after="Now the cat is sleepy, not hungry.", max_tokens=12)


def served(vllm: Any, lm: Any) -> ServerLM:
    return ServerLM(Endpoints(vllm.url, patience=300.0), "smollm2", lm.tokenizer, at_once=1)


def rows(n: int) -> torch.Tensor:
    return torch.zeros(n, dtype=torch.long)


def lora(path: Path, seed: int) -> Path:
    """A random LoRA, saved by peft."""
    from peft import LoraConfig, get_peft_model

    from retrodict.models.hf.load import materialise

    torch.manual_seed(seed)
    base = materialise("smollm2", dtype="float32", device="cpu").module
    model = get_peft_model(base, LoraConfig(r=8, lora_alpha=8, target_modules=["q_proj", "v_proj", "down_proj"]))
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.02)
    model.save_pretrained(path)
    return path


def report(name: str, apart: torch.Tensor) -> float:
    print(f"\n{name}: {apart.numel()} numbers, mean {apart.abs().mean():.4f}, largest {apart.abs().max():.3f} nats")
    return apart.abs().mean().item()


def test_samples_and_scores_agree_with_the_model_here(vllm: Any, lm: Any, story: Any) -> None:
    server = served(vllm, lm)
    policy, local = ServerPolicy(server, story.space, story.problems), LMPolicy(lm, story.space, story.problems)
    drawn = policy.sample(rows(32), generator(0))
    assert server.view(None).mode == "raw" and drawn.behaviour["log_q"] == drawn.behaviour["log_b"] == "exact"
    assert len(set(story.space.show(drawn))) > 20
    print("\n" + str(agreement(local, drawn)))
    here = local.score(drawn)
    ends = drawn.can_stop & (torch.arange(drawn.can_stop.shape[1]) < story.space.max_moves)
    assert report("log q(stop) of every prefix", (drawn.log_stop - here.log_stop)[ends]) < 0.1
    some = drawn.take(torch.arange(8))
    got, want = policy.score(some, raw=True), local.score(some, raw=True)
    inside = torch.arange(some.moves.shape[1]) < some.n[:, None]
    assert report("raw log p of recorded moves", (got.log_q - want.log_q)[inside]) < 0.08
    there = Likelihood(server, story.space, story.problems, prefixes=False)(some)
    assert report("log p(Y | X, z)", there - story.factors["likelihood"](some)) < 0.5
    again = policy.sample(rows(32), generator(0))
    same = sum(a == b for a, b in zip(story.space.keys(drawn), story.space.keys(again), strict=True))
    print(f"same seed, same strings: {same}/32")


def test_strings_come_in_their_proportions(vllm: Any, lm: Any) -> None:
    """First sentences of at most two tokens with a minimal length, against the local probabilities (5 sigma)."""
    target = rd.continuation(lm, "The capital of France is Paris. The capital of Italy is", stop=".", max_tokens=2,
                             min_tokens=1)  # fmt: skip
    drawn = ServerPolicy(served(vllm, lm), target.space, target.problems).sample(rows(192), generator(1))
    scores = LMPolicy(lm, target.space, target.problems).score(drawn)
    end = scores.log_stop[torch.arange(192), drawn.n, drawn.stop]
    log_q = dict(zip(target.space.keys(drawn), (scores.log_q.sum(1) + end).tolist(), strict=True))
    for key, k in Counter(target.space.keys(drawn)).most_common(5):
        p = math.exp(log_q[key])
        print(f"\n{key}: {k / 192:.3f} of draws, probability {p:.3f}", end="")
        assert abs(k / 192 - p) < 5 * math.sqrt(p * (1 - p) / 192) + 0.02


def test_adapters_are_pushed_and_told_apart(vllm: Any, lm: Any, story: Any, tmp_path: Path) -> None:
    policy = ServerPolicy(served(vllm, lm), story.space, story.problems)
    first, second = lora(tmp_path / "step-1", 1), lora(tmp_path / "step-2", 2)
    names = [policy.push(first), policy.push(second)]
    served_now = [m["id"] for m in policy.server.endpoints.get("/v1/models")["data"]]
    assert served_now == ["smollm2", names[1]]
    drawn = policy.sample(rows(32), generator(0))
    assert drawn.behaviour["adapter"] == names[1]
    both = rd.load("smollm2", adapter={"one": first, "two": second}, dtype="float32", device="cpu")
    one, two, none = (LMPolicy(both.view(a), story.space, story.problems) for a in ("one", "two", None))
    print("\n" + str(agreement(two, drawn)))
    for wrong in (one, none):
        with pytest.raises(InputError, match="with adapter 'two'") as error:
            agreement(wrong, drawn)
        print(error.value)


def test_a_killed_server_costs_a_retry_and_no_data(vllm: Any, lm: Any, story: Any, tmp_path: Path) -> None:
    policy = ServerPolicy(served(vllm, lm), story.space, story.problems)
    name = policy.push(lora(tmp_path / "step-1", 3))
    want = [policy.sample(rows(24), generator(i)) for i in range(3)]

    def strike() -> None:
        vllm.kill()
        vllm.start(wait=False)

    got = [policy.sample(rows(24), generator(0))]
    blow = threading.Timer(1.0, strike)
    blow.start()
    got += [policy.sample(rows(24), generator(i)) for i in range(1, 3)]
    blow.join()
    assert policy.server.endpoints.retries > 0
    same = sum(a == b for w, g in zip(want, got, strict=True)
               for a, b in zip(story.space.keys(w), story.space.keys(g), strict=True))  # fmt: skip
    print(f"\n{policy.server.endpoints.retries} retries; {same} of 72 strings as in an undisturbed run")
    assert all(len(g) == 24 and g.behaviour["adapter"] == name for g in got) and same >= 36
    tuned: Any = rd.load("smollm2", adapter=tmp_path / "step-1", dtype="float32", device="cpu").view("default")
    for part in got:
        print(agreement(LMPolicy(tuned, story.space, story.problems), part))


def test_processed_log_probabilities_are_log_b(vllm: Any, lm: Any, story: Any) -> None:
    vllm.kill()
    vllm.start("--logprobs-mode", "processed_logprobs")
    policy, local = (
        ServerPolicy(served(vllm, lm), story.space, story.problems),
        LMPolicy(lm, story.space, story.problems),
    )
    assert policy.server.mode == "processed"
    print("\n" + str(agreement(local, policy.sample(rows(16), generator(0)))))
    hot = policy.sample(rows(16), generator(1), {"temperature": 1.5})
    assert (hot.behaviour["log_q"], hot.behaviour["log_b"]) == ("unknown", "exact")
    s = story.space.start(hot.problem)
    p = tempered(*local.log_probs(local.start(hot.problem), s, story.space.menu(s)), 1.5)
    assert report("log b of first moves at T = 1.5", hot.log_b[:, 0] - p[0].gather(1, hot.moves[:, :1])[:, 0]) < 0.1
