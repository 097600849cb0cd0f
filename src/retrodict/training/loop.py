"""Amortized inference: fine-tune a policy to draw from the posterior (Hu et al. 2024, arXiv:2310.04363).

One step: draw without gradients, value the draws once, one teacher-forced pass with gradient, one Adam step. Every
random number comes from (seed, step, shard), so a run that is stopped and resumed is the run that never stopped.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from retrodict.errors import InputError, RetrodictError
from retrodict.numerics import at_end
from retrodict.objectives.groups import groups, mean, variance
from retrodict.objectives.residual import residual
from retrodict.objectives.table import NEED_PREFIXES, WITH_LOG_Z, objective
from retrodict.protocols import Trainable
from retrodict.records import Rollouts, Scores
from retrodict.rng import generator
from retrodict.samplers.common import device_of, log_b_of, positive
from retrodict.targets.algebra import Target
from retrodict.training.collect import Batch, collect, counted, final_log_gamma, turn
from retrodict.training.distance import DISTANCES
from retrodict.training.distributed import ALONE, World
from retrodict.training.memory import micro_batch
from retrodict.training.replay import Replay
from retrodict.training.settings import Settings
from retrodict.training.step import Loss, clip, push

PATIENCE = 3
"""Steps in a row whose loss is not finite before a run stops."""


class TrainingError(RetrodictError):
    """Training cannot go on; what was learned so far is kept."""


@dataclass
class Run:
    """A training run at some step; ``training.checkpoint`` writes it down and reads it back."""

    target: Target
    policy: Trainable
    settings: Settings
    objective: str
    adam: torch.optim.Adam
    log_z: Tensor | None
    replay: Replay
    step: int = 0
    failures: int = 0
    micro: int | None = None
    seconds: float = 0.0
    whole: bool = True  # not in the middle of a step: what a checkpoint may be made of
    world: World = field(default_factory=lambda: ALONE)


OnFailure = Callable[[int, Rollouts, str], None]
"""Called with the step, the batch and the cause where a step was skipped."""


def begin(target: Target, policy: Trainable, settings: Settings, world: World = ALONE) -> Run:
    """A run at step 0. Raises InputError where objective, target and settings do not go together."""
    prefixes = all(t.prefixes for t in target.factors.values())
    name = settings.objective
    if name == "auto":
        name = "pooled" if prefixes else "vargrad"
    if name in NEED_PREFIXES and not prefixes:
        whole = next(n for n, t in target.factors.items() if not t.prefixes)
        raise InputError(f"{name} needs values of every prefix, and the factor {whole!r} has none: use vargrad")
    noisy = [n for n, t in target.factors.items() if t.noise == "linear"]
    if noisy and name not in ("sir", "mle"):
        raise InputError(f"{name} takes the logarithm of {noisy[0]!r}, whose noise is linear: use sir")
    if settings.samples < 2 and name not in ("tb", "mle", *NEED_PREFIXES):
        raise InputError(f"{name} compares samples of one problem: give samples of at least 2, or use tb")
    if settings.mixture.from_prior and target.prior is None:
        raise InputError("this target has no prior to draw from; leave out from_prior")
    if world.together and settings.micro is None:
        raise InputError("processes that share weights must run the same passes: give micro, the rows of each")
    parameters = policy.parameters()
    m, device = len(target.problems), device_of(target, policy if hasattr(policy, "lm") else None)
    log_z = None
    if name in WITH_LOG_Z:  # NaN until a problem is first met, see ``_met``
        log_z = torch.full((m,), math.nan, dtype=torch.float64, device=device, requires_grad=True)
    groups_of = [{"params": list(parameters.values()), "lr": settings.lr}]
    if log_z is not None:
        groups_of.append({"params": [log_z], "lr": settings.lr_log_z})
    near = None if settings.distance is None else DISTANCES[settings.distance]
    replay = Replay(settings.capacity, priority=settings.priority, alpha=settings.replay_alpha, distance=near,
                    tolerance=settings.tolerance, model=_model(policy), target="*".join(target.factors))  # fmt: skip
    run = Run(target, policy, settings, name, torch.optim.Adam(groups_of, betas=(0.9, 0.99)), log_z, replay)
    run.world = world
    run.micro = micro_batch(target, policy, settings)
    if settings.checkpointing:
        policy.lm.checkpoint_activations(True)  # pyright: ignore[reportAttributeAccessIssue]
    return run


def _model(policy: Trainable) -> str:
    """The weights that an adapter stands on; they do not move."""
    return str(getattr(getattr(policy, "lm", None), "base_version", ""))


def advance(run: Run, on_failure: OnFailure | None = None) -> dict[str, Any]:
    """One step; gives its metrics. Steps whose loss is not finite are skipped, three in a row raise TrainingError."""
    s, clock = run.settings, Clock()
    device = device_of(run.target, run.policy if hasattr(run.policy, "lm") else None)
    batch = _collect(run, device)
    _ask_ahead(run, device)
    temperature = s.reward_t(run.step)
    tempered = run.target if temperature == 1.0 else run.target ** (1.0 / temperature)
    prefixes = run.objective in NEED_PREFIXES
    log_gamma = tempered.log_gamma(batch.rollouts, prefixes)
    clock.lap("sample")
    clock.seconds["seconds_reward"] = batch.seconds
    clock.seconds["seconds_sample"] -= batch.seconds
    metrics: dict[str, Any] = {"step": run.step, "objective": run.objective}
    run.adam.zero_grad(set_to_none=True)
    if run.log_z is not None:
        _met(run.log_z, batch.rollouts, log_gamma)
    log_norm = None if run.log_z is None else run.log_z[batch.rollouts.problem]
    loss_of: Loss = partial(objective(run.objective), **s.options)
    try:
        pushed = push(run.policy, loss_of, batch.rollouts, log_gamma, log_norm, run.micro, run.world)
    except FloatingPointError as error:
        return _skip(run, batch, str(error), on_failure, metrics)
    run.micro = pushed.micro if pushed.micro < len(batch.rollouts) else run.micro
    norm = clip(run.policy.parameters(), s.clip)
    if not math.isfinite(norm):
        return _skip(run, batch, f"the norm of the gradient is {norm}", on_failure, metrics)
    run.whole = False
    for group, rate in zip(run.adam.param_groups, (s.rate(run.step), s.lr_log_z), strict=False):
        group["lr"] = rate
    run.adam.step()
    run.policy.refresh()
    clock.lap("update")
    _remember(run, batch)
    metrics |= {k: float(v) for k, v in pushed.metrics.items()}
    metrics |= _fresh(run, batch, pushed.scores)
    metrics |= {"grad_norm": norm, "lr": s.rate(run.step), "reward_temperature": temperature,
                "behaviour_temperature": batch.temperature, "scored": batch.scored, "micro": pushed.micro,
                "replay": len(run.replay), "staleness": run.replay.staleness(run.step) if len(run.replay) else 0.0,
                "tokens": int(batch.rollouts.n.sum()), **clock.seconds}  # fmt: skip
    if "staleness" in batch.rollouts.behaviour:  # steps since the adapter that drew was pushed (training.remote)
        metrics["staleness_policy"] = batch.rollouts.behaviour["staleness"]
    run.step, run.failures = run.step + 1, 0
    return metrics


def _collect(run: Run, device: torch.device) -> Batch:
    """The rows of a step: each shard draws its own from (seed, step, shard), wherever it runs."""
    s, chosen = run.settings, _chosen(run, run.step)
    prefixes = run.objective in NEED_PREFIXES
    mine = [
        collect(run.target, run.policy, chosen, s.samples // s.shards, generator(s.seed, device, 2, run.step, shard),
                s.mixture, run.replay, prefixes)
        for shard in run.world.mine(s.shards)
    ]  # fmt: skip
    return run.world.gather(mine)


def _chosen(run: Run, step: int) -> list[int]:
    """Problems of a step."""
    s, m = run.settings, len(run.target.problems)
    per_step = min(m, s.per_step or min(m, 8))
    order = torch.randperm(m, generator=generator(s.seed, "cpu", 1, step * per_step // m))
    return turn(step, m, per_step, order)


def _ask_ahead(run: Run, device: torch.device) -> None:
    """Where servers draw ahead: ask for the next step's own rows before this step's update."""
    s, step = run.settings, run.step + 1
    own = s.mixture.counts(s.samples // s.shards)[0]
    if not getattr(run.policy, "ahead", False) or step >= s.steps or not own:
        return
    problem = torch.tensor(_chosen(run, step), device=device).repeat_interleave(own)
    for shard in run.world.mine(s.shards):
        run.policy.ask(problem, generator(s.seed, device, 4, step, shard))  # pyright: ignore[reportAttributeAccessIssue]


@torch.no_grad()
def _met(log_z: Tensor, rollouts: Rollouts, log_gamma: Tensor) -> None:
    """A learned log Z begins at the mean of log gamma / b over the first rows of its problem.

    From 0 it would have tens of nats to go at a tenth of a nat a step, and drag q along meanwhile.
    """
    new = log_z.isnan()[rollouts.problem]
    if not new.any():
        return
    value = log_gamma if log_gamma.dim() == 1 else at_end(log_gamma, rollouts.n, rollouts.stop)
    a = value.double() + rollouts.log_pb.double().sum(1) - log_b_of(rollouts)
    for p in rollouts.problem[new].unique().tolist():
        here = a[(rollouts.problem == p) & a.isfinite()]
        log_z[p] = here.mean() if len(here) else 0.0


def _remember(run: Run, batch: Batch) -> None:
    if run.settings.mixture.replay:
        rows = batch.rollouts.take(batch.new)
        run.replay.add(rows, final_log_gamma(run.target, rows), run.target.space.keys(rows), run.step)


def _fresh(run: Run, batch: Batch, scores: Scores) -> dict[str, Any]:
    """Var(a), evidence, ESS, distinct and lengths on the step's own draws at T = 1, before its update."""
    at = batch.own
    if not len(at):
        return {}
    rows = batch.rollouts.take(at)
    some = Scores(scores.log_q[at], scores.log_stop[at])
    log_gamma = run.target.log_gamma(rows)
    if not bool(log_gamma.isfinite().all()):
        return {"zeros": float((~log_gamma.isfinite()).double().mean())}
    _, _, a = residual(some, rows, log_gamma)
    return on_policy(a, rows, run.target.space.keys(rows))


