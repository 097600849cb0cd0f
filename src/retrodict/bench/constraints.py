"""``retrodict bench constraints``: test-time Monte Carlo under hard constraints, on SmolLM2 in float32, one thread.

Errors of log Z-hat on "no word over five letters" against the pooled reference, unguided and with guides that see the
stop coming (an HMM, a learned twist); the strongest peer on the same target in the same run; evidence precision per
token on other targets; and what is valid of JSON and grammar output. Guides are fitted once, on none of these prompts;
their seconds stand apart. The exponent of each guide is chosen by the spread of log Z-hat on another prompt, which
needs no reference; on the infilling by conditional runs around other posterior draws than those that judge it.
"""

from __future__ import annotations

import json
import math
import statistics
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from retrodict.bench import twist
from retrodict.bench.reference import PROMPTS, TOKENS, read, short_words_target
from retrodict.bench.rows import Row, at_least, at_most, show_only, write
from retrodict.bench.speed import interleaved
from retrodict.diagnostics.bounds import relative_variance
from retrodict.errors import InputError, nearest
from retrodict.guides.hmm_fit import cached_hmm
from retrodict.models.hf.gguf import convert, smollm2_gguf
from retrodict.models.load import load
from retrodict.numerics import NEG_INF, jackknife_log_mean, log_mean_exp
from retrodict.particles import Particles
from retrodict.records import Rollouts
from retrodict.rng import generator
from retrodict.samplers.smc import conditional_smc, smc
from retrodict.targets.algebra import Target
from retrodict.targets.constraint import json_schema, lark
from retrodict.targets.hmm import with_hmm
from retrodict.targets.ready import continuation, including, infill
from retrodict.training.twist import fit_twist, with_twist

SUITE = "constraints"
SHORT = "no word over five letters"
PEER = "genlm-control 0.4.1, AWRS"
SCRIPT = Path("benchmarks/peers/genlm_short_words.py")
PARTS = ("accuracy", "peer", "precision", "validity", "prompts")


