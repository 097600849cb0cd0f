"""The verdict: it must fire on every way a sample is known to fail, and only then."""

from __future__ import annotations

import dataclasses
import math
import os

import numpy as np
import pytest
import torch

from retrodict.diagnostics import diagnose, weight_se
from retrodict.errors import InputError
from retrodict.numerics import log_mean_exp
from retrodict.particles import Particles
from retrodict.records import Rollouts, Trace
from retrodict.rng import generator

D = torch.float64


def made(log_w, *, log_z=None, keys=None, n=None, method="smc", limit=8, names=(), **trace) -> Particles:
    """Particles from what a verdict reads."""
    log_w = torch.as_tensor(log_w, dtype=D)
    b = log_w.numel()
    n = torch.full((b,), 3) if n is None else torch.as_tensor(n)
    t = torch.arange(limit)
    moves = torch.zeros(b, limit, dtype=torch.long)
    log_stop = torch.full((b, limit + 1, 1), -1.0)
    log_stop[:, limit] = 0
    rows = Rollouts(
        torch.arange(b) // log_w.shape[1], moves, (t < n[:, None]).to(torch.int8), n, torch.zeros(b, dtype=torch.long),
        torch.ones(b, limit + 1, dtype=torch.bool), torch.zeros(b, limit), log_stop, torch.zeros(b, limit + 1),
        torch.zeros(b, limit),
    )  # fmt: skip
    keys = [(i,) for i in range(b)] if keys is None else keys
    log_z = None if log_z is None else torch.as_tensor(log_z, dtype=D)
    return Particles(rows, log_w, log_z, tuple(map(str, keys)), tuple(keys), Trace(method, **trace), tuple(names))


def good(**change) -> Particles:
    """Eight runs of 32 particles, close in log Z, well mixed."""
    g = generator(0)
    log_z = -5 + 0.1 * torch.randn(1, 8, generator=g, dtype=D)
    options = {
        "log_z": log_z,
        "ess": torch.full((6, 8), 20.0),
        "resampled": torch.zeros(6, 8, dtype=torch.bool).index_fill(0, torch.tensor([2]), True),
        "roots": torch.full((8,), 9),
        "ancestors": torch.zeros(6, 8, 32, dtype=torch.long),
    }
    log_w = (log_z.T + 0.3 * torch.randn(8, 32, generator=g, dtype=D)).reshape(1, -1)
    return made(change.pop("log_w", log_w), **{**options, **change})


def test_a_good_sample_is_reliable():
    d = diagnose(good())
    assert d.verdict == "reliable" and d.lines[-1].startswith("reliable: ") and str(d) == "\n".join(d.lines)
    x = d.numbers[0]
    assert x["runs"] == 8 and x["roots"] == 9 and x["low"] < -5 < x["high"] and x["min_ess"] == 20


@pytest.mark.parametrize(
    ("why", "change"),
    [
        ("as measured", {"log_z": [[-6.5, -7.6, -5.9, -8.2, -9.6, -13.0, -4.8, -13.6]]}),
        ("varies by", {"log_z": [[-5.0] * 4 + [-9.0] * 4]}),
        ("one run", {"log_z": [[-7.0, -7.1, -7.2, -6.9, -7.1, -7.0, -7.3, -5.0]]}),
        ("from -inf", {"log_z": [[-5.0, -math.inf] * 4]}),
        ("no interval", {"log_z": [[-5.0]]}),
        ("one root", {"roots": torch.ones(8, dtype=torch.long)}),
        ("one root", {"roots": torch.tensor([0, 0, 0, 0, 0, 5, 5, 5])}),
        ("one root", {"roots": torch.tensor([1, 1, 1, 1, 5, 6, 7, 8])}),
        ("ESS fell to 1.4 (step 2 of 6)", {"ess": torch.tensor([20.0, 1.4, 20, 20, 20, 20])[:, None].expand(6, 8)}),
        ("one particle", {"log_w": torch.cat([torch.zeros(1, 255), torch.full((1, 1), math.log(360))], 1)}),
    ],
)
def test_interval_unreliable(why, change):
    d = diagnose(good(**change))
    assert d.verdict == "interval unreliable", f"{why}: {d}"
    assert d.lines[-1].startswith("interval unreliable: ") and "Try " in d.lines[-1]
    assert why == "as measured" or (why in d.reason and len([f for f in d.findings[0] if f.verdict == d.verdict]) == 1)


def test_copies_are_collapsed_though_the_final_ess_is_full():
    """The peers' case: final ESS of 10 on ten copies of one string."""
    p = made(
        torch.zeros(1, 10),
        log_z=[[-17.0]],
        keys=[(7, 7)] * 10,
        ess=torch.tensor([[9.0], [1.2]]),
        resampled=torch.tensor([[False], [True]]),
        roots=torch.tensor([1]),
        settings={"resampling": "multinomial"},
    )
    d = diagnose(p)
    assert d.verdict == "collapsed" and "interval unreliable" in d.flags
    assert d.numbers[0]["ess"] == pytest.approx(10) and "systematic" in d.advice


def test_care():
    assert diagnose(good(log_z=[[-5.0, -5.1, -4.9]], ess=torch.full((6, 3), 20.0),
                         resampled=torch.ones(6, 3, dtype=torch.bool), roots=torch.tensor([9, 9, 9]),
                         ancestors=None)).verdict == "usable with care"  # fmt: skip
    assert diagnose(good(ess=torch.full((6, 8), 4.0))).verdict == "usable with care"


