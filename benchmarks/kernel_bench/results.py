"""What is written down: one line of CSV a contestant, rival and case, and the README's table made from it.

A ratio above 1 means that we are faster than the rival. Lines are long and repeat themselves, so that each can be
judged alone.
"""

import csv
import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from benchmarks.kernel_bench.device import slug

RESULTS = Path(__file__).parents[1] / "results"
THREADS = re.compile(r"-(\d+)-threads?$")
SHOWN_TOKENS = (1, 4, 16, 64, 256)
SHOWN_SHAPES = ("4096x4096",)
"""Shapes of which the README shows every format; of the others only `sign`."""


@dataclass(frozen=True, kw_only=True)
class Line:
    """One contestant against one rival.

    Attributes:
        device: processor with its instruction sets, or GPU.
        date: of the run, UTC.
        command: that repeats it.
        threads: of torch, and of ours; 0 on a GPU.
        backend: ours, with the instruction set on a CPU.
        format: of the weight, see shapes.FORMATS.
        bits: read per weight, scales included, as this backend holds it.
        model: that has this shape first, or empty.
        N: rows of the weight, output features.
        K: columns, input features.
        M: tokens.
        dtype: of x and y.
        cache: hot or cold, see shapes.
        copies: of our weight that a cold run walks through.
        median_us: of ours.
        rival: who else; empty if none ran.
        rival_us: its median.
        ratio: rival_us / median_us.
        gweights_per_s: N * K * M / median, in 1e9.
        fraction_of_roofline: possible over measured time.
        peak_gb_per_s: measured bandwidth of reading memory.
        peak_gops_per_s: measured rate of the fastest dense product.
        error: largest error over largest output, against float64.
        versions: of torch, Triton and the rivals that are installed, and how idle OpenMP threads wait.
    """

    device: str
    date: str
    command: str
    threads: int
    backend: str
    format: str
    bits: float
    model: str
    N: int
    K: int
    M: int
    dtype: str
    cache: str
    copies: int
    median_us: float
    rival: str
    rival_us: float | None
    ratio: float | None
    gweights_per_s: float
    fraction_of_roofline: float
    peak_gb_per_s: float
    peak_gops_per_s: float
    error: float
    versions: str


COLUMNS = tuple(field.name for field in fields(Line))
_INTEGERS = {"threads", "N", "K", "M", "copies"}
_FLOATS = {"bits", "median_us", "rival_us", "ratio", "gweights_per_s", "fraction_of_roofline", "peak_gb_per_s"}
_FLOATS |= {"peak_gops_per_s", "error"}


def write_lines(file: Path, lines: Iterable[Line]) -> None:
    """Write the whole file; after every case, so that an interrupted run leaves one."""
    write_table(file, [{key: _shown(value) for key, value in asdict(line).items()} for line in lines], COLUMNS)


def write_table(file: Path, rows: Sequence[Mapping[str, Any]], columns: Sequence[str] = ()) -> None:
    """Write a whole CSV file: the named columns, or those of the first row."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, fieldnames=columns or list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def _shown(value: Any) -> Any:
    """Keep four digits of a measurement."""
    if isinstance(value, float):
        return f"{value:.4g}" if value < 1e4 else f"{value:.0f}"
    return "" if value is None else value


def read_lines(file: Path) -> list[Line]:
    """Read a file back.

    Raises:
        ValueError: it has other columns.
    """
    with file.open(newline="", encoding="utf-8") as stream:
        reader = csv.DictReader(stream)
        if tuple(reader.fieldnames or ()) != COLUMNS:
            raise ValueError(f"{file}: not a file of this version; columns {reader.fieldnames}")
        return [Line(**{key: _parsed(key, value) for key, value in row.items()}) for row in reader]


def _parsed(key: str, text: str) -> Any:
    if key in _INTEGERS:
        return int(text)
    if key in _FLOATS:
        return float(text) if text else None
    return text


def output_file(out: Path | None, kind: str, device: str, date: str, threads: int = 0) -> Path:
    """Return the file of a run: the one named, or <kind>_<device>[-<threads>-threads]_<date>.csv in a folder."""
    folder = out or RESULTS
    if out is not None and not out.is_dir():
        return out
    suffix = f"-{counted(threads, 'thread').replace(' ', '-')}" if threads else ""
    return folder / f"{kind}_{slug(device)}{suffix}_{date}.csv"


def counted(count: int, noun: str) -> str:
    """Return `1 thread` or `2 threads`."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def shown_command(module: str, arguments: Sequence[str]) -> str:
    """Return the command without the folders of its files, which mean nothing elsewhere."""
    return shlex.join(["python", "-m", module, *(Path(word).name or word for word in arguments)])


