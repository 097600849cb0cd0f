"""Resampling without replacement, steering and the alpha ramp: the pieces, by themselves."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from retrodict.errors import InputError
from retrodict.models.tabular import TabularLM
from retrodict.rng import generator
from retrodict.samplers.resampling import STEERING, fan_out, without_replacement
from retrodict.samplers.smc import conditional_smc, smc
from retrodict.targets.algebra import Target
from retrodict.targets.ready import continuation, infill
from retrodict.testing.oracle import enumerate_target

WEIGHTS = {
    "uneven": [0.3, 0.25, 0.15, 0.1, 0.08, 0.07, 0.05],
    "one heavy": [0.9, 0.03, 0.03, 0.02, 0.01, 0.01, 0.0],
    "with zeros": [0.0, 0.3, 0.0, 0.4, 0.0, 0.3, 0.0],
    "equal": [1 / 7] * 7,
}


def thinned(weights: list[float], n: int, repeats: int) -> tuple[Tensor, Tensor]:
    w = torch.tensor(weights, dtype=torch.float64).expand(repeats, -1)
    index, weight = without_replacement(w, n, generator(0))
    assert index.shape == weight.shape == (repeats, n)
    return index, weight


@pytest.mark.parametrize("kind", WEIGHTS)
@pytest.mark.parametrize("n", [1, 2, 3, 5])
def test_weights_are_unbiased_and_their_sum_is_kept(kind: str, n: int) -> None:
    index, weight = thinned(WEIGHTS[kind], n, 20_000)
    assert torch.allclose(weight.sum(1), torch.ones(20_000, dtype=torch.float64))
    total = torch.zeros(20_000, 7, dtype=torch.float64).scatter_add(1, index, weight)
    se = total.std(0) / 20_000**0.5
    assert ((total.mean(0) - torch.tensor(WEIGHTS[kind], dtype=torch.float64)).abs() <= 4.5 * se + 1e-9).all()


@pytest.mark.parametrize("kind", WEIGHTS)
def test_nothing_is_drawn_twice(kind: str) -> None:
    index, weight = thinned(WEIGHTS[kind], 3, 2000)
    copies = torch.zeros(2000, 7).scatter_add(1, index, (weight > 0).float())
    assert copies.max() == 1


def test_heavy_ones_stay_as_they_are_and_others_weigh_the_same() -> None:
    index, weight = thinned(WEIGHTS["one heavy"], 3, 500)
    assert (index[:, 0] == 0).all() and torch.allclose(weight[:, 0], torch.tensor(0.9, dtype=torch.float64))
    assert torch.allclose(weight[:, 1:], torch.tensor(0.05, dtype=torch.float64))  # c = 2 / 0.1


def test_few_enough_stay_untouched() -> None:
    index, weight = thinned(WEIGHTS["with zeros"], 5, 10)
    found = torch.zeros(10, 7, dtype=torch.float64).scatter_add(1, index, weight)
    assert torch.allclose(found, torch.tensor(WEIGHTS["with zeros"], dtype=torch.float64))


def test_clones_share_the_weight_and_finished_ones_are_cloned_once() -> None:
    index = torch.tensor([[4, 2]])
    weight, grows = torch.tensor([[0.6, 0.4]]), torch.tensor([[True, False]])
    slots, share = fan_out(index, weight, grows, 3)
    assert slots.tolist() == [[4, 4, 4, 2, 2, 2]]
    assert torch.allclose(share, torch.tensor([[0.2, 0.2, 0.2, 0.4, 0.0, 0.0]]))


def story() -> Target:
    lm = TabularLM.random(".ab ", order=3, seed=1)
    return infill(lm, "ab", "ba", stop=".", max_tokens=5, limit="own_stop", join="", lookahead=1.0)


def test_steering_is_close_and_holds_no_finished_text_twice() -> None:
    target = story()
    p = smc(target, n=12, runs=16, seed=0, resampling=STEERING, beam=3, ess_threshold=1.0)
    truth = float(enumerate_target(target)[0].z.log())
    assert abs(float(p.evidence[0]) - truth) < 5 * float(p.evidence[1])  # pyright: ignore[reportOptionalSubscript]
    assert p.k == 12 * 3 * 16 and p.trace.settings["beam"] == 3
    assert p.trace.ancestors is not None and p.trace.ancestors.shape[2] == 36


def test_one_seed_one_result() -> None:
    how = {"n": 6, "runs": 2, "resampling": STEERING, "beam": 2, "ess_threshold": 1.0}
    a, b, c = (smc(story(), seed=s, **how) for s in (3, 3, 4))  # pyright: ignore[reportArgumentType]
    assert a.keys == b.keys and torch.equal(a.log_w, b.log_w) and a.keys != c.keys


def test_a_ramp_ends_at_the_same_answer() -> None:
    """Without resampling the intermediate targets cancel: the weights are those of no ramp, to rounding."""
    target = continuation(TabularLM.random(".ab ", order=3, seed=1), "a", temperature=0.4, stop=".", max_tokens=5)
    plain, slow = (smc(target, n=32, runs=2, seed=0, ess_threshold=0.0, ramp=r) for r in (0, 3))
    assert plain.keys == slow.keys and torch.allclose(plain.log_w, slow.log_w)
    assert plain.trace.ess is not None and slow.trace.ess is not None
    assert not torch.allclose(slow.trace.ess[0], plain.trace.ess[0])
    assert slow.trace.settings["ramp"] == 3


def test_who_stopped_is_left_alone_when_set_aside() -> None:
    """Its parent is itself from the step of its stop on; and who grows was resampled meanwhile."""
    target = continuation(TabularLM.random(".ab ", order=3, seed=1), "a", temperature=0.3, stop=".", max_tokens=6)
    p = smc(target, n=64, runs=2, seed=0, ess_threshold=1.0, stopped="aside")
    assert p.trace.ancestors is not None and p.trace.settings["stopped"] == "aside"
    own = torch.arange(64)
    stopped = torch.zeros(2, 64, dtype=torch.bool)
    n, moved = p.objects.n.view(2, 64), False
    for step, parent in enumerate(p.trace.ancestors):
        stopped = (n <= step) & (p.log_w.view(2, 64) > float("-inf"))
        assert (parent == own)[stopped].all()
        moved = moved or bool((parent != own).any())
    assert stopped.all() and moved


def test_bad_input() -> None:
    with pytest.raises(InputError, match="unknown value 'asid' of stopped"):
        smc(story(), n=4, seed=0, stopped="asid")
    with pytest.raises(InputError, match="thins all"):
        smc(story(), n=4, seed=0, resampling=STEERING, beam=2, stopped="aside")
    with pytest.raises(InputError, match="go together"):
        smc(story(), n=4, seed=0, beam=2)
    with pytest.raises(InputError, match="go together"):
        smc(story(), n=4, seed=0, resampling=STEERING)
    with pytest.raises(InputError, match="without_replacement"):
        smc(story(), n=4, seed=0, resampling="without_replacment", beam=2)
    with pytest.raises(InputError, match="exponent"):
        smc(story(), n=4, seed=0, ramp=4)
    with pytest.raises(InputError, match="at least 1"):
        smc(story(), n=4, seed=0, beam=0)
    with pytest.raises(TypeError):  # conditional SMC has no steering: only multinomial resampling keeps its law
        conditional_smc(story(), exact=enumerate_target(story())[0].draw(1, 0), n=4, seed=0, beam=2)  # pyright: ignore[reportCallIssue]
