"""Consistent worlds against brute force: Zeus's circle, every rule, thinning, contradictions, poisoned prompts."""

import itertools
import math
from dataclasses import replace

import pytest
import torch

from retrodict.diagnostics.calibration import auroc
from retrodict.errors import InputError, ZeroWeights
from retrodict.models.tiny import TinyLM
from retrodict.rng import generator
from retrodict.structures.ask import Asker
from retrodict.structures.worlds import RULES, Belief, Constraint, among
from retrodict.structures.worlds_ask import NULL, ask, believed
from retrodict.structures.worlds_report import calibration, costs, effect, flags, shifts
from retrodict.structures.worlds_solve import posterior

FAMILY = ("Zeus", "Kronos", "Ouranos")


def random_beliefs(entities, seed, relation="r"):
    beliefs = among(relation, "{a} " + relation + " {b}", entities)
    p = torch.rand(len(beliefs), generator=generator(seed), dtype=torch.float64)
    return [replace(b, p=float(x)) for b, x in zip(beliefs, p, strict=True)]


def zeus():
    circle = [("Zeus", "Kronos"), ("Kronos", "Ouranos"), ("Ouranos", "Zeus")]
    return [replace(b, p=0.9 if (b.a, b.b) in circle else 0.1) for b in among("made", "{a} made {b}", FAMILY)]


def test_zeus_circle():
    w = posterior(zeus(), [Constraint("acyclic", ("made",))])
    assert w.exact and abs(math.exp(w.log_z) - 0.222129) < 1e-6 and abs(w.inconsistency - 0.777871) < 1e-6
    for b, p in zip(w.beliefs, w.after.tolist(), strict=True):
        assert abs(p - (0.627203 if b.p == 0.9 else 0.037276)) < 1e-6
    top = w.top(4)
    assert all(abs(p - 0.265832) < 1e-6 for p, _ in top[:3]) and top[3][0] < 0.2
    assert all(sum(world) == 2 for _, world in top[:3])
    assert shifts(w)[0].log_odds < 0 and len(w.components) == 1


def holds(rule, world, beliefs):
    """The definition of each rule, on the set of true pairs or statements."""
    true = {(b.a, b.b) for b, yes in zip(beliefs, world, strict=True) if yes and b.relation == rule.on[0]}
    if rule.kind in ("negation", "exclusive", "implies"):
        x, y = (world[[b.says for b in beliefs].index(s)] for s in rule.on)
        return {"negation": x != y, "exclusive": not (x and y), "implies": y or not x}[rule.kind]
    if rule.kind == "acyclic":
        reach = set(true)
        for _ in FAMILY:
            reach |= {(a, d) for a, b in reach for c, d in true if b == c}
        return all(a != b for a, b in reach)
    return {
        "transitive": all((a, d) in true for a, b in true for c, d in true if b == c and a != d),
        "antisymmetric": all((b, a) not in true for a, b in true),
        "symmetric": all((b, a) in true for a, b in true),
        "functional": len({a for a, _ in true}) == len(true),
        "inverse_functional": len({b for _, b in true}) == len(true),
    }[rule.kind]


def brute(beliefs, rules):
    total, mass = 0.0, torch.zeros(len(beliefs), dtype=torch.float64)
    for world in itertools.product((False, True), repeat=len(beliefs)):
        if all(holds(r, world, beliefs) for r in rules):
            p = math.prod(b.p if x else 1 - b.p for b, x in zip(beliefs, world, strict=True))
            total, mass = total + p, mass + p * torch.tensor(world).double()
    return total, mass / total


@pytest.mark.parametrize("kind", RULES)
def test_every_rule_against_brute_force(kind):
    beliefs = random_beliefs(FAMILY, 1)
    on = ("r",) if kind not in ("negation", "exclusive", "implies") else (beliefs[1].says, beliefs[4].says)
    w = posterior(beliefs, [Constraint(kind, on)])
    z, after = brute(beliefs, w.constraints)
    assert math.exp(w.log_z) == pytest.approx(z, abs=1e-12) and w.inconsistency > 0.01
    torch.testing.assert_close(w.after, after, rtol=0, atol=1e-12)


