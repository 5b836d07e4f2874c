"""Counters for split-K: zero between launches, one set per stream, made before any CUDA graph is captured.

Two streams must not count on the same tiles, and a graph is usually captured on a stream of its own that never ran
before; memory cannot be made ready while capturing (its zeroing would be recorded, not done). So spare sets are kept
per device and a new stream takes one. Graphs captured on one stream share a set: replay them one after another.
"""

import threading

import torch
from torch import Tensor

from onebit_core.errors import KernelError
from onebit_core.kernels.triton.tiles import MAX_TILES

NUM_SPARES = 8

_lock = threading.Lock()
_by_stream: dict[tuple[torch.device, int], Tensor] = {}
_spares: dict[torch.device, list[Tensor]] = {}


def prepare(device: torch.device) -> None:
    """Make sure that spare counters exist; not while a graph is captured."""
    with _lock:
        spares = _spares.setdefault(device, [])
        if len(spares) >= NUM_SPARES:
            return
        spares.extend(torch.zeros(NUM_SPARES, MAX_TILES, dtype=torch.int32, device=device))
        if device.type == "cuda":
            torch.cuda.current_stream(device).synchronize()  # other streams will use them


def counters(device: torch.device) -> Tensor:
    """Return the zeroed counters of the current stream, int32 [MAX_TILES].

    Raises:
        KernelError: a graph is captured and no spare is left.
    """
    on_gpu = device.type == "cuda"
    key = (device, torch.cuda.current_stream(device).cuda_stream if on_gpu else 0)
    known = _by_stream.get(key)
    if known is not None:
        return known
    if not (on_gpu and torch.cuda.is_current_stream_capturing()):
        prepare(device)
    with _lock:
        if not _spares.get(device):
            raise KernelError(f"{device}: no counters are left for this stream; run the model once before capturing")
        return _by_stream.setdefault(key, _spares[device].pop())
