"""Taking turns, walking through copies, and leaving out what is wrong."""

import dataclasses

import pytest
import torch

from benchmarks.kernel_bench.contestants import Contestant
from benchmarks.kernel_bench.device import Peaks
from benchmarks.kernel_bench.run import RunInfo, Setting, measure_group
from benchmarks.kernel_bench.shapes import Case, Shape
from benchmarks.kernel_bench.timing import Player, copies_for, interleaved_medians, make_turn
from onebit_core.kernels.planes import dense_weight


def test_contestants_take_turns():
    """A B A B, so that a busy second hits both."""
    order = []

    def turn_of(name, values):
        numbers = iter(values)

        def turn():
            order.append(name)
            return next(numbers)

        return turn

    turns = {"a": turn_of("a", [3.0, 1.0, 2.0]), "b": turn_of("b", [5.0, 5.0, 9.0])}
    assert interleaved_medians(turns, 3) == {"a": 2.0, "b": 5.0}
    assert order == ["a", "b"] * 3


@pytest.mark.parametrize(("hot", "used"), [(False, {0, 1, 2}), (True, {0})])
def test_cold_turns_walk_through_all_copies_and_hot_ones_repeat_the_first(hot, used):
    """The state of a library is brought back before every turn."""
    seen, prepared = [], []
    calls = [lambda number=number: seen.append(number) or torch.zeros(1) for number in range(3)]
    turn = make_turn(Player(calls, lambda: prepared.append(1)), device="cpu", hot=hot)
    seen.clear()
    assert turn() > 0
    assert set(seen) == used
    assert len(prepared) == 2


def test_copies_exceed_the_cache_within_the_memory_that_may_be_used():
    """Two at least where they fit, one where nothing does."""
    assert copies_for(10, target_bytes=100, limit_bytes=1000) == 10
    assert copies_for(30, target_bytes=100, limit_bytes=1000) == 4
    assert copies_for(400, target_bytes=100, limit_bytes=1000) == 2
    assert copies_for(10, target_bytes=100, limit_bytes=50) == 5
    assert copies_for(4000, target_bytes=100, limit_bytes=1000) == 1


def dense(operands, dtype, factor=1.0):
    weight = dense_weight(operands).to(dtype) * factor
    return Contestant(
        name="",
        weight=weight,
        multiply=lambda weight, x: x @ weight.T,
        copy=torch.Tensor.clone,
        weight_bytes=weight.nbytes,
        dtype=dtype,
    )


def named(name, factor=1.0):
    return lambda operands, dtype: dataclasses.replace(dense(operands, dtype, factor), name=name, _copies=[])


def broken(operands, dtype):
    raise NotImplementedError("not for this shape\nsecond line")


def test_a_wrong_kernel_is_not_timed_and_a_broken_one_stops_nobody():
    """Both are left out, with the reason."""
    left_out = {}
    setting = Setting(
        device="cpu",
        dtype=torch.float32,
        repetitions=5,
        cold_bytes=1 << 20,
        memory_bytes=1 << 22,
        peaks=Peaks(1e9, 1e12),
        ours={"good": named("good"), "wrong": named("wrong", 1.01)},
        rivals={"rival": named("rival"), "broken": broken},
        side_backends=frozenset(),
        side_tokens=1,
        about=RunInfo(device="d", date="2026-01-02", command="c", threads=1, versions="v"),
        skip=left_out.setdefault,
    )
    shape = Shape(64, 128)
    cases = [Case(shape, "sign", tokens, cache) for tokens in (1, 4) for cache in ("hot", "cold")]
    lines = [line for found in measure_group(shape, "sign", cases, setting) for line in found]
    assert [(line.backend, line.rival, line.M, line.cache) for line in lines] == [
        ("good", "rival", tokens, cache) for cache in ("cold", "hot") for tokens in (1, 4)
    ]
    assert all(line.ratio == pytest.approx(line.rival_us / line.median_us) for line in lines)
    assert {line.copies for line in lines if line.cache == "cold"} == {(1 << 20) // (64 * 128 * 4)}
    assert "WRONG" in left_out["wrong"]
    assert left_out["broken"].endswith("NotImplementedError: not for this shape")
