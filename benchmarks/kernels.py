"""How fast a product with packed weights is, against torch's own and others' kernels; checked before it is timed.

    python -m benchmarks.kernels                         # minutes: the shapes and formats that matter most
    python -m benchmarks.kernels --full                  # every shape of five models, every format, M = 1 to 2048
    python -m benchmarks.kernels --only sign 'M=1'       # a part: words of model, layer, NxK, format, M=..., hot, cold
    python -m benchmarks.kernels --readme                # the README's table from the newest files; measures nothing

Writes benchmarks/results/kernels_<device>[-<n>-threads]_<date>.csv after every case. What each number means is in
benchmarks/README.md; the parts are in kernel_bench/.
"""

import argparse
import contextlib
import os
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from benchmarks.kernel_bench.contestants import makers, missing_backend
from benchmarks.kernel_bench.device import device_name, last_cache_bytes, measure_peaks
from benchmarks.kernel_bench.results import Line, markdown, newest_files, output_file, shown_command, write_lines
from benchmarks.kernel_bench.rivals import rivals
from benchmarks.kernel_bench.run import RunInfo, Setting, measure_group
from benchmarks.kernel_bench.shapes import FORMATS, Case, chosen, find_shape, full_cases, in_groups, quick_cases
from onebit_core.errors import OnebitError
from onebit_core.kernels import resolve_device

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
MEBIBYTE = 1 << 20


def main() -> int:
    """Run what the arguments ask for."""
    options = arguments(sys.argv[1:])
    if options.readme:
        print(markdown(newest_files()))
        return 0
    console = Console(stderr=True, width=None if sys.stderr.isatty() else 120)
    try:
        device = resolve_device(options.device)
        lines = run(options, device, console)
    except (OnebitError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0 if lines else 1


def run(options: argparse.Namespace, device: str, console: Console) -> list[Line]:
    """Measure all chosen cases, show a table a shape, keep the file up to date."""
    if options.threads:
        torch.set_num_threads(options.threads)
    cases = choose_cases(options, on_gpu=device != "cpu")
    if (reason := missing_backend(device)) is not None:
        console.print(f"packed kernels cannot run here: {reason}", markup=False)
    skipped: dict[str, str] = {}
    setting = _setting(options, device, skipped, console)
    about = setting.about
    file = output_file(options.out, "kernels", about.device, about.date, about.threads)
    lines: list[Line] = []
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, disable=options.progress == "none") as progress:
        task = progress.add_task("", total=len(cases))
        for (shape, kind), group in in_groups(cases).items():
            progress.update(task, description=f"{shape} {kind}")
            of_group: list[Line] = []
            for found in measure_group(shape, kind, group, setting):
                of_group += found
                write_lines(file, lines + of_group)
                progress.advance(task)
            lines += of_group
            if of_group:
                console.print(table_of(f"{shape} {kind}", of_group))
    for name, text in skipped.items():
        console.print(f"left out: {name}: {text}", markup=False, highlight=False)
    console.print(f"{len(lines)} lines in {file.name}", markup=False)
    return lines


def choose_cases(options: argparse.Namespace, *, on_gpu: bool) -> list[Case]:
    """Return the preset, or the product of what was named, reduced to what --only says.

    Raises:
        ValueError: nothing is left.
    """
    cases = full_cases(on_gpu=on_gpu) if options.full else quick_cases(on_gpu=on_gpu)
    if options.shapes or options.formats or options.tokens or options.cache:
        shapes = [find_shape(name) for name in options.shapes or ["4096x4096"]]
        cases = [
            Case(shape, kind, tokens, cache)
            for shape in shapes
            for kind in options.formats or ["sign"]
            for cache in options.cache or ["cold" if on_gpu else "hot"]
            for tokens in options.tokens or (1, 16, 64, 256)
        ]
    cases = chosen(cases, options.only)
    if not cases:
        raise ValueError(f"--only {' '.join(options.only)}: no case matches; formats: {', '.join(FORMATS)}")
    return cases


