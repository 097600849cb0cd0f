"""Tempered continuation: log-likelihood and diversity at equal numbers of draws, on prompts that training never saw.

p(Z | X)^(1/T) amortized, beside the same model sampled at token temperatures and beam search.
"""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import Any

from retrodict.bench.rows import Row, show_only, write
from retrodict.errors import InputError
from retrodict.models.load import load
from retrodict.records import Rollouts
from retrodict.rng import generator
from retrodict.targets.algebra import Target
from retrodict.tasks import continuation
from retrodict.training.amortize import amortize

SUITE = "continuation"
METRICS = {"best": "largest log p, nats", "mean": "mean log p, nats", "distance": "edit distance of two draws",
           "bigrams": "bigram diversity", "distinct": "distinct draws", "length": "tokens"}  # fmt: skip


def run(
    prompts: str = "",
    train: int = 16,
    held_out: int = 8,
    draws: int = 16,
    temperature: float = 0.8,
    taus: str = "1,0.8,0.6",
    objectives: str = "pooled,subtb",
    steps: int = 100,
    samples: int = 16,
    per_step: int = 8,
    lr: float = 5e-4,
    rank: int = 16,
    max_tokens: int = 20,
    micro: int = 0,
    model: str = "smollm2",
    dtype: str = "",
    device: str = "",
    seed: int = 0,
    limit_seconds: float = 1e9,
    partial: str = "",
) -> list[Row]:
    """The table, method by method; each is printed, and written to ``partial``, as soon as it is there.

    Args:
        prompts: a text file, one a line (ours without one): the first ``train`` are trained on, the next judged.
        train, held_out: how many of each.
        draws: sentences a prompt, of every method.
        temperature: T of the sequence.
        taus: token temperatures of the prior, joined by commas.
        objectives: what is amortized with, joined by commas.
        steps, samples, per_step, lr, rank, seed, micro: of training.
        max_tokens: limit on a sentence.
        model, dtype, device: see ``rd.load``; "" for its defaults.
        limit_seconds: no objective is begun after these.
        partial: a JSON file of the rows so far.
    """
    began = time.perf_counter()
    texts = continuation.read_prompts(prompts) if prompts else list(continuation.PROMPTS)
    if len(texts) < train + held_out:
        raise InputError(f"{len(texts)} prompts are fewer than train + held_out = {train + held_out}; ask for fewer")
    lm: Any = load(model, **{k: v for k, v in (("dtype", dtype), ("device", device)) if v})
    goal = continuation.target(lm, texts[:train], temperature=temperature, max_tokens=max_tokens)
    judged = goal.on(continuation.problems(lm, texts[train : train + held_out]))
    rows: list[Row] = []
    add(rows, judged, "beam search", continuation.beam_search(lm, judged, draws), partial)
    for tau in taus.split(","):
        gen = generator(seed, lm.device, 21)
        drawn = continuation.token_temperature(judged, draws, gen, float(tau))
        add(rows, judged, f"tokens at {float(tau):g}", drawn, partial)
    given: dict[str, Any] = {"micro": micro} if micro else {}
    for objective in objectives.split(","):
        if time.perf_counter() - began > limit_seconds:
            print(f"{objective}: no time left", flush=True)
            continue
        policy = amortize(goal, objective=objective, steps=steps, samples=samples, per_step=per_step, lr=lr, rank=rank,
                          seed=seed, evaluate=2, tempered=0.25, **given)  # fmt: skip
        gen = generator(seed, lm.device, 21)
        on = policy.on(judged.problems)
        drawn = continuation.token_temperature(dataclasses.replace(judged, prior=on), draws, gen, 1.0)
        add(rows, judged, f"{objective}, T {temperature:g}", drawn, partial, policy.about["seconds"])
    return rows


def add(
    rows: list[Row], goal: Target, method: str, drawn: Rollouts, partial: str, seconds: float | None = None
) -> None:
    """Judge a method's draws, print the line, and keep the rows."""
    each = len(drawn) // len(goal.problems)
    name = f"{each} sentences for each of {len(goal.problems)} new prompts"
    found = dataclasses.asdict(continuation.judge(goal, drawn))
    rows += [show_only(SUITE, name, method, words, found[key]) for key, words in METRICS.items()]
    if seconds is not None:
        rows.append(show_only(SUITE, name, method, "seconds of training", seconds))
    print(f"{method}: " + ", ".join(f"{METRICS[k]} {v:.3g}" for k, v in found.items()), flush=True)
    if partial:
        write(rows, Path(partial))
