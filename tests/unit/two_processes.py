"""What test_distributed runs on one process and, under a launcher, on two: ``two_processes.py FOLDER``."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tiny_llama import tiny_llama

from retrodict.objectives import OBJECTIVES
from retrodict.policies.amortized import Amortized
from retrodict.records import Rollouts, Scores
from retrodict.rng import generator
from retrodict.targets.ready import infill
from retrodict.training.amortize import amortize, grow
from retrodict.training.distributed import World, world
from retrodict.training.loop import TrainingError
from retrodict.training.step import push

PLAN: dict[str, Any] = {"steps": 6, "samples": 8, "shards": 2, "evaluate": 4, "rank": 2, "replay": 0.25, "lr": 0.02,
                        "save_every": 2}  # fmt: skip


def target(dtype: torch.dtype) -> Any:
    """A gap to fill; the model's random weights are the same everywhere."""
    return infill(tiny_llama(dtype), "ab", "cd", stop=".", max_tokens=4)


def gradients(here: World, micro: int | None) -> dict[str, torch.Tensor]:
    """Of the pooled loss on fixed rollouts, in float32, after the adapter left 0."""
    made = target(torch.float32)
    policy = grow(made, rank=2)
    with torch.no_grad():
        for i, p in enumerate(policy.parameters().values()):
            p.copy_(0.3 * torch.randn(p.shape, generator=generator(5, "cpu", i)))
    policy.refresh()
    rows = made.terms(made.prior.sample(torch.zeros(7, dtype=torch.long), generator(1)), every_prefix=True)
    push(policy, OBJECTIVES["pooled"], rows, made.log_gamma(rows, every_prefix=True), None, micro, here)
    return {f"{k}.{micro}": p.grad for k, p in policy.parameters().items() if p.grad is not None}


class Spoilt(Amortized):
    """NaN, in the rows of the second process only, where there are two."""

    def score(self, rollouts: Rollouts, raw: bool = False, grad: bool = False) -> Scores:
        """As always on the first."""
        s = super().score(rollouts, raw, grad)
        here = world()
        bad = here.rank == 1 or here.size == 1
        return Scores(s.log_q * torch.nan, s.log_stop) if bad else s


def skipped() -> tuple[str, int]:
    """Why a run whose second process fails ends, and how often it said so."""
    made, told = target(torch.float32), []
    grown = grow(made, rank=2)
    policy = Spoilt(grown.lm, grown.space, made.problems)
    try:
        amortize(made, policy, objective="vargrad", steps=6, samples=4, shards=2, evaluate=2,
                 on_failure=lambda *a: told.append(a))  # fmt: skip
    except TrainingError as error:
        return str(error), len(told)
    return "no error", len(told)


def main(folder: Path) -> None:
    """Write what each process found."""
    torch.set_num_threads(1)
    here = world()
    found = gradients(here, None) | gradients(here, 2)
    told: list[Any] = []
    torch.manual_seed(here.rank)  # what a process's global state holds must not matter
    policy = amortize(target(torch.float64), folder=folder / "run", on_metrics=told.append, **PLAN)
    more = amortize(target(torch.float64), folder=folder / "run", resume=True, **PLAN)
    why, times = skipped()
    save_file({k: v.contiguous() for k, v in found.items()}, folder / f"gradients-{here.rank}.safetensors")
    trained = {k: v.detach().contiguous() for k, v in policy.parameters().items()}
    save_file(trained, folder / f"trained-{here.rank}.safetensors")
    again = all(torch.equal(v, more.parameters()[k]) for k, v in trained.items())
    text = {"metrics": told, "why": why, "times": times, "size": here.size, "again": again, "about": policy.about}
    (folder / f"told-{here.rank}.json").write_text(json.dumps(text, default=str))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