def _setting(options: argparse.Namespace, device: str, skipped: dict[str, str], console: Console) -> Setting:
    """Collect what the run needs; measures the peaks."""
    on_gpu = device != "cpu"
    ours = {name: maker for name, maker in makers(device).items() if _named(name, options.backends)}
    others = {name: maker for name, maker in rivals(device).items() if _named(name, options.rivals)}
    first = next(iter(ours), "")
    peaks = measure_peaks(device)
    console.print(
        f"{device_name(device)}: reads {peaks.bytes_per_second / 1e9:.3g} GB/s, multiplies "
        f"{peaks.operations_per_second / 1e12:.3g} T operations/s",
        markup=False,
    )

    def skip(name: str, reason: str) -> None:
        skipped.setdefault(name, reason)
        if "WRONG" in reason:
            skipped[f"{name}, {reason.partition(':')[0]}"] = reason

    return Setting(
        device=device,
        dtype=DTYPES[options.dtype or ("float16" if on_gpu else "bfloat16")],
        repetitions=options.repetitions,
        cold_bytes=2 * last_cache_bytes(device),
        memory_bytes=options.memory * MEBIBYTE,
        peaks=peaks,
        ours=ours,
        rivals=others,
        side_backends=frozenset(ours) - {first} if not options.full else frozenset({"reference"}),
        side_tokens=16 if not options.full else 1,
        about=RunInfo(
            device=device_name(device),
            date=f"{datetime.now(UTC):%Y-%m-%d}",
            command=shown_command("benchmarks.kernels", sys.argv[1:]),
            threads=0 if on_gpu else torch.get_num_threads(),
            versions=_versions(),
        ),
        skip=skip,
    )


def _named(name: str, words: Sequence[str] | None) -> bool:
    """Return whether a contestant was asked for, by its whole name or its first word; all, if none is named."""
    return words is None or any(name == word or name.split()[0] == word for word in words)


def _versions() -> str:
    found = [f"torch {torch.__version__}"]
    for package in ("triton", "gemlite", "bitblas", "humming-kernels"):
        with contextlib.suppress(PackageNotFoundError):
            found.append(f"{package} {version(package)}")
    return ", ".join([*found, f"OMP_WAIT_POLICY={os.environ.get('OMP_WAIT_POLICY', 'unset')}"])


def table_of(title: str, lines: Sequence[Line]) -> Table:
    """Return a table of one weight: a row a backend, M and cache, with the factor over each rival."""
    names = list(dict.fromkeys(line.rival for line in lines if line.rival))
    table = Table(title=title, title_justify="left")
    headings = (
        "M",
        "cache",
        "backend",
        "bits",
        "µs",
        "Gw/s",
        "of possible",
        *(f"over {name.removeprefix('torch ')}" for name in names),
    )
    for heading in headings:
        left = heading == "backend"
        table.add_column(heading, justify="left" if left else "right", no_wrap=left)
    rows: dict[tuple[int, str, str], list[Line]] = {}
    for line in lines:
        rows.setdefault((line.M, line.cache, line.backend), []).append(line)
    for (tokens, cache, backend), of_row in sorted(rows.items(), key=lambda row: row[0][:2]):
        one = of_row[0]
        ratios = {line.rival: f"{digits(line.ratio or 0)}x" for line in of_row if line.rival}
        table.add_row(
            str(tokens),
            cache,
            backend,
            f"{one.bits:.2f}",
            digits(one.median_us),
            digits(one.gweights_per_s),
            f"{one.fraction_of_roofline:.0%}",
            *(ratios.get(name, "") for name in names),
        )
    return table


def digits(value: float) -> str:
    """Show three digits, and no exponents."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def arguments(words: Sequence[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.kernels", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--full", action="store_true", help="everything; takes hours on a CPU")
    parser.add_argument("--only", nargs="*", default=[], metavar="WORD", help="cases of which every word is a label")
    parser.add_argument("--shapes", nargs="*", metavar="NxK", help="in place of the preset's")
    parser.add_argument("--formats", nargs="*", choices=FORMATS, help="in place of the preset's")
    parser.add_argument("--tokens", nargs="*", type=int, metavar="M", help="in place of the preset's")
    parser.add_argument("--cache", nargs="*", choices=("hot", "cold"), help="in place of the preset's")
    parser.add_argument("--backends", nargs="*", metavar="NAME", help="cpu, 'cpu avx2', triton, reference; default all")
    parser.add_argument("--rivals", nargs="*", metavar="NAME", help="torch, 'torch bf16', gemlite, ...; default all")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", choices=DTYPES, help="of x; default bfloat16 on a CPU, float16 on a GPU")
    parser.add_argument("--threads", type=int, default=0, help="of torch and ours; default: torch's")
    parser.add_argument("--repetitions", type=int, default=7, help="turns of each contestant, at least 5")
    parser.add_argument("--memory", type=int, default=1024, metavar="MiB", help="for one contestant's copies, cold")
    parser.add_argument("--out", type=Path, help="CSV file, or the folder of kernels_<device>_<date>.csv")
    parser.add_argument("--progress", choices=("bar", "none"), default="bar")
    parser.add_argument("--readme", action="store_true", help="print the README's table and stop")
    options = parser.parse_args(words)
    if options.repetitions < 5:
        parser.error("--repetitions: a median needs at least 5")
    return options


if __name__ == "__main__":
    sys.exit(main())
