"""One weight at a time: make it, let every contestant lay it out, check them, time them in turns, write lines.

Making and packing a weight costs more than multiplying by it, so all cases of a weight are measured together.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor

from benchmarks.kernel_bench.check import (
    TOLERANCE,
    compared_rows,
    exact_product,
    largest_error,
)
from benchmarks.kernel_bench.contestants import Contestant, Maker
from benchmarks.kernel_bench.device import Peaks
from benchmarks.kernel_bench.results import Line
from benchmarks.kernel_bench.shapes import Case, Shape
from benchmarks.kernel_bench.timing import Turn, copies_for, interleaved_medians, make_turn
from benchmarks.kernel_bench.weights import make_inputs, make_operands
from onebit_core.kernels.planes import dense_weight

Result = TypeVar("Result")

SLOW_SECONDS = 0.6
"""A contestant whose call is expected to last longer is left out of a case."""


@dataclass(frozen=True, kw_only=True)
class RunInfo:
    """When, where and how a run was made; the columns of the same names."""

    device: str
    date: str
    command: str
    threads: int
    versions: str


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What is the same for every case of a run.

    Attributes:
        device: cpu, cuda or cuda:N.
        dtype: of x, for ours.
        repetitions: turns of every contestant.
        cold_bytes: what the copies of one contestant exceed in a cold case.
        memory_bytes: at most, for the copies of one contestant.
        peaks: of the device.
        ours: our backends by name.
        rivals: others by name.
        side_backends: ours that are measured up to `side_tokens` only: slower instruction sets and the reference.
        side_tokens: see there.
        about: columns that are the same on every line.
        skip: told what is left out, and why.
    """

    device: str
    dtype: torch.dtype
    repetitions: int
    cold_bytes: int
    memory_bytes: int
    peaks: Peaks
    ours: Mapping[str, Maker]
    rivals: Mapping[str, Maker]
    side_backends: frozenset[str]
    side_tokens: int
    about: RunInfo
    skip: Callable[[str, str], None]


@dataclass
class _Weight:
    """A weight as all contestants hold it, and how long each took per token so far."""

    ours: list[Contestant]
    rivals: list[Contestant]
    dense_OI: Tensor
    pace: dict[str, tuple[int, float]] = field(default_factory=dict)

    def all(self) -> list[Contestant]:
        return [*self.ours, *self.rivals]


def measure_group(shape: Shape, kind: str, cases: Sequence[Case], setting: Setting) -> Iterator[list[Line]]:
    """Measure all cases of one weight; yields the lines of each case."""
    operands = make_operands(kind, shape.rows, shape.columns, setting.device)

    def made(makers: Mapping[str, Maker]) -> list[Contestant]:
        tried = [
            _attempt(name, f"{shape} {kind}", partial(maker, operands, setting.dtype), setting)
            for name, maker in makers.items()
        ]
        return [contestant for contestant in tried if contestant is not None]

    weight = _Weight(made(setting.ours), made(setting.rivals), dense_weight(operands))
    for case in sorted(cases, key=lambda case: (case.cache, case.tokens)):
        yield _measure(case, weight, setting)


def _attempt(name: str, label: str, work: Callable[[], Result], setting: Setting) -> Result | None:
    """Return the result of a contestant's work, or None where it fails: the others go on without it."""
    try:
        return work()
    except Exception as error:  # noqa: BLE001 - others' libraries raise whatever they like, also what is no bug
        text = str(error).strip().partition("\n")[0]
        setting.skip(name, f"{label}: {type(error).__name__}: {text}")
        return None


