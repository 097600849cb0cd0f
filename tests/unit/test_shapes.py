"""Models of known shapes, the memory a step plans for, and the plain loop that bench speed compares with."""

from __future__ import annotations

import pytest

from retrodict.bench import step
from retrodict.errors import InputError
from retrodict.models.load import load
from retrodict.training.memory import estimate, micro_batch
from retrodict.training.settings import settings

pytestmark = pytest.mark.hf


def test_random_shapes_are_the_same_at_every_call() -> None:
    a, b = (load("random:tiny", dtype="float32", device="cpu") for _ in range(2))
    assert a.version == b.version and a.vocab_size == 512
    assert a.tokenizer.decode(a.tokenizer.encode("café")) == "café"
    with pytest.raises(InputError, match="no shape 'tinny'.*tiny"):
        load("random:tinny")


def test_the_estimate_grows_with_the_batch_and_micro_fits() -> None:
    lm = load("random:tiny", dtype="float32", device="cpu")
    run = step.prepared(lm, 8, 10, 6, 4, rank=4)
    few, many = (estimate(run.target, run.policy, settings(objective="subtb", samples=n)) for n in (8, 64))
    assert few is not None and many is not None
    assert many.per_row == few.per_row and many.peak(64) > few.peak(8) > sum(
        p.numel() * 4
        for p in run.policy.lm.module.parameters()  # pyright: ignore[reportAttributeAccessIssue]
    )
    lean = estimate(run.target, run.policy, settings(objective="subtb", samples=64, checkpointing=True))
    assert lean is not None and lean.per_row < many.per_row / 5
    assert micro_batch(run.target, run.policy, settings(micro=3)) == 3
    assert micro_batch(run.target, run.policy, settings(samples=16)) == 16


def test_the_textbook_loop_and_ours_run_a_step() -> None:
    """Timed things must run; that ours learns the right law is tested in tests/exact."""
    lm = load("random:tiny", dtype="float32", device="cpu")
    run = step.prepared(lm, 4, 10, 6, 4, rank=4)
    seconds, tokens = step.textbook(run, 4)
    assert seconds > 0 and tokens > 4 * (10 + 6)
    found = step.timed(run, 2, warm=1)
    assert found["seconds"] > 0 and found["seconds_reward"] > 0
