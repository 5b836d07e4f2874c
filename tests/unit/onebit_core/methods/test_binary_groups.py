"""What BiLLM's family shares: four values a row, the choice of salient columns, and feedback between blocks."""

import pytest
import torch

from onebit_core.errors import ConfigError
from onebit_core.methods.binary_groups import (
    bell_levels,
    blocks_of,
    check_blocks,
    choose_count,
    nearest,
    nearest_level,
    residual_levels,
    residual_scales,
    salient_columns,
    sweep_blocks,
)
from onebit_core.methods.second_order import inverse_factor, weight_error


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def hessian(columns: int, seed: int = 0) -> torch.Tensor:
    """Inputs that are correlated and of unequal size."""
    x = draw(4 * columns, columns, seed=seed) @ draw(columns, columns, seed=seed + 1) / columns**0.5
    return x.T @ x / len(x)


def test_two_signs_reproduce_four_values_that_are_sums_of_two_scales():
    """Shift, larger and smaller scale come back exactly, whatever their order in the row."""
    shift, large, small = 0.25, 1.0, 0.375
    values = torch.tensor([shift + a + b for a in (-large, large) for b in (-small, small)])
    row = values[torch.tensor([3, 0, 2, 1, 1, 2, 0, 3])]
    found_shift, scales = residual_scales(torch.stack((row, -row)))
    assert found_shift.tolist() == [shift, -shift]
    assert scales.tolist() == [[large, large], [small, small]]
    assert torch.equal(residual_levels(found_shift, scales)[0], values)
    assert torch.equal(nearest(row[None], residual_levels(found_shift, scales)[:1])[0], row)


def test_two_magnitude_groups_reproduce_their_four_values():
    """Wherever the border between the groups lies in the block."""
    levels = torch.tensor([-3.0, -0.5, 0.25, 4.0])
    index = torch.arange(60) % 4
    assert torch.equal(bell_levels(levels[index][None], 40)[0], levels)
    mostly_small = torch.where(torch.arange(60) < 48, levels[1 + index % 2], levels[3 * (index % 2)])
    assert torch.equal(bell_levels(mostly_small[None], 40)[0], levels)


def test_the_border_is_the_best_of_those_tried():
    """The same search with errors added up weight by weight."""
    weight = draw(7, 40) * draw(7, 40, seed=1)
    ordered = weight.abs().flatten().sort().values
    best = None
    for share in torch.linspace(0.1, 0.9, 9):
        border = ordered[round(float((ordered.numel() - 1) * share))]
        error, levels = 0.0, []
        for row in weight:
            ends = []
            for group in (row[row.abs() < border], row[row.abs() >= border]):
                mean = group.mean() if len(group) else torch.tensor(0.0)
                scale = (group - mean).abs().mean() if len(group) else torch.tensor(0.0)
                error += float(((group - mean).abs() - scale).square().sum())
                ends += [mean - scale, mean + scale]
            levels.append(torch.stack(ends).sort().values)
        if best is None or error < best[0]:
            best = error, torch.stack(levels)
    torch.testing.assert_close(bell_levels(weight, 9), best[1], rtol=1e-3, atol=1e-4)


def test_both_fits_leave_of_a_gaussian_what_is_known():
    """In blocks of 128 two signs leave 0.13, and so do two groups; a free table would leave 0.11."""
    blocks = draw(2000, 128)
    two_signs = nearest(blocks, residual_levels(*residual_scales(blocks)))
    two_groups = nearest(blocks, bell_levels(blocks, 40))
    assert abs(weight_error(blocks, two_signs) - 0.13) < 0.01
    assert abs(weight_error(blocks, two_groups) - 0.125) < 0.01


def test_the_nearest_of_four_levels_is_taken():
    """For a column and for a matrix; compared with all distances."""
    levels = draw(5, 4).sort(1).values
    values = draw(5, 9, seed=1)
    expected = (values[..., None] - levels[:, None]).abs().argmin(-1)
    assert torch.equal(nearest_level(values, levels), expected)
    assert torch.equal(nearest_level(values[:, 0], levels), expected[:, 0])


def test_salient_columns_are_those_whose_loss_costs_most():
    """Large weights count less in a column that feedback can repair."""
    weight = torch.ones(3, 4) * torch.tensor([1.0, 2.0, 3.0, 4.0])
    assert salient_columns(weight, torch.tensor([1.0, 1.0, 1.0, 0.1]), 2).tolist() == [False, True, True, False]


def test_the_number_of_salient_columns_is_the_one_of_least_error():
    """Compared with the loss of every count, block by block and row by row."""
    weight, curvature = draw(6, 48) * draw(1, 48, seed=1).exp(), draw(48, seed=2).exp()
    losses = {}
    for count in range(1, 13):
        total = 0.0
        for start in (0, 24):
            block, cost = weight[:, start : start + 24], curvature[start : start + 24]
            mask = salient_columns(block, cost, count)
            for part in (mask, ~mask):
                decided = nearest(block[:, part], residual_levels(*residual_scales(block[:, part])))
                total += float(((block[:, part] - decided).square() * cost[part]).sum())
        losses[count] = total
    assert choose_count(weight, curvature, 24) == min(losses, key=losses.get)


class Recorder:
    """Decides zeros, and keeps the blocks it was given."""

    def __init__(self) -> None:
        self.blocks: dict[int, torch.Tensor] = {}

    def fit(self, start: int, weight_OK: torch.Tensor) -> None:
        self.blocks[start] = weight_OK.clone()

    def decide(self, column: int, values_O: torch.Tensor) -> torch.Tensor:
        del column
        return torch.zeros_like(values_O)


@pytest.mark.parametrize("feedback", ["block", "column"])
def test_later_blocks_take_over_all_they_can(feedback):
    """What reaches a block is the least squares answer to the zeros decided before it: W_R + E H_BR H_RR^-1."""
    weight, moments, damping = draw(5, 24), hessian(24), 0.01
    recorder = Recorder()
    sweep_blocks(weight, inverse_factor(moments, damping), 8, recorder, feedback)
    damped = (moments + damping * moments.diagonal().mean() * torch.eye(24)).double()
    assert torch.equal(recorder.blocks[0], weight[:, :8])
    for start in (8, 16):
        taken = weight[:, :start].double() @ damped[:start, start:] @ damped[start:, start:].inverse()
        expected = (weight[:, start:].double() + taken)[:, :8].float()
        torch.testing.assert_close(recorder.blocks[start], expected, rtol=1e-3, atol=1e-3)


def test_blocks_without_other_columns_are_refused():
    """The message says how many could be salient; widths that 128 does not divide get narrower blocks."""
    with pytest.raises(ConfigError, match=r"salient 96: blocks of 576 input features have 96 columns.* at most 95"):
        check_blocks(128, 96, 576)
    check_blocks(128, 95, 576)
    assert blocks_of(128, 5, 576) == (6, 30)
    assert blocks_of(128, 0, 4096) == (32, 128)
    assert blocks_of(0, 0, 6) == (1, 3)
