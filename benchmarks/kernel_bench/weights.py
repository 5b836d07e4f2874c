"""Weights with the entropy of real ones: every bit and code is drawn, because constant bits flatter some kernels.

A branch or a lookup that goes the same way each time, a cache line that is all zero, a compressed memory path: all of
them make a benchmark on zeros faster than any model will be.

Shape suffixes: P = planes, O = output features, I = input features, W = words, G = groups, T = tokens.
"""

import dataclasses

import torch
from torch import Tensor

from onebit_core.kernels import pack_bits, pack_codes
from onebit_core.kernels.operands import byte_operands, code_terms, level_terms, sign_terms
from onebit_core.kernels.packing import WORD_BITS, num_words, unpack_bits
from onebit_core.kernels.planes import LinearOperands, PlaneTerm, SparseTerm

SEED = 20


def group_size(columns: int) -> int:
    """Return the columns of a group: 128, or the largest power of two below that divides the row."""
    return next(size for size in (128, 64, 32, columns) if columns % size == 0)


def make_operands(name: str, rows: int, columns: int, device: str = "cpu") -> LinearOperands:
    """Return a random weight in a format of `shapes.FORMATS`, scaled so that outputs are about one.

    Raises:
        ValueError: no such format.
    """
    draw = _Draw(columns, torch.Generator().manual_seed(SEED))
    kind, _, number = name.partition("-")
    if kind == "bytes":
        codes = torch.randint(-127, 128, (rows, columns), generator=draw.generator, dtype=torch.int8)
        return _moved(byte_operands(codes, draw.scales(rows) / 64), device)
    if kind not in ("sign", "sparse", "codes", "levels"):
        raise ValueError(f"format {name!r} is unknown")
    sparse = None
    if kind == "codes":
        terms = draw.code_terms(rows, int(number))
    elif kind == "levels":
        terms = level_terms(draw.words(2, rows), draw.scales(rows, columns // group_size(columns), 4).sort(-1).values)
    else:
        planes = int(number) if kind == "sign" and number else 1
        terms = draw.sign_terms(rows, planes, scales_in=name == "sign")
        if kind == "sparse":
            sparse = draw.sparse_term(rows, int(number) / 100)
    operands = LinearOperands(out_features=rows, in_features=columns, planes=terms, sparse=sparse)
    return _moved(operands, device)


class _Draw:
    """The random parts of a weight."""

    def __init__(self, columns: int, generator: torch.Generator) -> None:
        self.columns, self.generator = columns, generator

    def scales(self, *shape: int) -> Tensor:
        """Positive and negative would both do; real ones are positive and differ by a few times."""
        scales: Tensor = (0.5 + torch.rand(shape, generator=self.generator)) / self.columns**0.5
        return scales

    def words(self, *shape: int) -> Tensor:
        """Return packed bits, the unused ones of the last word 0 as on disk: int32 [*shape, W]."""
        size = (*shape, num_words(self.columns) * 4)
        words = torch.randint(0, 256, size, generator=self.generator, dtype=torch.uint8).view(torch.int32)
        if self.columns % WORD_BITS:
            words = pack_bits(unpack_bits(words, self.columns))
        return words

    def sign_terms(self, rows: int, planes: int, *, scales_in: bool) -> tuple[PlaneTerm, ...]:
        """Scales halve from plane to plane; OneBit's plane has input scales too."""
        halves = 0.5 ** torch.arange(planes)
        scale_in = 0.5 + torch.rand((1, self.columns), generator=self.generator) if scales_in else None
        return sign_terms(
            self.words(planes, rows),
            scale_in_PI=scale_in,
            scale_out_PO=self.scales(planes, rows) * halves[:, None],
            group_scale_POG=None,
            shift_OG=None,
        )

    def code_terms(self, rows: int, bits: int) -> tuple[PlaneTerm, ...]:
        """Codes over their whole range, zero points in the middle."""
        groups = self.columns // group_size(self.columns)
        zeros = torch.randint(1, 2**bits, (1, rows * groups), generator=self.generator, dtype=torch.int32)
        return code_terms(
            self.words(bits, rows), self.scales(rows, groups) * 2 ** (1 - bits), pack_codes(zeros, bits)[:, 0]
        )

    def sparse_term(self, rows: int, ratio: float) -> SparseTerm:
        """Return 8-bit weights at a share of all places."""
        places = torch.rand((rows, self.columns), generator=self.generator) < ratio
        count = int(places.sum())
        return SparseTerm(
            bitmap_OW=pack_bits(places),
            codes_N=torch.randint(0, 256, (count,), generator=self.generator, dtype=torch.uint8),
            scale_O=self.scales(rows) / 32,
            zero_O=torch.randint(96, 160, (rows,), generator=self.generator, dtype=torch.uint8),
        )


def make_inputs(tokens: int, columns: int, dtype: torch.dtype, device: str) -> Tensor:
    """Return activations [T, I]: normal, with the few large channels that real ones have."""
    generator = torch.Generator().manual_seed(SEED + tokens)
    x_TI = torch.randn((tokens, columns), generator=generator)
    x_TI[:, :: max(1, columns // 8)] *= 8
    return x_TI.to(dtype).to(device)


def stored_bytes(operands: LinearOperands) -> int:
    """Return the bytes of the tensors of a weight."""
    return sum(tensor.nbytes for tensor in _tensors(operands))


def _tensors(value: object) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, tuple):
        return [tensor for item in value for tensor in _tensors(item)]
    if dataclasses.is_dataclass(value):
        return [tensor for field in dataclasses.fields(value) for tensor in _tensors(getattr(value, field.name))]
    return []


def _moved(operands: LinearOperands, device: str) -> LinearOperands:
    """Return the same weight on a device."""
    moved = _to(operands, device)
    assert isinstance(moved, LinearOperands)
    return moved


def _to(value: object, device: str) -> object:
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, tuple):
        return tuple(_to(item, device) for item in value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        changed = {field.name: _to(getattr(value, field.name), device) for field in dataclasses.fields(value)}
        return type(value)(**changed)
    return value
