"""Subjectivity: is a sentence of a film page a fact or an opinion, from few labels (Hu et al. 2024, section 4.2).

    X  Classify this movie review as objective or subjective: "..." This review is      Z  at most 5 tokens, then ","
    Y   so it is objective.  |   so it is subjective.                       p(Y | X) = sum_Z p(Z | X) p(Y | X, Z)

Z is a reason nobody wrote down: E-step q(Z | X) ~ p(Z | X, Y) on the labelled rows, M-step p(Y | X, Z), both normalised
over the two labels, and the posterior predictive on new rows. Labels are scored as whole strings, however a tokenizer
splits them.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from retrodict.errors import InputError, nearest
from retrodict.models.cached import pad_ids
from retrodict.records import Problem
from retrodict.rng import child_seed, generator
from retrodict.targets.algebra import Target
from retrodict.targets.choice import answer_ids
from retrodict.targets.problems import problems, tokenise
from retrodict.targets.ready import posterior
from retrodict.training.amortize import amortize
from retrodict.training.em import em, likelihood_of, restricted
from retrodict.training.fit import choice_log_p, maximise
from retrodict.training.predictive import grade, predict

LABELS = ("objective", "subjective")
PROMPT = 'Classify this movie review as objective or subjective: "{text}" This review is'
EVIDENCE = " so it is {name}."
DIRECT = " {name}."
STOP = ","

EXAMPLES: tuple[tuple[str, int], ...] = (
    ("a young nurse returns to the island where she was born and finds her father's house empty .", 0),
    ("the jokes arrive late and leave early , and nobody on screen seems to miss them .", 1),
    ("two brothers inherit a bakery on the condition that they run it together for a year .", 0),
    ("it is a small , patient film that trusts its actors and is right to .", 1),
    ("when the last train is cancelled , four strangers share a taxi to the coast .", 0),
    ("for all its thunder , the final battle is the dullest quarter of an hour of the year .", 1),
    ("the mayor hides the letter in the school piano , where the new teacher discovers it .", 0),
    ("a warm and silly comedy whose charm outlasts its many clumsy moments .", 1),
    ("during the war a cook and a prisoner write a dictionary of a dying language .", 0),
    ("the camera adores its star , and after two hours it has not convinced us to .", 1),
    ("her sister marries the man who , ten years before , sold the family's land .", 0),
    ("rarely has a thriller been so busy and so little fun .", 1),
    ("he takes a job as a night guard in the museum that his grandfather built .", 0),
    ("what could have been sentimental becomes , thanks to a superb script , quietly devastating .", 1),
    ("the crew of a fishing boat pulls a sealed chest from the sea and votes on whether to open it .", 0),
    ("pretty to look at and impossible to care about .", 1),
)
"""Sentences written for this project: 0 objective, 1 subjective."""

Row = Mapping[str, Any]
Rows = str | Path | Iterable[Row]


def read(source: Rows) -> list[dict[str, Any]]:
    """Rows with ``text`` and ``label`` (0 objective, 1 subjective) from a JSONL, JSON or CSV file, or from mappings.

    Raises InputError naming file, line and field for one that is missing, and for a label that is neither.
    """
    out = []
    for i, p in enumerate(problems(source, context="{text}", evidence="{label}"), 1):
        label = p.row["label"]
        if label not in (0, 1, "0", "1"):
            at = f"{source}, row {i}" if isinstance(source, str | Path) else f"row {i}"
            raise InputError(f"{at}: label is {label!r}; write 0 for {LABELS[0]} or 1 for {LABELS[1]}")
        out.append({**p.row, "label": int(label)})
    return out


def examples() -> list[dict[str, Any]]:
    """The sentences of this project as rows."""
    return [{"text": text, "label": label} for text, label in EXAMPLES]


def answers(lm: Any, template: str = EVIDENCE) -> tuple[tuple[int, ...], ...]:
    """Token ids of each label in a template."""
    return answer_ids(lm, [template.format(name=name) for name in LABELS])


def questions(lm: Any, rows: Sequence[Row], labelled: bool = True) -> list[Problem]:
    """Problems of rows: X, and Y where they are to be learned from."""
    named = [{**r, "name": LABELS[r["label"]]} for r in rows]
    return tokenise(lm, problems(named, context=PROMPT, evidence=EVIDENCE if labelled else "", chat=False))


def target(lm: Any, rows: Sequence[Row], max_tokens: int = 5) -> Target:
    """p(Z | X) p(Y | X, Z) of labelled rows, Y being one of the two labels."""
    made = posterior(lm, questions(lm, rows), stop=STOP, max_tokens=max_tokens, min_tokens=1, lookahead=None)
    return restricted(made, answers(lm))


@dataclass(frozen=True)
class Plan:
    """Every number of a run.

    Attributes:
        objective, e_steps, samples, per_step, lr: of the E-step, ``per_step`` problems in a step.
        tempered, replay: shares of the E-step's samples, see ``training.collect``.
        rounds, m_steps, draws, m_lr, m_batch: of EM, see ``training.em``.
        sft_steps, sft_lr, sft_batch: of fitting labels without a latent.
        rank: of every adapter.
        chains: Z drawn for each prediction.
        batch: rows that are scored at once.
        micro: rows with gradient at once.
        seed: one seed, one result.
    """

    objective: str = "auto"
    e_steps: int = 200
    samples: int = 16
    per_step: int = 8
    lr: float = 1e-3
    tempered: float = 0.25
    replay: float = 0.25
    rounds: int = 2
    m_steps: int = 50
    draws: int = 16
    m_lr: float = 5e-4
    m_batch: int = 32
    sft_steps: int = 100
    sft_lr: float = 5e-4
    sft_batch: int = 32
    rank: int = 16
    chains: int = 16
    batch: int = 128
    micro: int = 64
    seed: int = 0


def run(
    lm: Any,
    train: Rows,
    dev: Rows,
    methods: Sequence[str] = ("zero-shot", "few-shot", "sft", "amortized", "em"),
    *,
    plan: Plan | None = None,
    limit: int | None = None,
    folder: str | Path | None = None,
    on_metrics: Callable[[dict[str, Any]], None] | None = None,
) -> list[dict[str, Any]]:
    """Train each method on ``train`` and grade it on ``dev``; one row a method.

    Args:
        lm: the model, from ``rd.load``; adapters are added to it.
        train, dev: see :func:`read`.
        methods: rows of :data:`METHODS`.
        plan: every number.
        limit: rows of ``dev`` to grade, the first ones.
        folder: where ``rows.jsonl`` is kept: a method found there under the same plan and data is not run again.
        on_metrics: called with each training step's numbers and ``method``.

    Returns:
        For each method: accuracy and its standard error, ece, brier, log_loss (nats), risk (area under risk against
        coverage), risk at half coverage, share said to be subjective, seconds of training and of prediction (those of
        "em" come on top of those of "amortized" where both are asked for: it goes on from there).
    """
    for name in methods:
        if name not in METHODS:
            raise InputError(f"unknown method {name!r}{nearest(name, METHODS)}")
    rows, asked = read(train), read(dev)[:limit]
    study = Study(lm, rows, asked, plan or Plan(), on_metrics)
    truth = torch.tensor([r["label"] for r in asked])
    kept, out = Kept(folder, study), []
    for name in methods:
        row = kept.get(name)
        if row is None:
            began = time.perf_counter()
            predictor, study.method = METHODS[name](study), name
            trained = time.perf_counter()
            row = graded(predictor(), truth) | {
                "method": name, "labels": len(rows), "dev": len(asked), "seconds_train": trained - began,
                "seconds_predict": time.perf_counter() - trained,
            }  # fmt: skip
            kept.add(row)
        out.append(row)
    return out


def graded(probability: Float[Tensor, "m c"], truth: Int[Tensor, " m"]) -> dict[str, Any]:
    """Grades as a row of a table."""
    found = grade(probability, truth)
    return {"accuracy": found.accuracy, "se": found.se, "ece": found.ece, "brier": found.brier,
            "log_loss": found.log_loss, "risk": found.risk.area, "risk_at_half": found.risk.at(0.5),
            "said_subjective": float((probability.argmax(-1) == 1).double().mean())}  # fmt: skip


Predictor = Callable[[], Float[Tensor, "m c"]]
"""Probabilities of each label for each row of ``dev``."""


@dataclass
class Study:
    """What the methods of one run share."""

    lm: Any
    train: Sequence[Row]
    dev: Sequence[Row]
    plan: Plan
    on_metrics: Callable[[dict[str, Any]], None] | None = None
    method: str = ""
    policy: Any = None

    def report(self, name: str) -> Callable[[dict[str, Any]], None] | None:
        """Metrics under a method's name."""
        on = self.on_metrics
        return None if on is None else lambda found: on({**found, "method": name})

    def settings(self) -> dict[str, Any]:
        """What every E-step is run with."""
        p = self.plan
        return {"objective": p.objective, "samples": p.samples, "per_step": min(p.per_step, len(self.train)),
                "lr": p.lr, "rank": p.rank, "tempered": p.tempered, "replay": p.replay, "evaluate": 8}  # fmt: skip


