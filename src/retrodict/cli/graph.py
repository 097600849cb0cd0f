"""``retrodict graph data.csv``: the posterior over causal graphs of a table's columns.

    log p(G) = log p(data | G) + log prior(G) + alpha log p_LM(G)

Edge probabilities with intervals, sampled graphs, and their quality where the true graph is given. Without ``--lm`` the
data speak alone; without data the language model does. Everything is checked before a model is loaded.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from jaxtyping import Bool
from torch import Tensor

from retrodict.cli.answers import keep, read_yaml
from retrodict.errors import InputError, nearest
from retrodict.models.load import load
from retrodict.protocols import LanguageModel
from retrodict.spaces.dags import Dags, Edge
from retrodict.structures import priors, scores
from retrodict.structures.ask import Asker
from retrodict.structures.data import Table, read_csv, read_edges
from retrodict.structures.intervene import expected_gain
from retrodict.structures.lm_prior import EdgePrior, ask_edges, edge_prior
from retrodict.structures.methods import choose, graph_posterior
from retrodict.structures.modular import Modular, combined
from retrodict.structures.network import read_bif
from retrodict.structures.posterior import GraphPosterior

SHOWN = 12
"""Graphs kept, and half the edges printed."""
EXPERIMENTS = 3000
"""Graphs that the worth of an experiment is judged on."""


def run(
    data: tyro.conf.Positional[str] = "",
    variables: str = "",
    lm: str = "",
    alpha: float | None = None,
    method: str = "auto",
    score: str = "auto",
    ess: float = 1.0,
    prior: str = "uniform",
    required: str = "",
    forbidden: str = "",
    max_parents: int = 0,
    kind: str = "auto",
    intervened: str = "",
    standardise: bool = True,
    few_rows: bool = False,
    truth: str = "",
    context: str = "",
    dtype: str = "auto",
    cache: str = "",
    chains: int = 16,
    steps: int = 0,
    seed: int = 0,
    out: str = "runs",
) -> int:
    """The posterior over causal graphs of a table's columns, from data, a language model, or both.

    Args:
        data: a CSV file with a header; without it the language model speaks alone.
        variables: a YAML file of the columns, name: what it is in words (or a list of names).
        lm: a language model as prior, such as smollm2.
        alpha: exponent of the language model's prior; 1 by default.
        method: exact (5 variables), subsets (12, edges only), order (14), structure (any), or auto.
        score: bge (continuous), bdeu (categories), bic, or auto.
        ess: equivalent sample size of bdeu's prior.
        prior: over graphs: uniform, erdos_renyi, fair.
        required: edges that must be there, as "a -> b, c -> d".
        forbidden: edges that must not.
        max_parents: most parents of a variable; 0 for no limit.
        kind: continuous, discrete (every column as categories), or auto.
        intervened: a column that names the variable that was set by the experimenter in each row.
        standardise: continuous columns to mean 0 and standard deviation 1, the scale bge's prior expects.
        few_rows: accept fewer rows than variables.
        truth: the true graph, a CSV of cause,effect or a .bif file, to be compared with.
        context: a sentence before each question to the language model, such as the field of study.
        dtype: the language model's precision.
        cache: a file of its answers, which spares it on another call.
        chains: independent chains, which intervals are over.
        steps: of each chain; 0 for the method's default.
        seed: of the chains.
        out: where the run folder is made.
    """
    config = {k: v for k, v in locals().items() if v not in ("", None)}
    if alpha is not None and not lm:
        raise InputError("--alpha is the exponent of a language model's prior; give --lm too, such as --lm smollm2")
    if alpha is not None and not 0 <= alpha < math.inf:
        raise InputError(f"--alpha must be a number from 0 up, not {alpha:g}; 0 leaves the language model out")
    if not data and not (lm and variables):
        raise InputError("graph: give a CSV file; or --variables and --lm, for what a language model believes alone")
    told = codebook(variables) if variables else {}
    table = read_csv(data, kind, intervened or None, few_rows) if data else None
    names = table.names if table is not None else tuple(told)
    words = described(names, told) if told else {n: "" for n in names}
    space = Dags(len(names), edges_of(required, names), edges_of(forbidden, names), max_parents or None, names=names)
    real = true_graph(truth, names) if truth else None
    method = choose(len(names), method)
    factors = (
        data_factors(table, score, ess, prior, standardise) if table is not None else chosen_prior(prior, len(names))
    )
    if space.required or space.forbidden or space.max_parents:
        factors["constraints"] = priors.hard(space)
    asked = ask(load(lm, dtype=dtype), words, context, 1.0 if alpha is None else alpha, cache) if lm else None
    if asked is not None:
        factors["lm"] = asked.prior
    found = graph_posterior(combined(factors), names, method, space, chains, steps or None, seed)
    notes = [*found.notes, *(asked.notes if asked else ())]
    answer = answer_of(found, factors, table, asked, real, notes, seed)
    show(answer)
    folder = keep("graph", out, config, answer, asked.lm if asked else None)
    print(f"\nthe page is {folder / 'report.html'}")
    return 0


# -- input ----------------------------------------------------------------------------------------------------------


def codebook(path: str) -> dict[str, str]:
    """Name to description, from a mapping, a mapping under ``variables``, or a list of names."""
    told = read_yaml(path)
    told = told.get("variables", told) if isinstance(told, Mapping) else told
    if isinstance(told, list) and told and all(isinstance(x, (str, int)) for x in told):
        return {str(x): "" for x in told}
    if (
        not isinstance(told, Mapping)
        or not told
        or not all(isinstance(v, (str, int, type(None))) for v in told.values())
    ):
        raise InputError(
            f"{path}: needs lines such as 'smoke: whether the person smokes', one a column, or a list of names"
        )
    return {str(k): str(v or "") for k, v in told.items()}


def described(names: tuple[str, ...], told: Mapping[str, str]) -> dict[str, str]:
    """The description of every column; one that the codebook lacks is refused."""
    lost = [n for n in names if n not in told]
    if lost:
        raise InputError(f"column {lost[0]!r} is not in the codebook (--variables){nearest(lost[0], told)}")
    return {n: told[n] for n in names}


def edges_of(text: str, names: tuple[str, ...]) -> tuple[Edge, ...]:
    """Edges from 'a -> b, c -> d'."""
    out = []
    for part in filter(None, (p.strip() for p in text.split(","))):
        ends = [e.strip() for e in part.split("->")]
        if len(ends) != 2:
            raise InputError(f"cannot read the edge {part!r}; write edges as 'a -> b, c -> d'")
        for end in ends:
            if end not in names:
                raise InputError(f"the edge {part!r} names {end!r}, which is no variable{nearest(end, names)}")
        out.append((names.index(ends[0]), names.index(ends[1])))
    return tuple(out)


def true_graph(path: str, names: tuple[str, ...]) -> Bool[Tensor, "d d"]:
    """The true graph in the order of the columns."""
    if not Path(path).name.endswith((".bif", ".bif.gz")):
        return read_edges(path, names)
    net = read_bif(path)
    lost = [n for n in names if n not in net.names]
    if lost:
        raise InputError(f"{path} has no variable {lost[0]!r}{nearest(lost[0], net.names)}")
    at = [net.names.index(n) for n in names]
    return net.graph[at][:, at]


# -- factors --------------------------------------------------------------------------------------------------------


def chosen_prior(prior: str, d: int) -> dict[str, Modular]:
    """The prior by its name."""
    if prior not in priors.PRIORS:
        raise InputError(f"unknown prior {prior!r}{nearest(prior, priors.PRIORS)}")
    return {"prior": priors.PRIORS[prior](d)}


def data_factors(table: Table, score: str, ess: float, prior: str, standardise: bool) -> dict[str, Modular]:
    """The data's score and the prior."""
    score = ("bdeu" if table.discrete else "bge") if score == "auto" else score
    known = {"bge": scores.bge, "bdeu": lambda t: scores.bdeu(t, ess), "bic": scores.bic}
    if score not in known:
        raise InputError(f"unknown score {score!r}{nearest(score, [*known, 'auto'])}")
    if ess != 1.0 and score != "bdeu":
        raise InputError(f"--ess is the prior of bdeu; the score is {score}")
    table = table.standardised() if standardise and not table.discrete else table
    return {"data": known[score](table), **chosen_prior(prior, table.d)}