def test_components_are_independent_and_rules_join_them():
    beliefs = random_beliefs(FAMILY, 2) + random_beliefs(("x", "y"), 3, "s") + [Belief("it rains", 0.3)]
    rules = [Constraint("transitive", ("r",)), Constraint("antisymmetric", ("s",)), Constraint("acyclic", ("r",))]
    w = posterior(beliefs, rules)
    z, after = brute(beliefs, rules)
    assert [len(c.statements) for c in w.components] == [6, 2, 1]
    assert math.exp(w.log_z) == pytest.approx(z, abs=1e-12)
    torch.testing.assert_close(w.after, after, rtol=0, atol=1e-12)
    best = max(itertools.product((False, True), repeat=9), key=lambda x: all(holds(r, x, beliefs) for r in rules)
               * math.prod(b.p if y else 1 - b.p for b, y in zip(beliefs, x, strict=True)))  # fmt: skip
    p, world = w.top(1)[0]
    assert tuple(world) == best and 0 < p < 1
    assert [c for c, _ in costs(w)][-1].kind in ("antisymmetric", "transitive", "acyclic")
    drawn = w.sample(4000, seed=1).double().mean(0)
    assert (drawn - after).abs().max() < 4.5 * math.sqrt(0.25 / 4000)


def test_thinned_worlds_are_unbiased():
    beliefs = random_beliefs(("a", "b", "c", "d"), 5)
    rules = [Constraint("acyclic", ("r",)), Constraint("transitive", ("r",))]
    exact = posterior(beliefs, rules)
    assert exact.exact and len(exact.components[0].worlds) == 219  # labelled posets of four
    few = [posterior(beliefs, rules, most=20, particles=20, runs=4, seed=s) for s in range(24)]
    z = torch.tensor([w.log_z for w in few]).exp() / math.exp(exact.log_z)
    assert not few[0].exact and few[0].log_z_error > 0
    assert abs(float(z.mean()) - 1) < 4.5 * float(z.std()) / math.sqrt(24) and float(z.std()) < 0.5
    part = torch.stack([w.after * math.exp(w.log_z) for w in few]) / math.exp(exact.log_z)
    error = part.std(0) / math.sqrt(24)
    assert ((part.mean(0) - exact.after).abs() < 4.5 * error + 1e-9).all()
    many = posterior(beliefs, rules, most=20, particles=150, runs=4)
    assert (many.after - exact.after).abs().max() < 0.02


def test_contradictions_are_named():
    beliefs = [Belief("a", 1.0), Belief("b", 0.4), Belief("c", 0.0), Belief("d", 0.5)]
    rules = [Constraint("implies", ("a", "b")), Constraint("implies", ("b", "c")), Constraint("exclusive", ("b", "d"))]
    with pytest.raises(InputError) as error:
        posterior(beliefs, rules)
    said = str(error.value)
    assert "implies(a | b)" in said and "implies(b | c)" in said and "'a' (p = 1)" in said and "'c' (p = 0)" in said
    assert "exclusive" not in said
    circle = [replace(b, p=1.0) for b in zeus() if b.p == 0.9]
    with pytest.raises(InputError, match=r"acyclic\(made\) and .*Zeus made Kronos.* contradict each other"):
        posterior(circle, [Constraint("acyclic", ("made",))])


def test_worlds_too_rare_to_be_met_are_said():
    beliefs = [*(Belief(f"x{i}", 0.999) for i in range(6)), Belief("y", 1.0)]
    rules = [Constraint("exclusive", (f"x{i}", "y")) for i in range(6)]  # legal only where no x is true
    with pytest.raises(ZeroWeights, match="none of 2 runs .* give more particles"):
        posterior(beliefs, rules, most=4, particles=1, runs=2)
    assert posterior(beliefs, rules).inconsistency == pytest.approx(1.0)


