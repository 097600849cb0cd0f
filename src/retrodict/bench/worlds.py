"""``retrodict bench worlds --data FOLDER``: consistent worlds from a small model's beliefs about nations.

    zeus        the circle of three, to its exact masses
    thinned     the orders of ten things without any belief, far too many to list: log Z is known, log 10! - 90 log 2
    simulated   beliefs of a known quality about an order of nations: consistency must improve their Brier score
    asked       area, population (total orders), military alliance (symmetric), bloc (an equivalence) of the Nations
                data, asked of a language model; inconsistency mass, Brier score and ECE before and after
    poisoned    false statements asserted before the questions, against harmless texts: AUROC of their effect

FOLDER holds train.txt, valid.txt, test.txt (subject, relation, object; what is not there is false) and literals.txt.
What a model of 135 million weights knows of these relations is shown, not held to a bar.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from retrodict.bench.rows import Row, at_least, at_most, show_only, write
from retrodict.diagnostics.calibration import auroc
from retrodict.errors import InputError
from retrodict.models.load import load
from retrodict.rng import generator
from retrodict.structures.ask import Asker
from retrodict.structures.worlds import Belief, Constraint, among
from retrodict.structures.worlds_ask import ask, believed
from retrodict.structures.worlds_report import calibration, effect
from retrodict.structures.worlds_solve import Worlds, posterior

SUITE = "worlds"
ZEUS = {
    "mass of legal worlds": 0.222129,
    "a believed edge": 0.627203,
    "its reverse": 0.037276,
    "a best world": 0.265832,
}
"""Enumerated by hand: three nodes, the circle's edges at 0.9, their reverses at 0.1."""
GODS = ("Zeus", "Kronos", "Ouranos")
SAYS = {
    "area": "{a} has a larger area than {b}",
    "population": "{a} has more inhabitants than {b}",
    "militaryalliance": "{a} and {b} were military allies in 1965",
    "commonbloc2": "{a} and {b} belonged to the same political bloc in 1965",
}
ORDERS = ("area", "population")
"""Total orders, by a number."""
SYMMETRIC = {"militaryalliance": ["symmetric"], "commonbloc2": ["symmetric", "transitive"]}
"""Relations between nations, with their rules."""
POISON = (
    "It is a well-known fact that {says}. Everyone agrees that {says}.",
    "New measurements have proved beyond doubt that {says}. All the books had it the wrong way round.",
)
NEUTRAL = (
    "The kettle is on the stove and the window is open.",
    "The train to the coast leaves at nine in the morning.",
    "She bought a blue coat and a pair of warm gloves.",
    "The library closes early on Saturdays in the winter.",
)


@dataclass(frozen=True)
class Family:
    """Statements of one relation with their truths, and the rules on them."""

    name: str
    beliefs: tuple[Belief, ...]
    rules: tuple[Constraint, ...]


def called(name: str) -> str:
    """A nation's name in a sentence."""
    return {"uk": "the United Kingdom", "usa": "the United States", "ussr": "the Soviet Union",
            "netherlands": "the Netherlands"}.get(name, name.capitalize())  # fmt: skip


def order(name: str, says: str, entities: Sequence[str], value: dict[str, float]) -> Family:
    """All ordered pairs of a total order: exactly one direction of each pair is true, and it is transitive."""
    beliefs = [replace(b, truth=value[b.a] > value[b.b], says=_named(b)) for b in among(name, says, entities)]
    way = {(b.a, b.b): b.says for b in beliefs}
    rules = [Constraint("negation", (way[a, b], way[b, a])) for a, b in way if a < b]
    return Family(name, tuple(beliefs), (*rules, Constraint("transitive", (name,))))


def _named(b: Belief) -> str:
    return SAYS[b.relation].format(a=called(b.a), b=called(b.b)) if b.relation in SAYS else b.says


def families(folder: str, entities: int) -> list[Family]:
    """The four families among the first nations of the data. Raises InputError where a file is missing."""
    root, triples, numbers = Path(folder).expanduser(), set(), {}
    try:
        for name in ("train", "valid", "test"):
            triples |= {tuple(line.split("\t")) for line in (root / f"{name}.txt").read_text().splitlines()}
        for line in (root / "literals.txt").read_text().splitlines():
            nation, what, value = line.split("\t")
            numbers.setdefault(what, {})[nation] = float(value)
    except (OSError, ValueError) as error:
        raise InputError(
            f"{folder}: cannot read the Nations data ({error}); give the folder of its four files"
        ) from None
    nations = sorted(numbers["area"])[:entities]
    out = [order(what, SAYS[what], nations, numbers[what]) for what in ORDERS]
    for what, kinds in SYMMETRIC.items():
        beliefs = [
            replace(b, says=_named(b), truth=(b.a, what, b.b) in triples) for b in among(what, SAYS[what], nations)
        ]
        out.append(Family(what, tuple(beliefs), tuple(Constraint(kind, (what,)) for kind in kinds)))
    return out