def direct(lm: Any, rows: Sequence[Row], shots: Sequence[Row], batch: int) -> Float[Tensor, "m c"]:
    """p(label | X) without a latent, after worked examples; these are run once."""
    ids, out = answers(lm, DIRECT), []
    heads = [p.context for p in questions(lm, rows, labelled=False)]
    worked = "".join(f"{PROMPT.format(**r)}{DIRECT.format(name=LABELS[r['label']])}\n" for r in shots)
    prefix = lm.tokenizer.encode(worked) if shots else []
    room = lm.context - max(map(len, heads)) - max(map(len, ids))
    if len(prefix) > room:
        raise InputError(f"{len(shots)} worked examples are {len(prefix)} tokens, and {lm.name} has room for {room}")
    for i in range(0, len(heads), batch):
        some = heads[i : i + batch]
        suffixes = [[a] * len(some) for a in ids]
        if prefix:
            moves, n = pad_ids(some, lm.device)
            found = lm.score_suffixes([prefix] * len(some), moves, n, suffixes, every=False)
        else:
            n = torch.zeros(len(some), dtype=torch.long, device=lm.device)
            found = lm.score_suffixes(some, n[:, None][:, :0], n, suffixes, every=False)
        out.append(found[torch.arange(len(some), device=found.device), n].double().cpu())
    return torch.cat(out).softmax(-1)


