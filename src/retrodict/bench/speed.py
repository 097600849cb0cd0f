"""``retrodict bench speed``: where the time goes, on SmolLM2, each bar beside the code that measures it.

Everything is timed in one process, after a warm-up, in alternation with what it is compared to; the median counts.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from retrodict.bench.reference import PROMPTS, TOKENS, read, short_words_target
from retrodict.bench.rows import Row, at_least, at_most, show_only
from retrodict.bench.step import seven, subtb_cpu, subtb_gpu
from retrodict.models.load import load
from retrodict.models.tiny import random_weights
from retrodict.particles import Particles
from retrodict.rng import generator
from retrodict.samplers.smc import smc

SUITE = "speed"


def clock(work: Callable[[], Any], device: torch.device) -> float:
    """Seconds of one call."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    began = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def interleaved(
    works: dict[str, Callable[[], Any]], repeats: int, device: torch.device, warm: bool = True
) -> dict[str, float]:
    """Median seconds of each, run in alternation after one uncounted call of each where ``warm``."""
    for work in works.values() if warm else ():
        work()
    times: dict[str, list[float]] = {name: [] for name in works}
    for _ in range(repeats):
        for name, work in works.items():
            times[name].append(clock(work, device))
    return {name: statistics.median(t) for name, t in times.items()}


def constrained(lm: Any, repeats: int = 5) -> list[Row]:
    """SMC under "no word over five letters" against transformers ``generate`` on the same batch, unconstrained."""
    target = short_words_target(lm)
    prompt = lm.tokenizer.encode(PROMPTS[0])
    works = {
        "generate": lambda: lm.generate_plain(prompt, 32, TOKENS),
        "smc": lambda: smc(target, n=32, seed=0, runs=1),
    }
    seconds = interleaved(works, repeats, lm.device)
    name = "short words, N = 32, 32 tokens"
    return [
        show_only(SUITE, name, "generate", "seconds", seconds["generate"], "transformers, no constraint"),
        show_only(SUITE, name, "smc", "seconds", seconds["smc"]),
        at_most(SUITE, name, "smc", "ratio to generate", seconds["smc"] / seconds["generate"], 1.3),
    ]


def covers(particles: Particles, truth: float) -> bool:
    """Whether the printed 95% interval covers a log-evidence."""
    from retrodict.diagnostics.verdict import diagnose

    found = diagnose(particles).numbers[0]
    return found["low"] <= truth <= found["high"]


def accuracy(lm: Any, seeds: int = 10) -> list[Row]:
    """Errors of log Z-hat against the pooled reference, and coverage of the printed interval."""
    from retrodict.diagnostics.verdict import diagnose

    reference = read()
    rows = []
    truth = reference["own_stop"][PROMPTS[0]]
    name = "short words, own_stop, N = 32"
    rows.append(show_only(SUITE, name, "reference", "log Z", truth["log_z"],
                          f"+- {truth['se']:.2f} (jackknife), {truth['runs']} runs of N = {truth['n']}"))  # fmt: skip
    target = short_words_target(lm)
    found = [smc(target, n=32, seed=s, runs=1) for s in range(seeds)]
    errors = [abs(float(p.log_z[0, 0]) - truth["log_z"]) for p in found if p.log_z is not None]
    rows.append(
        at_most(SUITE, name, "smc", "median |error| (nats)", statistics.median(errors), 2.0, "issue's aim: 1.5")
    )
    warned = sum(
        diagnose(p).verdict == "interval unreliable" or "interval unreliable" in diagnose(p).flags for p in found
    )
    rows.append(at_least(SUITE, name, "smc", f"verdict 'interval unreliable', of {seeds}", warned, seeds))
    runs = 4
    for prompt in PROMPTS:
        truth = reference["force"][prompt]
        target = short_words_target(lm, prompt, "force")
        hits = sum(covers(smc(target, n=32, seed=s, runs=runs), truth["log_z"]) for s in range(seeds))
        rows.append(at_least(SUITE, f"short words, force, N = 32 x {runs}: {prompt!r}", "smc",
                             f"interval covers, of {seeds}", hits, 0.8 * seeds))  # fmt: skip
    return rows