@dataclass(frozen=True)
class Asked:
    """A language model's prior, and what the page says of it."""

    lm: LanguageModel
    prior: EdgePrior
    notes: tuple[str, ...]
    outside: float

    @property
    def told(self) -> str:
        """The factor in words."""
        return f"({self.lm.name}, edge by edge)^{self.prior.alpha:g}"


def ask(lm: LanguageModel, words: Mapping[str, str], context: str, alpha: float, cache: str = "") -> Asked:
    """Ask the model about every ordered pair."""
    asker = Asker(lm, cache or None)
    answers = ask_edges(asker, words, context=f"{context.strip()}\n" if context else "")
    made, outside = edge_prior(answers, alpha), asker.counts.mean_outside
    told = f"{lm.name} answered {asker.counts.questions} questions; {outside:.0%} of its mass was on neither yes nor no"
    return Asked(lm, made, (told,), outside)


# -- the answer -----------------------------------------------------------------------------------------------------


def answer_of(
    found: GraphPosterior,
    factors: Mapping[str, Modular],
    table: Table | None,
    asked: Asked | None,
    real: Bool[Tensor, "d d"] | None,
    notes: list[str],
    seed: int,
) -> dict[str, Any]:
    """What answer.json holds."""
    low, high = found.interval()
    graphs = [{"weight": w, "edges": g.nonzero().tolist()} for g, w in found.top(SHOWN)]
    gain = expected_gain(found, EXPERIMENTS, seed).tolist() if found.graphs is not None else None
    drawn = [g.nonzero().tolist() for g in found.sample(6, seed)] if found.graphs is not None else []
    return {
        "names": found.names, "method": found.method, "exact": found.exact, "log_z": found.log_z,
        "factors": {n: f.version for n, f in factors.items()} | ({"lm": asked.told} if asked else {}),
        "rows": None if table is None else len(table),
        "marginals": found.marginals.tolist(), "low": low.tolist(), "high": high.tolist(),
        "top": graphs, "drawn": drawn, "gain": gain, "counts": dict(found.counts), "notes": notes,
        "lm": None if asked is None else {"name": asked.lm.name, "alpha": asked.prior.alpha, "outside": asked.outside,
                                         "probabilities": asked.prior.probabilities.tolist()},
        "truth": None if real is None else real.tolist(),
        "metrics": {} if real is None else found.metrics(real),
    }  # fmt: skip