def on_policy(a: Tensor, rows: Rollouts, keys: list[tuple[int, ...]]) -> dict[str, Any]:
    """What q's own draws say, a mean over problems: ``elbo`` = E_q[a] <= log Z, ``log_z`` by importance, ESS share."""
    of, count = groups(rows.problem)
    m = len(count)
    top = torch.full((m,), -torch.inf, dtype=a.dtype, device=a.device).scatter_reduce(0, of, a, "amax")
    w = (a - top[of]).exp()
    mass = torch.zeros(m, dtype=a.dtype, device=a.device).index_add(0, of, w)
    square = torch.zeros(m, dtype=a.dtype, device=a.device).index_add(0, of, w.square())
    log_z = top + (mass / count).log()
    distinct = len({(p, *k) for p, k in zip(of.tolist(), keys, strict=True)}) / m
    lengths = torch.bincount(rows.n.cpu()).tolist()
    return {"elbo": float(mean(a, of, count).mean()), "var_a": float(variance(a, of, count).mean()),
            "log_z": float(log_z.mean()), "ess": float((mass.square() / square / count).mean()), "distinct": distinct,
            "length": float(rows.n.double().mean()), "lengths": lengths}  # fmt: skip


def _skip(run: Run, batch: Batch, why: str, on_failure: OnFailure | None, metrics: dict[str, Any]) -> dict[str, Any]:
    run.failures += 1
    if on_failure is not None:
        on_failure(run.step, batch.rollouts, why)
    if run.failures >= PATIENCE:
        raise TrainingError(f"{PATIENCE} steps in a row were skipped, the last because {why}: lower lr, or check the "
                            "factors of the target")  # fmt: skip
    run.whole = False
    run.step += 1
    return metrics | {"skipped": why}


