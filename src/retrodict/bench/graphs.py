"""``retrodict bench graphs``: policies over graphs against enumeration, chains at equal seconds, speed of the space.

Fixed data (``testing.waves``), BGe, uniform prior. The law of a trained policy is exact (``structures.law``), so its
total variation has no Monte Carlo error; that of a chain is of its visited graphs, as a user would take them. Seconds
are processor seconds of this process on one thread, which is what the bars mean; wall seconds stand beside them, and
say how busy the machine was. Evaluation is not timed.
"""

from __future__ import annotations

import json
import math
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from retrodict.bench.rows import Row, at_least, at_most, show_only, write
from retrodict.errors import InputError
from retrodict.numerics import NEG_INF, sample_categorical
from retrodict.rng import generator
from retrodict.spaces.dags import Dags, graph_codes
from retrodict.structures.law import Law, graph_law, jensen_shannon, posterior_law, total_variation
from retrodict.structures.mcmc_order import order_mcmc
from retrodict.structures.mcmc_structure import structure_mcmc
from retrodict.structures.modular import Modular
from retrodict.structures.posterior import GraphPosterior
from retrodict.structures.scores import bge
from retrodict.structures.target import graph_target
from retrodict.structures.train import amortize_graphs, graph_policy
from retrodict.testing.graphs import NoBackward
from retrodict.testing.waves import waves
from retrodict.training.threads import one_thread

SUITE = "graphs"
PEER = "torchgfn 2.4.1"
SCRIPT = Path("benchmarks/peers/torchgfn_dags.py")
OBJECTIVES = ("db", "subtb", "vargrad")
BARS = {4: (0.02, 20.0), 5: (0.08, 60.0)}
"""By nodes: largest total variation, and most processor seconds."""
STEPS = {4: 500, 5: 1200}
NODES, BATCH, MOVES = 20, 256, 40
"""Of the environment's speed: nodes, graphs at once, edges added to each."""


def run(
    seeds: int = 3, peer: str = "", peer_script: str = str(SCRIPT), scale: float = 1.0, partial: str = ""
) -> list[Row]:
    """All rows.

    Args:
        seeds: runs of each method.
        peer: the Python of an environment with torchgfn (``benchmarks/peers``); without it no peer row.
        peer_script: what that Python runs.
        scale: of the numbers of gradient steps (below 1 for a look; bars then need not hold).
        partial: a JSON file of the rows so far.
    """
    rows: list[Row] = []
    with one_thread():
        for new in _parts(seeds, peer, peer_script, scale):
            rows += new
            for r in new:
                print(f"{r.name}, {r.method}: {r.metric} {r.value:.4g} {r.bar or ''} {r.note}", flush=True)
            if partial:
                write(rows, Path(partial))
    return rows


def _parts(seeds: int, peer: str, script: str, scale: float) -> Iterator[list[Row]]:
    yield speed(peer, script)
    yield planted(scale)
    for d in BARS:
        yield from quality(d, seeds, scale)


def timed(call: Callable[[], Any]) -> tuple[Any, float, float]:
    """What a call gives, its processor seconds and its wall seconds."""
    cpu, wall = time.process_time(), time.perf_counter()
    found = call()
    return found, time.process_time() - cpu, time.perf_counter() - wall


Found = tuple[float, float, float, float]
"""Of one seed: total variation, processor seconds, wall seconds, Jensen-Shannon divergence."""


def quality(d: int, seeds: int, scale: float) -> Iterator[list[Row]]:
    """Each objective, then each chain for the seconds that modified DB took."""
    score, (bar, most) = bge(waves(d)), BARS[d]
    target, seconds, name = graph_target(Dags(d), {"data": score}), 0.0, f"d = {d}, BGe"
    truth, steps = posterior_law(target), max(2, int(STEPS[d] * scale))

    def found(law: Law, cpu: float, wall: float) -> Found:
        return total_variation(law, truth), cpu, wall, jensen_shannon(law, truth)

    for objective in OBJECTIVES:
        each = []
        for seed in range(seeds):
            policy = graph_policy(target, seed=seed)
            _, cpu, wall = timed(lambda p=policy, s=seed, o=objective: amortize_graphs(
                target, p, objective=o, seed=s, steps=steps, evaluate=2))  # fmt: skip
            each.append(found(graph_law(policy), cpu, wall))
        seconds = seconds or statistics.fmean(x[1] for x in each)
        yield _method(name, objective, each, bar, most, f"{steps} steps, exact law")
    for method, chain in {"structure MCMC": structure_mcmc, "order MCMC": order_mcmc}.items():
        each = []
        for seed in range(seeds):
            answer, cpu, wall = timed(lambda s=seed, c=chain: for_seconds(c, score, seconds, s))
            each.append(found(law_of(answer, truth), cpu, wall))
        yield _method(name, method, each, None, None, f"{CHAINS} chains, visited graphs")


