"""Twenty steps of training with samples from a real vLLM, bfloat16 on a CPU, killed on the way."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("peft")

import retrodict as rd
from retrodict.models.endpoints import Endpoints
from retrodict.models.server import ServerLM
from retrodict.policies.agreement import MEAN, WORST, Agreement, agreement
from retrodict.policies.server import ServerPolicy
from retrodict.rng import generator
from retrodict.training.amortize import amortize, grow
from retrodict.training.loop import evaluate
from retrodict.training.remote import Remote

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(1200)]

STEPS, EVERY, DRAWS, KILLED = 20, 5, 128, 8
"""Gradient steps; between pushes; fresh local draws behind an evidence bound; the step after which the server dies."""


def test_twenty_steps_with_pushes_and_a_killed_server(vllm: Any, tmp_path: Path) -> None:
    """What is asserted of learning is little, as 20 steps of 8 samples are little: the evidence bound on fresh draws of
    the trained policy, made here, is not worse than before by more than two standard errors of the difference."""
    lm: Any = rd.load("smollm2", dtype="float32", device="cpu")
    story: Any = rd.infill(lm, before="The cat was hungry.", after="Now the cat is sleepy, not hungry.", max_tokens=8)
    local = grow(story, rank=8)
    server = ServerLM(Endpoints(vllm.url, patience=300.0), "smollm2", lm.tokenizer, at_once=1)
    rows = torch.zeros(32, dtype=torch.long)
    base = agreement(story.prior, ServerPolicy(server, story.space, story.problems).sample(rows, generator(0)))
    policy = Remote(local, server, folder=tmp_path / "adapters", every=EVERY)
    before = evaluate(story, policy, DRAWS, 1)
    told: list[dict[str, Any]] = []
    agreed: list[tuple[int, Agreement]] = []

    def watch(metrics: dict[str, Any]) -> None:
        told.append(metrics)
        if metrics["staleness_policy"] == 0:
            agreed.append((metrics["step"], policy.agreed))
        if metrics["step"] == KILLED:
            vllm.kill()
            vllm.start(wait=False)

    amortize(story, policy, objective="vargrad", steps=STEPS, samples=8, lr=1e-3, evaluate=2, on_metrics=watch)
    policy.sample(rows, generator(1))  # a last push: the adapter as trained
    agreed.append((STEPS, policy.agreed))
    after = evaluate(story, policy, DRAWS, 1)
    retries = policy.sampler.server.endpoints.retries
    print(f"\nbefore the first push: {base}")
    for step, found in agreed:
        print(f"pushed before step {step}: {found}")
    print(f"evidence bound on {DRAWS} fresh draws here: {before['elbo']:.2f} +- {before['elbo_se']:.2f} before, "
          f"{after['elbo']:.2f} +- {after['elbo_se']:.2f} after {STEPS} steps; {retries} retries")  # fmt: skip
    seconds = {k: sum(x[f"seconds_{k}"] for x in told) for k in ("sample", "reward", "update")}
    print(f"loss {[round(x['loss'], 1) for x in told]}, seconds {seconds}")
    assert [x["step"] for x in told] == list(range(STEPS)) and not any("skipped" in x for x in told)
    assert all(math.isfinite(x["loss"]) and x["grad_norm"] > 0 for x in told)
    assert [x["staleness_policy"] for x in told] == list(range(EVERY)) * (STEPS // EVERY)
    assert [step for step, _ in agreed] == list(range(0, STEPS + 1, EVERY)) and policy.pushes == len(agreed)
    assert all(x.mean < MEAN and x.worst < WORST for x in (base, *(a for _, a in agreed)))
    assert retries > 0
    noise = math.hypot(before["elbo_se"], after["elbo_se"])
    assert after["elbo"] > before["elbo"] - 2 * noise
    served = [m["id"] for m in server.endpoints.get("/v1/models")["data"]]
    assert served == ["smollm2", policy.sampler.adapter]
    policy.close()
