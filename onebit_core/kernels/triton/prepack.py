"""From LinearOperands to what the GPU kernels read: sign planes in fragment order, tables of coefficients.

    words        int32 [terms, planes, blocks, O, 4]    a block is 128 columns; blocks = ceil(I / 128)
    coefficient  float  [terms, C, G, O]                of signs: c = -a / 2
    shift        float  [terms, G, O]                   of sums of x: m = b + sum_q a_q / 2, left out where it is zero
    gain         float32 [terms, 128 * blocks]          scale_in, zero past the last column

Inside of a block, column k = 8 j + e is bit j of int16 half e: a thread of the tensor-core instruction owns one word,
two halves, and finds its columns 2c, 2c + 1 (+ 8 j) there. As canonical packing puts position p into bit p % 32 of word
p // 32, fragment order is canonical packing of permuted columns: position 16 e + j holds column 8 j + e. Blocks are the
outer dimension, so a tile of rows is one contiguous run of memory.

Terms of equal structure form a stack, which one launch computes. Group sizes that do not divide or fill a block are cut
to parts of 128, 64 or 32 columns by repeating coefficients; where even that fails, only the dense path can be taken.
"""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from itertools import groupby

import torch
from torch import Tensor

from onebit_core.kernels.packing import pack_bits, unpack_bits
from onebit_core.kernels.planes import LinearOperands, PlaneTerm

BLOCK = 128
MIN_PART = 32
GAIN_LIMIT = 16.0
"""Gains are stored at most this large (the rest moves into the coefficients), so that gain * x fits float16."""

_CHUNK_BITS = 1 << 24


@dataclass(frozen=True)
class Stack:
    """Terms of equal structure, computed by one launch. All fields are integers: they travel in Packed.layout.

    Attributes:
        terms: how many.
        planes: sign planes of a term.
        is_code: whether plane q stands for 2**q of one coefficient.
        groups: column groups, 1 for a coefficient a row.
        group_size: columns of a group.
        has_shift: whether sums of x are added.
        has_gain: whether x is scaled per column.
    """

    terms: int
    planes: int
    is_code: int
    groups: int
    group_size: int
    has_shift: int
    has_gain: int

    @property
    def is_grouped(self) -> bool:
        """Whether products are scaled per block, not at the end."""
        return self.groups > 1 or (self.planes > 1 and not self.is_code)

    @property
    def parts(self) -> int:
        """Runs of a block with a coefficient of their own; 0 where the tensor-core kernel cannot go."""
        if self.groups == 1 or self.group_size % BLOCK == 0:
            return 1
        fits = BLOCK % self.group_size == 0 and self.group_size >= MIN_PART
        return BLOCK // self.group_size if fits else 0


STACK_FIELDS = 7


