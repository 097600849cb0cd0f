"""``retrodict bench sachs``: real and known causal graphs, from data, a language model, and both.

    sachs     11 proteins, 7,466 cells (Sachs et al. 2005), log concentrations standardised, BGe
    asia, cancer, survey     known networks of 8, 5 and 6 categories, rows drawn from them, BDeu with sample size 1

The reference is the exact sum over subsets under the uniform prior over DAGs. Order MCMC, structure MCMC and an
amortized policy are held to it by the mean and largest absolute difference of edge probabilities, on the data alone and
with the language model's prior. Bars, on order MCMC at 11 nodes: mean 0.02 and largest 0.1. Quality against the known
graph (AUROC, Brier, ECE, expected distance) is shown and not gated: it says what data and model are worth.

The language model's edge prior is shown as it is (``lm``) and calibrated on asia and cancer (``lm calibrated``), which
is honest for survey and sachs only. Calibration also teaches how rare edges are; ``base rate`` is that alone, without
the model, and what a model is worth is what it adds to it. The Sachs cells are pooled over interventions that the file
does not label, and the consensus graph of the file has a cycle (PIP3, plcg, PIP2), so no DAG has distance 0.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor

from retrodict.bench.rows import Row, at_most, show_only, write
from retrodict.errors import InputError
from retrodict.rng import generator
from retrodict.structures import scores
from retrodict.structures.ask import Asker
from retrodict.structures.data import Table, read_csv, read_edges
from retrodict.structures.lm_prior import Calibration, EdgeAnswers, ask_edges, calibrate, edge_prior
from retrodict.structures.methods import graph_posterior
from retrodict.structures.modular import Modular, combined
from retrodict.structures.network import read_bif
from retrodict.structures.posterior import GraphPosterior, difference
from retrodict.structures.subsets import subset_marginals

SUITE = "sachs"
BARS = {"mean difference": 0.02, "largest difference": 0.1}
"""On order MCMC: absolute differences of edge probabilities to the exact ones."""
SMALL = 10
"""Data sets other than sachs get so many times fewer steps of a chain."""
SIZES = (10, 30, 100, 1000)
CONTEXT = {
    "sachs": "This is about signalling between proteins inside human immune cells.\n",
    "asia": "This is about lung disease and its diagnosis.\n",
    "cancer": "This is about lung cancer.\n",
    "survey": "This is about how people choose to travel.\n",
}
WORDS: dict[str, dict[str, str]] = {
    "sachs": {"praf": "the protein Raf", "pmek": "the protein MEK", "plcg": "the protein PLC-gamma",
              "PIP2": "the lipid PIP2", "PIP3": "the lipid PIP3", "p44/42": "the protein ERK",
              "pakts473": "the protein Akt", "PKA": "the protein PKA", "PKC": "the protein PKC",
              "P38": "the protein p38", "pjnk": "the protein JNK"},
    "asia": {"asia": "a visit to Asia", "tub": "tuberculosis", "smoke": "smoking", "lung": "lung cancer",
             "bronc": "bronchitis", "either": "having tuberculosis or lung cancer", "xray": "a positive chest X-ray",
             "dysp": "shortness of breath"},
    "cancer": {"Pollution": "exposure to air pollution", "Smoker": "smoking", "Cancer": "lung cancer",
               "Xray": "a positive chest X-ray", "Dyspnoea": "shortness of breath"},
    "survey": {"A": "a person's age", "S": "a person's sex", "E": "a person's level of education",
               "O": "a person's occupation", "R": "the size of a person's city",
               "T": "a person's choice of transport"},
}  # fmt: skip
"""What the variables are called in questions."""


@dataclass(frozen=True)
class Case:
    """A data set with its true graph: ``rows(n, seed)`` draws a table, ``score`` scores it."""

    name: str
    names: tuple[str, ...]
    truth: Bool[Tensor, "d d"]
    rows: Callable[[int, int], Table]
    score: Callable[[Table], Modular]


def cases(data: str, wanted: Sequence[str]) -> list[Case]:
    """The data sets in a folder of causal data."""
    return [_sachs(Path(data)) if name == "sachs" else _network(Path(data), name) for name in wanted]


def _sachs(folder: Path) -> Case:
    table = read_csv(folder / "cyto_full_data.csv")
    logs = Table(table.values.log(), table.names)

    def rows(n: int, seed: int) -> Table:
        return logs.rows(torch.randperm(len(logs), generator=generator(seed))[:n]).standardised()

    return Case("sachs", table.names, read_edges(folder / "cyto_full_target.csv", table.names), rows, scores.bge)


def _network(folder: Path, name: str) -> Case:
    net = read_bif(folder / f"{name}.bif.gz")
    return Case(name, net.names, net.graph, net.sample, scores.bdeu)


def quality(case: Case, n: int, seen: str, found: GraphPosterior) -> list[Row]:
    """What an answer is worth against the known graph."""
    where = f"N={n}" if n else "no data"
    return [show_only(SUITE, where, seen, f"{case.name}: {k}", x) for k, x in found.metrics(case.truth).items()]


def compared(case: Case, n: int, seen: str, exact: GraphPosterior, method: str, score: Modular, steps: int,
             chains: int) -> list[Row]:  # fmt: skip
    """One method against the reference."""
    found = graph_posterior(score, case.names, method, chains=chains, steps=steps, seed=1)
    where, name, note = f"N={n}", f"{method}, {seen}", "; ".join(found.notes)
    gap = {f"{case.name}: {k}": x for k, x in zip(BARS, difference(exact, found), strict=True)}
    if method == "order" and case.name == "sachs":
        each = zip(gap.items(), BARS.values(), strict=True)
        rows = [at_most(SUITE, where, name, k, x, bar, note) for (k, x), bar in each]
    else:
        rows = [show_only(SUITE, where, name, k, x, note) for k, x in gap.items()]
    cost = {k: found.counts[k] for k in ("rhat", "ess", "seconds") if k in found.counts}
    return rows + [show_only(SUITE, where, name, f"{case.name}: {k}", x) for k, x in cost.items()]


def models_of(
    told: Mapping[str, EdgeAnswers], known: Mapping[str, Case], alpha: float
) -> dict[str, dict[str, Modular]]:
    """Each data set's prior by the language model: as it is, calibrated on asia and cancer, and their rate of edges."""
    seen = [(told[n].log_odds(), known[n].truth) for n in ("asia", "cancer") if n in told]
    if not seen:
        return {n: {"lm": edge_prior(a, alpha)} for n, a in told.items()}
    fitted, rate = calibrate(seen), calibrate([(torch.zeros_like(x), truth) for x, truth in seen])
    print(f"calibration on asia and cancer: slope {fitted.slope:.3f}, bias {fitted.bias:.3f}", flush=True)
    return {n: {"lm": edge_prior(a, alpha), "lm calibrated": edge_prior(a, alpha, fitted),
                "base rate": edge_prior(a, alpha, Calibration(0.0, rate.bias))} for n, a in told.items()}  # fmt: skip


