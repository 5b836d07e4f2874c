"""All decoder blocks of a Llama-like model in one call of the C library, over one step of a paged KV cache.

Between two products of a model that decodes a token stand a norm, a rotation, an attention over few keys: each takes
microseconds, and each costs as much again to reach from Python. So the C library walks through all blocks by itself
(`ob_decode`, src/decoder.c); Python hands over where everything lies.

    step(embeddings [T, D], rotation [T, R], cache, runs) -> normalized hidden states [rows asked for, D]

Legend: T tokens of the step, D hidden size, R head size, L layers, H query heads, K key heads, P pages.
"""

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from onebit_core.errors import KernelError
from onebit_core.kernels.cpu.library import check, load
from onebit_core.kernels.cpu.pack import aligned
from onebit_core.kernels.planes import CPU_CODE, Packed

PAGE_TOKENS = 16
"""Tokens of a page: the C side computes with sixteen keys side by side."""

HEAD_STEP, MOST_HEAD = 16, 512
"""Heads have a multiple of so many numbers, and at most so many."""

Chain = tuple[Packed, ...]
"""Products one after the other; one or two."""

Int64s = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class DecoderShape:
    """Sizes of a model.

    Attributes:
        hidden: D.
        heads: H.
        key_heads: K, divides H.
        head_dim: R, a multiple of HEAD_STEP up to MOST_HEAD.
        inner: columns of down_proj.
        eps: of the norms.
        scaling: of queries.
    """

    hidden: int
    heads: int
    key_heads: int
    head_dim: int
    inner: int
    eps: float
    scaling: float


@dataclass(frozen=True, kw_only=True)
class DecoderBlock:
    """What one block computes with; norms are float32.

    Attributes:
        input_norm_D: before attention.
        post_norm_D: before the inner part.
        q_norm_R: of each query head, before its rotation; None for none.
        k_norm_R: of each key head, likewise.
        window: keys that a token looks at, its own among them; None for all.
        qkv: chains of q, k and v; or one alone, with the rows of all three.
        o: the output projection.
        gate_up: chains of gate and up; or one alone.
        down: back to D.
    """

    input_norm_D: Tensor
    post_norm_D: Tensor
    q_norm_R: Tensor | None
    k_norm_R: Tensor | None
    window: int | None
    qkv: tuple[Chain, ...]
    o: Chain
    gate_up: tuple[Chain, ...]
    down: Chain


