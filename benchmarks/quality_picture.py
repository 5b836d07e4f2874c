"""Bits against quality: a picture of what quality.py measured.

    python -m benchmarks.quality_picture benchmarks/results/quality_MODEL_DATE.csv
    python -m benchmarks.quality_picture FIRST.csv SECOND.csv --out benchmarks/results/quality_MODEL.svg

A panel a text. Along x the true bits of a linear weight, along y the perplexity over the original's, both logarithmic:
down and left is better. Hollow marks are published methods as they were published, filled ones are ours: methods in
OURS, and any method with reconstruction or with bits planned layer by layer; those that were trained as a whole after
that have a colour of their own. A line joins each kind's frontier, the rows that no other row of that kind beats in
both. Rows worse than HIGHEST stand at the upper edge as arrowheads.

The picture is for a README, on a white page or a dark one: no background, and middle tones that stand off from both.
Its description names the files it was drawn from and their sha256, so that a test can tell an old picture.
"""

import argparse
import hashlib
import math
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any, Literal, get_args

from benchmarks.quality_table import read_lines

HIGHEST = 1000.0
OURS = frozenset({"lut2"})
INK = "#727a86"  # contrast above 4 with white and with GitHub's dark page alike
COLOURS = {"published": INK, "ours": "#d2651e", "trained": "#2f7fd1"}
LEGEND = {"published": "published methods", "ours": "ours", "trained": "ours, trained"}
LINES = {"published": "--", "ours": "-", "trained": "-"}
TICKS = (1, 1.1, 1.2, 1.5, 2, 3, 5, 10, 20, 50, 100, 200, 500, 1000)
BIT_TICKS = (1, 1.5, 2, 2.5, 3, 4, 5, 6, 8, 16)
WIDTH, HEIGHT = 6.0, 6.6  # inches, of a panel
MARK_POINTS = 7.0
LABEL_POINTS = 8.0
LEADER_POINTS = 12.0
"""A label farther than this from its mark is joined to it by a line."""

Kind = Literal["published", "ours", "trained"]

Box = tuple[float, float, float, float]
"""Left, bottom, right, top, in points."""


@dataclass(frozen=True, kw_only=True)
class Mark:
    """One row of the CSV in one panel."""

    name: str
    bits: float
    ratio: float
    kind: Kind

    @property
    def is_beyond(self) -> bool:
        """Whether it is too bad for the axis."""
        return self.ratio > HIGHEST

    @property
    def label(self) -> str:
        """Its name, with the ratio if the picture does not show that."""
        return f"{self.name} {self.ratio:.0e}x".replace("e+0", "e") if self.is_beyond else self.name


