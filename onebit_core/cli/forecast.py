"""How `--plan` shows a forecast: bits, bytes, memory by item, time by stage."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING

from rich.console import Console

from onebit_core.cli.tables import table

if TYPE_CHECKING:  # importing it needs torch
    from onebit_core.pipeline.forecast import Forecast
    from onebit_core.pipeline.training_forecast import TrainingForecast

MIB = 2**20


def print_forecast(console: Console, found: Forecast) -> None:
    """Print a forecast as three small tables."""
    bits = [
        ("linear weights", f"{found.linear_true_bits:.3f}", f"{found.linear_nominal_bits:.3g} as advertised"),
        ("whole model", f"{found.whole_model_bits:.3f}", f"{found.artifact_bytes / 1e6:.1f} MB to write"),
    ]
    console.print(table("Bits per weight", ("of", "true", ""), (), bits))
    memory = found.memory
    items = [
        (field.name, f"{getattr(memory, field.name) / MIB:,.0f} MiB")
        for field in dataclasses.fields(memory)
        if field.name != "on_device" and getattr(memory, field.name)
    ]
    place = "GPU" if memory.on_device else "memory"
    peaks = [("at most at once, in memory", f"{memory.host_bytes / MIB:,.0f} MiB")]
    if memory.on_device:
        peaks.append(("at most at once, on the GPU", f"{memory.device_bytes / MIB:,.0f} MiB"))
    console.print(table(f"Memory ({place}), beside the interpreter", ("for",), ("size",), [*items, *peaks]))
    _print_time(console, found.seconds)


def print_training_forecast(console: Console, found: TrainingForecast) -> None:
    """Print what a training will take as two small tables."""
    sizes = [("training", f"{found.memory_bytes / MIB:,.0f} MiB"), ("free now", f"{found.free_bytes / MIB:,.0f} MiB")]
    console.print(table("Memory, beside the interpreter", ("for",), ("size",), sizes))
    _print_time(console, found.seconds)


def _print_time(console: Console, seconds: Mapping[str, float]) -> None:
    stages = [(stage, duration(each)) for stage, each in seconds.items()]
    stages.append(("in all", duration(sum(seconds.values()))))
    console.print(table("Time on this machine, roughly", ("stage",), ("estimate",), stages))
    console.print("Nothing was written. Without --plan this begins.", highlight=False)


def duration(seconds: float) -> str:
    """Write a duration in two units at most: `48 s`, `12 min`, `3 h 20 min`."""
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02d} min"
