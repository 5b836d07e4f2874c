"""The pictures of the report page, as SVG text to put inside a page.

They carry no colour of their own for lines and letters: whatever matplotlib draws in INK becomes the page's
current text colour, and the background stays clear, so one picture serves a light page and a dark one. Data colours
are mid-tones that stand off from both. Letters stay letters (not outlines), so the page's font and its search
apply to them.

matplotlib comes with the extra `eval`; it is imported here only when a picture is drawn.
"""

import io
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from onebit_core.artifact.manifest import EvaluationResult, LayerReport, Manifest, TaskResult
from onebit_core.errors import EvaluationError
from onebit_core.evaluation.accuracy import mean_over_tasks

INK = "#010203"
COLOURS = ("#4c8dd6", "#e0813a", "#3fa66b", "#c65b7c", "#8b78d0", "#b59a2b", "#2fa3ad", "#8a8f98")
SMALLEST_ERROR = 1e-12
"""A logarithmic axis has no place for an error of zero."""
WIDEST_RANGE = 30.0
"""Errors smaller than the largest by more than this share one colour; a tiny one would leave none to the rest."""
ERROR_COLOURS = ("#24456f", "#4c8dd6", "#a9b8c4", "#e8b06a", "#d2521f")
NOISE_NATS = 1e-3
"""KL of a model against itself in other precision (benchmarks/README.md); less than that means nothing."""
SMALLEST_NATS = 1e-5
LONGEST_LABEL = 24
SETTINGS: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "onebit",
    "text.parse_math": False,
    "font.family": "sans-serif",
    "font.size": 10,
    "text.color": INK,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.8,
    "axes.axisbelow": True,
    "xtick.color": INK,
    "ytick.color": INK,
    "grid.color": INK,
    "grid.alpha": 0.15,
    "legend.frameon": False,
}

Draw = Callable[[Any], None]


def learning_curve(entries: Sequence[Mapping[str, float]]) -> str:
    """Draw how a training went: KL on the windows held out, and on those trained on, against tokens."""

    def draw(axes: Any) -> None:
        lines = (("held_out_kl", "held out", COLOURS[0]), ("kl", "trained on", COLOURS[7]))
        for key, label, colour in lines:
            known = [entry for entry in entries if key in entry]
            tokens = [entry["tokens"] for entry in known]
            axes.plot(tokens, [entry[key] for entry in known], marker=".", color=colour, label=label)
        best = min(entries, key=lambda entry: entry["held_out_kl"])
        axes.plot([best["tokens"]], [best["held_out_kl"]], marker="o", color=COLOURS[1], linestyle="none", label="kept")
        axes.set_ylim(bottom=0)
        axes.set_xlabel("tokens")
        axes.set_ylabel("KL, nats per token")
        axes.grid(axis="y")
        axes.legend(loc="lower left", bbox_to_anchor=(0.0, 1.0), ncols=3, borderaxespad=0.0, handlelength=1.0)

    return _svg(draw, width=9.4, height=2.8)


def learning_curves(curves: Mapping[str, Sequence[Mapping[str, float]]]) -> str:
    """Draw several trainings, each by its name: KL on the windows held out, against tokens."""

    def draw(axes: Any) -> None:
        for place, (name, entries) in enumerate(curves.items()):
            points = [entry["tokens"] for entry in entries], [entry["held_out_kl"] for entry in entries]
            axes.plot(*points, marker=".", color=COLOURS[place % len(COLOURS)], label=name)
        axes.xaxis.set_major_formatter("{x:,.0f}")
        axes.set_xlabel("tokens")
        axes.set_ylabel("held-out KL, nats per token")
        axes.grid(axis="y")
        axes.legend(loc="lower left", bbox_to_anchor=(0.0, 1.0), ncols=3, borderaxespad=0.0, handlelength=1.0)

    return _svg(draw, width=9.4, height=3.4)