def run(
    seeds: int = 10, peer: str = "", peer_script: str = str(SCRIPT), prompts: int = 5, runs: int = 16,
    samples: int = 64, parts: str = ",".join(PARTS), partial: str = "",
) -> list[Row]:  # fmt: skip
    """All rows.

    Args:
        parts: which, joined by commas.
        seeds: runs behind each median error.
        peer: the Python of an environment with genlm-control (``benchmarks/peers/setup.sh``); without it no peer row.
        peer_script: what that Python runs.
        prompts: how many of the five prompts of the reference under limit ``force``.
        runs: runs behind each evidence precision.
        samples: texts drawn from each grammar.
        partial: a JSON file of the rows so far.
    """
    names = parts.split(",")
    for part in names:
        if part not in PARTS:
            raise InputError(f"unknown part {part!r}{nearest(part, PARTS)}")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        lm: Any = load("smollm2", dtype="float32")
        hmm = cached_hmm(lm)
        rows: list[Row] = [show_only(SUITE, "guide", "hmm", k, float(v)) for k, v in told(hmm).items()]
        guides, more = fitted(lm, hmm) if {"accuracy", "peer", "prompts"} & set(names) else ({}, [])
        rows += more
        run_part = {
            "accuracy": lambda: accuracy(lm, guides, seeds),
            "peer": lambda: against_peer(lm, guides, peer, peer_script),
            "precision": lambda: precision(lm, hmm, runs), "validity": lambda: validity(lm, samples),
            "prompts": lambda: five_prompts(lm, guides, max(2, seeds // 2), prompts),
        }  # fmt: skip
        for part in names:
            new = run_part[part]()
            rows += new
            for r in new:
                print(f"{r.name}, {r.method}: {r.metric} {r.value:.4g} {r.bar or ''} {r.note}", flush=True)
            if partial:
                write(rows, Path(partial))
        return rows
    finally:
        torch.set_num_threads(threads)


Guided = Callable[[Target], Target]


def fitted(lm: Any, hmm: Any) -> tuple[dict[str, Guided], list[Row]]:
    """The HMM's and a learned twist's guide, each at its exponent on the second prompt."""
    head = twist.fit(lm)
    target, name = short_words_target(lm, PROMPTS[1]), f"{SHORT}, own_stop, {PROMPTS[1]!r}"
    rows = [show_only(SUITE, "guide", "twist", "seconds", float(head.about["seconds"]))]  # pyright: ignore[reportArgumentType]
    guides: dict[str, Guided] = {}
    for label, make in {"smc, hmm guide": lambda t, b: with_hmm(t, hmm, b),
                        "smc, learned twist": lambda t, b: with_twist(t, head, b)}.items():  # fmt: skip
        guides[label], more = chosen(target, name, label, make)
        rows += more
    return guides, rows


def chosen(
    target: Target, name: str, label: str, make: Callable[[Target, float], Target]
) -> tuple[Guided, list[Row]]:  # fmt: skip
    """A guide at the exponent whose log Z-hat spreads least over ten runs on a target; no reference is asked."""
    spread, rows = {}, []
    for power in (1.0, 0.8, 0.6, 0.4):
        p = smc(make(target, power), n=16, runs=10, seed=600)
        assert p.log_z is not None
        spread[power] = float(p.log_z[0].std().nan_to_num(nan=math.inf))
        rows.append(show_only(SUITE, name, label, f"sd of log Z-hat, psi^{power:g}", spread[power],
                              "10 runs of N = 16"))  # fmt: skip
    best = min(spread, key=lambda b: spread[b])
    return lambda t: make(t, best), [*rows, show_only(SUITE, name, label, "exponent", best)]


def told(hmm: Any) -> dict[str, Any]:
    """The numbers on a guide's card: its size, what fitting cost, how well it predicts."""
    return {"states": hmm.states} | {k: v for k, v in hmm.card.items() if isinstance(v, (int, float))}


def evidence(target: Target, n: int, seeds: int, first: int = 0) -> tuple[list[float], list[Particles]]:
    """log Z-hat of single runs."""
    found = [smc(target, n=n, seed=first + s, runs=1) for s in range(seeds)]
    return [float(p.log_z[0, 0]) for p in found if p.log_z is not None], found


def off(log_z: list[float], truth: float) -> float:
    """Median absolute error in nats."""
    return statistics.median(abs(x - truth) for x in log_z)


def accuracy(lm: Any, guides: dict[str, Guided], seeds: int) -> list[Row]:
    """The first prompt under limit own_stop: the text must come to its end by itself."""
    target, truth = short_words_target(lm), read()["own_stop"][PROMPTS[0]]["log_z"]
    name, rows = f"{SHORT}, own_stop, {TOKENS} tokens", []
    rows.append(show_only(SUITE, name, "reference", "log Z", truth, "100 runs of N = 256"))
    for n, bar in {10: 1.5, 32: 0.5}.items():
        metric, note = f"median |error| at N = {n} (nats)", f"{seeds} seeds"
        for method, t in {"smc": target, **{k: g(target) for k, g in guides.items()}}.items():
            log_z, found = evidence(t, n, seeds)
            value = off(log_z, truth)
            rows.append(show_only(SUITE, name, method, metric, value, note) if method == "smc" else
                        at_most(SUITE, name, method, metric, value, bar, note))  # fmt: skip
            rows += [show_only(SUITE, name, method, f"{what} at N = {n}",
                               statistics.median(p.trace.counts[what] for p in found))
                     for what in ("seconds", "tokens")]  # fmt: skip
    return rows


def against_peer(lm: Any, guides: dict[str, Guided], peer: str, script: str, n: int = 32) -> list[Row]:
    """Seconds of one sampling call of the peer's default and of ours, in one run, and errors at the peer's seconds."""
    target, truth = short_words_target(lm), read()["own_stop"][PROMPTS[0]]["log_z"]
    name = f"{SHORT}, own_stop, N = {n}"
    seconds = interleaved({"smc": lambda: smc(target, n=n, seed=0, runs=1)}, 3, lm.device)["smc"]
    rows = [show_only(SUITE, name, "smc", "seconds", seconds, "unguided, median of 3")]
    if not peer:
        return [*rows, show_only(SUITE, name, PEER, "seconds", math.nan, "not run: no --peer")]
    theirs = ask_peer(lm, peer, script, n)
    rows += [show_only(SUITE, name, PEER, k, theirs[k]) for k in ("seconds", "log_z", "ess", "distinct")]
    rows.append(at_least(SUITE, name, "smc", "times faster than the peer", theirs["seconds"] / seconds, 4.0))
    rows.append(show_only(SUITE, name, PEER, "|error| (nats)", abs(theirs["log_z"] - truth), "seed 0"))
    for method, guide in guides.items():
        looking = guide(target)
        many = max(1, int(theirs["seconds"] / smc(looking, n=n, seed=0, runs=1).trace.counts["seconds"]))
        p = smc(looking, n=n, seed=1, runs=many)
        assert p.log_z is not None
        rows.append(show_only(SUITE, name, method, "|error| in the peer's seconds (nats)",
                              abs(float(log_mean_exp(p.log_z[0])) - truth), f"{many} runs"))  # fmt: skip
    return rows


def ask_peer(lm: Any, python: str, script: str, n: int) -> dict[str, float]:
    """One run of the peer in its own environment."""
    words = [python, script, str(convert(smollm2_gguf())), str(n), str(TOKENS), "0", PROMPTS[0]]
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=1200, check=True)
        return json.loads(done.stdout.strip().splitlines()[-1])
    except (OSError, subprocess.SubprocessError, ValueError, IndexError) as error:
        said = getattr(error, "stderr", None) or str(error)
        raise InputError(f"the peer's run failed ({said.strip().splitlines()[-1]}); see benchmarks/peers") from error


def five_prompts(lm: Any, guides: dict[str, Guided], seeds: int, prompts: int) -> list[Row]:
    """Limit force, where a text cut at the limit counts: other prompts, the same guides."""
    rows = []
    for prompt in PROMPTS[:prompts]:
        truth, target = read()["force"][prompt]["log_z"], short_words_target(lm, prompt, "force")
        for method, t in {"smc": target, **{k: g(target) for k, g in guides.items()}}.items():
            rows.append(show_only(SUITE, f"{SHORT}, force, {prompt!r}", method, "median |error| at N = 32 (nats)",
                                  off(evidence(t, 32, seeds)[0], truth), f"{seeds} seeds"))  # fmt: skip
    return rows


def precision(lm: Any, hmm: Any, runs: int, n: int = 32) -> list[Row]:
    """1 / (Var(Z-hat) / Z^2 x tokens), guided over unguided.

    The words have the HMM's look-ahead, and posterior draws of its own runs with other seeds. The infilling has a twist
    fitted on itself (its seconds apart), and posterior draws that know no twist: SMC with the model's own look-ahead.
    """
    words = including(lm, "This morning", contain=WORDS, stop=".", max_tokens=24, limit="own_stop")
    looking = with_hmm(words, hmm)
    rows = worth("three words", "smc, hmm guide", words, lambda _: looking, Draws(looking, runs), n, (1.0,))
    story = infill(lm, *STORY, max_tokens=12, limit="own_stop", lookahead=None)
    ahead = infill(lm, *STORY, max_tokens=12, limit="own_stop")
    head = fit_twist(story, **STORY_TWIST)
    rows.append(show_only(SUITE, "infilling", "twist", "seconds", float(head.about["seconds"])))  # pyright: ignore[reportArgumentType]
    return rows + worth("infilling", "smc, learned twist", story, lambda b: with_twist(story, head, b),
                        Draws(ahead, runs), n, (1.0, 0.6, 0.4, 0.2))  # fmt: skip


class Draws:
    """log Z of a target and posterior draws from eight runs: those of four to choose by, of the other four to judge by.

    Conditional SMC keeps one draw a run. (The spread of free runs is no measure here: where nearly every draw is worth
    nothing they all miss what is worth most, and agree.)
    """

    def __init__(self, best: Target, runs: int, n: int = 64) -> None:
        pool = smc(best, n=n, runs=8, seed=700)
        assert pool.log_z is not None
        self.runs = runs
        self.truth, self.error = (float(x) for x in jackknife_log_mean(pool.log_z[0]))
        half, gen = 4 * n, generator(701)
        places = [torch.multinomial(w, runs, replacement=True, generator=gen) for w in pool.weights[0].split(half)]
        self.to_choose, self.to_judge = (pool.objects.take(where + k * half) for k, where in enumerate(places))

    def measure(self, target: Target, exact: Rollouts, n: int, stopped: str) -> tuple[float, float, float]:
        """Var(Z-hat) / Z^2 of SMC on a target, its standard error, and the tokens of a run."""
        kept = conditional_smc(target, exact=exact, n=n, runs=self.runs, seed=702, stopped=stopped)
        assert kept.log_z is not None
        return *relative_variance(kept.log_z[0], self.truth), kept.trace.counts["tokens"] / self.runs


def worth(
    name: str, method: str, plain: Target, make: Callable[[float], Target], draws: Draws, n: int,
    powers: tuple[float, ...],
) -> list[Row]:  # fmt: skip
    """The rows of one target, the guide at the exponent that is worth most around other draws than it is judged on.

    All runs set aside who has stopped; the unguided one is also shown without that, where prefixes that have yet to pay
    for Y crowd out who has paid.
    """
    rows = [show_only(SUITE, name, "reference", "log Z", draws.truth, f"+- {draws.error:.2f}, 8 runs of N = 64")]
    note, cost = f"{draws.runs} conditional runs of N = {n}", {}
    for b in powers if len(powers) > 1 else ():
        variance, se, tokens = draws.measure(make(b), draws.to_choose, n, "aside")
        cost[b] = variance * tokens
        rows.append(show_only(SUITE, name, method, f"Var(Z-hat) / Z^2 to choose by, psi^{b:g}", variance,
                              f"+- {se:.2g}, {note}"))  # fmt: skip
    best = min(powers, key=lambda b: cost.get(b, 0.0))
    rows.append(show_only(SUITE, name, method, "exponent", best))
    value, off_by = {}, {}
    for label, t, stopped in (("smc", plain, "compete"), ("smc, stopped aside", plain, "aside"),
                              (method, make(best), "aside")):  # fmt: skip
        variance, se, tokens = draws.measure(t, draws.to_judge, n, stopped)
        value[label], off_by[label] = 1 / (variance * tokens), se / variance
        rows += [show_only(SUITE, name, label, "Var(Z-hat) / Z^2", variance, f"+- {se:.2g}, {note}"),
                 show_only(SUITE, name, label, "tokens a run", tokens)]  # fmt: skip
    for label in ("smc", "smc, stopped aside"):
        error = math.hypot(off_by[method], off_by[label])
        rows.append(at_least(SUITE, name, method, f"precision per token against {label}", value[method] / value[label],
                             5.0, f"+- {error:.0%}"))  # fmt: skip
    return rows


STORY = ("Anna lost her keys.", "So she slept at a friend's house.")
STORY_TWIST = {
    "rows": 256,
    "rounds": 3,
    "steps": 250,
    "samples": 64,
    "lr": 3e-3,
    "top": 64,
    "hidden": 64,
    "evaluate": 2,
}
WORDS = ("rain", "bus", "late")
PET = {"type": "object", "properties": {"name": {"type": "string", "maxLength": 8}, "age": {"type": "integer",
       "minimum": 0, "maximum": 20}, "kind": {"enum": ["cat", "dog", "bird"]}},
       "required": ["name", "age", "kind"], "additionalProperties": False}  # fmt: skip
SUM = """start: product ("+" product)* "\\n"
product: NUMBER ("*" NUMBER)*
NUMBER: /[0-9]{1,2}/
"""


def is_pet(text: str) -> bool:
    """Whether a text is a record of PET, by json.loads and hand."""
    try:
        found = json.loads(text)
    except ValueError:
        return False
    return (isinstance(found, dict) and set(found) == {"name", "age", "kind"} and isinstance(found["name"], str)
            and len(found["name"]) <= 8 and type(found["age"]) is int and 0 <= found["age"] <= 20
            and found["kind"] in ("cat", "dog", "bird"))  # fmt: skip


def is_sum(text: str) -> bool:
    """Whether a text is in SUM, by splitting."""
    return all(x.isdigit() and len(x) <= 2 for term in text.split("+") for x in term.split("*"))


def validity(lm: Any, samples: int) -> list[Row]:
    """Draws under a JSON schema and under a grammar, checked by other code than the mask's."""
    asks = {
        "JSON schema": ("My pet as JSON:\n", json_schema(PET, False), 40, is_pet),
        "Lark grammar": ("A sum with the result 12:", lark(SUM), 12, is_sum),
    }
    rows = []
    for name, (prompt, rule, tokens, check) in asks.items():
        target = continuation(lm, prompt, stop="\n", max_tokens=tokens, limit="own_stop") * rule
        p = smc(target, n=samples, runs=1, seed=0)
        live = p.log_w[0] > NEG_INF
        texts = [t for t, on in zip(p.shown, live.tolist(), strict=True) if on]
        good = sum(check(t.removesuffix("\n").strip(" ")) for t in texts)
        rows.append(at_least(SUITE, name, "smc", "share of weighted texts that are valid",
                             good / len(texts) if texts else 0.0, 1.0,
                             f"{good} of {len(texts)}; {samples - len(texts)} ran into the limit"))  # fmt: skip
        rows.append(show_only(SUITE, name, "smc", "seconds", p.trace.counts["seconds"]))
    return rows
