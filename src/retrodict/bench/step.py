"""One SubTB step (Hu et al. 2024): seconds by phase and peak memory, beside the textbook loop that peers run.

The textbook loop keeps the graph of every decoding step, and values each prefix by a forward of its own over prompt,
prefix and evidence. Both take the same number of samples of the same model; both update the same LoRA adapter.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from retrodict.bench.rows import Row, at_least, at_most, show_only
from retrodict.models.load import load
from retrodict.policies.amortized import Amortized
from retrodict.records import Problem
from retrodict.rng import generator
from retrodict.targets.ready import posterior
from retrodict.training.amortize import grow
from retrodict.training.loop import Run, advance, begin
from retrodict.training.memory import estimate
from retrodict.training.settings import settings

SUITE = "speed"


def problem_of(lm: Any, x: int, y: int, end: int) -> Problem:
    """Random ids that are no special tokens."""
    ids = torch.randint(0, 250, (x + y,), generator=generator(1)) if lm.vocab_size < 1000 else torch.randint(
        100, lm.vocab_size - 100, (x + y,), generator=generator(1))  # fmt: skip
    ids = torch.where(ids == end, ids + 1, ids).tolist()
    return Problem(tuple(ids[:x]), tuple(ids[x:]))


def prepared(lm: Any, samples: int, x: int, z: int, y: int, rank: int, **more: Any) -> Run:
    """A SubTB run on one problem: |X| = x, at most z new tokens, |Y| = y."""
    end = lm.end_ids[0] if lm.end_ids else 0
    target = posterior(lm, [problem_of(lm, x, y, end)], stop=[end], max_tokens=z, lookahead=None)
    policy = grow(target, rank=rank)
    return begin(target, policy, settings(objective="subtb", samples=samples, steps=100, **more))


def timed(run: Run, steps: int, warm: int = 2) -> dict[str, float]:
    """Median seconds of a step and of its phases; peak memory on a GPU, in GB."""
    cuda = torch.cuda.is_available()
    for _ in range(warm):
        advance(run)
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    found = [advance(run) for _ in range(steps)]
    names = [k for k in found[0] if k.startswith("seconds_")]
    out = {k: sorted(m[k] for m in found)[steps // 2] for k in names}
    out["seconds"] = sorted(sum(m[k] for k in names) for m in found)[steps // 2]
    out["tokens"] = sum(m["tokens"] for m in found) / steps
    if cuda:
        out["peak"] = torch.cuda.max_memory_allocated() / 1e9
    return out


def textbook(run: Run, samples: int, seed: int = 0) -> tuple[float, int]:
    """One step of the plain loop on the transformers module: (seconds, tokens run through it)."""
    policy, target = run.policy, run.target
    assert isinstance(policy, Amortized)
    lm: Any = policy.lm
    module, device = lm.module, lm.device
    problem, tokens = target.problems[0], 0
    space: Any = target.space
    stop, legal = space.stops.ids[0], space.legal_ids(device)
    gen = generator(seed, device)
    began = time.perf_counter()
    module.set_adapter(lm.adapter)
    ids = torch.tensor([problem.context] * samples, device=device)
    past, fed, log_q, log_stop = None, ids, [], []
    done = torch.zeros(samples, dtype=torch.bool, device=device)
    n = torch.zeros(samples, dtype=torch.long, device=device)
    for t in range(space.max_moves + 1):  # sampling, with its graph kept
        out = module(input_ids=fed, past_key_values=past, use_cache=True)
        tokens += fed.numel()
        past = out.past_key_values
        logits = out.logits[:, -1].float()
        allowed = legal.clone()
        allowed[stop] = True
        log_p = logits.masked_fill(~allowed, -torch.inf).log_softmax(-1)
        log_stop.append(log_p[:, stop] if t < space.max_moves else torch.zeros_like(log_p[:, stop]))
        if t == space.max_moves:
            break
        move = torch.multinomial(log_p.detach().exp(), 1, generator=gen).squeeze(1)
        done = done | (move == stop)
        move = torch.where(done, 0, move)
        log_q.append(torch.where(done, 0.0, log_p.gather(1, move[:, None]).squeeze(1)))
        n = n + (~done).long()
        ids, fed = torch.cat([ids, move[:, None]], 1), move[:, None]
        if bool(done.all()):
            break
    x, y = len(problem.context), torch.tensor(problem.evidence, device=device).expand(samples, -1)
    log_r = []
    with torch.no_grad(), module.disable_adapter():
        whole = module(input_ids=ids).logits[:, x - 1 :].float().log_softmax(-1)
        tokens += ids.numel()
        moved = whole[:, :-1].gather(2, ids[:, x:, None]).squeeze(2)
        prior = torch.cat([moved.new_zeros(samples, 1), moved.cumsum(1)], 1)
        for i in range(ids.shape[1] - x + 1):  # the reward of every prefix, each from the beginning
            full = torch.cat([ids[:, : x + i], torch.full_like(ids[:, :1], stop), y], 1)
            got = module(input_ids=full).logits[:, x + i : -1].float().log_softmax(-1)
            tokens += full.numel()
            log_r.append(prior[:, i] + whole[:, i, stop] + got.gather(2, y[:, :, None]).sum((1, 2)))
    k = len(log_r)
    q = torch.stack(log_q, 1)
    a = (
        torch.stack(log_r, 1)
        - torch.cat([q.new_zeros(samples, 1), q.cumsum(1)], 1)[:, :k]
        - torch.stack(log_stop[:k], 1)
    )
    mask = torch.arange(k, device=device) <= n[:, None]
    pair = (mask[:, :, None] & mask[:, None, :]).triu(1)
    gap = torch.where(pair, (a[:, :, None] - a[:, None, :]).square(), 0.0)
    loss = (gap.sum((1, 2)) / pair.sum((1, 2)).clamp_min(1)).mean()
    parameters: list[Tensor] = list(policy.parameters().values())
    adam = torch.optim.Adam(parameters, lr=1e-4)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    adam.step()
    if device.type == "cuda":
        torch.cuda.synchronize()
    for p in parameters:
        p.grad = None
    return time.perf_counter() - began, tokens


def phase_rows(name: str, found: Mapping[str, Any]) -> list[Row]:
    """Seconds of each phase."""
    return [show_only(SUITE, name, "subtb", k.replace("_", " "), v) for k, v in found.items() if "seconds_" in k]


def subtb_cpu(repeats: int = 3) -> list[Row]:
    """SmolLM2 on a CPU: our SubTB step against the textbook loop, the same samples."""
    samples, x, z, y = 16, 40, 30, 12
    run = prepared(load("smollm2"), samples, x, z, y, rank=16)
    textbook(run, samples)
    ours, theirs, tokens = [], [], 0
    advance(run)
    for i in range(repeats):
        began = time.perf_counter()
        phases = advance(run)
        ours.append(time.perf_counter() - began)
        seconds, tokens = textbook(run, samples, seed=i)
        theirs.append(seconds)
    name = f"SubTB step, {samples} samples, |X| {x}, |Z| {z}, |Y| {y}, SmolLM2 {str(run.policy.lm.dtype)[6:]}"  # pyright: ignore[reportAttributeAccessIssue]
    mine, plain = sorted(ours)[repeats // 2], sorted(theirs)[repeats // 2]
    rows = [show_only(SUITE, name, "textbook loop", "seconds", plain, f"{tokens} tokens run"),
            show_only(SUITE, name, "subtb", "seconds", mine, f"{phases['tokens']} tokens drawn")]  # fmt: skip
    rows += [
        show_only(SUITE, name, "subtb", k.replace("_", " "), v) for k, v in phases.items() if k.startswith("seconds_")
    ]
    rows.append(at_least(SUITE, name, "subtb", "times faster than the textbook loop", plain / mine, 2.0, "issue: 5"))
    return rows


def subtb_gpu() -> list[Row]:
    """DESIGN's shapes on a GPU: 135M random weights in bf16, LoRA rank 64, 32 and 128 samples."""
    rows = []
    lm = load("random:135m", dtype="bfloat16", device="cuda")
    for samples, bars in ((32, (0.6, 3.5)), (128, (0.6, 11.6))):
        found = timed(prepared(lm, samples, 40, 30, 12, rank=64), 7, warm=3)
        name = f"SubTB step, {samples} samples, |X| 40, |Z| 30, |Y| 12, 135M bf16, LoRA 64"
        rows += phase_rows(name, found)
        rows.append(at_most(SUITE, name, "subtb", "seconds", found["seconds"], bars[0], "aim: 0.25 and 0.4"))
        rows.append(at_most(SUITE, name, "subtb", "peak GB", found["peak"], bars[1], "aim: 1.5 and 4"))
    return rows


def seven(shape: str = "random:7b", samples: int = 16, device: str = "cuda") -> list[Row]:
    """A 7B-shaped model of random weights: seconds a step, estimated and measured peak memory."""
    lm: Any = load(shape, dtype="bfloat16", device=device)
    run = prepared(lm, samples, 64, 48, 16, rank=16, checkpointing=True)
    guess = estimate(run.target, run.policy, run.settings)
    found = timed(run, 3, warm=2)
    name = f"SubTB step, {samples} samples, |X| 64, |Z| 48, |Y| 16, {shape}, LoRA 16"
    rows = [
        show_only(SUITE, name, "subtb", k.replace("_", " "), v) for k, v in found.items() if k.startswith("seconds")
    ]
    if guess is not None and "peak" in found:
        told = guess.peak(run.micro or samples) / 1e9
        rows.append(
            show_only(SUITE, name, "subtb", "peak GB", found["peak"], f"estimate {told:.1f}, micro {run.micro}")
        )
        rows.append(at_most(SUITE, name, "subtb", "measured / estimated peak", found["peak"] / told, 1.25))
    return rows