def layer_errors(layers: Sequence[LayerReport]) -> str:
    """Draw the relative error of every layer: a row a projection, a column a block, the colour is the error.

    Output errors are drawn where every layer has one, weight errors otherwise. Layers that share block and
    projection (experts) are averaged; beside the rows and below the columns stand their means.
    """
    has_output = all(layer.output_error is not None for layer in layers)
    projections = list(dict.fromkeys(layer.projection for layer in layers))
    errors_PB = _mean_errors(layers, projections, of_output=has_output)
    rows, blocks = errors_PB.shape

    def draw(axes: Any) -> None:
        from matplotlib.colors import LinearSegmentedColormap, LogNorm

        largest, smallest = errors_PB.max(), errors_PB.min()
        clipped = smallest < largest / WIDEST_RANGE
        norm = LogNorm(max(smallest, largest / WIDEST_RANGE), max(largest, smallest * 1.01))
        colours = {"cmap": LinearSegmentedColormap.from_list("error", ERROR_COLOURS), "norm": norm}
        edges = np.arange(blocks + 1) - 0.5
        mesh = axes.pcolormesh(edges, np.arange(rows + 1), errors_PB, **colours)
        axes.pcolormesh(edges, [rows + 0.35, rows + 1.35], errors_PB.mean(axis=0, keepdims=True), **colours)
        centres = [*(np.arange(rows) + 0.5), rows + 0.85]
        axes.set_yticks(centres, [*map(_short, projections), "mean of block"])
        for centre, mean in zip(centres, [*errors_PB.mean(axis=1), errors_PB.mean()], strict=True):
            axes.text(blocks - 0.5 + 0.008 * blocks, centre, f"{mean:.2g}", va="center", fontsize=9)
        axes.text(blocks - 0.5 + 0.008 * blocks, -0.25, "mean", va="bottom", fontsize=9)
        axes.invert_yaxis()
        axes.spines[:].set_visible(False)
        axes.tick_params(length=0)
        axes.set_xlabel("decoder block")
        axes.xaxis.get_major_locator().set_params(integer=True)
        bar = axes.figure.colorbar(mesh, ax=axes, aspect=14, pad=0.02, extend="min" if clipped else "neither")
        bar.outline.set_visible(False)
        bar.set_label(f"squared relative error\nof the {'output' if has_output else 'weight'}")
        bar.solids.set_rasterized(False)  # rasterized, it would be an image inside the picture
        _plain_ticks(bar.ax.yaxis)

    return _svg(draw, width=9.4, height=1.3 + 0.28 * (rows + 1))


def _mean_errors(layers: Sequence[LayerReport], projections: Sequence[str], *, of_output: bool) -> Any:
    """Return the mean error [P, B] by projection and block, masked where there is no such layer."""
    sums_PB = np.zeros((len(projections), 1 + max(layer.block for layer in layers)))
    counts_PB = np.zeros_like(sums_PB)
    for layer in layers:
        place = projections.index(layer.projection), layer.block
        sums_PB[place] += max(_error(layer, of_output=of_output), SMALLEST_ERROR)
        counts_PB[place] += 1
    return np.ma.masked_array(sums_PB / np.maximum(counts_PB, 1), mask=counts_PB == 0)


def bytes_by_part(bytes_of_parts: dict[str, int]) -> str:
    """Draw the bytes of the artifact as one bar, a piece a part, in the order given."""
    total = sum(bytes_of_parts.values())

    def draw(axes: Any) -> None:
        left = 0.0
        for index, (part, size) in enumerate(bytes_of_parts.items()):
            width = size / 1e6
            label = part.replace("_", " ")
            axes.barh([0], [width], left=left, color=COLOURS[index % len(COLOURS)], label=label, height=0.8)
            if size >= 0.06 * total:
                axes.text(left + width / 2, 0, f"{size / total:.0%}", ha="center", va="center", color="#ffffff")
            left += width
        axes.set_yticks([])
        axes.spines["left"].set_visible(False)
        axes.margins(x=0)
        axes.set_xlabel("megabytes")
        axes.legend(loc="lower left", bbox_to_anchor=(0.0, 1.0), ncols=7, borderaxespad=0.0, handlelength=1.0)

    return _svg(draw, width=9.4, height=1.6)


