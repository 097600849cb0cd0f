"""Programs from pictures: the space, the law of its programs, the exact posterior, samplers, and a trained policy."""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from retrodict.errors import InputError
from retrodict.objectives.mle import object_log_q
from retrodict.policies.choices import EvenChoices
from retrodict.rng import generator
from retrodict.samplers.exact import exact
from retrodict.samplers.importance import importance
from retrodict.samplers.smc import smc
from retrodict.spaces.enumerate import enumerate_objects
from retrodict.spaces.phrases import Phrases
from retrodict.structures.pictures import (
    Catalogue,
    PictureModel,
    amortize_pictures,
    distance,
    picture,
    picture_target,
    posterior_draws,
    predictive,
    stroke_policy,
)
from retrodict.structures.strokes import Language, Strokes, draw, shape_pixels
from retrodict.targets.algebra import Target
from retrodict.testing.laws import check_policy, check_space

SMALL = Language(grid=(4, 9), radii=(2,), counts=(2,), longest=10)


@cache
def small() -> tuple[Target, Catalogue]:
    target = picture_target(Strokes(SMALL), [picture(torch.zeros(16, 16))])
    return target, Catalogue(target)


@cache
def simulated(n: int = 6) -> tuple[Target, Any]:
    return PictureModel(small()[0]).simulate(n, generator(3))


def test_laws_of_phrases() -> None:
    words = ("a", "b", "c")
    check_space(Phrases(words, ((0,), (1, 0), (1, 2, 2), (2, 1)), most=2, longest=4))
    check_space(small()[0].space)
    with torch.no_grad():
        check_policy(stroke_policy(small()[0], hidden=8))


def test_phrases_that_begin_with_another_are_refused() -> None:
    with pytest.raises(InputError, match=r"phrase 1, \(0, 1\)"):
        _ = Phrases(("a", "b"), ((0,), (0, 1))).tree
    with pytest.raises(InputError, match="raise longest"):
        Phrases(("a", "b"), ((0, 1),), longest=1)


@pytest.mark.parametrize("stop", [0.3, 0.5])
def test_description_length_is_a_distribution(stop: float) -> None:
    """The sum over all programs is one, also where the length limit leaves fewer choices; one program by hand."""
    space = small()[0].space
    rows = enumerate_objects(space, 0)
    log_p = object_log_q(EvenChoices(space, [], stop).score(rows), rows)
    assert float(log_p.exp().sum()) == pytest.approx(1.0, abs=1e-12)
    shown = space.show(rows)
    line = log_p[shown.index("line 4 4 9 9")]  # five commands, two x, two y, then x of 9 or 4, y of what is left
    by_hand = 1 / 5 / 2 / 2 / 2 / 2 * stop
    assert float(line.exp()) == pytest.approx(by_hand, rel=1e-9)


def test_shapes_by_hand() -> None:
    box = torch.zeros(16, 16, dtype=torch.bool)
    box[3:7, 2:6] = True
    box[4:6, 3:5] = False
    assert torch.equal(shape_pixels(("rectangle", "2", "3", "5", "6")), box)
    steep = shape_pixels(("line", "1", "2", "3", "8"))
    assert int(steep.sum()) == 7 and bool(steep[2, 1]) and bool(steep[8, 3])
    ring = shape_pixels(("circle", "8", "8", "2"))
    assert not bool(ring[8, 8]) and bool(ring[8, 10] and ring[6, 8]) and torch.equal(ring, ring.T)
    twice, whole = draw(("repeat", "2", "down", "line", "4", "4", "9", "4"), 3)
    assert whole and sorted(twice.any(1).nonzero().flatten().tolist()) == [4, 7]
    assert not draw(("repeat", "3", "right", "line", "9", "4", "12", "4"), 3)[1]
    mirrored, _ = draw(("reflect", "left-right", "line", "4", "4", "4", "9"), 3)
    assert sorted(mirrored.any(0).nonzero().flatten().tolist()) == [4, 11]


def test_every_prefix_is_worth_its_whole_items() -> None:
    target, rows = simulated()
    values = target.factors["pixels"](rows, True)
    last = values[torch.arange(len(rows)), rows.n, 0]
    assert torch.allclose(last, target.factors["pixels"](rows))
    assert torch.allclose(values[:, 0, 0], target.factors["pixels"].of(
        target.factors["pixels"].x, torch.zeros(len(rows), 256, dtype=torch.bool)))  # pyright: ignore  # fmt: skip