def _method(name: str, method: str, found: list[Found], bar: float | None, most: float | None, note: str) -> list[Row]:
    """The rows of one method: the worst seed is what a bar holds."""
    tv, cpu, wall, js = zip(*found, strict=True)
    note = f"{note}; seeds: {', '.join(f'{x:.4f}' for x in tv)}"
    held = (SUITE, name, method)
    return [
        show_only(*held, "total variation", statistics.fmean(tv), f"mean of {len(tv)} seeds"),
        show_only(*held, "worst total variation", max(tv), note) if bar is None else
        at_most(*held, "worst total variation", max(tv), bar, note),
        show_only(*held, "Jensen-Shannon divergence (nats)", statistics.fmean(js)),
        show_only(*held, "processor seconds", max(cpu)) if most is None else
        at_most(*held, "processor seconds", max(cpu), most, "of the slowest seed"),
        show_only(*held, "wall seconds", max(wall), "of the slowest seed"),
    ]  # fmt: skip


CHAINS, TRIAL = 64, 200


def for_seconds(chain: Callable[..., GraphPosterior], score: Modular, seconds: float, seed: int) -> GraphPosterior:
    """A chain for about so many processor seconds: as many steps as a trial says, a fifth of them dropped."""
    given = {"chains": CHAINS, "thin": 5}
    _, cpu, _ = timed(lambda: chain(score, steps=TRIAL, burn_in=0, seed=seed, **given))
    steps = max(TRIAL, int((seconds - cpu) / cpu * TRIAL / 1.2))
    return chain(score, steps=steps, burn_in=steps // 5, seed=seed, **given)


def law_of(answer: GraphPosterior, like: Law) -> Law:
    """A weighted sample as a law over all graphs; those it never visited have probability 0."""
    assert answer.graphs is not None and answer.weights is not None
    code, order = graph_codes(like.graphs).sort()
    at = order[torch.searchsorted(code, graph_codes(answer.graphs))]
    p = torch.zeros(len(like.graphs), dtype=torch.float64).index_add_(0, at, answer.weights.double())
    return Law(like.graphs, p.log())


def planted(scale: float) -> list[Row]:
    """Training that ignores P_B: it must be far from the posterior, and near gamma times the number of orders."""
    score, steps = bge(waves(4)), max(2, int(STEPS[4] * scale))
    truth = posterior_law(graph_target(Dags(4), {"data": score}))
    policy = amortize_graphs(graph_target(NoBackward(4), {"data": score}), objective="db", steps=steps, evaluate=2)
    orders = truth.log_p + torch.lgamma(truth.graphs.flatten(1).sum(1).double() + 1)
    wrong, found = Law(truth.graphs, orders - orders.logsumexp(0)), graph_law(policy)
    held = (SUITE, "d = 4, BGe", "db, P_B ignored (planted)")
    return [
        at_least(*held, "total variation", total_variation(found, truth), 10 * BARS[4][0], "the bug must be seen"),
        show_only(*held, "total variation in the limit", total_variation(wrong, truth), "exact"),
        show_only(*held, "total variation to its own limit", total_variation(found, wrong)),
    ]


def speed(peer: str, script: str) -> list[Row]:
    """Steps of graphs a second: environment step and mask alone, random legal edges from the empty graph."""
    name, method = f"d = {NODES} environment, batch {BATCH}", "retrodict"
    own = statistics.median(_environment(seed) for seed in range(7))
    rows = [show_only(SUITE, name, method, "steps a second", own, "step and menu; processor seconds, median of 7")]
    if not peer:
        return [*rows, show_only(SUITE, name, PEER, "steps a second", math.nan, "not run: no --peer")]
    theirs = ask_peer(peer, script)
    rows.append(show_only(SUITE, name, PEER, "steps a second", theirs, "env.step and forward_masks; processor seconds"))
    return [*rows, at_least(SUITE, name, method, "times the peer's steps a second", own / theirs, 20.0)]


def _environment(seed: int) -> float:
    space, gen, seconds = Dags(NODES), generator(seed), 0.0
    s = space.start(torch.zeros(BATCH, dtype=torch.long))
    legal = space.menu(s).legal
    for _ in range(MOVES):
        assert legal is not None
        move = sample_categorical(torch.where(legal, 0.0, NEG_INF), gen)
        began = time.process_time()
        s = space.step(s, move)
        legal = space.menu(s).legal
        seconds += time.process_time() - began
    return MOVES * BATCH / seconds


def ask_peer(python: str, script: str) -> float:
    """Steps a processor second of the peer, in its own environment."""
    words = [python, script, str(NODES), str(BATCH), str(MOVES), "0"]
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=600, check=True)
        told = json.loads(done.stdout.strip().splitlines()[-1])
        return told["steps"] / told["cpu_seconds"]
    except (OSError, subprocess.SubprocessError, ValueError, IndexError, KeyError) as error:
        said = getattr(error, "stderr", None) or str(error)
        raise InputError(f"the peer's run failed ({said.strip().splitlines()[-1]}); see benchmarks/peers") from error