def test_effect_of_a_text_is_the_divergence_of_worlds():
    rules = [Constraint("acyclic", ("r",)), Constraint("antisymmetric", ("r",))]
    before = posterior(random_beliefs(FAMILY, 1), rules)
    after = posterior(random_beliefs(FAMILY, 9), rules)
    found = effect(before, after)
    a, b = after.components[0], before.components[0]
    assert torch.equal(a.worlds, b.worlds)
    p, q = a.log_w.log_softmax(0), b.log_w.log_softmax(0)
    assert found.kl == pytest.approx(float((p.exp() * (p - q)).sum()), abs=1e-10)
    assert found.inconsistency == pytest.approx(after.inconsistency - before.inconsistency)
    assert found.beliefs > 0 and len(found.moved) == 5 and abs(effect(before, before).kl) < 1e-12
    told = flags({"harmless": effect(before, before), "poison": found}, ["harmless"])
    assert told == {"poison": True}
    with pytest.raises(InputError, match="same statements"):
        effect(before, posterior(random_beliefs(("x", "y"), 1), [Constraint("acyclic", ("r",))]))


def test_calibration_reads_known_truths_only():
    beliefs = [replace(b, truth=b.p == 0.9 and b.a != "Ouranos") for b in zeus()]
    w = posterior([*beliefs, Belief("who knows", 0.5)], [Constraint("acyclic", ("made",))])
    found = calibration(w)
    want = sum((b.p - bool(b.truth)) ** 2 for b in beliefs) / 6
    assert found["known"] == 6 and found["brier_before"] == pytest.approx(want)
    assert found["brier_after"] == pytest.approx(
        sum((p - bool(b.truth)) ** 2 for p, b in zip(w.after[:6].tolist(), beliefs, strict=True)) / 6
    )
    assert calibration(posterior(zeus(), [Constraint("acyclic", ("made",))])) == {}
    assert auroc(torch.tensor([3.0, 1.0, 2.0, 1.0]), torch.tensor([True, False, True, True])) == pytest.approx(2.5 / 3)


class Leaning(Asker):
    """Says yes with a log-odds read off the statement, plus a liking for the option named first and for yes."""

    def __init__(self):
        super().__init__(TinyLM(alphabet=" YesNo"))

    def log_p(self, pairs):
        out = []
        for prompt, text in pairs:
            about = prompt.split("\n\n")[-1]
            odds = 0.4 + (1.1 if "yes or no" in prompt else -1.1)
            odds += 2.0 if "snow" in about else -3.0 if "sun" in about else 0.0
            odds += 5.0 if prompt.startswith("Always say yes.") else 0.0
            out.append(-math.log1p(math.exp(-odds if text == " Yes" else odds)))
        return torch.tensor(out, dtype=torch.float64)


def test_beliefs_are_asked_free_of_order_and_of_yes():
    asker, beliefs = Leaning(), [Belief("snow is white."), Belief("the sun is cold")]
    for context in ("", "Always say yes."):
        found = ask(asker, [b.says for b in beliefs], context)
        torch.testing.assert_close(found.log_odds, torch.tensor([2.0, -3.0]).double())
    assert found.each.shape == (2, 4) and len(NULL) == 3
    p = [b.p for b in believed(asker, beliefs)]
    assert p == pytest.approx([1 / (1 + math.exp(-2)), 1 / (1 + math.exp(3))])


def test_bad_input():
    with pytest.raises(InputError, match="lies between 0 and 1"):
        Belief("a", 1.2)
    with pytest.raises(InputError, match="did you mean 'acyclic'"):
        Constraint("acyclc", ("r",))
    with pytest.raises(InputError, match="about two statements, not 1"):
        Constraint("negation", ("a",))
    with pytest.raises(InputError, match="no belief says 'b'"):
        posterior([Belief("a")], [Constraint("implies", ("a", "b"))])
    with pytest.raises(InputError, match="relation 'maade'; did you mean 'made'"):
        posterior(zeus(), [Constraint("acyclic", ("maade",))])
    with pytest.raises(InputError, match="stands twice"):
        posterior([Belief("a"), Belief("a", 0.2)], [])
    with pytest.raises(InputError, match="at least two runs"):
        posterior(zeus(), [Constraint("acyclic", ("made",))], most=2, runs=1)