class CpuDecoder:
    """The blocks of one model, ready to be stepped.

    Raises:
        BackendUnavailable: the library is missing.
        KernelError: parts that do not belong together.
    """

    def __init__(self, shape: DecoderShape, blocks: Sequence[DecoderBlock], final_norm_D: Tensor) -> None:
        self._library = load()
        if shape.head_dim % HEAD_STEP or not 0 < shape.head_dim <= MOST_HEAD:
            raise KernelError(
                f"cpu decoder: head size {shape.head_dim} is not a multiple of {HEAD_STEP} up to {MOST_HEAD}"
            )
        self.shape = shape
        self._kept: list[object] = []
        reals = np.array([shape.eps, shape.scaling], dtype=np.float64)
        self._kept.append(reals)
        at = reals.ctypes.data
        sizes = (shape.hidden, shape.heads, shape.key_heads, shape.head_dim, shape.inner)
        fields = [len(blocks), *sizes, self._norm(final_norm_D, shape.hidden), at, at + reals.itemsize]
        for block in blocks:
            fields += self._block_fields(block)
        self._fields = (ctypes.c_int64 * len(fields))(*fields)

    def step(
        self,
        hidden_TD: Tensor,
        rotation: tuple[Tensor, Tensor],
        cache: tuple[Tensor, Tensor],
        *,
        slots_T: Int64s,
        runs_N4: Int64s,
        pages_P: Int64s,
        rows: Int64s,
    ) -> Tensor:
        """Compute one step; writes the tokens' keys and values.

        Args:
            hidden_TD: embeddings, float32; undefined afterwards.
            rotation: cosines and sines, float32 [T, R] each.
            cache: keys and values, float32 [L, pages, ...] of K * R * 16 elements a page; read and written as
                [K, R, 16] and [K, 16, R].
            slots_T: page * 16 + place in it, where each token's keys and values go.
            runs_N4: of consecutive tokens of a sequence: first row, rows, position of the first, place in pages_P.
            pages_P: page tables, one after the other.
            rows: whose hidden states to return.

        Returns:
            float32 [len(rows), D], after the final norm.

        Raises:
            KernelError: the library refused.
        """
        cos_TR, sin_TR = (table.float().contiguous() for table in rotation)
        keys, values = cache
        out_RD = torch.empty(len(rows), self.shape.hidden)
        arrays = [np.ascontiguousarray(array, dtype=np.int64) for array in (slots_T, runs_N4, pages_P, rows)]
        slots, runs, pages, out_rows = (array.ctypes.data for array in arrays)
        addresses = [tensor.data_ptr() for tensor in (hidden_TD, cos_TR, sin_TR, keys, values)]
        fields = [len(hidden_TD), len(runs_N4), len(rows), *addresses, keys.stride(0), slots, runs, pages, out_rows]
        step = (ctypes.c_int64 * (len(fields) + 1))(*fields, out_RD.data_ptr())
        check(self._library, self._library.ob_decode(self._fields, len(self._fields), step, torch.get_num_threads()))
        return out_RD

    def _norm(self, weight: Tensor | None, size: int) -> int:
        """Return the address of a norm's weight, kept alive; 0 for none."""
        if weight is None:
            return 0
        if weight.shape != (size,):
            raise KernelError(f"cpu decoder: a norm has shape {tuple(weight.shape)}, not ({size},)")
        kept = weight.detach().float().contiguous().cpu()
        self._kept.append(kept)
        return kept.data_ptr()

    def _block_fields(self, block: DecoderBlock) -> list[int]:
        shape = self.shape
        width, key_width = shape.heads * shape.head_dim, shape.key_heads * shape.head_dim
        fields = [self._norm(block.input_norm_D, shape.hidden), self._norm(block.post_norm_D, shape.hidden)]
        fields += [self._norm(block.q_norm_R, shape.head_dim), self._norm(block.k_norm_R, shape.head_dim)]
        fields.append(block.window or 0)
        fields += self._joined_fields(block.qkv, (width, key_width, key_width), shape.hidden)
        fields += self._chain_fields(block.o, shape.hidden, width)
        fields += self._joined_fields(block.gate_up, (shape.inner, shape.inner), shape.hidden)
        return fields + self._chain_fields(block.down, shape.hidden, shape.inner)

    def _joined_fields(self, chains: Sequence[Chain], rows: Sequence[int], columns: int) -> list[int]:
        """Return the fields of linears that read the same input, or of their one product and of nothing."""
        if len(chains) == 1:
            return self._chain_fields(chains[0], sum(rows), columns) + [0] * 8 * (len(rows) - 1)
        fields: list[int] = []
        for chain, size in zip(chains, rows, strict=True):
            fields += self._chain_fields(chain, size, columns)
        return fields

    def _chain_fields(self, chain: Chain, rows: int, columns: int) -> list[int]:
        layouts = [packed.layout for packed in chain]
        sizes = [columns, *(layout[0] for layout in layouts)]
        fits = all(layout[1] == size for layout, size in zip(layouts, sizes, strict=False)) and sizes[-1] == rows
        if len(chain) not in (1, 2) or not fits or any(layout[2] != CPU_CODE for layout in layouts):
            raise KernelError(f"cpu decoder: products {layouts} do not multiply {columns} columns to {rows} rows")
        fields: list[int] = []
        for packed in chain:
            blob = aligned(packed.parts[0])
            self._kept.append(blob)
            fields += [blob.data_ptr(), blob.numel(), packed.layout[0], packed.layout[1]]
        return fields + [0] * (8 - len(fields))
