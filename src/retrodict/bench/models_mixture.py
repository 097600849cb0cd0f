"""``retrodict bench models --parts mixture``: an entangled mixture by exact, mean-field and amortized EM; clusterings.

Entangled: 600 points of the petals (``latent.mixture.petals``), 1,000 held out, the first three starts from which EM
finds the petals with exact posteriors and with eight exact draws of each (others end at local optima whatever the
E-step). Held-out log-likelihood is exact. Clusterings: data sets of eight points, the means integrated out, against
all 256 assignments.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch

from retrodict.bench.rows import Row, at_most, show_only
from retrodict.latent.clusters import cluster_target, simulate_clusters
from retrodict.latent.data import data_problems
from retrodict.latent.enumerated import distances, factorised
from retrodict.latent.mixture import Mixture, petals, start
from retrodict.policies.net import NetPolicy
from retrodict.rng import generator
from retrodict.training.amortize import amortize
from retrodict.training.learn import learn

SUITE = "models"
NAME, WHOLE = "entangled mixture, 4 x 4", "clusterings of 8 points"
GAP = 0.02
"""Nats of held-out log-likelihood a point, from exact EM."""
DISTANCES = {NAME: 0.02, WHOLE: 0.05}
"""Mean total variation between a policy and exact posteriors, of two variables and of eight."""
STARTS, ROUNDS = 3, 90


def rows(seed: int = 0) -> Iterator[list[Row]]:
    """One list for each start, then the clusterings."""
    truth = petals()
    _, x = truth.sample(600, generator(seed, "cpu", 0))
    _, test = truth.sample(1000, generator(seed, "cpu", 1))
    at = float(truth.log_evidence(test).mean())
    yield [show_only(SUITE, NAME, "the truth", "held-out log-likelihood (nats a point)", at)]
    for where in itertools.islice(good_starts(x, seed), STARTS):
        yield from_start(x, test, where, seed)
    yield clusterings(seed)


def good_starts(x: torch.Tensor, seed: int) -> Iterator[int]:
    """Starts from which EM comes to within a tenth of a nat of the petals themselves, exactly and with eight draws."""
    need, gen = float(petals().log_evidence(x).mean()) - 0.1, generator(seed, "cpu", 3)
    for where in range(200):
        exact, drawn = (Mixture(x, start(x, (4, 4), where, sd=0.55)) for _ in range(2))
        for _ in range(40):
            exact.exact_step()
            p = drawn.theta.log_joint(x).softmax(1)
            z = torch.multinomial(p, 8, replacement=True, generator=gen)
            drawn.maximise(x, torch.zeros_like(p).scatter_add_(1, z, torch.full(z.shape, 1 / 8, dtype=p.dtype)))
        if min(float(m.log_evidence().mean()) for m in (exact, drawn)) > need:
            yield where


def from_start(x: torch.Tensor, test: torch.Tensor, where: int, seed: int) -> list[Row]:
    """Every method from one start."""

    def model() -> Mixture:
        return Mixture(x, start(x, (4, 4), where, sd=0.55))

    exact, field, joint, note = model(), model(), model(), f"start {where}"
    learn(exact, rounds=ROUNDS)
    for _ in range(ROUNDS):
        field.maximise(x, factorised(field.target, 15).exp())
    q = NetPolicy(joint.space, joint.problems, seed=seed)
    told = learn(joint, q, rounds=ROUNDS, e_steps=14, draws=8, weighted=True, objective="vargrad", samples=4,
                 per_step=64, lr=1e-2, sleep=0.5, dreams=256, threshold=(0.03, 0.1, 700), seed=seed)  # fmt: skip
    best = float(exact.theta.log_evidence(test).mean())
    each = {"exact EM": exact, "mean-field EM": field, "amortized EM (VarGrad and sleep)": joint}
    out: list[Row] = []
    for method, m in each.items():
        value, held = float(m.theta.log_evidence(test).mean()), (SUITE, NAME, method)
        out.append(show_only(*held, "held-out log-likelihood (nats a point)", value, note))
        if m is field:
            out.append(
                show_only(*held, "behind exact EM (nats a point)", best - value, f"{note}; a factorised posterior")
            )
        elif m is joint:
            done = sum(r.value is not None for r in told.rounds)
            out.append(at_most(*held, "behind exact EM (nats a point)", best - value, GAP, f"{note}; {done} M-steps"))
    fresh = data_problems(test)
    far = distances(joint.of(fresh), q.on(fresh))
    held = (SUITE, NAME, "amortized EM (VarGrad and sleep)")
    out.append(at_most(*held, "mean total variation to exact posteriors", float(far.mean()), DISTANCES[NAME],
                       f"{note}; 1,000 held-out points, exact law"))  # fmt: skip
    out.append(show_only(*held, "worst total variation", float(far.max()), note))
    return out


def clusterings(seed: int) -> list[Row]:
    """A joint over the labels of all points, with and without the annealing that keeps both namings of clusters."""
    like = cluster_target(torch.zeros(1, 8, 2, dtype=torch.float64), 2, 0.5, 1.5)
    target, _ = simulate_clusters(like, 4, generator(seed, "cpu", 2))
    plan = {"objective": "vargrad", "steps": 700, "samples": 64, "lr": 1e-2, "lr_end": 0.02, "tempered": 0.5,
            "temperatures": (1.0, 1.0), "epsilon": 0.1, "evaluate": 2, "seed": seed}  # fmt: skip
    out: list[Row] = []
    for method, more in {"VarGrad, annealed": {"reward_temperature": (20.0, 1.0, 400)}, "VarGrad": {}}.items():
        q = NetPolicy(target.space, target.problems, seed=seed)  # pyright: ignore[reportArgumentType]
        amortize(target, q, **plan, **more)
        far, note = distances(target, q), "4 data sets, 256 assignments each, exact law"
        held, value = (SUITE, WHOLE, method), float(far.mean())
        what = "mean total variation to exact posteriors"
        out.append(at_most(*held, what, value, DISTANCES[WHOLE], note) if more else show_only(*held, what, value, note))
        out.append(show_only(*held, "worst total variation", float(far.max())))
    return out