def show(answer: Mapping[str, Any]) -> None:
    """The table and the graphs on the terminal."""
    names, p = answer["names"], torch.tensor(answer["marginals"])
    print(" x ".join(answer["factors"].values()))
    print(
        f"method {answer['method']}, {answer['counts'].get('seconds', 0):.1f} s; expected edges {float(p.sum()):.2f}\n"
    )
    model = answer["lm"]
    print(
        "     P   " + ("exact       " if answer["exact"] else "95% interval") + "   the model" * bool(model) + "   edge"
    )
    for e in p.flatten().argsort(descending=True)[: 2 * SHOWN].tolist():
        i, j = divmod(e, len(names))
        if i != j and p[i, j] > 0.005:
            asked = f"{model['probabilities'][i][j]:12.2f}" if model else ""
            span = f"{answer['low'][i][j]:.2f} to {answer['high'][i][j]:.2f}" if not answer["exact"] else " " * 12
            print(f"  {p[i, j]:.2f}   {span}{asked}   {names[i]} -> {names[j]}")
    for k, g in enumerate(answer["top"][:3]):
        words = ", ".join(f"{names[i]} -> {names[j]}" for i, j in g["edges"]) or "no edges"
        print(f"{'' if k else chr(10)}graph of weight {g['weight']:.1%}: {words}")
    if answer["gain"] and answer["exact"]:  # over a sample in which every graph is new it is near 0 whatever is true
        best = max(range(len(names)), key=answer["gain"].__getitem__)
        print(
            f"\nmost telling experiment: set {names[best]}, {answer['gain'][best]:.2f} nats that data alone cannot give"
        )
    if answer["metrics"]:
        m = answer["metrics"]
        print(f"\nagainst the true graph: E-SHD {m['e_shd']:.2f}, AUROC {m['auroc']:.3f}, Brier {m['brier']:.4f}, "
              f"ECE {m['ece']:.4f}")  # fmt: skip
    for note in answer["notes"]:
        print(f"note: {note}")
