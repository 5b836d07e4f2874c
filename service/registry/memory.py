"""How much memory a model needs, and whether it is there: asked before anything is touched.

    needs  = weights + loading + kv_cache + process
    free   = what the system could give now - what loaded models were promised but have not touched yet

    weights    what is computed from: packed, at most MOST_PACKED_PER_STORED times what is on disk; dense: all of them
    loading    the stored weights, which are given back when the packed ones are made
    kv_cache   kv_cache_bytes, or less where config.json says that max_num_sequences of full length take less
    process    Python, PyTorch, and on a GPU its context

On the CPU the KV cache takes real memory only as it is filled; so an engine that was just started looks small, and what
it may still grow by is set aside. "What the system could give" is the least of the machine's and of the container's
(cgroup) limit. All of it is an upper bound: `--memory-check off` loads what it refuses.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from onebit_core.artifact.manifest import MOST_PACKED_PER_STORED
from service.registry.artifacts import Identity
from service.registry.gpu_memory import gpu_free_bytes
from service.settings import Settings

HOST_PROCESS_BYTES = 512 << 20
"""Measured: an engine with a model of 1 MB has 300 MB of its own and 190 MB of shared libraries."""

GPU_PROCESS_BYTES = 1 << 30
"""CUDA's context, Triton's kernels and workspaces."""

BYTES_OF_DTYPE = {"float32": 4, "float16": 2, "bfloat16": 2}
GIBIBYTE = float(1 << 30)


@dataclass(frozen=True, kw_only=True)
class Needs:
    """Memory that a model takes on one device, in bytes.

    Attributes:
        device: "cpu", or "cuda:N".
        weights: while it is served.
        loading: on top of them, until it is loaded.
        kv_cache: when it is full.
        process: of the engine without a model.
    """

    device: str
    weights: int
    loading: int
    kv_cache: int
    process: int

    @property
    def peak(self) -> int:
        """While it loads, which is when it needs most."""
        return self.weights + self.loading + self.kv_cache + self.process

    @property
    def lasting(self) -> int:
        """While it is served."""
        return self.weights + self.kv_cache + self.process

    def in_words(self) -> str:
        """Say what it is made of."""
        parts = {"weights": self.weights, "loading": self.loading, "KV cache": self.kv_cache, "process": self.process}
        return ", ".join(f"{name} {value / GIBIBYTE:.2f}" for name, value in parts.items() if value)


@dataclass(frozen=True, kw_only=True)
class MemoryPlan:
    """Whether a model fits.

    Attributes:
        needs: of the model.
        free: on its device, less what others were promised; None where nobody can tell.
        freed: what comes free when the model that it replaces is unloaded; 0 if it replaces none.
    """

    needs: Needs
    free: int | None
    freed: int = 0

    @property
    def fits(self) -> bool:
        """Whether it can be loaded beside everything that is."""
        return self.free is None or self.needs.peak <= self.free

    @property
    def fits_after_unload(self) -> bool:
        """Whether it can be loaded once the model that it replaces is gone."""
        return self.free is None or self.needs.peak <= self.free + self.freed

    @property
    def remedy(self) -> str | None:
        """What to do where it does not fit."""
        if self.fits:
            return None
        if self.freed and self.fits_after_unload:
            return "it fits once the served one is unloaded: send unload_first, and requests get 503 meanwhile"
        return "unload another model, lower kv_cache_bytes, or take a machine with more memory"

    def in_words(self, name: str) -> str:
        """Say in one sentence what is needed, what there is, and what to do."""
        assert self.free is not None
        return (
            f"model {name!r} needs {self.needs.peak / GIBIBYTE:.2f} GiB on {self.needs.device} "
            f"({self.needs.in_words()}) and {max(0, self.free) / GIBIBYTE:.2f} GiB are free beside what loaded models "
            f"were promised; {self.remedy}. --memory-check off loads it all the same"
        )


def needs_of(identity: Identity, settings: Settings, device: str) -> Needs:
    """Say what a model will take.

    Args:
        identity: of the model.
        settings: of the server.
        device: "cpu" or "cuda:N", as `choose_device` says.
    """
    manifest = identity.manifest
    dtype = settings.dtype if settings.dtype != "auto" else "float32" if device == "cpu" else "bfloat16"
    stored = sum(manifest.bytes_by_part.values())
    dense = manifest.source.parameters * BYTES_OF_DTYPE[dtype]
    if identity.is_original:
        weights, loading = dense, 0
    elif settings.backend == "dense":
        weights, loading = dense, stored
    elif settings.backend == "reference":
        weights, loading = stored, 0
    else:
        weights, loading = int(MOST_PACKED_PER_STORED * stored), stored
    return Needs(
        device=device,
        weights=weights,
        loading=loading,
        kv_cache=min(settings.kv_cache_bytes, _longest_cache(identity.folder, settings, BYTES_OF_DTYPE[dtype])),
        process=HOST_PROCESS_BYTES if device == "cpu" else GPU_PROCESS_BYTES,
    )


def free_bytes(device: str, promised: Iterable[int] = ()) -> int | None:
    """Return what a new model could take; None where nobody can tell.

    Args:
        device: "cpu" or "cuda:N".
        promised: what each loaded model may still take, which is not free.
    """
    free = host_free_bytes() if device == "cpu" else gpu_free_bytes(int(device.partition(":")[2] or 0))
    return None if free is None else free - sum(promised)


def resident_bytes(pid: int | None) -> int:
    """Return what a process holds of main memory; 0 where there is none."""
    try:
        return int(psutil.Process(pid).memory_info().rss) if pid is not None else 0
    except psutil.Error:
        return 0


def host_free_bytes(cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """Return what the machine could give, or the container, whichever is less."""
    free = int(psutil.virtual_memory().available)
    left = _cgroup_left(cgroup)
    return free if left is None else min(free, left)


def _cgroup_left(folder: Path) -> int | None:
    """Return what a container may still take; its file cache counts as free, for the kernel gives it up first."""
    for limit, usage, stat, cache in (
        ("memory.max", "memory.current", "memory.stat", "inactive_file"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "memory/memory.stat", "total_inactive_file"),
    ):
        try:
            most, used = (folder / limit).read_text().strip(), int((folder / usage).read_text())
            rows = dict(line.split() for line in (folder / stat).read_text().splitlines())
            return None if most == "max" else int(most) - used + int(rows.get(cache, 0))
        except (OSError, ValueError):
            continue
    return None


def _longest_cache(folder: Path, settings: Settings, itemsize: int) -> int:
    """Return the bytes that max_num_sequences of full length take; without limit where config.json does not say."""
    try:
        config: Any = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        config = config.get("text_config") or config
        heads = config["num_attention_heads"]
        head_dim = config.get("head_dim") or config["hidden_size"] // heads
        per_token = 2 * config["num_hidden_layers"] * (config.get("num_key_value_heads") or heads) * head_dim * itemsize
        longest = min(filter(None, (settings.max_model_len, config["max_position_embeddings"])))
        pages = settings.max_num_sequences * -(-int(longest) // settings.page_size)
        return int(per_token) * pages * settings.page_size
    except (OSError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError):
        return settings.kv_cache_bytes  # the engine will say what is wrong with it