def test_no_particle_has_weight_names_the_factor():
    note = "problem 0: every weight is zero: the factor 'verifier' is zero on every sample"
    p = made(torch.full((1, 4), -math.inf), log_z=[[-math.inf] * 4], notes=(note, "problem 7: of another"))
    d = diagnose(p)
    assert "of another" not in d.reason and str(d).count("'verifier'") == 2
    assert d.verdict == "no particle has weight" and "'verifier'" in d.reason and "nan" not in str(d)


def test_importance_weights_need_no_runs_but_a_light_tail():
    g = generator(0)
    light = 0.4 * torch.randn(1, 2000, generator=g, dtype=D)
    d = diagnose(made(light, log_z=log_mean_exp(light)[:, None], method="importance"))
    assert d.verdict == "reliable" and d.numbers[0]["se"] == pytest.approx(weight_se(light[0]))
    heavy = torch.tensor(np.log(np.random.default_rng(0).pareto(0.8, (1, 2000))))
    d = diagnose(made(heavy, log_z=log_mean_exp(heavy)[:, None], method="importance"))
    assert d.verdict == "interval unreliable" and any("Pareto" in f.reason for f in d.findings[0])


def test_exact_truth_is_compared():
    p = good(keys=[(i % 4,) for i in range(256)])
    exact = made(torch.zeros(1, 4), log_z=[[-5.0]], keys=[(i,) for i in range(4)], method="exact")
    assert diagnose(exact).verdict == "reliable"
    d = diagnose(p, exact)
    assert d.verdict == "reliable" and d.numbers[0]["tv"] < 0.05 and abs(d.numbers[0]["log_z_error"]) < 0.2
    assert diagnose(p, {(0,): 1.0, (1,): 1.0}).verdict == "usable with care"
    off = dataclasses.replace(exact, log_z=exact.log_z - 2)
    assert diagnose(p, off).verdict == "interval unreliable"
    with pytest.raises(InputError, match="2 exact tables for 1"):
        diagnose(p, [{(0,): 1.0}] * 2)


def ar1(c: int, d: int, rho: float, seed: int, start: float = 0.0) -> torch.Tensor:
    e, x = torch.randn(c, d, generator=generator(seed), dtype=D), torch.full((c, d), start, dtype=D)
    for t in range(1, d):
        x[:, t] = rho * x[:, t - 1] + math.sqrt(1 - rho**2) * e[:, t]
    return x


def chain(x: torch.Tensor, accepted: float) -> Particles:
    n = x.flatten().long()
    settings, counts = {"chains": len(x)}, {"proposals": 1000.0, "accepted": accepted}
    return made(torch.zeros(1, x.numel()), n=n, keys=[(int(i),) for i in n], method="mh", limit=int(n.max()) + 1,
                settings=settings, counts=counts)  # fmt: skip


def test_markov_chains():
    mixed = (ar1(4, 300, 0.3, 0) * 3 + 12).round().clamp_min(0)
    d = diagnose(chain(mixed, 400))
    assert d.verdict == "reliable" and d.numbers[0]["acceptance"] == 0.4 and 200 < d.numbers[0]["draws"] < 1200
    apart = mixed + 5 * torch.arange(4)[:, None]
    assert diagnose(chain(apart, 400)).verdict == "usable with care"
    assert "not mixed" in diagnose(chain(apart, 400)).reason
    still = torch.arange(1, 5)[:, None].expand(4, 50).float()
    assert diagnose(chain(still, 3)).verdict == "collapsed"
    assert diagnose(chain(mixed, 0)).verdict == "collapsed"
    assert diagnose(chain(torch.ones(1, 50), 40)).verdict == "collapsed"
    last = diagnose(chain(mixed[:, -1:], 400))
    assert last.verdict == "usable with care" and "kept" in last.reason and last.numbers[0]["chains"] == 4
    slow = (ar1(4, 300, 0.98, 1) * 3 + 12).round().clamp_min(0)
    assert diagnose(chain(slow, 400)).verdict == "usable with care"
    assert diagnose(made(torch.zeros(1, 8), method="best_of_n")).verdict == "usable with care"


def test_many_problems_report_the_worst():
    one = good()
    log_w = torch.cat([one.log_w, one.log_w.roll(1), torch.full_like(one.log_w, -math.inf)])
    log_z = torch.cat([one.log_z, one.log_z, torch.full_like(one.log_z, -math.inf)])
    p = made(log_w, log_z=log_z, names=("a", "b", "c"))
    d = diagnose(p)
    assert d.verdicts == ("reliable", "reliable", "no particle has weight") and d.verdict == d.verdicts[2]
    assert "[c]" in d.lines[-1] and len(d.numbers) == 3
    many = made(one.log_w.expand(30, -1), log_z=one.log_z.expand(30, -1))
    assert len(diagnose(many).lines) < 30 and "30 problems" in str(diagnose(many))
    with pytest.raises(InputError):
        diagnose(made(torch.zeros(0, 4)))


def test_the_length_limit_is_a_hint():
    n = torch.full((256,), 8)
    n[:20] = 3
    d = diagnose(good(n=n))
    assert d.verdict == "reliable" and "hint: 9" in str(d) and 0.8 < d.numbers[0]["at_limit"] < 1
    assert "hint" not in str(diagnose(good()))


def test_a_diagnosis_prints_in_colour():
    from rich.console import Console

    console = Console(width=200, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    console.print(diagnose(good()))
    assert "reliable" in console.export_text()
