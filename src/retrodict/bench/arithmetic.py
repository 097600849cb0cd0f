"""Integer arithmetic with a calculator: prompting, fine-tuning on ten annotations, and what goes on from there.

One table: for 3 and 4 operands (trained on) and 5 (never seen), by the vote of n chains at T = 1, by single chains and
by one chain at a temperature near 0. All methods after ``sft`` start from its weights and draw as many rows.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from retrodict.bench.rows import Row, show_only, write
from retrodict.errors import InputError, nearest
from retrodict.models.load import load
from retrodict.tasks import arithmetic_train as train
from retrodict.tasks.arithmetic import accuracy
from retrodict.training.star import restore

SUITE = "arithmetic"
KNOWN = ("prompt", "sft", *train.METHODS)
GREEDY = 0.05
"""Temperature of the chain that stands for the most likely one."""


def run(
    data: str = "",
    methods: str = "prompt,sft,vargrad,ppo,grpo,grpo_reward,pooled",
    steps: int = 60,
    samples: int = 16,
    per_step: int = 16,
    sft_steps: int = 24,
    lr: float = 5e-4,
    rank: int = 16,
    dev: int = 80,
    chains: int = 16,
    unannotated: int = 400,
    micro: int = 0,
    batch: int = 512,
    model: str = "smollm2",
    dtype: str = "",
    device: str = "",
    seed: int = 0,
    limit_seconds: float = 1e9,
    partial: str = "",
) -> list[Row]:
    """The table, method by method; each is printed, and written to ``partial``, as soon as it is there.

    Args:
        data: folder of question files; they are generated without one.
        methods: names joined by commas, trained and judged in this order.
        steps, samples, per_step, lr, rank, seed: of training: ``per_step`` questions a step, ``samples`` rows each.
        sft_steps: of supervised fine-tuning on the annotations, where all others start.
        dev, chains: questions of each number of operands, and chains a question.
        unannotated: questions with answers only.
        micro: rows with gradient at once (0: as many as are estimated to fit).
        batch: rows that are drawn at once in evaluation.
        model, dtype, device: see ``rd.load``; "" for its defaults.
        limit_seconds: for everything; each method gets its share of what is left.
        partial: a JSON file of the rows so far.
    """
    began, names = time.perf_counter(), [m.strip() for m in methods.split(",")]
    for name in names:
        if name not in KNOWN:
            raise InputError(f"unknown method {name!r}{nearest(name, KNOWN)}")
    given = {k: v for k, v in (("dtype", dtype), ("device", device)) if v}
    lm = load(model, **given)
    found = train.questions(data or None, unannotated=unannotated, dev=dev, seed=seed)
    made = train.task(lm, found, rank=rank, seed=seed)
    written, start = made.annotated(), train.kept_values(made.policy)
    plan: dict[str, Any] = {"steps": steps, "samples": samples, "per_step": per_step, "lr": lr, "seed": seed}
    plan |= {"micro": micro} if micro else {}
    table, tuned = Table(lm, made, chains, batch, seed, partial), None
    for i, name in enumerate(names):
        left = limit_seconds - (time.perf_counter() - began)
        if left <= 0:
            print(f"{name}: no time left", flush=True)
            continue
        share = left / (len(names) - i)
        restore(made.policy, start)
        told: dict[str, Any] = {}
        if name != "prompt":
            tuned = tuned or _imitated(made, written, sft_steps, lr, seed)
            restore(made.policy, tuned[0])
            told = tuned[1]
        if name not in ("prompt", "sft"):
            told = train.learn(made, name, written, seconds=0.8 * share, on_metrics=_said(name), **plan)
        table.add(name, told)
    return table.rows


def _imitated(made: Any, written: Any, steps: int, lr: float, seed: int) -> tuple[Any, dict[str, Any]]:
    """Where all trained methods start: the parameters after fine-tuning on the annotations, and what it cost."""
    clock = time.perf_counter()
    losses = train.imitate(made.policy, written, steps=steps, lr=lr, seed=seed)
    print(f"sft: - log q of the annotations {losses[0]:.2f} -> {losses[-1]:.2f}", flush=True)
    cost = {"steps": steps, "seconds": time.perf_counter() - clock, "tokens": steps * int(written.n.sum())}
    return train.kept_values(made.policy), cost


def _said(name: str) -> Callable[[dict[str, Any]], None]:
    """Prints a line now and then."""

    def say(m: dict[str, Any]) -> None:
        if m["step"] % 10 == 0:
            keys = (
                "loss",
                "reward",
                "elbo",
                "var_a",
                "ess",
                "grad_norm",
                "seconds_sample",
                "seconds_reward",
                "seconds_update",
            )
            print(f"  {name} {m['step']}: " + ", ".join(f"{k} {m[k]:.3g}" for k in keys if k in m), flush=True)

    return say


class Table:
    """Rows of all methods so far."""

    def __init__(self, lm: Any, made: train.Task, chains: int, batch: int, seed: int, partial: str) -> None:
        self.lm, self.made, self.chains, self.batch, self.seed, self.partial = lm, made, chains, batch, seed, partial
        self.rows: list[Row] = []

    def add(self, method: str, told: dict[str, Any]) -> None:
        """Judge the policy as it is now, print the line, and keep the rows."""
        line, clock = [], time.perf_counter()
        for k, data in self.made.data.dev.items():
            name = f"{k} operands" + ("" if k < 5 else " (never trained on)")
            drawn = train.chains(self.made.policy, self.lm, data, self.chains, seed=self.seed, batch=self.batch)
            single = train.chains(
                self.made.policy, self.lm, data, 1, seed=self.seed, temperature=GREEDY, batch=self.batch
            )
            a, one = accuracy(drawn, data, self.lm), accuracy(single, data, self.lm)
            values = {f"accuracy, vote of {self.chains}": a.vote, "accuracy, one chain at T = 1": a.chain,
                      "accuracy, one chain near T = 0": one.vote, "chains with an answer": a.answered,
                      "calibration error of the vote": a.ece, "risk at half coverage": a.risk.at(0.5)}  # fmt: skip
            self.rows += [
                show_only(SUITE, name, method, metric, v, f"{len(data)} questions") for metric, v in values.items()
            ]
            line.append(f"{k}: vote {a.vote:.3f} chain {a.chain:.3f} greedy {one.vote:.3f}")
        for metric in ("steps", "tokens", "seconds", "elbo", "reward"):
            if metric in told:
                self.rows.append(show_only(SUITE, "training", method, metric, told[metric]))
        spent = f"trained {told.get('seconds', 0.0):.0f} s, judged {time.perf_counter() - clock:.0f} s"
        print(f"{method}: {'; '.join(line)} ({spent})", flush=True)
        if self.partial:
            write(self.rows, Path(self.partial))