def prefix_rewards(lm: Any, repeats: int = 3) -> list[Row]:
    """The infilling reward of every prefix: packed tree mask, a KV-cached loop, and re-encoding each prefix."""
    x, z, y, b = 40, 30, 12, 16
    gen = generator(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randint(100, lm.vocab_size - 100, shape, generator=gen).to(lm.device)

    prompt, after = draw(x).tolist(), draw(y)
    moves, n = draw(b, z), torch.full((b,), z, device=lm.device)

    def packed() -> torch.Tensor:
        return lm.score_suffixes([prompt] * b, moves, n, [[after.tolist()] * b])[:, :, 0]

    def cached() -> torch.Tensor:
        cache, _ = lm.encode([prompt], room=z)
        cache = lm.take(cache, torch.zeros(b, dtype=torch.long, device=lm.device))
        out = []
        for i in range(z + 1):
            out.append(lm.peek(cache, after.expand(b, -1)).sum(1))
            if i < z:
                cache, _ = lm.step(cache, moves[:, i])
        return torch.stack(out, 1)

    def encoded() -> torch.Tensor:
        out = []
        for i in range(z + 1):
            head = torch.tensor(prompt, device=lm.device).expand(b, -1)
            ids = torch.cat([head, moves[:, :i], after.expand(b, -1)], 1)
            log_p = lm.raw_forward(ids)[:, x + i - 1 : -1].float().log_softmax(-1)
            out.append(log_p.gather(2, after.expand(b, -1)[:, :, None]).sum((1, 2)))
        return torch.stack(out, 1)

    packed()  # warm-up; the slow baselines share its kernels
    seconds = interleaved(
        {"packed": packed, "cached loop": cached, "re-encoding": encoded}, repeats, lm.device, warm=False
    )
    name = f"prefix rewards, |X| {x}, |Z| {z}, |Y| {y}, batch {b}"
    rows = [show_only(SUITE, name, k, "seconds", v) for k, v in seconds.items()]
    rows.append(at_least(SUITE, name, "packed", "times faster than re-encoding",
                         seconds["re-encoding"] / seconds["packed"], 4.0))  # fmt: skip
    rows.append(at_least(SUITE, name, "packed", "times faster than a KV-cached loop",
                         seconds["cached loop"] / seconds["packed"], 1.0))  # fmt: skip
    if lm.dtype == torch.float32:
        worst = float((packed() - encoded()).abs().max())
        rows.append(at_most(SUITE, name, "packed", "largest difference (nats)", worst, 1e-4))
    return rows


def sampling(batches: tuple[int, ...] = (256, 1024), prompt: int = 40, tokens: int = 30, repeats: int = 7) -> list[Row]:
    """Sampling speed of a 135M-shaped model of random weights in bf16 on a GPU, tokens per second."""
    from retrodict.models.decoder import Decoder
    from retrodict.policies.lm import LMPolicy
    from retrodict.records import Problem
    from retrodict.spaces.stops import Stops
    from retrodict.spaces.strings import Strings

    weights = random_weights(49152, 576, 30, 9, 3, 64, 1536, 2048, dtype=torch.bfloat16, device="cuda")
    lm = Decoder(weights)
    space = Strings(49152, Stops(), tokens)
    problem = Problem(tuple(range(100, 100 + prompt)))
    policy = LMPolicy(lm, space, [problem])
    bars = {256: 50_000.0, 1024: 130_000.0}
    rows = []
    for b in batches:
        gen = generator(0, "cuda")
        where = torch.zeros(b, dtype=torch.long, device="cuda")
        seconds = interleaved({"ours": lambda w=where, g=gen: policy.sample(w, g)}, repeats, lm.device)["ours"]
        rows.append(at_least(SUITE, f"sampling {b} sequences, prompt {prompt}, {tokens} tokens, 135M bf16", "ancestral",
                             "tokens per second", b * tokens / seconds, bars.get(b, 0.0)))  # fmt: skip
    return rows


def run(seeds: int = 10, quick: bool = False) -> list[Row]:
    """All rows; on a CPU with one thread in float32, on a GPU the sampling row as well."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        lm = load("smollm2", dtype="float32")
        rows = constrained(lm, 3 if quick else 5) + prefix_rewards(lm, 1 if quick else 2)
        rows += accuracy(lm, 2 if quick else seeds)
        torch.set_num_threads(threads)
        if not torch.cuda.is_available():
            return rows + subtb_cpu(1 if quick else 3) + seven("random:tiny", 4, "cpu")
        return rows + sampling() + subtb_gpu() + seven()
    finally:
        torch.set_num_threads(threads)
