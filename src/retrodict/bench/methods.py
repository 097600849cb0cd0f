"""Which method for which problem: every method of test time on the same targets, each with the same number of tokens.

A method's size (particles, chains) is set by a pilot run so that a run costs ``budget`` tokens of the language model,
look-ahead, rejected proposals and re-scoring included. Columns: how far mean log Z-hat lies below a long reference
(methods that estimate no evidence have none), the least ESS on the way, distinct texts by weight, the share of the
weight on valid texts, tokens, seconds. Weighted answers of one run are biased; the gap says how much to trust them.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from retrodict.bench import rows as files
from retrodict.bench.reference import PROMPTS, read, short_words_target
from retrodict.bench.rows import Row, show_only, write
from retrodict.diagnostics.diversity import effective_distinct
from retrodict.guides.hmm_fit import cached_hmm
from retrodict.models.load import load
from retrodict.numerics import NEG_INF, ess, jackknife_log_mean
from retrodict.particles import Particles
from retrodict.samplers.annealed import annealed
from retrodict.samplers.importance import best_of_n, importance
from retrodict.samplers.mh.run import mh
from retrodict.samplers.pimh import pimh
from retrodict.samplers.smc import smc
from retrodict.samplers.tempering import tempering
from retrodict.targets.algebra import Target
from retrodict.targets.constraint import json_schema
from retrodict.targets.hmm import with_hmm
from retrodict.targets.ready import continuation, including, infill

SUITE = "methods"
STORY = {"before": "Anna lost her keys.", "after": "So she slept at a friend's house."}
WORDS = ("rain", "bus", "late")
PET = {"type": "object", "properties": {"name": {"type": "string", "maxLength": 8}, "age": {"type": "integer",
       "minimum": 0, "maximum": 20}, "kind": {"enum": ["cat", "dog", "bird"]}},
       "required": ["name", "age", "kind"], "additionalProperties": False}  # fmt: skip


@dataclass(frozen=True)
class Task:
    """A target, and the guide that looks further ahead than its own where there is one."""

    name: str
    target: Target
    guided: Target | None = None
    log_z: float | None = None
    """From a file; None has it computed."""
    cold: float | None = None
    """Token temperature of importance draws that suit the target better than a guide: p^alpha has none to look by, and
    SMC weighs what has stopped against prefixes that have yet to pay for their ends: it loses the short ones."""


Method = Callable[[Task, int, int], Particles | None]
"""(task, size, seed) to an answer; None where the method does not apply."""


def _smc(**settings: Any) -> Method:
    return lambda task, n, seed: smc(task.target, n=n, runs=1, seed=seed, **settings)


def _cold(task: Task, n: int, seed: int, runs: int = 1) -> Particles | None:
    return None if task.cold is None else importance(task.target, n=n, runs=runs, seed=seed, temperature=task.cold)


def _looking(task: Task, n: int, seed: int) -> Particles | None:
    return None if task.guided is None else smc(task.guided, n=n, runs=1, seed=seed)


METHODS: dict[str, Method] = {
    "importance": lambda task, n, seed: importance(task.target, n=n, runs=1, seed=seed),
    "importance, colder tokens": _cold,
    "smc": _smc(),
    "smc, stopped aside": _smc(stopped="aside"),
    "smc, hmm guide": _looking,
    "smc, steering (2 beams)": _smc(resampling="without_replacement", beam=2),
    "annealed": lambda task, n, seed: annealed(task.target, n=n, runs=1, seed=seed),
    "mh, suffix": lambda task, n, seed: mh(task.target, n=n, steps=12, keep=4, seed=seed),
    "tempering": lambda task, n, seed: tempering(task.target, n=n, steps=8, rungs=3, keep=4, seed=seed),
    "pimh": lambda task, n, seed: pimh(task.target, n=n, runs=2, steps=4, keep=2, seed=seed),
    "best of 4": lambda task, n, seed: best_of_n(task.target, n=4, draws=n, seed=seed),
}


def tasks(lm: Any, hmm: Any) -> list[Task]:
    """One target of each kind; guides are fitted on none of their texts."""
    story = infill(lm, STORY["before"], STORY["after"], max_tokens=16, limit="own_stop")
    words = including(lm, "This morning", contain=WORDS, stop=".", max_tokens=24, limit="own_stop")
    short = short_words_target(lm)
    record = continuation(lm, "My pet as JSON:\n", stop="\n", max_tokens=40, limit="own_stop") * json_schema(PET, False)
    power = continuation(lm, "The best thing about winter is", temperature=0.25, stop=".", max_tokens=16,
                         limit="own_stop")  # fmt: skip
    told = read()["own_stop"][PROMPTS[0]]["log_z"]
    return [Task("infilling", story, with_hmm(story, hmm)), Task("three words", words, with_hmm(words, hmm)),
            Task("short words", short, with_hmm(short, hmm), told), Task("JSON record", record),
            Task("p^4", power, cold=0.6)]  # fmt: skip


def run(
    budget: int = 3000, seeds: int = 3, only: str = "", methods: str = "", reference: int = 128, partial: str = ""
) -> list[Row]:
    """The table, line by line; one thread, float32.

    Args:
        budget: tokens of the language model a run.
        seeds: runs of each method.
        only: names of tasks, joined by commas; all by default.
        methods: names of methods, joined by semicolons; all by default.
        reference: particles of each of the eight runs behind a log Z that no file holds.
        partial: a JSON file of the rows so far; another call with the same numbers goes on from there.
    """
    torch.set_num_threads(1)
    lm: Any = load("smollm2", dtype="float32")
    rows = files.read(Path(partial)) if partial else []
    have = {(r.name, r.method): r.value for r in rows}
    for task in tasks(lm, cached_hmm(lm)):
        if only and task.name not in only.split(","):
            continue
        truth = have.get((task.name, "reference"))
        if truth is None:
            truth, note = (task.log_z, "from its file") if task.log_z is not None else truth_of(task, reference)
            rows.append(show_only(SUITE, task.name, "reference", "log Z", truth, note))
        for name, method in METHODS.items():
            if (methods and name not in methods.split(";")) or (task.name, name) in have:
                continue
            rows += line(task, name, method, truth, budget, seeds)
            if partial:
                write(rows, Path(partial))
    return rows


def truth_of(task: Task, n: int) -> tuple[float, str]:
    """log Z pooled over eight runs of SMC with the best guide there is; colder importance draws, 8 n a run."""
    n = n if task.cold is None else 8 * n
    p = _cold(task, n, 900, 8)
    p = smc(task.guided or task.target, n=n, runs=8, seed=900) if p is None else p
    assert p.log_z is not None
    log_z, error = jackknife_log_mean(p.log_z[0])
    return float(log_z), f"+- {float(error):.2f}, 8 runs of {n}"


def line(task: Task, name: str, method: Method, truth: float, budget: int, seeds: int) -> list[Row]:
    """One method on one target."""
    pilot = method(task, 4, 500)
    if pilot is None:
        return []
    n = max(2, round(4 * budget / max(pilot.trace.counts["tokens"], 1)))
    found = [p for p in (method(task, n, seed) for seed in range(seeds)) if p is not None]
    mean = statistics.fmean
    out = [show_only(SUITE, task.name, name, "size", n)]
    if found[0].log_z is not None:
        log_z = [float(p.log_z[0, 0]) for p in found if p.log_z is not None]
        dead = sum(z == NEG_INF for z in log_z)
        gap = truth - mean(z for z in log_z if z > NEG_INF) if dead < len(log_z) else float("inf")
        out.append(show_only(SUITE, task.name, name, "evidence gap (nats)", gap,
                             f"{dead} of {len(log_z)} runs died" if dead else ""))  # fmt: skip
    out += [show_only(SUITE, task.name, name, key, mean(of(p) for p in found)) for key, of in COLUMNS.items()]
    print(f"{task.name}: {name}: " + ", ".join(f"{r.metric} {r.value:.3g}" for r in out), flush=True)
    return out


def min_ess(p: Particles) -> float:
    """Least ESS before any resampling; of the final weights where nothing is resampled."""
    return float(ess(p.log_w).min()) if p.trace.ess is None else float(p.trace.ess.min())


def valid(p: Particles) -> float:
    """Share of the weight on texts that every hard factor accepts."""
    hard = [v for k, v in p.objects.terms.items() if k not in ("prior", "prior.path", "likelihood")]
    ok = torch.stack([v > NEG_INF for v in hard]).all(0) if hard else torch.ones(p.k, dtype=torch.bool)
    return float(p.weights[0][ok].sum())


COLUMNS: dict[str, Callable[[Particles], float]] = {
    "min ESS": min_ess,
    "distinct": lambda p: effective_distinct(p.counts(0)),
    "validity": valid,
    "tokens": lambda p: p.trace.counts["tokens"],
    "seconds": lambda p: p.trace.counts["seconds"],
}