def test_catalogue_is_the_exact_posterior() -> None:
    target, catalogue = simulated()[0], small()[1]
    found = exact(target.on(target.problems[:2]))
    for m in range(2):
        log_p = catalogue.log_posterior(target.problems[m])
        assert float(log_p.exp().sum()) == pytest.approx(1.0, abs=1e-9)
        mine = {k: float(p) for k, p in zip(catalogue.space.keys(catalogue.programs), log_p.exp(), strict=True)}
        assert max(abs(mine[k] - w) for k, w in found.counts(m).items()) < 1e-6
        assert found.log_z is not None
        assert catalogue.log_evidence(target.problems[m]) == pytest.approx(float(found.log_z[m, 0]), abs=1e-4)


def test_a_planted_bug_shows_in_the_posterior() -> None:
    """Programs that draw the same share one likelihood, not one prior: pictures counted once, not by their mass."""
    catalogue, problem = small()[1], simulated()[0].problems[0]
    right = catalogue.log_posterior(problem).exp()
    joint = catalogue.log_joint(problem.row["features"][None])[0] - catalogue.log_drawing
    wrong = (joint[catalogue.which]).softmax(0)
    assert float((right - wrong).abs().sum()) / 2 > 0.2


@pytest.mark.parametrize("method", ["importance", "smc"])
def test_evidence_by_sampling(method: str) -> None:
    """Unbiased on a picture that the prior explains: within 4.5 standard errors of the sum over all programs."""
    target = simulated()[0]
    run: Any = {"importance": importance, "smc": smc}[method]
    found = run(target.on(target.problems[:1]), n=400, seed=0, runs=16)
    assert found.log_z is not None
    z = (found.log_z[0] - small()[1].log_evidence(target.problems[0])).exp()
    assert abs(float(z.mean()) - 1) < 4.5 * max(float(z.std()) / 4, 0.02)


def test_sleep_brings_q_to_the_posterior() -> None:
    """Held-out pictures; untrained the look-ahead misjudges what later items explain."""
    model = PictureModel(small()[0])
    held = model.simulate(12, generator(9))[0]

    def off(policy: Any) -> tuple[float, float]:
        found = [distance(small()[1], policy.on(held.problems), i) for i in range(12)]
        assert all(f.slack < 2e-3 for f in found)
        return sum(f.tv for f in found) / 12, sum(f.kl for f in found) / 12

    policy = stroke_policy(held, hidden=32)
    before = off(policy)
    wake = model.simulate(16, generator(10))[0]
    policy = policy.on(wake.problems)
    amortize_pictures(wake, policy, e_steps=40, dreams=64, lr=5e-3, sleep=0.9, per_step=4, samples=8)
    after = off(policy)
    assert after[1] < 0.6 * before[1] and after[0] < 0.3


def test_untrained_the_last_item_is_exact() -> None:
    """With one item a program, the look-ahead is the posterior: no training, no slack but rounding."""
    space = Strokes(Language(grid=(4, 9), radii=(2,), counts=(2,), most=1))
    target = picture_target(space, [picture(torch.zeros(16, 16))])
    held, _ = PictureModel(target).simulate(4, generator(1))
    catalogue = Catalogue(target)
    found = [distance(catalogue, stroke_policy(held, hidden=8), i) for i in range(4)]
    assert max(f.tv for f in found) < 2e-3


def test_a_loop_goes_on() -> None:
    space = Strokes(SMALL)
    rows = enumerate_objects(space, 0)
    at = space.show(rows).index("repeat 2 down line 4 4 9 4")
    loop = rows.take(torch.tensor([at]))
    assert not bool(predictive(space, loop, torch.ones(1))[10].any())
    assert bool((predictive(space, loop, torch.ones(1), more=1)[10, 4:10] == 1).all())
    one = small()[1]
    draws = posterior_draws(one, simulated()[0].problems[0], 5, generator(0))
    assert len(draws) == 5 and math.isfinite(float(predictive(one.space, draws, torch.ones(5)).sum()))


@pytest.mark.parametrize(
    ("image", "words"),
    [
        (torch.zeros(28, 28), "a picture of 28 x 28 pixels, and these programs draw 16 x 16"),
        (torch.full((16, 16), 0.5), "must be 0 or 1; threshold it"),
        (torch.full((16, 16), math.nan), "must be 0 or 1; threshold it"),
    ],
)
def test_other_pictures_are_refused(image: Tensor, words: str) -> None:
    with pytest.raises(InputError, match=words) as error:
        picture(image)
    assert "\n" not in str(error.value)


def test_other_refusals() -> None:
    with pytest.raises(InputError, match="between 0 and 0.5"):
        picture_target(small()[0].space, [picture(torch.zeros(16, 16))], flip=0.5)
    with pytest.raises(InputError, match="chance of a stop"):
        EvenChoices(small()[0].space, [], 1.0)
    with pytest.raises(InputError, match="two coordinates or more"):
        Language(grid=(3, 16))
