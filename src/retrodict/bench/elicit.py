"""``retrodict bench elicit``: both forms of elicitation at d = 3, where the sum over what may be seen is finite.

    augmented   trained on (G, D), and marginalised                           to the exact sum
    naive       trained on log-mean-exp of K draws, squared error             to its own target R*_K; that to the sum
    pseudo      Metropolis-Hastings on one draw a graph                       to the exact sum
    importance  every graph weighed by one-draw estimates, many times         to the exact sum

25 graphs, 27 reports. The reports' log-probabilities are drawn at random (standard deviation 2), so that the sums can
be checked without a model; with ``model`` the last rows ask one about three variables of the talk.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from retrodict.bench.rows import Row, at_most, show_only
from retrodict.models.load import load
from retrodict.numerics import total_variation
from retrodict.records import PAD, Problem
from retrodict.rng import generator
from retrodict.spaces.dags import Dags, all_dags, graph_codes
from retrodict.spaces.enumerate import enumerate_objects
from retrodict.structures import elicit
from retrodict.structures.ask import Asker
from retrodict.structures.relations import Relations, Teller
from retrodict.targets.algebra import Target
from retrodict.testing.trained import Table, listed, posterior_paths
from retrodict.training.amortize import amortize

SUITE = "elicit"
BAR = 0.02
"""Total variation that every form must reach."""
KS = (1, 4, 16, 64)
ENOUGH = 256
"""Draws at which the naive form, trained, is held to the exact sum."""
HELD = 16
"""Draws from which on the trained naive form is held to its own target: below, the noise of log R_K is of several nats
and skewed, and training stops some 0.02 away; that is shown."""
WIDER = 2
"""Training on a language model's reports takes so many times the steps: they range over twice the nats."""
ERROR = 0.05
VARIABLES = {"smoking": "smoking", "tar": "tar in the lungs", "cancer": "lung cancer"}
PLAN: dict[str, Any] = {"samples": 128, "lr": 0.1, "lr_end": 0.02, "lr_log_z": 0.3, "evaluate": 2, "epsilon": 0.1,
                        "tempered": 0.5, "temperatures": (1.0, 3.0)}  # fmt: skip
"""With exploration: improbable D would otherwise hardly be met."""
D3, SEEN = Dags(3), Relations(3, ERROR)
PROBLEM = [Problem((), name="graphs")]


def of_graphs(space: Dags, policy: Table) -> Float[Tensor, " n"]:
    """log q of each of the 25 graphs: the sum over its paths (and D)."""
    paths = enumerate_objects(space, 0)
    with torch.no_grad():
        scores = policy.score(paths)
    rows = torch.arange(len(paths))
    log_q = scores.log_q.sum(1) + scores.log_stop[rows, paths.n, paths.stop]
    return summed(space, paths, log_q)


def summed(space: Dags, paths: Any, log_mass: Float[Tensor, " r"]) -> Float[Tensor, " n"]:
    """Mass of paths added up graph by graph, in the order of ``all_dags``."""
    codes = graph_codes(all_dags(3)).tolist()
    at = torch.tensor([codes.index(c) for c in graph_codes(space.graphs(paths)).tolist()])
    return torch.zeros(len(codes), dtype=torch.float64).index_add(0, at, log_mass.double().exp()).log()


def table(space: Dags) -> Table:
    """One row of logits a graph, whatever the order of its edges; at first all stops together weigh as much as an edge.

    With each of 27 stops as likely as each edge, graphs of three edges would hardly be met.
    """
    policy = Table(space, PROBLEM, 9)
    for key in list(policy.nodes):
        policy.nodes[key] = policy.nodes[(key[0], *sorted(key[1:]))]
    paths = enumerate_objects(space, 0)
    node = policy.at(paths)
    row, i = (paths.kind != PAD).nonzero().unbind(1)
    policy.legal.zero_()
    policy.legal[node[row, i], paths.moves[row, i]] = True
    policy.legal[node[torch.arange(len(paths)), paths.n], 9 + paths.stop] = True
    with torch.no_grad():
        policy.logits[:, 9:] -= math.log(space.n_stops)
    return policy


def trained(target: Target, objective: str, steps: int, seed: int) -> Float[Tensor, " n"]:
    """log q of each graph after training a table on a target."""
    policy = table(target.space)  # pyright: ignore[reportArgumentType]
    amortize(target, policy, objective=objective, steps=steps, seed=seed, **PLAN)
    return of_graphs(target.space, policy)  # pyright: ignore[reportArgumentType]