def bits_per_weight(manifest: Manifest) -> str:
    """Draw the bits a weight costs, as advertised and as counted, against the 16 of the original."""
    bits = manifest.bits
    rows = {
        "linears, advertised": bits.linear_nominal,
        "linears, counted": bits.linear_true,
        "whole model, counted": bits.whole_model,
        "original": 16.0,
    }

    def draw(axes: Any) -> None:
        colours = [COLOURS[7], COLOURS[0], COLOURS[0], COLOURS[7]]
        bars = axes.barh(list(rows), list(rows.values()), color=colours, height=0.62)
        axes.bar_label(bars, fmt="%.2f", padding=4)
        axes.invert_yaxis()
        axes.set_xlim(0, 18)
        axes.set_xlabel("bits per weight")
        axes.tick_params(axis="y", length=0)

    return _svg(draw, width=4.6, height=2.4)


def perplexities(results: Sequence[EvaluationResult]) -> str:
    """Draw the perplexity of the original and of the artifact on every text, with standard errors."""
    highest = max(result.compressed.value / result.original.value for result in results)

    def draw(axes: Any) -> None:
        rows = range(len(results))
        for offset, colour, label in ((-0.2, COLOURS[7], "original"), (0.2, COLOURS[0], "compressed")):
            both = [r.original if label == "original" else r.compressed for r in results]
            bars = axes.barh(
                [row + offset for row in rows],
                [one.value for one in both],
                xerr=[one.standard_error for one in both],
                color=colour,
                ecolor=INK,
                height=0.36,
                label=label,
            )
            axes.bar_label(bars, labels=[f"{one.value:.4g}" for one in both], padding=4)
        axes.set_yticks(list(rows), [_short(result.dataset) for result in results])
        axes.invert_yaxis()
        axes.tick_params(axis="y", length=0)
        if highest > 10:
            axes.set_xscale("log")
            axes.set_xlim(left=1)
            _plain_ticks(axes.xaxis)
        axes.margins(x=0.18)
        axes.set_xlabel("perplexity" + (" (logarithmic)" if highest > 10 else ""))
        axes.legend(loc="lower left", bbox_to_anchor=(0.0, 1.0), ncols=2, borderaxespad=0.0, handlelength=1.0)

    return _svg(draw, width=4.6, height=1.5 + 0.55 * len(results))


def divergences(results: Sequence[EvaluationResult]) -> str:
    """Draw how KL is spread over the tokens of every text: median, mean, 99th percentile and largest."""
    marks = (("median", "o", 7.0), ("mean", "D", 5.0), ("99 %", "|", 13.0), ("largest", "|", 7.0))

    def draw(axes: Any) -> None:
        for row, result in enumerate(results):
            values = [result.kl_median, result.kl_mean, result.kl_p99, result.kl_max]
            median, mean, p99, largest = (max(value, SMALLEST_NATS) for value in values)
            axes.plot([median, p99], [row, row], color=COLOURS[0], linewidth=4, solid_capstyle="butt")
            axes.plot([p99, largest], [row, row], color=COLOURS[0], linewidth=1)
            for value, (label, marker, size) in zip((median, mean, p99, largest), marks, strict=True):
                colour = COLOURS[1] if label == "mean" else COLOURS[0]
                style = {"color": colour, "markersize": size, "markeredgewidth": 1.6, "linestyle": "none"}
                axes.plot([value], [row], marker=marker, label=label if row == 0 else None, **style)
        axes.set_xscale("log")
        low = min(max(min(result.kl_median, result.kl_mean), SMALLEST_NATS) for result in results)
        axes.set_xlim(left=min(low, NOISE_NATS) / 2)
        axes.axvspan(axes.get_xlim()[0], NOISE_NATS, color=INK, alpha=0.08, linewidth=0)
        _plain_ticks(axes.xaxis)
        axes.set_yticks(range(len(results)), [_short(result.dataset) for result in results])
        axes.set_ylim(len(results) - 0.4, -0.6)
        axes.tick_params(axis="y", length=0)
        axes.set_xlabel("nats per token (logarithmic)")
        axes.grid(axis="x")
        legend = {"ncols": 4, "borderaxespad": 0.0, "handlelength": 0.8, "columnspacing": 1.2}
        axes.legend(loc="lower left", bbox_to_anchor=(0.0, 1.0), **legend)

    return _svg(draw, width=4.6, height=1.5 + 0.55 * len(results))