def main() -> int:
    """Draw the files named."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("files", nargs="+", type=Path, metavar="CSV")
    parser.add_argument("--out", type=Path, default=None, help="default: quality_MODEL.svg beside the first file")
    options = parser.parse_args()
    out = options.out or picture_of(options.files[0])
    draw(options.files, out)
    print(out)
    return 0


def picture_of(file: Path) -> Path:
    """Return where the picture of a CSV belongs: beside it, without the date."""
    return file.with_name(re.sub(r"_\d{4}-\d{2}-\d{2}$", "", file.stem) + ".svg")


def description_of(files: Sequence[Path]) -> str:
    """Name the files with the sha256 of what is in them."""
    return ", ".join(f"{file.name} {hashlib.sha256(file.read_bytes()).hexdigest()}" for file in files)


def panels_of(lines: Sequence[Mapping[str, Any]]) -> dict[str, list[Mark]]:
    """Sort lines of the CSV into panels, one a text; a row that comes again replaces itself.

    The same name with other tokens is another text.
    """
    fingerprints = list(dict.fromkeys((line["dataset"], line["fingerprint"], line["windows"]) for line in lines))
    panels: dict[str, list[Mark]] = {}
    for dataset, fingerprint, windows in fingerprints:
        marks = {
            line["row"]: Mark(name=line["row"], bits=line["true_bits_linear"], ratio=line["ratio"], kind=kind_of(line))
            for line in lines
            if (line["dataset"], line["fingerprint"]) == (dataset, fingerprint)
        }
        title = f"{dataset}, {windows:.0f} windows"
        while title in panels:
            title += ", other tokens"
        panels[title] = list(marks.values())
    return panels


def kind_of(line: Mapping[str, Any]) -> Kind:
    """Tell our ways of doing it from the published one."""
    how = {name for name in ("reconstruction", "allocation", "training") if line.get(name) not in (None, "")}
    if "training" in how:
        return "trained"
    return "ours" if how or line["method"] in OURS else "published"


def frontier(marks: Sequence[Mark]) -> list[Mark]:
    """Return the marks that no other one beats, ascending in bits: fewer bits cost more, all along the line."""
    best: list[Mark] = []
    for mark in sorted(marks, key=lambda mark: (mark.bits, mark.ratio)):
        if not best or mark.ratio < best[-1].ratio:
            best.append(mark)
    return best


def draw(files: Sequence[Path], out: Path) -> None:
    """Write the picture; the same lines give the same bytes."""
    import matplotlib as mpl
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = panels_of([line for file in files for line in read_lines(file)])
    settings: Any = {
        "svg.hashsalt": "onebit",
        "text.parse_math": False,
        "font.size": 9,
        "text.color": INK,
        "axes.edgecolor": INK,
        "axes.labelcolor": INK,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "xtick.color": INK,
        "ytick.color": INK,
        "grid.color": INK,
        "grid.alpha": 0.22,
        "legend.frameon": False,
    }
    with mpl.rc_context(settings):
        figure = Figure(figsize=(WIDTH * len(panels), HEIGHT), dpi=72)
        left = 0.65 / (WIDTH * len(panels))
        figure.subplots_adjust(left=left, right=0.99, bottom=0.5 / HEIGHT, top=1 - 0.35 / HEIGHT, wspace=0.12)
        FigureCanvasAgg(figure)  # only this one can measure letters
        columns = figure.subplots(1, len(panels), squeeze=False)[0]
        for axes, (title, marks) in zip(columns, panels.items(), strict=True):
            _panel(axes, title, marks)
        columns[0].set_ylabel("perplexity over the original's (logarithmic)")
        out.parent.mkdir(parents=True, exist_ok=True)
        metadata = {"Date": None, "Creator": None, "Description": description_of(files)}
        figure.savefig(out, format="svg", transparent=True, metadata=metadata)


def _panel(axes: Any, title: str, marks: Sequence[Mark]) -> None:
    """Draw marks and frontiers of one text, then write every name beside its mark."""
    edge = 1.6 * max([mark.ratio for mark in marks if not mark.is_beyond], default=HIGHEST)
    shown = {mark.name: min(mark.ratio, edge) for mark in marks}
    for kind in get_args(Kind):
        side = [mark for mark in marks if mark.kind == kind]
        best = frontier(side)
        curve = [mark.bits for mark in best], [shown[mark.name] for mark in best]
        axes.plot(*curve, color=COLOURS[kind], linestyle=LINES[kind], linewidth=1.2, alpha=0.7)
        style: Any = {"markersize": MARK_POINTS, "markeredgecolor": COLOURS[kind], "markeredgewidth": 1.3}
        style |= {"markerfacecolor": "none" if kind == "published" else COLOURS[kind], "clip_on": False}
        for beyond, shape in ((False, "o"), (True, "^")):
            group = [mark for mark in side if mark.is_beyond == beyond]
            points = [mark.bits for mark in group], [shown[mark.name] for mark in group]
            axes.plot(*points, shape, label=LEGEND[kind] if group and not beyond else None, **style)
    axes.axhline(1, color=INK, linewidth=0.8)
    axes.set_yscale("log")
    axes.set_ylim(0.93, edge)
    fewest, most = min(mark.bits for mark in marks), max(mark.bits for mark in marks)
    room = max(most / fewest, 1.5)
    axes.set_xscale("log")
    axes.set_xlim(fewest * room**-0.06, most * room**0.14)
    axes.set_title(title, fontsize=10)
    axes.set_xlabel("true bits per linear weight (logarithmic)")
    ticks = [tick for tick in TICKS if tick <= edge and (edge < 50 or tick not in (1.1, 1.2, 1.5))]
    axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    bit_ticks = [tick for tick in BIT_TICKS if axes.get_xlim()[0] <= tick <= axes.get_xlim()[1]]
    axes.set_xticks(bit_ticks, [f"{tick:g}" for tick in bit_ticks])
    axes.minorticks_off()
    axes.grid(axis="y")
    axes.legend(loc="upper right", fontsize=LABEL_POINTS)
    _label(axes, marks, shown)


def _label(axes: Any, marks: Sequence[Mark], shown: Mapping[str, float]) -> None:
    """Write every name beside its mark."""
    where = [tuple(axes.transData.transform((mark.bits, shown[mark.name]))) for mark in marks]
    sizes = []
    for mark in marks:
        trial = axes.figure.text(0, 0, mark.label, fontsize=LABEL_POINTS)
        extent = trial.get_window_extent()
        sizes.append((extent.width, extent.height))
        trial.remove()
    area, legend = axes.get_window_extent(), axes.get_legend().get_window_extent()
    corners = place_labels(where, sizes, area.extents, [legend.extents])
    for mark, point, (width, height), corner in zip(marks, where, sizes, corners, strict=True):
        nearest = (
            min(max(point[0], corner[0]), corner[0] + width),
            min(max(point[1], corner[1]), corner[1] + height),
        )
        is_far = math.dist(point, nearest) > LEADER_POINTS
        leader = {"arrowstyle": "-", "linewidth": 0.5, "color": INK, "alpha": 0.7, "shrinkA": 0, "shrinkB": 4}
        axes.annotate(
            mark.label,
            (mark.bits, shown[mark.name]),
            xytext=(corner[0] - point[0], corner[1] - point[1]),
            textcoords="offset points",
            fontsize=LABEL_POINTS,
            color=COLOURS[mark.kind],
            verticalalignment="bottom",
            annotation_clip=False,
            arrowprops=leader if is_far else None,
        )


def place_labels(
    marks: Sequence[tuple[float, float]],
    sizes: Sequence[tuple[float, float]],
    area: Box,
    taken: Sequence[Box] = (),
) -> list[tuple[float, float]]:
    """Choose the lower left corner of each label, near its mark and away from other labels and marks.

    Greedy: labels are placed one after the other, each where it covers the least; among equals, nearest to its mark.

    Args:
        marks: their centres, in points.
        sizes: width and height of the labels.
        area: where labels may be.
        taken: what they may not cover.
    """
    half = MARK_POINTS / 2 + 1
    obstacles: list[Box] = [(x - half, y - half, x + half, y + half) for x, y in marks] + list(taken)
    corners = []
    for mark, size in zip(marks, sizes, strict=True):
        # Points that are outside, and those that cover something, weigh more than any distance.
        costs = [(_cost(box, obstacles, area) * 10 + away, box) for away, box in _candidates(mark, size)]
        box = min(costs)[1]
        obstacles.append(box)
        corners.append(box[:2])
    return corners


def _candidates(mark: tuple[float, float], size: tuple[float, float]) -> Iterator[tuple[float, Box]]:
    """Yield places around a mark with their distance: right, left, above and below, then farther out."""
    (x, y), (width, height) = mark, size
    for gap, side, shift in product((6.0, 14.0, 24.0, 36.0), (1, -1, 0), (0.0, 1.0, -1.0, 2.0, -2.0)):
        left = x - width / 2 if side == 0 else x + gap if side == 1 else x - gap - width
        up = shift * (gap + height / 2) if side == 0 else shift * 0.7 * (height + gap / 4)
        if side == 0 and shift == 0:
            continue
        bottom = y + up - height / 2
        yield gap + abs(up) + (1.0 if side != 1 else 0.0), (left, bottom, left + width, bottom + height)


def _cost(box: Box, obstacles: Sequence[Box], area: Box) -> float:
    """Return the area a box shares with the obstacles, or has outside, in square points."""
    outside = (box[2] - box[0]) * (box[3] - box[1]) - _shared(box, area)
    return outside + sum(_shared(box, other) for other in obstacles)


def _shared(one: Box, other: Box) -> float:
    """Return the area two boxes share."""
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    return max(width, 0.0) * max(height, 0.0)


if __name__ == "__main__":
    sys.exit(main())
