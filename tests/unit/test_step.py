"""The two-phase step: micro-batches give the gradient of the whole batch; what goes wrong leaves no trace."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from retrodict.objectives import OBJECTIVES
from retrodict.records import Rollouts, Scores
from retrodict.rng import generator
from retrodict.testing.bugs_training import gradient_error
from retrodict.testing.trained import GFLOWNET, Table, fresh, training_targets
from retrodict.training.step import push

WHERE = "infill, own_stop"


@pytest.mark.parametrize("objective", GFLOWNET)
def test_micro_batches_give_the_gradient_of_the_whole_batch(objective: str) -> None:
    for micro in (1, 3, 100):
        assert gradient_error("pushed", objective, WHERE, micro) < 1e-9, micro


@pytest.mark.parametrize("objective", ["vargrad", "pooled"])
def test_accumulating_the_loss_does_not(objective: str) -> None:
    assert gradient_error("split", objective, WHERE, 3) > 0.05
    assert gradient_error("split", objective, WHERE, 100) < 1e-9  # one group: nothing is split


def test_a_batch_of_several_problems() -> None:
    for objective in ("pooled", "tb"):
        assert gradient_error("pushed", objective, "batch of problems", 5) < 1e-9


class Narrow(Table):
    """Runs out of memory where more than ``most`` rows carry gradient."""

    most = 3
    asked: list[int]

    def score(self, rollouts: Rollouts, raw: bool = False, grad: bool = False) -> Scores:
        if grad:
            self.asked.append(len(rollouts))
            if len(rollouts) > self.most:
                raise torch.cuda.OutOfMemoryError("planted")
        return super().score(rollouts, raw, grad)


def batch(kind: type[Table]) -> tuple[Any, Rollouts, torch.Tensor, torch.Tensor]:
    target = training_targets()[WHERE]
    policy = fresh(target, kind)
    rows = target.terms(fresh(target).sample(torch.zeros(10, dtype=torch.long), generator(3)), every_prefix=True)
    log_z = torch.zeros(1, dtype=torch.float64, requires_grad=True)
    return policy, rows, target.log_gamma(rows), log_z


def test_out_of_memory_halves_the_micro_batch_and_counts_nothing_twice() -> None:
    found = []
    for kind in (Table, Narrow):
        policy, rows, log_gamma, log_z = batch(kind)
        policy.asked = []
        policy.logits.grad = torch.ones_like(policy.logits)  # what was there before stays
        pushed = push(policy, OBJECTIVES["tb"], rows, log_gamma, log_z[rows.problem])
        found.append((policy.logits.grad, log_z.grad, pushed.loss))
    assert pushed.micro == 3 and policy.asked[0] == 10
    assert all(torch.allclose(torch.as_tensor(x), torch.as_tensor(y), atol=1e-12) for x, y in zip(*found, strict=True))


class Broken(Table):
    """Its last move is NaN."""

    def score(self, rollouts: Rollouts, raw: bool = False, grad: bool = False) -> Scores:
        s = super().score(rollouts, raw, grad)
        return Scores(s.log_q * torch.nan, s.log_stop)


def test_nan_is_told_apart_from_a_target_with_zeros() -> None:
    from retrodict.errors import InputError

    policy, rows, log_gamma, _ = batch(Broken)
    with pytest.raises(FloatingPointError, match="log q is NaN"):
        push(policy, OBJECTIVES["vargrad"], rows, log_gamma)
    assert policy.logits.grad is None
    policy, rows, log_gamma, _ = batch(Table)
    with pytest.raises(FloatingPointError, match="log gamma is NaN or infinite"):
        push(policy, OBJECTIVES["vargrad"], rows, log_gamma.clone().index_fill(0, torch.tensor([2]), torch.inf))
    with pytest.raises(InputError, match="floor= nats"):
        push(policy, OBJECTIVES["vargrad"], rows, log_gamma.clone().index_fill(0, torch.tensor([2]), -torch.inf))
