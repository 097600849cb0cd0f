"""The reference of the short-words target: the pooled mean of Z-hat over many runs of SMC, with its interval.

The estimate is heavy-tailed (a rare early stop carries much of Z), so it is pooled on the natural scale, where each
run is unbiased, and its error is a jackknife over runs.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from retrodict.models.load import load
from retrodict.numerics import jackknife_log_mean
from retrodict.protocols import LanguageModel
from retrodict.samplers.smc import smc
from retrodict.spaces.limits import Limit
from retrodict.targets.algebra import Target
from retrodict.targets.constraint import short_words
from retrodict.targets.ready import continuation

PROMPTS = (
    "The weather in Scotland today is",
    "My old dog likes to",
    "For lunch we had",
    "She put the book on",
    "At the end of the day",
)
TOKENS = 32
RESULTS = Path("benchmarks/results")


def short_words_target(lm: LanguageModel, prompt: str = PROMPTS[0], limit: Limit = "own_stop") -> Target:
    """No word over five letters, at most 32 tokens, end-of-sequence as the stop (reference/testtime.md, section 9)."""
    return continuation(lm, prompt, stop="eos", max_tokens=TOKENS, limit=limit) * short_words(5)


def pooled(target: Target, runs: int, n: int, at_once: int, seed: int) -> dict[str, Any]:
    """Pooled log-evidence over independent runs, and what it is made of (nats)."""
    parts = [smc(target, n=n, seed=seed + i, runs=min(at_once, runs - i)) for i in range(0, runs, at_once)]
    log_z = torch.cat([p.log_z for p in parts if p.log_z is not None], 1)[0]
    value, error = jackknife_log_mean(log_z)
    return {
        "log_z": float(value), "se": float(error), "runs": runs, "n": n, "sd_over_runs": float(log_z.std()),
        "largest_run_share": float((log_z - log_z.logsumexp(0)).exp().max()), "log_z_runs": log_z.tolist(),
    }  # fmt: skip


def make(runs: int = 20, n: int = 256, at_once: int = 1, seed: int = 0, dtype: str = "float32") -> dict[str, Any]:
    """References of the own_stop target (first prompt) and of the force target (all prompts)."""
    lm = load("smollm2", dtype=dtype)
    out: dict[str, Any] = {"model": lm.name, "version": lm.version, "device": str(lm.device), "tokens": TOKENS}
    out["own_stop"] = {PROMPTS[0]: pooled(short_words_target(lm), runs, n, at_once, seed)}
    out["force"] = {p: pooled(short_words_target(lm, p, "force"), runs, n, at_once, seed) for p in PROMPTS}
    return out


def read() -> dict[str, Any]:
    """The committed reference. Raises FileNotFoundError where it has not been made."""
    return json.loads((RESULTS / "short_words_reference.json").read_text(encoding="utf-8"))


if __name__ == "__main__":
    import argparse

    ask = argparse.ArgumentParser(description=__doc__)
    ask.add_argument("--runs", type=int, default=20)
    ask.add_argument("--n", type=int, default=256)
    ask.add_argument("--at-once", type=int, default=1)
    ask.add_argument("--json", type=Path, default=RESULTS / "short_words_reference.json")
    args = ask.parse_args()
    args.json.parent.mkdir(parents=True, exist_ok=True)
    args.json.write_text(json.dumps(make(args.runs, args.n, args.at_once), indent=1) + "\n", encoding="utf-8")