def _measure(case: Case, weight: _Weight, setting: Setting) -> list[Line]:
    """Check and time one case."""
    label = f"{case.shape} {case.format} M={case.tokens}"
    exact = _Exact(case, weight.dense_OI, setting.device)
    errors: dict[str, float] = {}
    turns: dict[str, Turn] = {}
    for contestant in weight.all():
        name = contestant.name
        reason = _why_not(case, contestant, weight, setting)
        if reason is not None:
            if reason:
                setting.skip(name, f"{label}: {reason}")
            continue
        error = _attempt(name, label, partial(exact.error_of, contestant), setting)
        if error is None:
            continue
        if error > (contestant.tolerance or TOLERANCE[contestant.dtype]):
            setting.skip(name, f"{label}: WRONG, not timed: error {error:.2g} of the largest output")
            continue
        player = contestant.player(exact.x_for(contestant), _copies(case, contestant, setting))
        make = partial(make_turn, player, device=setting.device, hot=case.cache == "hot")
        turn = _attempt(name, label, make, setting)
        if turn is not None:
            turns[name], errors[name] = turn, error
    seconds_of = interleaved_medians(turns, setting.repetitions)
    weight.pace.update({name: (case.tokens, seconds) for name, seconds in seconds_of.items()})
    ours = [one for one in weight.ours if one.name in turns]
    rivals: list[Contestant | None] = [one for one in weight.rivals if one.name in turns]
    return [
        _line(case, one, rival, seconds_of, errors[one.name], setting) for one in ours for rival in (rivals or [None])
    ]


def _why_not(case: Case, contestant: Contestant, weight: _Weight, setting: Setting) -> str | None:
    """Return None where a contestant takes part; a reason, empty where it need not be told."""
    if contestant.name in setting.side_backends and case.tokens > setting.side_tokens:
        return ""
    if contestant.name == "reference" and case.cache == "cold":
        return ""
    tokens, seconds = weight.pace.get(contestant.name, (1, 0.0))
    return "would take too long" if seconds * case.tokens / tokens > SLOW_SECONDS else None


class _Exact:
    """The float64 product of a case, made once for every dtype of x: rounding x is no error of the kernel."""

    def __init__(self, case: Case, dense_OI: Tensor, device: str) -> None:
        self.case, self.dense_OI, self.device = case, dense_OI, device
        self.rows_R = compared_rows(case.shape.rows, case.shape.columns, case.tokens)
        self._made: dict[torch.dtype, tuple[Tensor, Tensor]] = {}

    def x_for(self, contestant: Contestant) -> Tensor:
        """Return the activations in the contestant's dtype."""
        return self._both(contestant.dtype)[0]

    def error_of(self, contestant: Contestant) -> float:
        """Multiply once and compare."""
        x_TI, exact_TR = self._both(contestant.dtype)
        call = contestant.player(x_TI, 1)
        return largest_error(call.calls[0](), exact_TR, self.rows_R)

    def _both(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        if dtype not in self._made:
            x_TI = make_inputs(self.case.tokens, self.case.shape.columns, dtype, self.device)
            self._made[dtype] = (x_TI, exact_product(self.dense_OI, x_TI, self.rows_R))
        return self._made[dtype]


def _copies(case: Case, contestant: Contestant, setting: Setting) -> int:
    if case.cache == "hot":
        return 1
    return copies_for(contestant.weight_bytes, target_bytes=setting.cold_bytes, limit_bytes=setting.memory_bytes)


def _line(
    case: Case,
    ours: Contestant,
    rival: Contestant | None,
    seconds_of: Mapping[str, float],
    error: float,
    setting: Setting,
) -> Line:
    shape, seconds = case.shape, seconds_of[ours.name]
    products = shape.rows * shape.columns * case.tokens
    activations = case.tokens * (shape.rows + shape.columns) * ours.dtype.itemsize
    possible = setting.peaks.possible_seconds(
        moved_bytes=ours.weight_bytes + activations, operations=2.0 * products, hot=case.cache == "hot"
    )
    return Line(
        device=setting.about.device,
        date=setting.about.date,
        command=setting.about.command,
        threads=setting.about.threads,
        versions=setting.about.versions,
        backend=ours.name,
        format=case.format,
        bits=8 * ours.weight_bytes / (shape.rows * shape.columns),
        model=shape.model,
        N=shape.rows,
        K=shape.columns,
        M=case.tokens,
        dtype=str(ours.dtype).removeprefix("torch."),
        cache=case.cache,
        copies=_copies(case, ours, setting),
        median_us=1e6 * seconds,
        rival=rival.name if rival else "",
        rival_us=1e6 * seconds_of[rival.name] if rival else None,
        ratio=seconds_of[rival.name] / seconds if rival else None,
        gweights_per_s=products / seconds / 1e9,
        fraction_of_roofline=possible / seconds,
        peak_gb_per_s=setting.peaks.bytes_per_second / 1e9,
        peak_gops_per_s=setting.peaks.operations_per_second / 1e9,
        error=error,
    )
