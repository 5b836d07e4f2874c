"""What `onebit tune` does: time every sensible tile of every product of a model, and keep the fastest.

Times are of launches inside a CUDA graph, one after another over more weights than the L2 cache holds: a model never
finds a layer's weights in the cache, and Python's share of a launch is not in a graph. Where the dense path beats the
fastest tile, the number of tokens is kept as `dense_from`.
"""

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from onebit_core.errors import ConfigError
from onebit_core.kernels.packing import num_words
from onebit_core.kernels.planes import LinearOperands, Packed, PlaneTerm
from onebit_core.kernels.triton import launch, tiles
from onebit_core.kernels.triton.layout import INT8_KIND, Plan, parts_of, plan_of
from onebit_core.kernels.triton.packed import pack_operands
from onebit_core.kernels.triton.prepack import num_blocks

ROW_CHOICES = ((16, 1), (32, 2), (64, 4), (128, 8))
STAGE_CHOICES = (3, 4, 5)
SPLIT_CHOICES = (1, 2, 4, 8, 16)
DENSE_BUCKETS = (32, 64, 128, 256)
REPEATS = 5
CACHE_FACTOR = 2
MOST_COPIES = 256


@dataclass(frozen=True)
class Timing:
    """One result.

    Attributes:
        product: what was multiplied.
        tokens: by how many tokens.
        tile: the fastest tile.
        packed_us: its time in microseconds.
        rule_us: the time of the tile the shipped rule names.
        dense_us: the time of unpacking and multiplying densely, where that was timed.
    """

    product: tiles.Product
    tokens: int
    tile: tiles.Tile
    packed_us: float
    rule_us: float
    dense_us: float | None