def run(
    data: str = "",
    sets: str = "asia,cancer,survey,sachs",
    model: str = "smollm2",
    dtype: str = "float32",
    alpha: float = 1.0,
    steps: int = 8_000,
    policy_steps: int = 0,
    chains: int = 32,
    seeds: int = 3,
    cache: str = "",
    partial: str = "",
) -> list[Row]:
    """Methods against the exact sum, and what data and a language model say of known graphs.

    Args:
        data: folder with asia.bif.gz, cancer.bif.gz, survey.bif.gz, cyto_full_data.csv and cyto_full_target.csv.
        sets: data sets, joined by commas.
        model, dtype: the language model, see ``rd.load``; "" leaves it out.
        alpha: exponent of its prior.
        steps: of each chain on sachs; a tenth on the others.
        policy_steps: gradient steps of an amortized policy on sachs at N = 100; 0 leaves it out.
        chains: of each Monte Carlo method.
        seeds: samples of rows over which quality at each N is averaged.
        cache: a file of the model's answers.
        partial: a JSON file of the rows so far.
    """
    if not data:
        raise InputError("bench sachs: --data needs the folder of causal data (asia.bif.gz, ..., cyto_full_data.csv)")
    wanted = [s.strip() for s in sets.split(",")]
    unknown = [s for s in wanted if s not in WORDS]
    if unknown:
        raise InputError(f"unknown data set {unknown[0]!r}; choose from {', '.join(WORDS)}")
    found = {c.name: c for c in cases(data, wanted)}
    asked = _ask(model, dtype, found, cache) if model else {}
    models = models_of(asked, found, alpha) if asked else {}
    rows: list[Row] = []
    for case in found.values():
        rows += _asked_rows(case, asked.get(case.name), models.get(case.name, {}))
        for n in SIZES:
            rows += _at(case, n, models.get(case.name, {}), steps, policy_steps, chains, seeds)
            if partial:
                write(rows, Path(partial))
            print(f"{case.name} N={n}: {len(rows)} rows", flush=True)
    return rows


def _ask(model: str, dtype: str, found: Mapping[str, Case], cache: str) -> dict[str, EdgeAnswers]:
    from retrodict.models.load import load

    given: dict[str, Any] = {"dtype": dtype} if dtype else {}
    asker = Asker(load(model, **given), cache or None)
    return {n: ask_edges(asker, {v: WORDS[n][v] for v in c.names}, context=CONTEXT[n]) for n, c in found.items()}


def _asked_rows(case: Case, told: EdgeAnswers | None, models: Mapping[str, Modular]) -> list[Row]:
    """The model alone: the posterior without data, and how it answered."""
    if told is None:
        return []
    off = ~torch.eye(len(case.names), dtype=torch.bool)
    missed = float(told.outside[off].mean())
    rows = [show_only(SUITE, "no data", "lm", f"{case.name}: mass outside yes and no", missed)]
    for seen, prior in models.items():
        rows += quality(case, 0, seen, subset_marginals(prior, case.names))
    return rows


def _at(case: Case, n: int, models: Mapping[str, Modular], steps: int, policy_steps: int, chains: int,
        seeds: int) -> list[Row]:  # fmt: skip
    """Every kind of evidence at N rows: quality averaged over samples of rows, methods on the first sample."""
    rows: list[Row] = []
    kept: dict[str, list[list[Row]]] = {}
    for seed in range(seeds):
        score = case.score(case.rows(n, seed))
        given = {"data": score, **{f"data and {k}": combined({"data": score, "lm": m}) for k, m in models.items()}}
        for seen, density in given.items():
            exact = subset_marginals(density, case.names)
            kept.setdefault(seen, []).append(quality(case, n, seen, exact))
            if seed == 0 and seen in ("data", "data and lm"):
                length = steps if case.name == "sachs" else max(1, steps // SMALL)
                rows += compared(case, n, seen, exact, "order", density, length, chains)
                rows += compared(case, n, seen, exact, "structure", density, length, chains)
                if policy_steps and case.name == "sachs" and n == 100 and seen == "data":
                    rows += compared(case, n, seen, exact, "amortized", density, policy_steps, chains)
    for same in kept.values():
        for each in zip(*same, strict=True):
            mean = sum(r.value for r in each) / len(each)
            rows.append(
                show_only(SUITE, each[0].name, each[0].method, each[0].metric, mean, f"mean of {seeds} samples")
            )
    return rows