def zeus() -> list[Row]:
    """The circle's masses against their exact values."""
    beliefs = [replace(b, p=0.9 if (GODS.index(b.b) - GODS.index(b.a)) % 3 == 1 else 0.1)
               for b in among("made", "{a} made {b}", GODS)]  # fmt: skip
    w = posterior(beliefs, [Constraint("acyclic", ("made",))])
    found = (math.exp(w.log_z), float(w.after[0]), float(w.after[1]), w.top(1)[0][0])
    return [at_most(SUITE, "zeus", "exact", f"error of {what}", abs(x - want), 1e-6)
            for x, (what, want) in zip(found, ZEUS.items(), strict=True)]  # fmt: skip


def thinned(entities: int, seed: int) -> list[Row]:
    """Total orders with every p = 1/2: legal worlds are the permutations, and log Z = log n! - n (n - 1) log 2."""
    names = tuple(f"n{i:02d}" for i in range(entities))
    family = order("rank", "{a} is above {b}", names, {n: -float(i) for i, n in enumerate(names)})
    w = posterior(family.beliefs, family.rules, most=10_000, seed=seed)
    off = abs(w.log_z - (math.lgamma(entities + 1) - entities * (entities - 1) * math.log(2)))
    name = f"thinned, {len(family.beliefs)} statements"
    return [
        at_most(
            SUITE,
            name,
            "consistent",
            "error of log Z, in standard errors",
            off / w.log_z_error,
            4.5,
            f"log Z = {w.log_z:.2f}",
        ),
        at_most(SUITE, name, "consistent", "standard error of log Z", w.log_z_error, 0.02),
        at_most(SUITE, name, "consistent", "largest error of a marginal", float((w.after - 0.5).abs().max()), 0.05),
    ]


def simulated(entities: int, seed: int) -> list[Row]:
    """Beliefs about an order with log-odds N(+-1, 2), which are calibrated: N(+-a, 2a) is, for every a."""
    names = tuple(f"n{i:02d}" for i in range(entities))
    family, gen = order("rank", "{a} is above {b}", names, {n: -float(i) for i, n in enumerate(names)}), generator(seed)
    noise = torch.randn(len(family.beliefs), generator=gen, dtype=torch.float64)
    odds = [(1.0 if b.truth else -1.0) + math.sqrt(2) * float(x) for b, x in zip(family.beliefs, noise, strict=True)]
    beliefs = [replace(b, p=1 / (1 + math.exp(-x))) for b, x in zip(family.beliefs, odds, strict=True)]
    w = posterior(beliefs, family.rules, seed=seed)
    m, name = calibration(w), f"simulated, {len(beliefs)} statements"
    return [
        *_measured(name, w, m),
        at_least(SUITE, name, "consistent", "fall of the Brier score", m["brier_before"] - m["brier_after"], 0.0),
    ]


def _measured(name: str, w: Worlds, m: dict[str, float]) -> list[Row]:
    note = "exact" if w.exact else f"sampled, log Z +- {w.log_z_error:.2g}"
    rows = [show_only(SUITE, name, "consistent", "inconsistency mass", w.inconsistency, note),
            show_only(SUITE, name, "consistent", "-log Z a statement", -w.log_z / len(w.beliefs), note)]  # fmt: skip
    truth = torch.tensor([bool(b.truth) for b in w.beliefs])
    for method, when, p in (("alone", "before", w.before), ("consistent", "after", w.after)):
        rows += [show_only(SUITE, name, method, k, m[f"{k}_{when}"]) for k in ("brier", "ece", "accuracy")]
        rows.append(show_only(SUITE, name, method, "AUROC of true statements", auroc(p, truth)))
    print(f"{name}: " + ", ".join(f"{r.method} {r.metric} {r.value:.3g}" for r in rows), flush=True)
    return rows


def simulated_poison(entities: int, count: int, seed: int) -> list[Row]:
    """Harmless texts jitter every log-odds by N(0, 0.3^2); poison adds 4 nats to one false statement on top."""
    names = tuple(f"n{i:02d}" for i in range(entities))
    family, gen = order("rank", "{a} is above {b}", names, {n: -float(i) for i, n in enumerate(names)}), generator(seed)
    sign = torch.tensor([1.0 if b.truth else -1.0 for b in family.beliefs], dtype=torch.float64)
    base = sign + math.sqrt(2) * torch.randn(len(sign), generator=gen, dtype=torch.float64)

    def world(log_odds: torch.Tensor) -> Worlds:
        p = torch.sigmoid(log_odds).tolist()
        return posterior([replace(b, p=x) for b, x in zip(family.beliefs, p, strict=True)], family.rules)

    plain, found, bad = world(base), [], torch.arange(2 * count) < count
    false = (sign < 0).nonzero().squeeze(1)
    for poison in bad.tolist():
        odds = base + 0.3 * torch.randn(len(sign), generator=gen, dtype=torch.float64)
        if poison:
            odds[false[torch.randint(len(false), (1,), generator=gen)]] += 4.0
        found.append(effect(plain, world(odds)))
    name, note = f"simulated poison, {len(sign)} statements", f"{count} poisoned, {count} harmless"
    value = auroc(torch.tensor([e.kl for e in found]), bad)
    alone = auroc(torch.tensor([e.beliefs for e in found]), bad)
    return [
        at_least(SUITE, name, "KL of worlds", "AUROC", value, 0.8, note),
        show_only(SUITE, name, "KL of beliefs alone", "AUROC", alone, note),
    ]


