"""Embedding and output head in 8 or 4 bit: in a small model they are most of the bytes.

    8 bit   E_vd = s_v * q_vd                   q int8,  s = max|E_v| / 127
    4 bit   E_vd = s_vg * (q_vd - z_vg)         0 <= q, z < 16,  g the group of column d

At 4 bit the range of each row and group is the one with the least squared error (`grid`), and codes and zero points are
bit planes as in `grouped_int`: 4 + 20/64 bits a weight with groups of 64. A lookup unpacks the rows asked for and no
others. A head tied to the embedding stores nothing and multiplies by the embedding's codes; an untied one is a
`GroupedIntLinear` of its own.

Shape suffixes: V = vocabulary, D = hidden size, G = groups of columns, K = columns of a group, N = rows asked for, B =
bits, W = words.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from onebit_core.kernels import (
    Backend,
    LinearOperands,
    Packed,
    byte_operands,
    code_terms,
    int_dequantize,
    num_words,
    packed_backend,
    packed_matmul,
    packs,
    unpack_bits,
)
from onebit_core.kernels.packing import WORD_BITS
from onebit_core.layers.grid import SMALLEST_SCALE, best_grid, min_max_grid
from onebit_core.layers.grouped_int import GroupedIntLinear
from onebit_core.layers.spec import LayerSpec

GROUP_SIZE = 64
WEIGHTS_AT_ONCE = 1 << 22
"""Weights that are quantized together: the search for the best range takes several copies of them."""


def groups_of_row(columns: int) -> int:
    """Return how many groups a row is cut into at 4 bit: the number that divides it and is nearest to groups of 64."""
    divisors = [groups for groups in range(1, columns // 2 + 1) if columns % groups == 0] or [1]
    return min(divisors, key=lambda groups: abs(math.log(columns / groups / GROUP_SIZE)))


def _spans(rows: int, columns: int) -> Iterator[slice]:
    """Cut a table into parts of whole rows."""
    step = max(1, WEIGHTS_AT_ONCE // columns)
    for start in range(0, rows, step):
        yield slice(start, start + step)


def table_spec(rows: int, columns: int, bits: int) -> LayerSpec:
    """Return what `quantize_table` stores: one group a row at 8 bits, groups of 64 or so at 4."""
    groups = 1 if bits == 8 else groups_of_row(columns)
    return LayerSpec(format="grouped_int", in_features=columns, out_features=rows, planes=bits, groups=groups)


@torch.no_grad()
def quantize_table(weight_VD: Tensor, bits: int) -> GroupedIntLinear:
    """Quantize a table, floating [V, D]: 8 bits with one group a row, 4 with searched ranges of groups."""
    rows, columns = weight_VD.shape
    groups = table_spec(rows, columns, bits).groups
    codes_VD = torch.empty(rows, columns, dtype=torch.uint8, device=weight_VD.device)
    scale_VG = torch.empty(rows, groups, device=weight_VD.device)
    zero_VG = torch.empty(rows, groups, dtype=torch.uint8, device=weight_VD.device)
    for span in _spans(rows, columns):
        part_RK = weight_VD[span].float().reshape(-1, columns // groups)
        grid = min_max_grid(part_RK, bits) if bits == 8 else best_grid(part_RK, bits, None)
        codes_VD[span] = grid.quantize(part_RK).view(-1, columns).to(torch.uint8)
        scale_VG[span] = grid.scale_O.view(-1, groups)
        zero_VG[span] = grid.zero_O.view(-1, groups).to(torch.uint8)
    return GroupedIntLinear.from_codes(codes_VD, scale_VG, zero_VG, bits)


class QuantizedEmbedding(nn.Module, ABC):
    """An embedding table of few bits.

    Looks up rows in the dtype that was torch's default when the module was made, or that the module was moved to.
    """

    dtype_probe: Tensor

    def __init__(self, num_embeddings: int, embedding_dim: int) -> None:
        super().__init__()
        self.num_embeddings, self.embedding_dim = num_embeddings, embedding_dim
        self.register_buffer("dtype_probe", torch.empty(0, dtype=torch.get_default_dtype()), persistent=False)

    @abstractmethod
    def fill(self, weight_VD: Tensor) -> None:
        """Quantize a table, floating [V, D], into this module."""

    @abstractmethod
    def rows(self, ids_N: Tensor) -> Tensor:
        """Return the rows of some tokens, float32 [N, D]."""

    @abstractmethod
    def operands(self) -> LinearOperands:
        """Return the table as the weight of a head, in the form that packed kernels read."""

    def forward(self, ids: Tensor) -> Tensor:
        """Look up: integer [...], result [..., D]."""
        rows_ND = self.rows(ids.reshape(-1))
        return rows_ND.to(self.dtype_probe.dtype).view(*ids.shape, self.embedding_dim)

    def dequantize(self) -> Tensor:
        """Return the dense table, float32 [V, D]."""
        return self.rows(torch.arange(self.num_embeddings, device=self.dtype_probe.device))


class ByteEmbedding(QuantizedEmbedding):
    """A table in 8 bit.

    Tensors: codes int8 [V, D]; scale float16 [V].
    """

    codes: Tensor
    scale: Tensor

    def __init__(self, num_embeddings: int, embedding_dim: int) -> None:
        super().__init__(num_embeddings, embedding_dim)
        self.register_buffer("codes", torch.empty(num_embeddings, embedding_dim, dtype=torch.int8))
        self.register_buffer("scale", torch.empty(num_embeddings, dtype=torch.float16))

    @torch.no_grad()
    def fill(self, weight_VD: Tensor) -> None:
        """Quantize a table with one scale a row."""
        for span in _spans(self.num_embeddings, self.embedding_dim):
            part_RD = weight_VD[span].float()
            scale_R = (part_RD.abs().amax(1) / 127).clamp(min=SMALLEST_SCALE).half()
            self.scale[span] = scale_R
            self.codes[span] = (part_RD / scale_R.float()[:, None]).round().clamp(-127, 127).to(torch.int8)

    def rows(self, ids_N: Tensor) -> Tensor:
        """Return the rows of some tokens."""
        return self.codes[ids_N].float() * self.scale[ids_N].float()[:, None]

    def operands(self) -> LinearOperands:
        """Return the bytes."""
        return byte_operands(self.codes, self.scale)


class GroupedEmbedding(QuantizedEmbedding):
    """A table in 4 bit.

    Tensors: planes int32 [4, V, W]; scale float16 [V, G]; zero int32 [4, ceil(V * G / 32)], zero points of all rows in
    one run. The layouts are those of `grouped_int`.
    """

    BITS = 4
    planes: Tensor
    scale: Tensor
    zero: Tensor

    def __init__(self, num_embeddings: int, embedding_dim: int) -> None:
        super().__init__(num_embeddings, embedding_dim)
        self.groups = groups_of_row(embedding_dim)
        words, zero_words = num_words(embedding_dim), num_words(num_embeddings * self.groups)
        self.register_buffer("planes", torch.empty(self.BITS, num_embeddings, words, dtype=torch.int32))
        self.register_buffer("scale", torch.empty(num_embeddings, self.groups, dtype=torch.float16))
        self.register_buffer("zero", torch.empty(self.BITS, zero_words, dtype=torch.int32))

    @torch.no_grad()
    def fill(self, weight_VD: Tensor) -> None:
        """Quantize a table with a scale and a zero point for every group."""
        table = quantize_table(weight_VD, self.BITS)
        for name in ("planes", "scale", "zero"):
            self.get_buffer(name).copy_(table.get_buffer(name))

    def rows(self, ids_N: Tensor) -> Tensor:
        """Return the rows of some tokens: words of the planes, scales and zero points of these rows alone."""
        digit_B11 = (1 << torch.arange(self.BITS, device=ids_N.device, dtype=torch.int32))[:, None, None]
        bits_BND = unpack_bits(self.planes[:, ids_N], self.embedding_dim)
        codes_NGK = (bits_BND * digit_B11).sum(0).unflatten(1, (self.groups, -1))
        # The zero points of a row begin anywhere in a word of the run.
        places_NG = ids_N[:, None] * self.groups + torch.arange(self.groups, device=ids_N.device)
        bits_BNG = (self.zero[:, places_NG // WORD_BITS] >> (places_NG % WORD_BITS)) & 1
        zero_NG = (bits_BNG * digit_B11).sum(0)
        rows_NGK: Tensor = (codes_NGK - zero_NG[..., None]) * self.scale[ids_N].float()[..., None]
        return rows_NGK.flatten(1)

    def operands(self) -> LinearOperands:
        """Return the planes as a binary code."""
        return LinearOperands(
            out_features=self.num_embeddings,
            in_features=self.embedding_dim,
            planes=code_terms(self.planes, self.scale, self.zero),
        )

    def dequantize(self) -> Tensor:
        """Return the dense table, float32 [V, D]."""
        return int_dequantize(self.planes, self.scale, self.zero, self.embedding_dim)


EMBEDDINGS: dict[int, type[QuantizedEmbedding]] = {8: ByteEmbedding, 4: GroupedEmbedding}
"""`embedding_bits` to class."""


class TiedHead(nn.Module):
    """The output head of a model whose head is its embedding: logits = x @ E.T; stores nothing."""

    def __init__(self, embedding: QuantizedEmbedding) -> None:
        super().__init__()
        self._embedding = (embedding,)  # in a tuple, so that torch does not count its tensors twice
        self.in_features, self.out_features = embedding.embedding_dim, embedding.num_embeddings
        self.backend: Backend = "dense"
        self._dense: Tensor | None = None
        self._packed: Packed | None = None

    def set_backend(self, backend: Backend) -> None:
        """Let another backend compute; what was laid out for the one before is dropped."""
        if backend != self.backend:
            self.backend, self._dense, self._packed = backend, None, None

    def pack(self) -> None:
        """Lay the table out for a packed backend, ahead of the first product; nothing to do for the others."""
        if packs(self.backend) and self._packed is None:
            self._packed = packed_backend(self.backend).pack(self._embedding[0].operands())

    def packed_bytes(self) -> int:
        """Return the bytes of the table as packed for a backend."""
        return 0 if self._packed is None else self._packed.num_bytes

    def forward(self, x: Tensor) -> Tensor:
        """Multiply: x floating [..., D], result [..., V] in x's dtype."""
        if packs(self.backend):
            self.pack()
            assert self._packed is not None
            return packed_matmul(x, self._packed)
        embedding = self._embedding[0]
        if self.backend == "reference":
            return (x.float() @ embedding.dequantize().T).to(x.dtype)
        if self._dense is None or self._dense.dtype != x.dtype or self._dense.device != x.device:
            # Kept for later, so that a pass with gradients can use it, too, whoever asks for it first.
            with torch.inference_mode(mode=False), torch.no_grad():
                self._dense = embedding.dequantize().to(x.dtype)
        return nn.functional.linear(x, self._dense)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:  # noqa: FBT001, FBT002  (torch's signature)
        """Drop what was made for the old device or dtype when the module moves."""
        self._dense = self._packed = None
        return super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
