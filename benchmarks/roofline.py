"""How much of what the device could do was reached: a picture of a kernels_*.csv.

    python -m benchmarks.roofline                # of the newest file of every device
    python -m benchmarks.roofline FILE.csv

Along x the tokens M, along y possible over measured time (device.py says what is possible). On the left the one-plane
format for every shape, on the right every format for one shape, dashed where weights come from memory; of the backends
the fastest. Few tokens are bound by reading the weight, many by multiplying, and the kink between them moves left as
the bits get fewer.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks.kernel_bench.results import Line, device_of, newest_files, read_lines

SHOWN_SHAPE = "4096x4096"
SHOWN_FORMAT = "sign"


def main() -> int:
    """Draw every file named, or the newest of every device."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("files", nargs="*", type=Path, help="default: the newest of every device")
    for file in parser.parse_args().files or newest_files():
        out = file.with_name(f"kernels_roofline_{device_of(file)}.svg")
        draw(read_lines(file), out)
        print(out.name)
    return 0


def series(lines: Sequence[Line], label: Callable[[Line], str]) -> dict[str, list[tuple[int, float]]]:
    """Return (M, fraction) of the fastest backend, by label, ascending in M."""
    fastest: dict[tuple[str, int], Line] = {}
    for line in lines:
        key = (label(line), line.M)
        if key not in fastest or line.median_us < fastest[key].median_us:
            fastest[key] = line
    curves: dict[str, list[tuple[int, float]]] = {}
    for (name, tokens), line in sorted(fastest.items(), key=lambda item: item[0]):
        curves.setdefault(name, []).append((tokens, line.fraction_of_roofline))
    return curves


def draw(lines: Sequence[Line], out: Path) -> None:
    """Write the picture; the same lines give the same bytes."""
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams["svg.hashsalt"] = "onebit"
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 5), sharey=True)
    by_shape = [line for line in lines if line.format == SHOWN_FORMAT and line.backend != "reference"]
    by_format = [line for line in lines if f"{line.N}x{line.K}" == SHOWN_SHAPE and line.backend != "reference"]
    panels = (
        (left, f"{SHOWN_FORMAT}, by shape", series(by_shape, lambda line: f"{line.N}x{line.K}, {line.cache}")),
        (right, f"{SHOWN_SHAPE}, by format", series(by_format, lambda line: f"{line.format}, {line.cache}")),
    )
    for axes, title, curves in panels:
        names = list(dict.fromkeys(label.partition(",")[0] for label in curves))
        for label, points in curves.items():
            name, _, cache = label.partition(", ")
            style = {"color": f"C{names.index(name) % 10}", "linestyle": "-" if cache == "hot" else "--"}
            axes.plot(*zip(*points, strict=True), marker="o", markersize=4, label=label, **style)
        axes.set(title=title, xlabel="tokens M", ylim=(0, 1.05))
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter("{x:.0f}")
        axes.axhline(1, color="gray", linewidth=0.8, linestyle="--")
        axes.grid(alpha=0.25)
        if curves:
            axes.legend(fontsize=7, ncols=4, loc="upper center", bbox_to_anchor=(0.5, -0.14), frameon=False)
    left.set_ylabel("possible / measured time")
    if lines:
        one = lines[0]
        name = one.device.partition(" (")[0]
        figure.suptitle(
            f"{name}: reads {one.peak_gb_per_s:.3g} GB/s, multiplies {one.peak_gops_per_s / 1e3:.3g} T operations/s",
            fontsize=10,
        )
    figure.tight_layout()
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, metadata={"Date": None})
    pyplot.close(figure)


if __name__ == "__main__":
    sys.exit(main())