class Clock:
    """Seconds between laps."""

    def __init__(self) -> None:
        self.last, self.seconds = time.perf_counter(), {}
        self.seconds: dict[str, float]

    def lap(self, name: str) -> None:
        """The time since the last lap is ``name``'s."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        now = time.perf_counter()
        self.seconds[f"seconds_{name}"], self.last = now - self.last, now


@torch.no_grad()
def evaluate(target: Target, policy: Trainable, n: int, seed: int, batch: int = 256) -> dict[str, Any]:
    """Fresh draws at T = 1: ELBO with its standard error, log Z-hat, ESS share, distinct, what Y makes of them."""
    positive(n=n)
    policy = getattr(policy, "local", policy)  # q's own draws, not an older adapter's (training.remote)
    gen = generator(seed, device_of(target, policy), 3)
    from retrodict.records import cat_rollouts

    problem = torch.arange(len(target.problems), device=gen.device).repeat_interleave(n)
    parts = [target.terms(policy.sample(part, gen)) for part in problem.split(batch)]
    rows = counted(target, cat_rollouts(parts))
    scores = policy.score(rows)
    log_gamma = target.log_gamma(rows)
    inside = Scores(scores.log_q, scores.log_stop)
    finite = log_gamma.isfinite()
    _, _, a = residual(inside, rows, torch.where(finite, log_gamma, 0.0))
    found = on_policy(torch.where(finite, a, -1e30), rows, target.space.keys(rows)) if finite.all() else {}
    error = float(a.view(-1, n).std(1).div(n**0.5).square().mean().div(len(target.problems)).sqrt()) if n > 1 else None
    return found | {"elbo_se": error, "zeros": float((~finite).double().mean()), "n": n}


def steps(run: Run, on_failure: OnFailure | None = None) -> Iterator[dict[str, Any]]:
    """Metrics of each remaining step."""
    while run.step < run.settings.steps:
        yield advance(run, on_failure)


def with_settings(run: Run, **changes: Any) -> Run:
    """The same run under other settings."""
    return replace(run, settings=replace(run.settings, **changes))