def zero_shot(study: Study) -> Predictor:
    """The model's own label, nothing learned."""
    return lambda: direct(study.lm, study.dev, (), study.plan.batch)


def few_shot(study: Study) -> Predictor:
    """The labelled rows as worked examples, in random order."""
    order = torch.randperm(len(study.train), generator=generator(study.plan.seed, "cpu", 1)).tolist()
    shots = [study.train[i] for i in order]
    return lambda: direct(study.lm, study.dev, shots, max(1, study.plan.batch // 8))


def sft(study: Study) -> Predictor:
    """An adapter fitted to the labels, without a latent."""
    p, lm = study.plan, grown(study.lm, "sft", study.plan)
    heads = [x.context for x in questions(lm, study.train)]
    truth, ids = torch.tensor([r["label"] for r in study.train]), answers(lm, DIRECT)

    def log_p(index: Int[Tensor, " r"]) -> Float[Tensor, " r"]:
        found = choice_log_p(lm, [heads[i] for i in index.tolist()], ids, grad=True)
        return found.gather(1, truth[index, None].to(found.device)).squeeze(1)

    weights = torch.full((len(heads),), 1 / len(heads))
    maximise(lm, log_p, weights, steps=p.sft_steps, lr=p.sft_lr, batch=p.sft_batch, micro=p.micro, seed=p.seed,
             on_metrics=study.report("sft"))  # fmt: skip
    return lambda: direct(lm, study.dev, (), p.batch)


def grown(lm: Any, name: str, plan: Plan) -> Any:
    """A view of the model with a new adapter."""
    free = next(n for n in (name, *(f"{name}_{i}" for i in range(2, 999))) if n not in lm.adapters)
    return lm.add_adapter(free, plan.rank, None, "all-linear", plan.seed)


def amortized(study: Study) -> Predictor:
    """q(Z | X) trained on the labelled rows; the base model says what each Z implies."""
    goal = target(study.lm, study.train)
    if study.policy is None:
        study.policy = amortize(goal, steps=study.plan.e_steps, seed=study.plan.seed,
                                on_metrics=study.report("amortized"), **study.settings())  # fmt: skip
    return averaging(study, study.policy, goal)


def expectation_maximisation(study: Study) -> Predictor:
    """The same q, then rounds of M and E: p(Y | X, Z) learns as well. Leaves ``study.policy`` trained further."""
    p = study.plan
    amortized(study)
    policy, goal, given = study.policy, target(study.lm, study.train), study.settings()
    study.policy = None  # it goes on from here, and is no longer what "amortized" trained
    del given["rank"]
    for i in range(p.rounds):
        policy, goal = em(goal, policy, e_steps=p.e_steps // 2 if i else 0, m_steps=p.m_steps, draws=p.draws,
                          m_lr=p.m_lr, m_batch=p.m_batch, m_micro=p.micro, m_rank=p.rank, seed=child_seed(p.seed, i),
                          on_metrics=study.report("em"), **given)  # fmt: skip
    return averaging(study, policy, goal)


def averaging(study: Study, policy: Any, goal: Target) -> Predictor:
    """The posterior predictive of ``dev``."""
    p = study.plan
    asked = questions(study.lm, study.dev, labelled=False)
    term = likelihood_of(goal)
    return lambda: predict(policy, term, asked, n=p.chains, seed=p.seed, batch=p.batch).probability


METHODS: dict[str, Callable[[Study], Predictor]] = {
    "zero-shot": zero_shot,
    "few-shot": few_shot,
    "sft": sft,
    "amortized": amortized,
    "em": expectation_maximisation,
}


class Kept:
    """Rows of finished methods in ``rows.jsonl`` of a folder, found again by method, plan and data."""

    def __init__(self, folder: str | Path | None, study: Study) -> None:
        self.path = None if folder is None else Path(folder) / "rows.jsonl"
        texts = [[f"{r['label']} {r['text']}" for r in rows] for rows in (study.train, study.dev)]
        self.key = {"model": study.lm.name, "plan": asdict(study.plan), "data": [_digest(t) for t in texts]}

    def get(self, method: str) -> dict[str, Any] | None:
        """The row of a method, if it was finished."""
        if self.path is None or not self.path.is_file():
            return None
        rows = [json.loads(line) for line in self.path.read_text(encoding="utf-8").splitlines() if line.strip()]
        return next(
            (r for r in rows if r["method"] == method and all(r.get(k) == v for k, v in self.key.items())), None
        )

    def add(self, row: dict[str, Any]) -> None:
        """Write a finished method's row."""
        row |= self.key
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")


def _digest(texts: Sequence[str]) -> str:
    import hashlib

    return hashlib.sha256("\n".join(texts).encode()).hexdigest()[:16]


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows as a person reads them."""
    head = ["labels  method      accuracy %      ECE    log loss  risk at 1/2  seconds"]
    for r in rows:
        seconds = r["seconds_train"] + r["seconds_predict"]
        head.append(f"{r['labels']:6d}  {r['method']:10s} {100 * r['accuracy']:6.1f} +- {100 * r['se']:3.1f}  "
                    f"{r['ece']:7.3f}  {r['log_loss']:8.3f}  {r['risk_at_half']:11.3f}  {seconds:7.0f}")  # fmt: skip
    return "\n".join(head)
