"""Random weights in the compute form, one of every structure the formats have, for tests of packed backends."""

from collections.abc import Callable

import torch

from onebit_core.kernels.packing import num_words, pack_bits
from onebit_core.kernels.planes import ByteTerm, LinearOperands, PlaneTerm, SparseTerm, dense_weight


def plane_term(
    rows: int, columns: int, planes: int = 1, groups: int = 1, *, gain: bool = False, shift: bool = False,
    code: bool = False, device: str = "cpu",
) -> PlaneTerm:  # fmt: skip
    """Planes of random bits; without `shift` they are signs, whose offset cancels the mean of a bit."""
    words = pack_bits(torch.rand(planes, rows, columns) < 0.5)
    coefficient_COG = -2 * (torch.rand(1 if code else planes, rows, groups) + 0.1).half().float()
    per_row = 2**planes - 1 if code else 1
    offset_OG = torch.randn(rows, groups) if shift else -coefficient_COG.sum(0) * per_row / 2
    return PlaneTerm(
        words_QOW=words.to(device),
        coefficient_COG=coefficient_COG.to(device),
        offset_OG=offset_OG.to(device),
        scale_in_I=(torch.rand(columns) * 3 + 0.2).to(device) if gain else None,
        binary_code=code,
    )


def shift_term(rows: int, columns: int, groups: int = 1, device: str = "cpu") -> PlaneTerm:
    """A term without planes."""
    return PlaneTerm(
        words_QOW=torch.zeros(0, rows, num_words(columns), dtype=torch.int32, device=device),
        coefficient_COG=torch.zeros(0, rows, groups, device=device),
        offset_OG=torch.randn(rows, groups).to(device),
    )


def sparse_term(rows: int, columns: int, density: float = 0.1, device: str = "cpu") -> SparseTerm:
    """8-bit weights at random places; the first row has none."""
    mask_OI = torch.rand(rows, columns) < density
    mask_OI[0] = False
    return SparseTerm(
        bitmap_OW=pack_bits(mask_OI).to(device),
        codes_N=torch.randint(0, 256, (int(mask_OI.sum()),), dtype=torch.uint8).to(device),
        scale_O=(torch.rand(rows) * 0.02 + 0.01).to(device),
        zero_O=torch.randint(100, 150, (rows,), dtype=torch.uint8).to(device),
    )


def byte_term(rows: int, columns: int, device: str = "cpu") -> ByteTerm:
    """Random int8 codes."""
    codes = torch.randint(-128, 128, (rows, columns), dtype=torch.int8)
    return ByteTerm(codes_OI=codes.to(device), scale_O=(torch.rand(rows) + 0.1).to(device))


Build = Callable[[int, int, str], LinearOperands]


def _operands(rows: int, columns: int, *terms: PlaneTerm, **rest: object) -> LinearOperands:
    return LinearOperands(out_features=rows, in_features=columns, planes=terms, **rest)  # type: ignore[arg-type]


STRUCTURES: dict[str, Build] = {
    "sign": lambda o, i, d: _operands(o, i, plane_term(o, i, device=d)),
    "sign with input scale": lambda o, i, d: _operands(o, i, plane_term(o, i, gain=True, device=d)),
    "sign with shift and bias": lambda o, i, d: _operands(
        o, i, plane_term(o, i, device=d), shift_term(o, i, device=d), bias_O=torch.randn(o).to(d)
    ),
    "two terms with input scales": lambda o, i, d: _operands(
        o, i, plane_term(o, i, gain=True, device=d), plane_term(o, i, gain=True, device=d)
    ),
    "three planes": lambda o, i, d: _operands(o, i, plane_term(o, i, 3, shift=True, device=d)),
    "code of 4 bits": lambda o, i, d: _operands(o, i, plane_term(o, i, 4, code=True, shift=True, device=d)),
    "code of 8 bits": lambda o, i, d: _operands(o, i, plane_term(o, i, 8, code=True, shift=True, device=d)),
    "input scale, planes and shift": lambda o, i, d: _operands(
        o, i, plane_term(o, i, gain=True, device=d), plane_term(o, i, 2, device=d), shift_term(o, i, device=d)
    ),
    "salient": lambda o, i, d: _operands(
        o, i, plane_term(o, i, shift=True, device=d), sparse=sparse_term(o, i, device=d), bias_O=torch.randn(o).to(d)
    ),
    "salient with input scales": lambda o, i, d: _operands(
        o, i, plane_term(o, i, 2, gain=True, shift=True, device=d), plane_term(o, i, device=d),
        sparse=sparse_term(o, i, device=d),
    ),
    "bytes": lambda o, i, d: LinearOperands(
        out_features=o, in_features=i, bytes_=byte_term(o, i, d), bias_O=torch.randn(o).to(d)
    ),
}  # fmt: skip
"""Structures that exist for any shape."""


def grouped(rows: int, group_size: int, device: str = "cpu", *, code: bool = True) -> LinearOperands:
    """Five groups of columns."""
    columns = 5 * group_size
    term = plane_term(rows, columns, 4 if code else 2, 5, shift=True, code=code, device=device)
    return _operands(rows, columns, term)


def exact_product(x: torch.Tensor, operands: LinearOperands) -> torch.Tensor:
    """Return x @ W.T + bias in float64."""
    result = x.double() @ dense_weight(operands).double().T
    return result if operands.bias_O is None else result + operands.bias_O.double()


def error_of(y: torch.Tensor, x: torch.Tensor, operands: LinearOperands) -> float:
    """Return the largest error relative to the largest exact result."""
    exact = exact_product(x, operands)
    return float((y.double() - exact).abs().max() / exact.abs().max().clamp_min(1e-30))
