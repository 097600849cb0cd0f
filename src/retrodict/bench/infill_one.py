"""One missing sentence, amortized on a CPU: ``recipes/infill_one.yaml`` at several seeds, against a long reference.

Bar: E_q[log gamma/q] on fresh draws closes at least half of the prior's gap to log Z. The ESS of q as a proposal is
shown beside the prior's at equal draws and not gated: a collapsed q has a full one. log Z is that of pooled SMC runs;
MH chains give E[log gamma/q] under (nearly) the posterior, which bounds log Z from above and is only shown.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from retrodict.bench.rows import Row, at_least, show_only, write
from retrodict.models.load import load
from retrodict.numerics import jackknife_log_mean
from retrodict.objectives.mle import object_log_q
from retrodict.records import cat_rollouts
from retrodict.rng import generator
from retrodict.samplers.mh.run import mh
from retrodict.samplers.smc import smc
from retrodict.targets.ready import infill
from retrodict.training.amortize import amortize
from retrodict.training.settings import settings

SUITE = "infill_one"
STORY: dict[str, Any] = {
    "before": "The cat was hungry.",
    "after": "Now the cat is sleepy.",
    "stop": ".",
    "max_tokens": 10,
}
RECIPE: dict[str, Any] = {"objective": "vargrad", "steps": 120, "samples": 32, "lr": 1e-3, "rank": 16}
"""As in the recipe; a test holds the two together."""


def run(
    seeds: int = 3,
    draws: int = 1024,
    steps: int = RECIPE["steps"],
    runs: int = 8,
    particles: int = 256,
    threads: int = 0,
    model: str = "smollm2",
    dtype: str = "",
    partial: str = "",
) -> list[Row]:
    """Reference, prior, and the policy of each seed; each is written as soon as it is there.

    Args:
        seeds: policies to train.
        draws: fresh draws behind each bound and ESS.
        steps: gradient steps (those of the recipe).
        runs, particles: of the SMC reference.
        threads: of torch; 0 leaves them.
        model, dtype: see ``rd.load``; "" for its defaults.
        partial: a JSON file of the rows so far.
    """
    if threads:
        torch.set_num_threads(threads)
    lm: Any = load(model, **({"dtype": dtype} if dtype else {}))
    story = infill(lm, **STORY)
    name, rows = f"infill_one, {steps} steps, {draws} fresh draws", []

    def say(*new: Row) -> None:
        rows.extend(new)
        for r in new:
            print(f"{r.method}: {r.metric} {r.value:.4g} {r.bar or ''} {r.note}", flush=True)
        if partial:
            write(rows, Path(partial))

    long = smc(story, n=particles, runs=runs, seed=1000)
    assert long.log_z is not None
    log_z, error = (float(x) for x in jackknife_log_mean(long.log_z[0]))
    say(show_only(SUITE, name, "smc", "log Z", log_z, f"+- {error:.2f}, {runs} runs of {particles}"))
    chains = mh(story, n=32, steps=60, seed=1001).objects
    base = bounds(story, story.prior, draws, chains)
    say(*(show_only(SUITE, name, "prior", k, v) for k, v in base.items()))
    for seed in range(seeds):
        given = {k: v for k, v in RECIPE.items() if k != "rank"} | {"steps": steps, "seed": seed, "evaluate": 2}
        policy = amortize(story, rank=RECIPE["rank"], plan=settings(**given))
        found = bounds(story, policy, draws, chains)
        method = f"vargrad, seed {seed}"
        share = (found["lower bound"] - base["lower bound"]) / (log_z - base["lower bound"])
        say(*(show_only(SUITE, name, method, k, v) for k, v in found.items()))
        ratio, on = found["ESS share"] / base["ESS share"], f"{torch.get_num_threads()} threads"
        say(show_only(SUITE, name, method, "seconds of training", policy.about["seconds"], on),
            at_least(SUITE, name, method, "share of the prior's gap closed", share, 0.5),
            show_only(SUITE, name, method, "ESS against the prior's", ratio))  # fmt: skip
    return rows


def bounds(story: Any, policy: Any, draws: int, chains: Any) -> dict[str, float]:
    """Lower bound and ESS share from fresh draws, and E[log gamma/q] over the chains' states."""
    gen = generator(77, policy.lm.device)
    rows = cat_rollouts([policy.sample(x, gen) for x in torch.zeros(draws, dtype=torch.long).split(256)])

    def log_w(rows: Any) -> torch.Tensor:
        return story.log_gamma(rows) - object_log_q(policy.score(rows), rows).double()

    a = log_w(rows)
    w = a.softmax(0)
    return {"lower bound": float(a.mean()), "s.e. of it": float(a.std() / draws**0.5),
            "ESS share": float(1 / w.square().sum() / draws), "mean over chains": float(log_w(chains).mean()),
            "distinct": float(len(set(story.space.keys(rows))))}  # fmt: skip
