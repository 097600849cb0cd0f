"""The replay buffer on disk, and rows that people wrote."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from replays import LM, drawn, equal, line, policy_of, target_of

from retrodict.errors import InputError
from retrodict.models.tabular import TabularLM
from retrodict.models.tiny import TinyLM
from retrodict.particles import Particles
from retrodict.policies.base import rollout
from retrodict.policies.lm import LMPolicy
from retrodict.records import FORCED, FREE, PAD, Problem, cat_rollouts
from retrodict.rng import generator
from retrodict.samplers.importance import importance
from retrodict.spaces.stops import Stops
from retrodict.spaces.strings import Strings
from retrodict.spaces.tools import Tool, with_tool
from retrodict.targets.algebra import Target
from retrodict.targets.ready import infill, posterior, until
from retrodict.testing import SetPolicy, set_target
from retrodict.training.distance import DISTANCES, bag_distance, edit_distance
from retrodict.training.replay import Replay, written

# -- on disk ------------------------------------------------------------------------------------------------------


def full_buffer(**settings) -> tuple[Replay, Target]:
    target = target_of()
    buffer = Replay(6, model="m1", target="t1", **settings)
    for step in range(4):
        buffer.add(*drawn(target, 24, step), step=step)
    odd = line([[3, 1]], problem=9, tag=2.0)  # another layout: other terms, other dtypes
    buffer.add(odd, torch.tensor([-1.25]), [(3, 1, -(2**70))], step=2)
    return buffer, target


@pytest.mark.parametrize("settings", [{}, {"priority": "reward", "alpha": 0.5}, {"priority": "recency"},
                                      {"distance": bag_distance, "tolerance": 0.1}])  # fmt: skip
def test_a_file_draws_as_the_buffer_does(tmp_path: Path, settings: dict) -> None:
    buffer, target = full_buffer(**settings)
    path = buffer.save(tmp_path / "deep" / "replay.safetensors")
    back = Replay.load(path, model="m1", target="t1")
    assert [f.name for f in path.parent.iterdir()] == ["replay.safetensors"]
    assert (back.sizes(), back.staleness(7)) == (buffer.sizes(), buffer.staleness(7))
    names = ("capacity", "priority", "alpha", "tolerance", "distance", "model", "target")
    assert all(getattr(back, f) == getattr(buffer, f) for f in names)
    ask = torch.tensor([0, 1, 2, 9]).repeat(10)
    for seed in range(3):
        for which in (ask, ask[ask < 9], ask[ask == 9]):
            assert equal(buffer.draw(which, generator(seed))[0], back.draw(which, generator(seed))[0])
    for x in (buffer, back):  # and goes on alike
        x.add(*drawn(target, 24, 99), step=99)
    assert equal(buffer.draw(ask, generator(5))[0], back.draw(ask, generator(5))[0])
    Replay(3, model="m1", target="t1").save(path)
    assert len(Replay.load(path, model="m1", target="t1")) == 0


def test_a_distance_of_ones_own_is_given_again(tmp_path: Path) -> None:
    def mine(a, b) -> float:
        return abs(len(a) - len(b))

    path = Replay(distance=mine, tolerance=0.1).save(tmp_path / "r")
    with pytest.raises(InputError, match="give it as distance="):
        Replay.load(path, model="", target="")
    assert Replay.load(path, model="", target="", distance=mine).distance is mine


def test_a_file_of_another_model_or_target_is_refused_with_both_names(tmp_path: Path) -> None:
    path = full_buffer()[0].save(tmp_path / "r")
    with pytest.raises(InputError, match="model 'm1', and this run's model is 'm2'"):
        Replay.load(path, model="m2", target="t1")
    with pytest.raises(InputError, match="target 't1', and this run's target is ''"):
        Replay.load(path, model="m1", target="")


def test_every_damaged_or_foreign_file_is_one_line(tmp_path: Path) -> None:
    path = full_buffer()[0].save(tmp_path / "r")
    data = path.read_bytes()
    bad = {"empty": b"", "text": b"not a file of tensors", "half": data[: len(data) // 2], "long": data + b"\0",
           "a bit": data[:-5] + bytes([data[-5] ^ 1]) + data[-4:],
           "a setting": data.replace(b'\\"capacity\\": 6', b'\\"capacity\\": 7')}  # fmt: skip
    for why, content in bad.items():
        assert content != data, why
        path.write_bytes(content)
        with pytest.raises(InputError) as e:
            Replay.load(path, model="m1", target="t1")
        assert str(path) in str(e.value) and "\n" not in str(e.value) and "save" in str(e.value), why
    importance(target_of(), n=4, seed=0).save(path)
    with pytest.raises(InputError, match="holds no replay buffer; give a file that Replay.save wrote"):
        Replay.load(path, model="m1", target="t1")
    full_buffer()[0].save(path)
    with pytest.raises(InputError, match="holds no particles"):
        Particles.load(path)
    with pytest.raises(InputError, match="cannot read"):
        Replay.load(tmp_path / "nowhere", model="m1", target="t1")


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = full_buffer()[0].save(tmp_path / "r")
    old = path.read_bytes()

    def full(*_) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(InputError, match="No space left"):
        Replay(3).save(path)
    assert path.read_bytes() == old and [f.name for f in tmp_path.iterdir()] == ["r"]


def test_bad_settings_are_one_line() -> None:
    for settings, words in (
        ({"capacity": 0}, "capacity of at least 1"),
        ({"priority": "rewards"}, "unknown priority 'rewards'; did you mean 'reward'"),
        ({"alpha": -1.0, "priority": "reward"}, "alpha must be 0 or more"),
        ({"alpha": 2.0}, "alpha sharpens priority 'reward'; under 'uniform' leave it out"),
        ({"tolerance": 1.0}, "tolerance is a share"),
        ({"distance": edit_distance}, "does nothing at tolerance 0"),
    ):
        with pytest.raises(InputError, match=words):
            Replay(**settings)
    assert set(DISTANCES) == {"edit", "bag"}


# -- what people wrote --------------------------------------------------------------------------------------------


def test_written_rows_are_those_a_rollout_would_have_recorded() -> None:
    """Every field but log_b's source: compare with drawn rows, replayed from their ids alone."""
    target = posterior(TabularLM.random(".!ab ", order=2, seed=2), [Problem((2,), (3,)), Problem((3, 4), (2,))],
                       stop=(0, 1), max_tokens=4, min_tokens=1, limit="own_stop")  # fmt: skip
    policy = policy_of(target)
    rows = rollout(policy, torch.ones(300, dtype=torch.long), generator(0))
    for stop in (0, 1):
        mine = rows.take((rows.stop == stop).nonzero().squeeze(1))
        ids = [m[:n] for m, n in zip(mine.moves.tolist(), mine.n.tolist(), strict=True)]
        got = written(policy, 1, ids, stop)
        t = got.moves.shape[1]
        assert got.behaviour == {"source": "written"} and t == max(map(len, ids))
        for f in ("problem", "n", "stop", "moves", "kind", "can_stop"):
            want = getattr(mine, f)
            assert torch.equal(getattr(got, f), want[:, : getattr(got, f).shape[1]] if want.dim() > 1 else want), f
        for f in ("log_q", "log_b", "log_pb", "log_stop"):
            want = getattr(mine, f)[:, : getattr(got, f).shape[1]]
            assert torch.allclose(getattr(got, f), want, atol=1e-5), f


