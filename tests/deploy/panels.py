"""Draws what a dashboard's queries returned, panel by panel, where Grafana would put them."""

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure

GRID_COLUMNS = 24
INCHES_PER_COLUMN = 0.85
INCHES_PER_ROW = 0.42
MOST_SERIES = 12
COLORS = mpl.colormaps["tab20"].colors  # type: ignore[attr-defined]


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What one query of a panel returned.

    Attributes:
        panel: the panel, as Grafana reads it.
        legend: how a series is named, with {{label}} in it.
        series: Prometheus' result: labels and (time, value) pairs.
    """

    panel: dict[str, Any]
    legend: str
    series: list[dict[str, Any]]

    def name(self, labels: dict[str, str]) -> str:
        """The legend of one series; what a table shows is its labels."""
        if not self.legend:
            return ", ".join(f"{key}={value[:16]}" for key, value in labels.items() if key != "__name__")
        return re.sub(r"\{\{(\w+)\}\}", lambda found: labels.get(found[1], ""), self.legend)


def draw_dashboard(dashboard: dict[str, Any], answers: list[Answer], file: Path) -> None:
    """Write a picture of all panels."""
    panels = dashboard["panels"]
    rows = max(panel["gridPos"]["y"] + panel["gridPos"]["h"] for panel in panels)
    figure = Figure(figsize=(GRID_COLUMNS * INCHES_PER_COLUMN, rows * INCHES_PER_ROW + 0.6), facecolor="white")
    figure.suptitle(dashboard["title"], x=0.01, y=0.998, ha="left", va="top", fontsize=14)
    top = 1 - 0.6 / (rows * INCHES_PER_ROW + 0.6)
    for panel in panels:
        place = panel["gridPos"]
        left, width = place["x"] / GRID_COLUMNS, place["w"] / GRID_COLUMNS
        bottom, height = top * (1 - (place["y"] + place["h"]) / rows), top * place["h"] / rows
        if panel["type"] == "row":
            figure.text(left + 0.005, bottom + height / 2, panel["title"], fontsize=11, weight="bold", va="center")
            continue
        inner = (left + 0.03, bottom + 0.25 * height, width - 0.045, 0.55 * height)
        axes = figure.add_axes(inner)
        axes.set_title(panel["title"], fontsize=9, loc="left")
        draw_panel(axes, panel, [answer for answer in answers if answer.panel is panel or answer.panel == panel])
    figure.savefig(file, dpi=70)


def draw_panel(axes: Axes, panel: dict[str, Any], answers: list[Answer]) -> None:
    """One panel: a number, bars, a table's rows as words, or lines over time."""
    found = [(answer.name(series["metric"]), series["values"]) for answer in answers for series in answer.series]
    found = [(name, [(float(at), float(value)) for at, value in values]) for name, values in found]
    axes.tick_params(labelsize=7)
    if not found:
        axes.text(0.5, 0.5, "no data", ha="center", va="center", color="crimson", transform=axes.transAxes)
        axes.set_axis_off()
    elif panel["type"] == "timeseries":
        draw_lines(axes, found, panel)
    elif panel["type"] == "bargauge":
        draw_bars(axes, [(name or panel["title"], points[-1][1]) for name, points in found[:MOST_SERIES]], panel)
    else:
        draw_words(axes, found, panel)


def draw_bars(axes: Axes, values: list[tuple[str, float]], panel: dict[str, Any]) -> None:
    """Bars from the top down, each with its name and its number on it."""
    places = range(len(values), 0, -1)
    axes.barh(places, [value for _, value in values], color=COLORS[1], height=0.7)
    for place, (name, value) in zip(places, values, strict=True):
        axes.text(0, place, f" {readable(value, unit_of(panel))}  {name}", va="center", fontsize=7.5)
    axes.set_xlim(0, panel["fieldConfig"]["defaults"].get("max") or max(1e-9, *(value for _, value in values), 1e-9))
    axes.set_ylim(0.4, max(len(values), 3) + 0.6)
    axes.set_axis_off()


def draw_lines(axes: Axes, found: list[tuple[str, list[tuple[float, float]]]], panel: dict[str, Any]) -> None:
    """Series over time, seconds before now."""
    last = max(points[-1][0] for _, points in found)
    for number, (name, points) in enumerate(found[:MOST_SERIES]):
        times = [at - last for at, _ in points]
        axes.plot(times, [value for _, value in points], label=name, color=COLORS[number % 20], linewidth=1.3)
    axes.set_ylim(bottom=0)
    axes.set_xlim(-60, 0)
    axes.yaxis.set_major_formatter(lambda value, _: readable(value, unit_of(panel)))
    axes.legend(fontsize=6.5, loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=3, frameon=False)
    axes.grid(alpha=0.3)


def draw_words(axes: Axes, found: list[tuple[str, list[tuple[float, float]]]], panel: dict[str, Any]) -> None:
    """A stat's number in large type, or a table's rows."""
    axes.set_axis_off()
    if panel["type"] == "stat":
        axes.text(0.5, 0.5, readable(found[0][1][-1][1], unit_of(panel)), fontsize=20, ha="center", va="center")
        return
    lines = [name.replace(", ", "\n") for name, _ in found[:3]]
    axes.text(0, 1, "\n\n".join(lines), fontsize=7, va="top", family="monospace")


def unit_of(panel: dict[str, Any]) -> str:
    """Grafana's name of a panel's unit."""
    return str(panel["fieldConfig"]["defaults"].get("unit", "short"))


def readable(value: float, unit: str) -> str:
    """A number as Grafana would write it."""
    if math.isnan(value):
        return "-"
    if unit == "percentunit":
        return f"{100 * value:.3g} %"
    if unit == "s":
        return f"{value:.3g} s" if value >= 0.1 or value == 0 else f"{1000 * value:.3g} ms"
    if unit in ("bytes", "decbytes"):
        return f"{value / 1000:.3g} kB" if value < 1e6 else f"{value / 1e6:.3g} MB"
    return f"{value:.4g}"