def visited(log_lm: Float[Tensor, " m"], steps: int, seed: int) -> Float[Tensor, " n"]:
    """log share of each graph among the states of pseudo-marginal chains with one draw of D."""

    def one(graphs: Tensor, gen: torch.Generator) -> Tensor:
        return log_lm[SEEN.draw(graphs, 1, gen)].squeeze(1)

    found = elicit.pseudo_marginal(D3, one, chains=1024, steps=steps, burn_in=steps // 4, thin=5, seed=seed)
    assert found.graphs is not None and found.weights is not None
    codes = graph_codes(all_dags(3)).tolist()
    at = torch.tensor([codes.index(c) for c in graph_codes(found.graphs).tolist()])
    return torch.zeros(len(codes), dtype=torch.float64).index_add(0, at, found.weights).log()


def forms(
    name: str, log_lm: Float[Tensor, " m"], steps: int, objectives: list[str], learned: tuple[int, ...], seed: int
) -> list[Row]:
    """Every form against the exact sum, for one table of log p_LM(D); the naive one is trained at K in ``learned``."""
    graphs, rows = all_dags(3), []
    zero, law = elicit.uniform(graphs), SEEN.law(graphs)
    exact = elicit.exact_log_r(zero, law, log_lm)
    tv = total_variation

    def held(method: str, metric: str, value: float, note: str = "") -> None:
        rows.append(at_most(SUITE, name, method, metric, value, BAR, note))
        print(f"{name}, {method}: {metric} {value:.4f}", flush=True)

    told = elicit.Told(3, n_stops=SEEN.count)
    joint = listed(Target(told, PROBLEM, {"elicited": elicit.Augmented(told, SEEN, log_lm)}))
    paths, share = posterior_paths(joint, 0)
    rows.append(at_most(SUITE, name, "augmented, summed over D", "TV to the exact sum",
                        tv(summed(told, paths, share), exact), 1e-9))  # fmt: skip
    for objective in objectives:
        found = trained(joint, objective, steps, seed)
        held(f"augmented, {objective}", "TV to the exact sum", tv(found, exact))
    held("pseudo-marginal MH, K = 1", "TV to the exact sum", tv(visited(log_lm, 2000, seed), exact))
    gen = generator(seed, "cpu", 1)
    draws = torch.stack([log_lm[SEEN.draw(graphs, 1000, gen)].logsumexp(1) for _ in range(20)]).logsumexp(0)
    held("importance, K = 1", "TV to the exact sum", tv(draws, exact), "20,000 draws a graph")
    for k in (*KS, ENOUGH):
        star = elicit.naive_log_r(zero, law, log_lm, k)
        rows.append(show_only(SUITE, name, f"naive, K = {k}", "mean of E[log R_K] - log R (nats)",
                              float((star - exact).mean())))  # fmt: skip
        rows.append(show_only(SUITE, name, f"naive, K = {k}", "TV of its own target to the exact sum", tv(star, exact)))
        if k not in learned:
            continue
        term = elicit.Naive(D3, SEEN, lambda codes: log_lm[codes], k, generator(seed, "cpu", 2, k), noise="log")
        found = trained(Target(D3, PROBLEM, {"elicited": term}), objectives[0], steps, seed)
        method, own = f"naive, K = {k}, {objectives[0]}", "TV to its own target"
        if k < HELD:
            rows.append(show_only(SUITE, name, method, own, tv(found, star)))
            continue
        held(method, own, tv(found, star))
        if k == ENOUGH:
            held(method, "TV to the exact sum", tv(found, exact))
    return rows


def run(
    steps: int = 800,
    objectives: str = "pooled,tb,vargrad",
    spread: float = 2.0,
    model: str = "",
    dtype: str = "float32",
    cache: str = "",
    seed: int = 0,
) -> list[Row]:
    """The table; some four minutes of one core.

    Args:
        steps: of training, for each form.
        objectives: names joined by commas; the first also trains the naive form.
        spread: standard deviation, in nats, of the reports' random log-probabilities.
        model: also ask this language model (smollm2) about smoking, tar and lung cancer.
        dtype: its precision.
        cache: a file of its answers, which spares it on another call.
        seed: one seed, one result.
    """
    torch.set_num_threads(1)
    log_lm = spread * torch.randn(SEEN.count, generator=generator(seed), dtype=torch.float64)
    names = [x.strip() for x in objectives.split(",")]
    rows = forms(f"d = 3, random reports (sd {spread:g})", log_lm, steps, names, (*KS, ENOUGH), seed)
    if model:
        asker = Asker(load(model, dtype=dtype), cache or None)
        told = Teller(asker, SEEN, VARIABLES).log_p(torch.arange(SEEN.count))
        name = f"d = 3, {', '.join(VARIABLES)} asked of {model}"
        rows += forms(name, told, WIDER * steps, names[:1], (ENOUGH,), seed)
    return rows
