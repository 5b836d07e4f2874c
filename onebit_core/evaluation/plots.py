"""The pictures of the report page, as SVG text to put inside a page.

They carry no colour of their own for lines and letters: whatever matplotlib draws in INK becomes the page's
current text colour, and the background stays clear, so one picture serves a light page and a dark one. Data colours
are mid-tones that stand off from both. Letters stay letters (not outlines), so the page's font and its search
apply to them.

matplotlib comes with the extra `eval`; it is imported here only when a picture is drawn.
"""

import io
import re
from collections.abc import Callable, Sequence
from typing import Any

from onebit_core.artifact.manifest import EvaluationResult, LayerReport, Manifest
from onebit_core.errors import EvaluationError

INK = "#010203"
COLOURS = ("#4c8dd6", "#e0813a", "#3fa66b", "#c65b7c", "#8b78d0", "#b59a2b", "#2fa3ad", "#8a8f98")
SMALLEST_ERROR = 1e-12
"""A logarithmic axis has no place for an error of zero."""
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


def layer_errors(layers: Sequence[LayerReport]) -> str:
    """Draw the relative error of every layer: one line a projection, over the blocks, on a logarithmic axis.

    Output errors are drawn where every layer has one, weight errors otherwise.
    """
    has_output = all(layer.output_error is not None for layer in layers)
    projections = list(dict.fromkeys(layer.projection for layer in layers))

    def draw(axes: Any) -> None:
        for index, projection in enumerate(projections):
            points = [layer for layer in layers if layer.projection == projection]
            blocks = [layer.block for layer in points]
            errors = [max(_error(layer, of_output=has_output), SMALLEST_ERROR) for layer in points]
            colour = COLOURS[index % len(COLOURS)]
            axes.plot(blocks, errors, color=colour, label=_short(projection), linewidth=1.4, marker="o", markersize=3)
        axes.set_yscale("log")
        _plain_ticks(axes.yaxis)
        axes.set_xlabel("decoder block")
        axes.set_ylabel(f"squared relative error of the {'output' if has_output else 'weight'}")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(axis="y")
        axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), borderaxespad=0.0)

    return _svg(draw, width=9.4, height=3.6)


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
