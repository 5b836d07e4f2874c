"""What calibration records about experts: their own tokens where there are enough, and all tokens where not."""

import pytest
import torch

from onebit_core.calibration.statistics import StatisticsAccumulator
from onebit_core.model.blocks import steps_of
from onebit_core.model.loading import load_original, open_original
from onebit_core.pipeline import group_statistics
from onebit_core.pipeline.capture import CapturedInputs
from onebit_core.pipeline.group_statistics import (
    NEVER_REACHED,
    RARELY_REACHED,
    recorded_at_once,
    step_statistics,
)
from tests.support.tiny_model import never_route_to, save_tiny_model

IDS = torch.randint(0, 256, (4, 32), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """One mixed block whose expert 3 no token reaches."""
    path = save_tiny_model(tmp_path_factory.mktemp("mixture"), architecture="mixtral", num_layers=1)
    never_route_to(path, block=0, expert=3)
    return path


def recorded(folder, ids=IDS):
    """Return linear name to what is recorded for it in the first block, and the notes."""
    original = open_original(str(folder))
    original.load_outer("cpu")
    captured = CapturedInputs(original, ids, "cpu")
    block = original.load_block(0, "cpu")
    found = {}
    for step in steps_of(block, original.layout):
        for group in step_statistics(captured, block, step, 64.0):
            found.update(dict.fromkeys(group.linears, (group.statistics, group.notes)))
    return found


@torch.no_grad()
def expected_states(folder, ids):
    """Return what transformers' own mixture gets: hidden states [N, D] and chosen experts [N, K]; and its weights."""
    model, _ = load_original(str(folder), dtype=torch.float32)
    experts = model.model.layers[0].mlp.experts
    calls = []
    experts.register_forward_pre_hook(lambda _, arguments: calls.append(arguments))
    for row in ids:
        model(row[None])
    return torch.cat([call[0] for call in calls]), torch.cat([call[1] for call in calls]), experts


def moments(rows):
    return rows.T @ rows / len(rows)


def inner_states(experts, number, rows):
    gate, up = (rows @ experts.gate_up_proj[number].T).chunk(2, dim=-1)
    return torch.nn.functional.silu(gate) * up


def assert_near(found, expected):
    """Products may be made with bfloat16 inputs, where the CPU has them."""
    assert (found - expected).norm() < 2e-2 * expected.norm()


def test_an_expert_is_calibrated_on_its_own_tokens(folder):
    """Gate and up on the tokens routed there, without a weight on first ones; down on the expert's inner states."""
    found = recorded(folder)
    hidden, index, experts = expected_states(folder, IDS)
    reached = [number for number in range(4) if (index == number).any(-1).sum() >= 8]
    assert len(reached) >= 2
    for number in reached:
        rows = hidden[(index == number).any(-1)]
        for linear, expected in {
            "gate_proj": rows, "up_proj": rows, "down_proj": inner_states(experts, number, rows),
        }.items():  # fmt: skip
            statistics, notes = found[f"mlp.experts.{number}.{linear}"]
            assert notes == ()
            assert abs(statistics.num_tokens - len(rows)) <= 2  # a tie may fall otherwise in bfloat16 products
            assert_near(statistics.hessian_II, moments(expected))


def test_an_expert_without_tokens_is_calibrated_on_all(folder):
    """It is named; the statistics are those of every token of the block, through its own gate and up for down."""
    found = recorded(folder)
    hidden, index, experts = expected_states(folder, IDS)
    assert not (index == 3).any()
    for linear, expected in {
        "gate_proj": hidden, "up_proj": hidden, "down_proj": inner_states(experts, 3, hidden),
    }.items():  # fmt: skip
        statistics, notes = found[f"mlp.experts.3.{linear}"]
        assert notes == (NEVER_REACHED,)
        assert statistics.num_tokens == IDS.numel()
        assert_near(statistics.hessian_II, moments(expected))


def test_too_few_tokens_are_not_trusted(folder):
    """With 6 tokens, fewer than an eighth of 64 inputs, every expert that was reached is calibrated on all of them."""
    found = recorded(folder, IDS[:1, :6])
    for number in range(4):
        statistics, notes = found[f"mlp.experts.{number}.gate_proj"]
        assert notes[0] in (NEVER_REACHED, RARELY_REACHED)
        assert statistics.num_tokens == 6
    assert found["mlp.experts.3.gate_proj"][1] == (NEVER_REACHED,)
    assert {found[f"mlp.experts.{number}.gate_proj"][1] for number in range(3)} >= {(RARELY_REACHED,)}


def test_ordinary_linears_are_recorded_as_ever(folder):
    """Attention's input weighs first tokens up, and no note is made however few tokens there are."""
    found = recorded(folder, IDS[:1, :2])
    statistics, notes = found["self_attn.q_proj"]
    assert notes == ()
    assert statistics.num_tokens == 2


def test_many_passes_record_the_same_as_one(folder, monkeypatch):
    """One Hessian a pass, bit for bit."""
    together = recorded(folder)
    monkeypatch.setattr(group_statistics, "HESSIANS_AT_ONCE", 1)
    assert recorded_at_once(4, 64) == 1
    apart = recorded(folder)
    assert together.keys() == apart.keys()
    for name, (statistics, notes) in together.items():
        assert torch.equal(statistics.hessian_II, apart[name][0].hessian_II)
        assert notes == apart[name][1]


def test_hessians_at_once_are_bounded():
    """128 experts of 2048 inputs (16 MiB each) need two passes; one Hessian above the bound is still recorded."""
    assert recorded_at_once(128, 2048) == 64
    assert recorded_at_once(8, 14336) == 1
    assert recorded_at_once(8, 16385) == 1
    assert recorded_at_once(4, 64) == 4


@pytest.mark.parametrize("sizes", [(0,), (0, 5, 0, 1), (3, 4)])
def test_picked_tokens_are_summed_whatever_their_number(sizes):
    """Batches of any length, none included; no row of them is a first token."""
    draw = torch.Generator().manual_seed(1)
    batches = [torch.randn(size, 16, generator=draw) for size in sizes]
    accumulator = StatisticsAccumulator(16, first_token_weight=64.0)
    for batch in batches:
        accumulator.add(batch)
    statistics = accumulator.finish()
    rows = torch.cat(batches)
    assert statistics.num_tokens == len(rows)
    assert torch.isfinite(statistics.hessian_II).all()
    if len(rows):
        assert_near(statistics.hessian_II, moments(rows))
    else:
        assert not statistics.hessian_II.any()