def num_blocks(num_columns: int) -> int:
    """Return how many 128-column blocks a row has."""
    return -(-num_columns // BLOCK)


def fragment_order(half_bits: int, device: torch.device | str = "cpu") -> Tensor:
    """Return the column at every position of a block whose halves have `half_bits` bits."""
    return torch.arange(BLOCK, device=device).view(half_bits, -1).T.flatten()


def pack_fragments(words_OW: Tensor, num_columns: int, half_bits: int = 16) -> Tensor:
    """Reorder one canonical plane.

    Args:
        words_OW: int32 [O, W], layout of `packing`.
        num_columns: I.
        half_bits: 16 for the float kernels, 8 for the int8 one.

    Returns:
        int32 [blocks, O, 4].
    """
    blocks = num_blocks(num_columns)
    result = words_OW.new_empty(blocks, words_OW.shape[0], 4)
    order = fragment_order(half_bits, words_OW.device)
    step = max(1, _CHUNK_BITS // (blocks * BLOCK))
    for start in range(0, words_OW.shape[0], step):
        bits_OI = unpack_bits(words_OW[start : start + step], num_columns)
        bits_OI = torch.nn.functional.pad(bits_OI, (0, blocks * BLOCK - num_columns))
        packed = pack_bits(bits_OI.unflatten(-1, (blocks, BLOCK))[..., order])
        result[:, start : start + step] = packed.transpose(0, 1)
    return result


def unpack_fragments(fragments_BO4: Tensor, num_columns: int, half_bits: int = 16) -> Tensor:
    """Undo `pack_fragments`: int32 [O, W]."""
    order = fragment_order(half_bits, fragments_BO4.device)
    bits_OBK = unpack_bits(fragments_BO4.transpose(0, 1), BLOCK)
    natural = torch.empty_like(bits_OBK)
    natural[..., order] = bits_OBK
    return pack_bits(natural.flatten(1)[:, :num_columns])


def pack_planes(operands: LinearOperands) -> tuple[list[Stack], list[list[Tensor]]]:
    """Turn all terms into stacks, and the tensors of every stack: words, coefficient, then shift and gain if any."""
    keep = None if operands.sparse is None else ~operands.sparse.bitmap_OW
    packed = [_pack_term(term, operands.in_features, keep) for term in merge_shifts(operands.planes)]
    stacks, tensors = [], []
    for _, members in groupby(packed, key=lambda pair: (astuple(pair[0]), len(pair[1]))):
        group = list(members)
        first = group[0][0]
        stacks.append(Stack(len(group), *astuple(first)[1:]))
        tensors.append([torch.stack(parts) for parts in zip(*(parts for _, parts in group), strict=True)])
        if first.is_grouped:
            tensors[-1][1] = _halved_if_exact(tensors[-1][1])
    return stacks, tensors


def merge_shifts(terms: Sequence[PlaneTerm]) -> list[PlaneTerm]:
    """Give the offsets of terms without planes to a term with planes, where one has their groups: a launch less."""
    merged = [term for term in terms if term.words_QOW.shape[0]]
    for term in terms:
        if term.words_QOW.shape[0]:
            continue
        host = next((index for index, each in enumerate(merged) if _can_carry(each, term)), None)
        if host is None or term.offset_OG is None:
            merged.append(term)
            continue
        offset_OG, groups = merged[host].offset_OG, merged[host].coefficient_COG.shape[-1]
        moved_OG = term.offset_OG.repeat_interleave(groups // term.offset_OG.shape[-1], dim=-1)
        offset_OG = moved_OG if offset_OG is None else offset_OG + moved_OG
        merged[host] = dataclasses.replace(merged[host], offset_OG=offset_OG)
    return merged


def _can_carry(host: PlaneTerm, shift: PlaneTerm) -> bool:
    """Whether a term can take another's offset: no input scale on either side, groups that refine the other's."""
    groups = 1 if shift.offset_OG is None else shift.offset_OG.shape[-1]
    return host.scale_in_I is None and shift.scale_in_I is None and host.coefficient_COG.shape[-1] % groups == 0


def _pack_term(term: PlaneTerm, num_columns: int, keep_OW: Tensor | None) -> tuple[Stack, list[Tensor]]:
    """Pack one term as a stack of one.

    Where `keep_OW` has a zero bit a sparse weight takes the place: its bits are cleared, so that the term gives
    gain * offset there, which the sparse kernel takes off again.
    """
    words_QOW = term.words_QOW if keep_OW is None else term.words_QOW & keep_OW
    planes, rows = words_QOW.shape[:2]
    half_QOG = term.coefficient_COG.float() / 2
    if planes == 0:  # nothing but shifts: one coefficient of zero, so that every table has a row
        half_QOG = half_QOG.new_zeros(1, rows, half_QOG.shape[-1])
    shift_OG = half_QOG[0] * (2**planes - 1) if term.binary_code else half_QOG.sum(0)
    if term.offset_OG is not None:
        shift_OG = shift_OG + term.offset_OG
    coefficient_CGO, shift_GO = -half_QOG.transpose(1, 2), shift_OG.T
    gain_K, factor = _packed_gain(term.scale_in_I, num_columns)
    coefficient_CGO, shift_GO, size = _regrouped(coefficient_CGO * factor, shift_GO * factor, num_columns)
    # What rounding left of c - c is no shift.
    has_shift = bool(shift_GO.abs().max() > 2.0**-22 * coefficient_CGO.abs().max())
    stack = Stack(
        terms=1,
        planes=planes,
        is_code=int(term.binary_code or planes <= 1),
        groups=shift_GO.shape[0],
        group_size=size,
        has_shift=int(has_shift),
        has_gain=int(gain_K is not None),
    )
    fragments = [pack_fragments(words_OW, num_columns) for words_OW in words_QOW]
    empty = words_QOW.new_empty(0, num_blocks(num_columns), rows, 4)
    tensors = [torch.stack(fragments) if fragments else empty, coefficient_CGO.contiguous()]
    tensors += [shift_GO.contiguous()] if has_shift else []
    return stack, tensors + ([gain_K] if gain_K is not None else [])


def _packed_gain(scale_in_I: Tensor | None, num_columns: int) -> tuple[Tensor | None, float]:
    """Return gains divided by a power of two and padded with zeros, and that power for the coefficients."""
    if scale_in_I is None:
        return None, 1.0
    largest = float(scale_in_I.abs().max())
    factor = 2.0 ** math.ceil(math.log2(largest / GAIN_LIMIT)) if 0.0 < largest < math.inf else 1.0
    padding = num_blocks(num_columns) * BLOCK - num_columns
    return torch.nn.functional.pad(scale_in_I.float() / factor, (0, padding)), factor


def _regrouped(coefficient_CGO: Tensor, shift_GO: Tensor, num_columns: int) -> tuple[Tensor, Tensor, int]:
    """Repeat groups until a group fills blocks or a block's parts, if it can; return both tables and the group size."""
    groups = shift_GO.shape[0]
    size = num_columns // groups
    part = math.gcd(size, BLOCK)
    if groups == 1 or size % BLOCK == 0 or part == size or part < MIN_PART:
        return coefficient_CGO, shift_GO, size
    repeats = size // part
    return coefficient_CGO.repeat_interleave(repeats, 1), shift_GO.repeat_interleave(repeats, 0), part


def _halved_if_exact(table: Tensor) -> Tensor:
    """Return the table as float16 if that loses nothing: scales that were stored so cost half the traffic."""
    halves = table.to(torch.float16)
    return halves if torch.equal(halves.float(), table) else table