def accuracies(tasks: Sequence[TaskResult]) -> str:
    """Draw the accuracy of the original and of the artifact on every task, with standard errors, beside guessing."""
    names = [_short(task.task) for task in tasks]
    before, after = [task.original for task in tasks], [task.compressed for task in tasks]
    chances = [task.chance for task in tasks]
    if len(tasks) > 1:
        names.append("mean")
        before, after = [*before, mean_over_tasks(before)], [*after, mean_over_tasks(after)]
        chances.append(sum(chances) / len(chances))

    def draw(axes: Any) -> None:
        for row, (one, other, chance) in enumerate(zip(before, after, chances, strict=True)):
            label = "guessing" if row == 0 else None
            axes.plot([100 * chance] * 2, [row - 0.36, row + 0.36], color=INK, alpha=0.6, linestyle=":", label=label)
            axes.plot([100 * one.value, 100 * other.value], [row, row], color=COLOURS[7], linewidth=3, alpha=0.5)
        both = ((-0.12, COLOURS[7], "original", before), (0.12, COLOURS[0], "compressed", after))
        for offset, colour, label, points in both:
            axes.errorbar(
                [100 * one.value for one in points],
                [row + offset for row in range(len(points))],
                xerr=[100 * one.standard_error for one in points],
                color=colour,
                fmt="o",
                markersize=6,
                elinewidth=1.4,
                label=label,
            )
        axes.set_yticks(range(len(names)), names)
        axes.set_ylim(len(names) - 0.4, -0.6)
        axes.tick_params(axis="y", length=0)
        axes.set_xlabel("questions answered rightly, %")
        axes.grid(axis="x")
        axes.legend(loc="lower left", bbox_to_anchor=(0.0, 1.0), ncols=3, borderaxespad=0.0, handlelength=1.2)

    return _svg(draw, width=9.4, height=1.2 + 0.36 * len(names))


def _error(layer: LayerReport, *, of_output: bool) -> float:
    """Return the error to draw."""
    return layer.output_error if of_output and layer.output_error is not None else layer.weight_error


def _plain_ticks(axis: Any) -> None:
    """Label a logarithmic axis with plain numbers; matplotlib would write powers in a mathematical notation."""
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    low, high = axis.get_view_interval()
    narrow = high / low < 100
    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if narrow else (1.0,), numticks=8))
    axis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axis.set_minor_formatter(NullFormatter())


def _short(name: str) -> str:
    """Cut a name that would take the room of the picture."""
    return name if len(name) <= LONGEST_LABEL else name[: LONGEST_LABEL - 1] + "…"


def _svg(draw: Draw, *, width: float, height: float) -> str:
    """Let `draw` fill one pair of axes and return the figure as an SVG element, without colours of its own."""
    try:
        import matplotlib as mpl
        from matplotlib.figure import Figure
    except ImportError as error:
        raise EvaluationError(
            "the HTML page needs matplotlib, which is not installed; install onebit with its extra: "
            "pip install 'onebit[eval]'"
        ) from error
    with mpl.rc_context(SETTINGS):
        figure = Figure(figsize=(width, height), layout="constrained")
        draw(figure.add_subplot())
        text = io.StringIO()
        metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(text, format="svg", transparent=True, metadata=metadata)
    return _for_a_page(text.getvalue())


def _for_a_page(svg: str) -> str:
    """Keep the `<svg>` element only, coloured by the page and free of identifiers that a second picture repeats."""
    svg = svg[svg.index("<svg") :]
    svg = svg.replace(INK, "currentColor")
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    opening, rest = svg.split(">", 1)
    return re.sub(r' (?:width|height)="[^"]*"', "", opening) + ">" + rest
