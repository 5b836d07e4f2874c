"""The CSV, the README's table, names of devices, and the roofline's arithmetic."""

import dataclasses
import platform

import pytest

from benchmarks.kernel_bench.device import Peaks, device_name, processor, slug
from benchmarks.kernel_bench.results import (
    COLUMNS,
    Line,
    device_of,
    markdown,
    newest_files,
    output_file,
    read_lines,
    shown_command,
    write_lines,
)
from benchmarks.roofline import draw, series

LINE = Line(
    device="Some CPU (avx2)",
    date="2026-01-02",
    command="python -m benchmarks.kernels",
    threads=2,
    backend="cpu avx2",
    format="sign",
    bits=1.062,
    model="llama-2-7b",
    N=4096,
    K=4096,
    M=1,
    dtype="bfloat16",
    cache="hot",
    copies=1,
    median_us=50.0,
    rival="torch bf16",
    rival_us=2000.0,
    ratio=40.0,
    gweights_per_s=335.5,
    fraction_of_roofline=0.5,
    peak_gb_per_s=20.0,
    peak_gops_per_s=1000.0,
    error=0.0001,
    versions="torch 2",
)
CPUINFO = """processor\t: 0
model name\t: Intel(R) Xeon(R) Gold 1234 CPU @ 2.50GHz
flags\t\t: fpu sse2 avx2 avx512f
"""


def changed(**fields):
    return dataclasses.replace(LINE, **fields)


def test_lines_come_back_as_written(tmp_path):
    """Numbers as numbers, and no rival as none."""
    lines = [LINE, changed(M=16, rival="", rival_us=None, ratio=None, median_us=123456.0)]
    write_lines(tmp_path / "k.csv", lines)
    assert read_lines(tmp_path / "k.csv") == lines


def test_the_columns_are_those_of_the_documentation():
    """One column a field, device first; the README of the benchmarks names each."""
    assert COLUMNS[:5] == ("device", "date", "command", "threads", "backend")
    wanted = {"format", "bits", "N", "K", "M", "cache", "median_us", "rival", "rival_us", "ratio"}
    assert wanted | {"gweights_per_s", "fraction_of_roofline"} <= set(COLUMNS)


def test_a_file_of_another_version_is_refused(tmp_path):
    """Rather than read half of it."""
    (tmp_path / "k.csv").write_text("device,date\na,b\n")
    with pytest.raises(ValueError, match="columns"):
        read_lines(tmp_path / "k.csv")


def test_the_newest_file_of_every_device_counts(tmp_path):
    """By the date in the name, not by that of the file."""
    for name in ("kernels_a_2026-03-01.csv", "kernels_a_2026-02-28.csv", "kernels_b_2025-12-31.csv", "kernels_x.csv"):
        (tmp_path / name).touch()
    assert [file.name for file in newest_files(tmp_path)] == ["kernels_a_2026-03-01.csv", "kernels_b_2025-12-31.csv"]
    assert device_of(tmp_path / "kernels_some-cpu_2026-03-01.csv") == "some-cpu"


def test_the_table_shows_the_default_backend_against_the_fastest_dense_product(tmp_path):
    """Not against the slowest, and not the reference; 4-bit rivals stay in the CSV."""
    lines = [
        LINE,
        changed(rival="torch fp32", rival_us=1000.0, ratio=20.0),
        changed(rival="torch int4", rival_us=500.0, ratio=10.0),
        changed(backend="cpu portable", median_us=40.0, ratio=50.0),
        changed(backend="reference", median_us=5.0, ratio=400.0),
        changed(M=16, cache="cold", median_us=1234.0, rival_us=8000.0, ratio=6.483),
        changed(N=11008, format="codes-4"),
    ]
    file = tmp_path / "kernels_some-cpu_2026-01-02.csv"
    write_lines(file, lines)
    assert markdown([file]) == (
        "Some CPU (avx2), 2 threads; x over the fastest dense product of torch (bf16, fp32):\n\n"
        "| weight | format | bits | weights are in | 1 token | 16 tokens |\n"
        "| --- | --- | --- | --- | --- | --- |\n"
        "| 4096x4096 | sign | 1.06 | cache | 50 µs, 20x |  |\n"
        "| 4096x4096 | sign | 1.06 | memory |  | 1.23 ms, 6.5x |\n\n"
        f"From [{file.name}](benchmarks/results/{file.name})."
    )


def test_a_device_is_named_by_processor_and_instruction_sets_never_by_host():
    """Results are read elsewhere."""
    assert processor(CPUINFO) == ("Intel Xeon Gold 1234", {"fpu", "sse2", "avx2", "avx512f"})
    assert platform.node() not in device_name("cpu")
    assert slug("Intel Xeon Gold 1234 (avx2 avx512f)") == "intel-xeon-gold-1234"
    assert slug("NVIDIA H100 80GB HBM3") == "nvidia-h100-80gb-hbm3"


def test_commands_and_files_name_no_folders_of_this_machine(tmp_path):
    """A folder given as output gets the usual name."""
    command = shown_command("benchmarks.kernels", ["--out", "/a/b/c.csv", "--only", "M=1"])
    assert command == "python -m benchmarks.kernels --out c.csv --only M=1"
    assert output_file(tmp_path, "kernels", "A (b)", "2026-01-02") == tmp_path / "kernels_a_2026-01-02.csv"
    assert output_file(tmp_path, "kernels", "A (b)", "2026-01-02", 2).name == "kernels_a-2-threads_2026-01-02.csv"
    assert output_file(tmp_path, "kernels", "A (b)", "2026-01-02", 1).name == "kernels_a-1-thread_2026-01-02.csv"
    assert output_file(tmp_path / "x.csv", "kernels", "A", "2026-01-02") == tmp_path / "x.csv"


def test_what_is_possible_is_the_slower_of_reading_and_multiplying():
    """Weights in the cache cost no reading from memory."""
    peaks = Peaks(bytes_per_second=10.0, operations_per_second=100.0)
    assert peaks.possible_seconds(moved_bytes=50, operations=200, hot=False) == 5
    assert peaks.possible_seconds(moved_bytes=50, operations=2000, hot=False) == 20
    assert peaks.possible_seconds(moved_bytes=50, operations=200, hot=True) == 2


def test_curves_follow_the_fastest_backend_in_order_of_tokens(tmp_path):
    """And the same lines give the same picture, byte for byte."""
    lines = [
        changed(M=16, fraction_of_roofline=0.6),
        LINE,
        changed(backend="cpu portable", median_us=99.0, fraction_of_roofline=0.1),
    ]
    assert series(lines, lambda line: line.format) == {"sign": [(1, 0.5), (16, 0.6)]}
    draw(lines, tmp_path / "one.svg")
    draw(lines, tmp_path / "two.svg")
    assert (tmp_path / "one.svg").read_bytes() == (tmp_path / "two.svg").read_bytes()
