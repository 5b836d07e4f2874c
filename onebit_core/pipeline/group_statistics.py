"""GroupStatistics: what calibration recorded about the input of one group of linears.

An ordinary linear reads every token. An expert e reads the tokens N_e that the router sends to it:

    gate, up    H_e = mean over N_e of x x^T           down    H_e = mean over N_e of z_e z_e^T

with x what enters the mixture and z_e the expert's own inner states. The weight of first tokens does not apply: no
other token reads them here.

An expert with fewer tokens than an eighth of its inputs would be fitted to a handful of directions, and one without
tokens to nothing. Such a linear is quantized on all tokens of the block, those of others included; its report says so.
They are what a router confuses with the expert's own tokens, and they have at least the block's common directions.
Many tools send all tokens to all experts always; here the others keep their own, which is what they will see.

No expert runs for its neighbours: a hook at the mixture gets all tokens and their experts, gate and up are recorded
from those, and down after running gate and up alone. The groups of a step are recorded together, as many in one pass
over the samples as have their Hessians in HESSIANS_AT_ONCE bytes.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from onebit_core.calibration.statistics import InputStatistics, StatisticsAccumulator
from onebit_core.model.blocks import Group, Groups
from onebit_core.model.experts import LinearExperts, experts_in
from onebit_core.pipeline.capture import CapturedInputs

HESSIANS_AT_ONCE = 1 << 30
"""Bytes; one Hessian is recorded even if it is larger."""

INPUTS_PER_TOKEN = 8
"""An expert is known by its own tokens if it has one for so many of its inputs."""

NEVER_REACHED = "experts calibration never reached"
RARELY_REACHED = "experts calibration reached with too few tokens"


@dataclass(frozen=True, kw_only=True)
class GroupStatistics:
    """One group with what was recorded for it.

    Attributes:
        linears: the group.
        statistics: of its input; None without calibration.
        notes: what reports should say about it.
    """

    linears: Group
    statistics: InputStatistics | None = None
    notes: tuple[str, ...] = ()


def step_statistics(
    captured: CapturedInputs, block: nn.Module, step: Groups, first_token_weight: float
) -> Iterator[GroupStatistics]:
    """Yield the statistics of every group of one step; passes over the samples are made as they are asked for.

    Args:
        captured: the samples at the input of the block.
        block: its earlier steps are quantized.
        step: the groups; experts of one kind, or a single other group.
        first_token_weight: of the first token of every sample, for ordinary linears.
    """
    mixture = experts_in(block)
    if mixture is None or not step[0][0].startswith(f"{mixture[0]}."):
        for group in step:
            yield GroupStatistics(linears=group, statistics=captured.statistics(block, group[0], first_token_weight))
        return
    experts = _ExpertInputs(captured, block, *mixture)
    starved: dict[Group, str] = {}
    for group, statistics in experts.record(step, routed=True):
        if statistics.num_tokens * INPUTS_PER_TOKEN < len(statistics.hessian_II):
            starved[group] = RARELY_REACHED if statistics.num_tokens else NEVER_REACHED
        else:
            yield GroupStatistics(linears=group, statistics=statistics)
    for group, statistics in experts.record(tuple(starved), routed=False):
        yield GroupStatistics(linears=group, statistics=statistics, notes=(starved[group],))


def recorded_at_once(num_groups: int, in_features: int) -> int:
    """Return how many groups of so wide an input one pass over the samples records."""
    return min(num_groups, max(1, HESSIANS_AT_ONCE // (torch.float32.itemsize * in_features**2)))


class _ExpertInputs:
    """Records the inputs of experts."""

    def __init__(self, captured: CapturedInputs, block: nn.Module, name: str, experts: LinearExperts) -> None:
        self.captured, self.block, self.name, self.experts = captured, block, name, experts

    def record(self, groups: Groups, *, routed: bool) -> Iterator[tuple[Group, InputStatistics]]:
        """Yield every group with its statistics, over its own tokens (routed) or over all."""
        if not groups:
            return
        if not routed and not groups[0][0].endswith(".down_proj"):  # all gates and ups read the same
            (statistics,) = self._pass(groups[:1], routed=False)
            yield from ((group, statistics) for group in groups)
            return
        in_features: int = self.block.get_submodule(groups[0][0]).in_features  # type: ignore[assignment]
        size = recorded_at_once(len(groups), in_features)
        for start in range(0, len(groups), size):
            part = groups[start : start + size]
            yield from zip(part, self._pass(part, routed=routed), strict=True)

    def _pass(self, groups: Groups, *, routed: bool) -> Iterable[InputStatistics]:
        """Run all samples once; the sums are divided one by one, as they are asked for."""
        linears = [self.block.get_submodule(group[0]) for group in groups]
        names = [group[0].removeprefix(f"{self.name}.") for group in groups]
        accumulators = [
            StatisticsAccumulator(linear.in_features, device=self.captured.device)  # type: ignore[arg-type]
            for linear in linears
        ]

        def record(arguments: tuple[Tensor, ...]) -> None:
            hidden_ND, top_k_index_NK, *_ = arguments
            for name, accumulator in zip(names, accumulators, strict=True):
                rows_NI = self.experts.input_of(name, hidden_ND, top_k_index_NK if routed else None)
                accumulator.add(rows_NI)

        self.captured.run_up_to(self.block, self.name, record)
        return (accumulator.finish() for accumulator in accumulators)