def test_written_rows_seed_a_buffer() -> None:
    target = infill(LM, "ab", "ba", stop=".", max_tokens=4, join="")
    policy = policy_of(target)
    rows = target.terms(written(policy, 0, [[1, 2], [3], [1, 1, 1, 2]]), every_prefix=True)
    assert target.space.show(rows) == ["ab.", " .", "aaab."]
    assert rows.log_b[2, 4] == 0.0 and not rows.can_stop[:, 0].any(), "the stop at the limit is forced"
    buffer = Replay(50)
    assert buffer.add(rows, target.log_gamma(rows), target.space.keys(rows)) == 3
    joined_with = cat_rollouts(
        [
            buffer.draw(torch.zeros(3, dtype=torch.long), generator(0))[0],
            target.terms(policy.sample(torch.zeros(3, dtype=torch.long), generator(0)), True),
        ]
    )
    assert set(joined_with.terms) == {"prior", "likelihood"}


def test_written_rows_of_other_spaces() -> None:
    say = posterior(LM, [Problem((1,), (2, 1))], stop=until("b "), max_tokens=4)
    policy = policy_of(say)
    rows = written(policy, 0, [[1, 2, 3], [1, 1, 1, 1]])
    assert rows.can_stop.tolist() == [[False, False, False, True, False], [False] * 4 + [True]]
    with pytest.raises(InputError, match="latent 1 may not stop after 2 moves"):
        written(policy, 0, [[2, 3], [1, 2]])
    with pytest.raises(InputError, match="latent 0 is over after 2 moves"):
        written(policy, 0, [[2, 3, 1]])
    sets = set_target(3)
    pair = SetPolicy(sets.space, sets.problems)  # pyright: ignore[reportArgumentType]
    rows = written(pair, 0, [[0, 2], [], [2, 1, 0]])
    assert torch.allclose(rows.log_pb.double().exp()[0, :2], torch.tensor([1.0, 0.5]).double())
    assert rows.log_b.dtype == rows.log_pb.dtype == torch.float64
    with pytest.raises(InputError, match="latent 0 has 2 as move 1, which is not legal"):
        written(pair, 0, [[2, 2]])
    tiny = TinyLM(".ab ", seed=3, dtype=torch.float64)
    empty = written(policy_of(posterior(tiny, [Problem((1,), (2,))], stop=".", max_tokens=3)), 0, [[]])
    assert empty.moves.shape == (1, 0) and empty.log_b.shape == (1, 1) and float(empty.log_b[0, 0]) < 0


