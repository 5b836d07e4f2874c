"""Steps that give one token to each sequence, recorded once and replayed.

On a GPU such a step is some hundreds of small kernels, and launching them one by one takes longer than running them. So
they are recorded as CUDA graphs when the model is loaded, one for every bucket of rows and of keys, and launched whole:

    record    run the model over tensors that stay where they are              once for each bucket, the largest first
    replay    copy the step's rows into the smallest bucket that holds them,   every step without longer chunks
              fill the rest of it with rows that disturb nobody, launch

    rows of the step     a b c . .    bucket of 4:  a b c p     p writes to a page of its own, and looks at itself only
    pages of each        3 1 2                      3 1 2 p     tables are as wide as the bucket; the rest is not read

The kernel that reads pages cuts a sequence's keys by nothing but their own number, so a row's result does not depend on
the bucket's keys. All recordings share their tensors and one pool of memory: a replay overwrites what the one before
returned. Whatever is no such step, or fits no bucket, is computed as before.

Where there is no GPU, "recording" keeps the function and "replaying" calls it again: the same tensors, the same
buckets, no graph. Tests compare that with the plain path.

Legend: B rows of a bucket, N rows of the step, P pages, V vocabulary, D hidden size.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from service.engine.batch import Batch, DecodeGroup, Reach

log = logging.getLogger(__name__)

FIRST_KEYS = 4096
MOST_PART_BYTES = 1 << 28
"""What the splits of one attention may leave in memory; a bucket whose rows and keys need more is not recorded."""

Outputs = tuple[Tensor, Tensor]
"""Logits [B, V] and what the head read [B, D]."""
Run = Callable[[Batch], Outputs]
Recorder = Callable[[Callable[[], None]], Callable[[], None]]
"""Runs a function, and returns one that does the same again on the same tensors."""


def row_buckets(most: int) -> tuple[int, ...]:
    """Return numbers of rows that steps are recorded for: small ones closely, so that few rows are spare."""
    steps = [1, 2, 4, *range(8, 64, 8), *range(64, 256, 16), *range(256, most + 1, 64)]
    return (*(rows for rows in steps if rows < most), most)


def key_buckets(most: int) -> tuple[int, ...]:
    """Return numbers of keys that steps are recorded for: the usual context and the longest."""
    return (most,) if most <= FIRST_KEYS else (FIRST_KEYS, most)


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """What recorded steps are made for.

    Attributes:
        rows: most sequences of a step.
        keys: most tokens of a sequence.
        page_size: tokens of a page.
        spare_page: a page that no sequence has, for rows that only fill a bucket.
        split_keys: keys of a sequence that one program attends to.
        split_bytes: what it leaves in memory, all heads together, until the splits are joined.
        windows: the model's sliding windows.
    """

    rows: int
    keys: int
    page_size: int
    spare_page: int
    split_keys: int
    split_bytes: int
    windows: tuple[int, ...] = ()


@dataclass(slots=True)
class _Recording:
    """One bucket: its batch, how to run it again, and where the results are."""

    batch: Batch
    replay: Callable[[], None]
    outputs: Outputs | None = None


class DecodeGraphs:
    """Recorded steps by bucket. Made once, when the model is loaded; raises whatever the model raises then."""

    def __init__(self, run: Run, limits: Limits, device: torch.device) -> None:
        self._run = run
        self._limits = limits
        self._rows, self._keys = row_buckets(limits.rows), key_buckets(limits.keys)
        size = self._rows[-1]
        width = -(-self._keys[-1] // limits.page_size)
        self._ids_1B = torch.zeros(1, size, dtype=torch.int64, device=device)
        self._positions_1B = torch.zeros_like(self._ids_1B)
        # Spare rows write to places of their own as far as the page has any: what they write is never read.
        self._spare_slots_B = (
            limits.spare_page * limits.page_size + torch.arange(size, device=device) % limits.page_size
        )
        self._slots_B = self._spare_slots_B.clone()
        self._pages_BP = torch.full((size, width), limits.spare_page, dtype=torch.int64, device=device)
        self._lengths_B = torch.ones(size, dtype=torch.int32, device=device)
        self._recordings: dict[tuple[int, int], _Recording] = {}
        record = _cuda_recorder() if device.type == "cuda" else _again
        for keys in reversed(self._keys):
            for rows in reversed(self._rows):
                if rows * -(-keys // limits.split_keys) * limits.split_bytes <= MOST_PART_BYTES:
                    self._record(rows, keys, record)
        log.info("%d decode steps are recorded, up to %d sequences of %d tokens", len(self), size, self._keys[-1])

    def __len__(self) -> int:
        """Return how many steps are recorded."""
        return len(self._recordings)

    def replay(self, batch: Batch) -> Outputs | None:
        """Compute a step; None if it is not one of those that are recorded.

        Returns:
            Logits [N, V] and what the head read [N, D], of all rows of the step; the next replay overwrites them.
        """
        recording = self._find(batch)
        if recording is None:
            return None
        self._fill(batch.decode_groups[0], batch, len(recording.batch.slots_T))
        recording.replay()
        assert recording.outputs is not None
        logits_BV, head_input_BD = recording.outputs
        num_rows = len(batch.slots_T)
        return logits_BV[:num_rows], head_input_BD[:num_rows]

    def _find(self, batch: Batch) -> _Recording | None:
        """Return the smallest recording that holds the step."""
        if batch.prefill_parts or len(batch.decode_groups) != 1 or batch.decode_groups[0].mask_B11S is not None:
            return None
        rows = next((bucket for bucket in self._rows if bucket >= len(batch.slots_T)), None)
        keys = next((bucket for bucket in self._keys if bucket >= batch.decode_groups[0].most_keys), None)
        return None if rows is None or keys is None else self._recordings.get((rows, keys))

    def _fill(self, group: DecodeGroup, batch: Batch, rows: int) -> None:
        """Copy a step into the first rows, and make the others of the bucket spare again."""
        used = len(batch.slots_T)
        self._ids_1B[:, :used].copy_(batch.input_ids_1T)
        self._positions_1B[:, :used].copy_(batch.position_ids_1T)
        self._slots_B[:used].copy_(batch.slots_T)
        self._lengths_B[:used].copy_(group.lengths_B)
        self._pages_BP[:used, : group.pages_BP.shape[1]].copy_(group.pages_BP)
        if used < rows:
            self._ids_1B[:, used:rows].zero_()
            self._positions_1B[:, used:rows].zero_()
            self._slots_B[used:rows].copy_(self._spare_slots_B[used:rows])
            self._lengths_B[used:rows].fill_(1)
            self._pages_BP[used:rows, 0].fill_(self._limits.spare_page)

    def _record(self, rows: int, keys: int, record: Recorder) -> None:
        width = -(-keys // self._limits.page_size)
        group = DecodeGroup(
            first=0,
            last=rows,
            pages_BP=self._pages_BP[:rows, :width],
            mask_B11S=None,
            lengths_B=self._lengths_B[:rows],
            most_keys=keys,
        )
        batch = Batch(
            input_ids_1T=self._ids_1B[:, :rows],
            position_ids_1T=self._positions_1B[:, :rows],
            slots_T=self._slots_B[:rows],
            fresh_pages_P=None,
            decode_groups=(group,),
            prefill_parts=(),
            drawing=(),
            drawing_rows_R=torch.arange(rows, device=self._slots_B.device),
            windowed={window: Reach(decode_groups=(group,), prefill_parts=()) for window in self._limits.windows},
        )
        recording = _Recording(batch=batch, replay=lambda: None)

        def run() -> None:
            recording.outputs = self._run(batch)

        recording.replay = record(run)
        self._recordings[rows, keys] = recording


def _again(run: Callable[[], None]) -> Callable[[], None]:
    """Keep the function: what a recording is where there are no graphs."""
    return run


def _cuda_recorder() -> Recorder:
    """Return what records CUDA graphs, all on one stream and in one pool of memory.

    The first runs, outside of the recording, compile kernels and make what they keep between calls.
    """
    stream, pool = torch.cuda.Stream(), torch.cuda.graph_pool_handle()

    def record(run: Callable[[], None]) -> Callable[[], None]:
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            run()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool, stream=stream):
            run()
        replay: Callable[[], None] = graph.replay
        return replay

    return record