def device_of(file: Path) -> str:
    """Return the device in the name kernels_<device>_<date>.csv; of any other name, all of it."""
    return re.sub(r"_\d{4}-\d\d-\d\d$", "", file.stem.removeprefix("kernels_"))


def newest_files(folder: Path = RESULTS) -> list[Path]:
    """Return the newest kernels_<device>_<date>.csv of every device, by device."""
    newest: dict[str, Path] = {}
    for file in sorted(folder.glob("kernels_*_????-??-??.csv"), key=lambda file: file.stem[-10:]):
        newest[device_of(file)] = file
    return [newest[device] for device in sorted(newest)]


def markdown(files: Sequence[Path]) -> str:
    """Return the README's tables, one a device: our time, and how often it fits into torch's fastest.

    Of a processor that was measured with several numbers of threads, the fewest are shown.
    """
    shown: dict[str, tuple[int, Path]] = {}
    for file in files:
        name, threads = THREADS.sub("", device_of(file)), THREADS.search(device_of(file))
        count = int(threads[1]) if threads else 0
        if name not in shown or count < shown[name][0]:
            shown[name] = count, file
    return "\n\n".join(_device_table(file) for _, file in shown.values())


def _device_table(file: Path) -> str:
    lines = [line for line in read_lines(file) if line.backend != "reference" and line.rival.startswith("torch ")]
    lines = [line for line in lines if line.rival.removeprefix("torch ") in ("fp32", "bf16", "fp16")]
    measured = {line.M for line in lines}
    tokens = [m for m in SHOWN_TOKENS if m in measured]
    table = [
        ["weight", "format", "bits", "weights are in", *(counted(m, "token") for m in tokens)],
        ["---"] * (4 + len(tokens)),
    ]
    rows: dict[tuple[int, int, str, str], dict[int, Line]] = {}
    for line in lines:
        if line.format != "sign" and f"{line.N}x{line.K}" not in SHOWN_SHAPES and line.format != "bytes-8":
            continue
        of_row = rows.setdefault((line.N, line.K, line.format, line.cache), {})
        known = of_row.get(line.M, line)  # the first backend of a case is the one that `auto` takes
        if line.backend == known.backend and (line.rival_us or 0) <= (known.rival_us or 0):
            of_row[line.M] = line
    for (n, k, kind, cache), of_row in rows.items():
        bits = next(iter(of_row.values())).bits
        place = "memory" if cache == "cold" else "cache"
        cells = [_cell(of_row.get(m)) for m in tokens]
        table.append([f"{n}x{k}", kind, f"{bits:.2f}", place, *cells])
    first = lines[0]
    threads = f", {counted(first.threads, 'thread')}" if first.threads else ""
    rendered = "\n".join("| " + " | ".join(cells) + " |" for cells in table)
    source = f"From [{file.name}](benchmarks/results/{file.name})."
    best = ", ".join(sorted({line.rival.removeprefix("torch ") for line in lines}))
    return f"{first.device}{threads}; x over the fastest dense product of torch ({best}):\n\n{rendered}\n\n{source}"


def _cell(line: Line | None) -> str:
    """Say 34 µs, 48x."""
    if line is None:
        return ""
    time = f"{line.median_us:.3g} µs" if line.median_us < 999 else f"{line.median_us / 1e3:.3g} ms"
    return f"{time}, {line.ratio:.2g}x" if (line.ratio or 0) < 10 else f"{time}, {line.ratio:.0f}x"