def test_what_a_tool_writes_is_not_an_action() -> None:
    lm = TabularLM.random(".=12", order=1, seed=1)
    base = Strings(4, Stops((0,), in_text=True), 4, tokenizer=lm.tokenizer)
    space = with_tool(base, Tool(lambda text: "12" if text.endswith("=") else None, "=", room=4))
    policy = LMPolicy(lm, space, [Problem((2,))])
    rows = written(policy, 0, [[2, 1, 2, 3], [3]])
    assert rows.kind.tolist() == [[FREE, FREE, FORCED, FORCED], [FREE, PAD, PAD, PAD]]
    assert (rows.log_q[0, 2:] == 0).all() and (rows.log_b[0, 2:4] == 0).all() and (rows.log_q[0, :2] < 0).all()
    assert not rows.can_stop[0, 2:4].any()
    with pytest.raises(InputError, match="latent 0 has 3 as move 2, where the space puts 2 in"):
        written(policy, 0, [[2, 1, 3, 3]])
    with pytest.raises(InputError, match="latent 0 may not stop after 3 moves"):
        written(policy, 0, [[2, 1, 2]])


def test_what_cannot_be_written_is_named() -> None:
    policy = policy_of(infill(LM, "ab", "ba", stop=".", max_tokens=4, join=""))
    for ids, stop, words in (
        ([], 0, "no latents"),
        ([[1], [1, 2, 1, 2, 1]], 0, "latent 1 has 5 moves, over the limit of 4"),
        ([[1], [1, 0]], 0, r"latent 1 has 0 \('\.'\) as move 1, which is not legal; a stop is no move"),
        ([[1, 77]], 0, "latent 0 has 77 as move 1, which is not legal"),
        ([[-1]], 0, "latent 0 has -1 as move 0, which is not legal"),
        ([[1], []], 0, "latent 1 may not stop after 0 moves"),
        ([[1]], 1, "latent 0 ends with stop 1; give one from 0 to 0"),
    ):
        with pytest.raises(InputError, match=words):
            written(policy, 0, ids, stop)
    two = posterior(TabularLM.random(".!ab ", order=2, seed=2), [Problem((2,))], stop=(0, 1), max_tokens=2)
    with pytest.raises(InputError, match="latent 0 is stopped by its space after 2 moves, which is stop 0 and not 1"):
        written(policy_of(two), 0, [[2, 3]], 1)