def candidates(gpu: tiles.Gpu, product: tiles.Product, tokens: int) -> list[tiles.Tile]:
    """Return the tiles worth timing; the shipped rule's is the first."""
    blocks = num_blocks(product.in_features)
    wide = max(gpu.fewest_tokens, min(128, 1 << (tokens - 1).bit_length()))
    found = [tiles.tile_by_rule(gpu, product, tiles.bucket_of(tokens))]
    for (rows, warps), width, stages in itertools.product(ROW_CHOICES, {wide, max(8, wide // 2)}, STAGE_CHOICES):
        if width < gpu.fewest_tokens or rows > max(16, 2 * product.out_features):
            continue
        programs = math.ceil(product.out_features / rows) * math.ceil(tokens / width)
        for splits in SPLIT_CHOICES:
            crowded = splits > 1 and programs * splits > 12 * gpu.processors * 4 // warps
            if crowded or splits > max(1, blocks // 2):
                continue
            tile = tiles.Tile(rows, width, 128, warps, stages, tiles.even_splits(blocks, splits))
            if tile not in found:
                found.append(tile)
    return found


def random_weight(rows: int, columns: int, planes: int, group_size: int, device: torch.device) -> Packed:
    """Return a packed random weight: independent planes with a coefficient a row, or codes with one a group.

    Raises:
        ConfigError: the group size does not divide the columns.
    """
    if group_size and columns % group_size:
        raise ConfigError(f"groups of {group_size} columns do not divide {columns} input features")
    groups = columns // group_size if group_size else 1
    words = torch.randint(-(2**31), 2**31 - 1, (planes, rows, num_words(columns)), dtype=torch.int64, device=device)
    scale_OG = torch.rand(rows, groups, device=device) + 0.5
    term = PlaneTerm(
        words_QOW=words.to(torch.int32),
        coefficient_COG=scale_OG.unsqueeze(0),
        offset_OG=scale_OG * (-(2**planes - 1) / 2),
        binary_code=True,
    )
    return pack_operands(LinearOperands(out_features=rows, in_features=columns, planes=(term,)))


@contextmanager
def recorded() -> Iterator[list[Packed]]:
    """Collect the weights that are multiplied while the context is open."""
    seen: dict[int, Packed] = {}

    def note(parts: Sequence[Tensor], layout: Sequence[int]) -> None:
        seen.setdefault(parts[0].data_ptr(), Packed(parts=tuple(parts), layout=tuple(layout)))

    found: list[Packed] = []
    launch.observers.append(note)
    try:
        yield found
    finally:
        launch.observers.remove(note)
        found.extend(seen.values())


def products_in(weights: Sequence[Packed], dtype: torch.dtype) -> dict[tiles.Product, list[Packed]]:
    """Sort weights by what decides their speed."""
    found: dict[tiles.Product, list[Packed]] = {}
    for packed in weights:
        found.setdefault(launch.product_of(plan_of(packed.layout), dtype), []).append(packed)
    return found


def tune_product(
    product: tiles.Product, weights: Sequence[Packed], dtype: torch.dtype, tokens: int, progress: Callable[[], None]
) -> Timing:
    """Time every candidate on enough copies of the weights to leave the cache cold.

    Args:
        product: what `weights` have in common.
        weights: at least one.
        dtype: of the activations.
        tokens: how many.
        progress: called after every candidate; may raise to stop.
    """
    device = weights[0].parts[0].device
    gpu, copies = tiles.gpu_of(device), _cold_copies(weights, device)
    x = torch.randn(tokens, product.in_features, device=device, dtype=dtype)
    times: list[tuple[float, tiles.Tile]] = []
    for tile in candidates(gpu, product, tokens):
        elapsed = _time_or_none([_call(x, packed, tile) for packed in copies])
        if elapsed is not None:
            times.append((elapsed, tile))
        progress()
    if not times:
        raise ConfigError(f"no tile of {product.key(tokens)} can run on {gpu.name}")
    dense_us = None
    if tokens in DENSE_BUCKETS and plan_of(weights[0].layout).kind != INT8_KIND:
        dense_us = _time_or_none([_dense_call(x, packed) for packed in copies[:8]])
    best_us, best = min(times, key=lambda pair: pair[0])
    return Timing(product, tokens, best, best_us, times[0][0], dense_us)


def entries_of(timings: Sequence[Timing]) -> dict[str, list[int]]:
    """Turn results into entries of a table."""
    entries: dict[str, list[int]] = {}
    for timing in timings:
        tile = timing.tile
        fields = [tile.rows, tile.tokens, tile.columns, tile.warps, tile.stages, tile.splits]
        entries[timing.product.key(tiles.bucket_of(timing.tokens))] = fields
        key = "dense_from," + timing.product.key(0)
        if timing.dense_us is not None and timing.dense_us < timing.packed_us:
            entries[key] = [min(timing.tokens, *entries.get(key, [timing.tokens]))]
    return entries


def _cold_copies(weights: Sequence[Packed], device: torch.device) -> list[Packed]:
    """Return the weights, and copies of them until together they fill the L2 cache more than once."""
    size = weights[0].num_bytes
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    wanted = min(MOST_COPIES, max(4, math.ceil(CACHE_FACTOR * cache / size)))
    copies = list(weights[:wanted])
    for index in range(wanted - len(copies)):
        original = weights[index % len(weights)]
        copies.append(Packed(parts=tuple(part.clone() for part in original.parts), layout=original.layout))
    return copies


def _call(x: Tensor, packed: Packed, tile: tiles.Tile) -> Callable[[], Tensor]:
    """Return a function that multiplies with that tile."""
    plan: Plan = plan_of(packed.layout)
    parts = parts_of(plan, packed.parts)
    return lambda: launch.packed_matmul(x, parts, plan, tile)


def _dense_call(x: Tensor, packed: Packed) -> Callable[[], Tensor]:
    """Return a function that unpacks and multiplies."""
    plan = plan_of(packed.layout)
    parts = parts_of(plan, packed.parts)
    return lambda: launch.dense_matmul(x, parts, plan)


def _time_or_none(calls: Sequence[Callable[[], Tensor]]) -> float | None:
    """Return microseconds a call, or None where the device cannot run the kernel."""
    try:
        return time_calls(calls)
    except triton.runtime.errors.OutOfResources:
        return None


def time_calls(calls: Sequence[Callable[[], Tensor]]) -> float:
    """Return microseconds a call: the fastest of several replays of a CUDA graph of all calls."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for call in calls[:2]:
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    graph.replay()
    times: list[float] = []
    for _ in range(REPEATS):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return 1000 * min(times) / len(calls)