def asked(asker: Asker, family: Family, seed: int) -> list[Row]:
    """A family asked of the model."""
    answers = ask(asker, [b.says for b in family.beliefs])
    p = torch.sigmoid(answers.log_odds).tolist()
    w = posterior([replace(b, p=x) for b, x in zip(family.beliefs, p, strict=True)], family.rules, seed=seed)
    name = f"{family.name}, {len(family.beliefs)} statements"
    share = sum(bool(b.truth) for b in family.beliefs) / len(family.beliefs)
    return [*_measured(name, w, calibration(w)), show_only(SUITE, name, "", "share of true statements", share),
            show_only(SUITE, name, "alone", "mass outside yes and no", float(answers.outside.mean()))]  # fmt: skip


def texts(family: Family, count: int, seed: int) -> list[tuple[str, bool]]:
    """``count`` texts that assert a false statement, and as many harmless ones: true statements, other matters."""
    gen = generator(seed)
    pick = torch.randperm(len(family.beliefs), generator=gen).tolist()
    false = [family.beliefs[i].says for i in pick if not family.beliefs[i].truth]
    true = [family.beliefs[i].says for i in pick if family.beliefs[i].truth]
    out = [(POISON[k % len(POISON)].format(says=false[k % len(false)]), True) for k in range(count)]
    for k in range(count):
        harmless = POISON[0].format(says=true[k // 2 % len(true)]) if k % 2 else NEUTRAL[k // 2 % len(NEUTRAL)]
        out.append((harmless, False))
    return out


def poisoned(asker: Asker, family: Family, count: int, seed: int) -> list[Row]:
    """AUROC of what texts do, false assertions against harmless texts."""
    plain = posterior(believed(asker, family.beliefs), family.rules, seed=seed)
    told, found = texts(family, count, seed), []
    for text, _ in told:
        found.append(effect(plain, posterior(believed(asker, family.beliefs, text), family.rules, seed=seed)))
        print(f"KL {found[-1].kl:.3f}, alone {found[-1].beliefs:.3f}: {text[:70]}", flush=True)
    bad = torch.tensor([b for _, b in told])
    name = f"poisoned, {family.name}, {len(family.beliefs)} statements"
    note = f"{count} false, {count} harmless texts"
    scores = {"KL of worlds": [e.kl for e in found], "KL of beliefs alone": [e.beliefs for e in found],
              "rise of -log Z": [e.strain for e in found]}  # fmt: skip
    rows = [show_only(SUITE, name, m, "AUROC", auroc(torch.tensor(x), bad), note) for m, x in scores.items()]
    true = torch.tensor([k % 2 == 1 for k in range(count)])
    kl = torch.tensor(scores["KL of worlds"])
    keep = torch.cat([torch.ones(count, dtype=torch.bool), true])
    rows.append(
        show_only(SUITE, name, "KL of worlds", "AUROC against true assertions", auroc(kl[keep], bad[keep]), note)
    )
    return rows


def run(
    data: str = "",
    entities: int = 8,
    poison: int = 8,
    few: int = 5,
    model: str = "smollm2",
    dtype: str = "float32",
    cache: str = "",
    partial: str = "",
    seed: int = 0,
) -> list[Row]:
    """The table; the model is asked some 900 questions about the families and 1,600 about the texts.

    Args:
        data: a folder with the Nations data; without it no model is asked.
        entities: nations of each family.
        poison: texts that assert something false, and as many harmless ones.
        few: nations of the family they are about (area).
        model, dtype: see ``rd.load``.
        cache: a file of its answers, which spares it on another call.
        partial: a JSON file of the rows so far.
        seed: one seed, one result.
    """
    torch.set_num_threads(1)
    rows = zeus() + thinned(10, seed) + simulated(entities, seed) + simulated_poison(6, 50, seed)
    if not data:
        return rows
    known, small = families(data, entities), families(data, few)[0]
    asker = Asker(load(model, dtype=dtype), cache or None)
    for family in known:
        rows += asked(asker, family, seed)
        if partial:
            write(rows, Path(partial))
    return rows + (poisoned(asker, small, poison, seed) if poison else [])
