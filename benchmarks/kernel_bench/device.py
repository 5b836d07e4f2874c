"""What the numbers were measured on: its name, its caches, and how fast it can read and multiply at best.

The two peaks are measured, not looked up: the bandwidth of reading more memory than any cache holds, and the rate of
the fastest dense product that torch has here. With them

    possible seconds = max(bytes of weight and activations / bandwidth, 2 N K M / rate)

for weights that come from memory; for weights in the cache the first term is left out, because nothing in torch reads a
cache as fast as it can be read. `fraction_of_roofline` is possible over measured.
"""

import contextlib
import platform
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

SHOWN_FLAGS: tuple[str, ...] = ("avx2", "avx_vnni", "avx512f", "avx512bw", "avx512_vnni", "avx512vbmi")
SHOWN_FLAGS += ("avx512_fp16", "avx512_bf16", "amx_int8", "amx_bf16", "asimddp", "i8mm", "sve", "sve2")
DEFAULT_CACHE_BYTES = 64 << 20
MEGABYTE = 1 << 20


@dataclass(frozen=True)
class Peaks:
    """The two ceilings of a device.

    Attributes:
        bytes_per_second: of reading from memory.
        operations_per_second: of a dense product; a multiply and an add are two.
    """

    bytes_per_second: float
    operations_per_second: float

    def possible_seconds(self, *, moved_bytes: float, operations: float, hot: bool) -> float:
        """Return the least time a product can take here."""
        computing = operations / self.operations_per_second
        return computing if hot else max(computing, moved_bytes / self.bytes_per_second)


def device_name(device: str) -> str:
    """Return the GPU's name, or the processor's with the instruction sets that matter; never the host's."""
    if device != "cpu":
        return torch.cuda.get_device_name(device)
    model, flags = processor()
    shown = [flag for flag in SHOWN_FLAGS if flag in flags]
    return f"{model} ({' '.join(shown)})" if shown else model


def processor(cpuinfo: str | None = None) -> tuple[str, frozenset[str]]:
    """Return the processor's model and its feature flags, from the text of /proc/cpuinfo where there is one."""
    if cpuinfo is None:
        source = Path("/proc/cpuinfo")
        cpuinfo = source.read_text() if source.exists() else ""
    fields = dict(re.findall(r"^([^\t:]+?)\s*:\s*(.*)$", cpuinfo, flags=re.MULTILINE))
    model = fields.get("model name") or platform.processor() or platform.machine()
    flags = fields.get("flags") or fields.get("Features") or ""
    return re.sub(r"\((R|TM|tm)\)|\bCPU\b|@.*", "", model).strip(), frozenset(flags.split())


def slug(name: str) -> str:
    """Return a device's name as part of a file name: no instruction sets, no spaces."""
    return re.sub(r"[^a-z0-9]+", "-", name.partition(" (")[0].lower()).strip("-")


def last_cache_bytes(device: str) -> int:
    """Return the size of the cache in front of memory."""
    if device != "cpu":
        return int(torch.cuda.get_device_properties(device).L2_cache_size)
    sizes = [
        _bytes_of(file.read_text().strip()) for file in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
    ]
    return max(sizes, default=DEFAULT_CACHE_BYTES)


def _bytes_of(text: str) -> int:
    """Read 48K, 2048K or 260M."""
    unit = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}.get(text[-1:], 1)
    return int(text.rstrip("KMG")) * unit


def measure_peaks(device: str) -> Peaks:
    """Measure both ceilings, in a few seconds."""
    size = max(2 * last_cache_bytes(device), (256 if device == "cpu" else 2048) * MEGABYTE)
    buffer = torch.ones(size // 4, device=device)
    matrix = buffer[: buffer.numel() // 4096 * 4096].view(-1, 4096)
    reads = (buffer.sum, buffer.view(torch.int32).amax, partial(torch.mv, matrix, matrix[0].clone()))
    bandwidth = size / min(_best_seconds(read, device) for read in reads)
    return Peaks(bandwidth, max(_product_rates(device)))


def _product_rates(device: str) -> Sequence[float]:
    """Return operations per second of torch's dense products; int8 counts on a CPU, whose kernels compute in it."""
    tokens, size = (1024, 2048) if device == "cpu" else (4096, 8192)
    work = 2.0 * tokens * size * size
    rates = []
    for dtype in (torch.float32, torch.bfloat16) if device == "cpu" else (torch.float16,):
        x, weight = torch.randn(tokens, size, device=device).to(dtype), torch.randn(size, size, device=device).to(dtype)
        rates.append(work / _best_seconds(partial(torch.nn.functional.linear, x, weight), device))
    if device == "cpu":
        x8 = torch.randint(-64, 64, (tokens, size), dtype=torch.int8)
        weight8 = torch.randint(-64, 64, (size, size), dtype=torch.int8)
        with contextlib.suppress(RuntimeError):  # not on every processor
            rates.append(work / _best_seconds(partial(torch._int_mm, x8, weight8), device))
    return rates


def _best_seconds(call: Callable[[], Tensor], device: str) -> float:
    """Return the shortest of several calls: a ceiling is what was reached once."""
    call()
    best = float("inf")
    for _ in range(15):
        _wait(device)
        start = time.perf_counter()
        call()
        _wait(device)
        best = min(best, time.perf_counter() - start)
    return best


def _wait(device: str) -> None:
    if device != "cpu":
        torch.cuda.synchronize(device)
