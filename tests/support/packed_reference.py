"""The numerics of the CPU kernels, written a second time in torch: exact integers, then float32 in the stated order.

Also random weights of every kind that `LinearOperands` can hold. Formulas: onebit_core/kernels/cpu/src/tier.h.
"""

import torch
from torch import Tensor

from onebit_core.kernels import pack_bits, unpack_bits
from onebit_core.kernels.planes import ByteTerm, LinearOperands, PlaneTerm, SparseTerm

WHOLE_SEGMENT = 256
MAX_SEGMENT = 1024


def segments(columns: int, groups: int) -> list[tuple[int, int, int]]:
    """Return (first column, last column + 1, group) of every segment."""
    size = columns // groups
    part = WHOLE_SEGMENT if groups == 1 else -(-size // -(-size // MAX_SEGMENT))
    return [
        (group * size + begin, group * size + min(begin + part, size), group)
        for group in range(groups)
        for begin in range(0, size, part)
    ]


def quantize(x_TI: Tensor) -> tuple[Tensor, Tensor]:
    """Return int64 [T, I] and the float32 step [T, 1] of one segment."""
    amax = x_TI.abs().amax(-1, keepdim=True).double()
    exponent = torch.ceil(torch.log2(amax / 8191)).clamp(min=-126)
    step = torch.where(amax > 0, torch.exp2(exponent), torch.exp2(torch.full_like(amax, -126)))
    step = torch.where(amax / step * 2 <= 8191, step / 2, step).clamp(min=2.0**-126)
    step = torch.where(amax / step > 8191, step * 2, step)
    codes = torch.where(amax.isfinite(), torch.round(x_TI.double() / step), 0.0).nan_to_num().long()
    return codes, torch.where(amax.isfinite(), step, torch.nan).float()


def _term(term: PlaneTerm, keep_OI: Tensor, x_TI: Tensor, y_TO: Tensor, *, has_sparse: bool) -> Tensor:
    scaled = x_TI if term.scale_in_I is None else x_TI * term.scale_in_I
    bits_QOI = unpack_bits(term.words_QOW, x_TI.shape[1]).double() * keep_OI
    numbers = bits_QOI
    if term.binary_code and len(bits_QOI):
        numbers = sum(bits * 2**q for q, bits in enumerate(bits_QOI))[None]
    for begin, end, group in segments(x_TI.shape[1], term.coefficient_COG.shape[-1]):
        codes, step = quantize(scaled[:, begin:end])
        total = codes.sum(-1, keepdim=True).float()
        products = [
            term.coefficient_COG[k, :, group] * (codes.double() @ number[:, begin:end].T).float()
            for k, number in enumerate(numbers)
        ]
        if term.offset_OG is not None:
            offset = term.offset_OG[:, group]
            if has_sparse:
                products.append(-offset * (codes.double() @ (1 - keep_OI[:, begin:end]).T).float())
            products.append(offset * total)
        if products:
            inner = products[0]
            for product in products[1:]:
                inner = inner + product
            y_TO = y_TO + step * inner
    return y_TO


def _byte_part(codes_OI: Tensor, zero_O: Tensor, scale_O: Tensor, x_TI: Tensor, y_TO: Tensor) -> Tensor:
    for begin, end, _ in segments(x_TI.shape[1], 1):
        codes, step = quantize(x_TI[:, begin:end])
        exact = codes.double() @ (codes_OI.double() - zero_O.double()[:, None])[:, begin:end].T
        y_TO = y_TO + step * (scale_O * exact.float())
    return y_TO


def packed_reference(operands: LinearOperands, x_TI: Tensor) -> Tensor:
    """Return what every instruction set has to return, bit for bit."""
    x = x_TI.float()
    y = torch.zeros(x.shape[0], operands.out_features)
    sparse = operands.sparse
    keep = torch.ones(operands.out_features, operands.in_features, dtype=torch.float64)
    if sparse is not None:
        keep -= unpack_bits(sparse.bitmap_OW, operands.in_features).double()
    for term in operands.planes:
        y = _term(term, keep, x, y, has_sparse=sparse is not None)
    if operands.bytes_ is not None:
        scale = operands.bytes_.scale_O
        y = _byte_part(operands.bytes_.codes_OI, torch.zeros_like(scale), scale, x, y)
    if sparse is not None:
        codes = sparse.zero_O[:, None].expand(keep.shape).clone()
        codes[keep == 0] = sparse.codes_N
        y = _byte_part(codes, sparse.zero_O, sparse.scale_O, x, y)
    if operands.bias_O is not None:
        y = y + operands.bias_O
    return y.to(x_TI.dtype)


def random_term(
    draw: torch.Generator,
    rows: int,
    columns: int,
    *,
    planes: int = 1,
    groups: int = 1,
    code: bool = False,
    offset: bool = True,
    scale_in: bool = False,
) -> PlaneTerm:
    """Return a term of random bits; values have full float32 mantissas."""
    coefficients = 1 if code else planes
    return PlaneTerm(
        words_QOW=pack_bits(torch.rand(planes, rows, columns, generator=draw) < 0.5),
        coefficient_COG=torch.randn(coefficients, rows, groups, generator=draw),
        offset_OG=torch.randn(rows, groups, generator=draw) if offset else None,
        scale_in_I=torch.rand(columns, generator=draw) + 0.5 if scale_in else None,
        binary_code=code,
    )


def random_sparse(draw: torch.Generator, rows: int, columns: int, density: float) -> SparseTerm:
    """Return a sparse part; every third row is empty."""
    chosen = torch.rand(rows, columns, generator=draw) < density
    chosen[::3] = False
    return SparseTerm(
        bitmap_OW=pack_bits(chosen),
        codes_N=torch.randint(0, 256, (int(chosen.sum()),), generator=draw, dtype=torch.uint8),
        scale_O=torch.rand(rows, generator=draw),
        zero_O=torch.randint(0, 256, (rows,), generator=draw, dtype=torch.uint8),
    )


def random_bytes(draw: torch.Generator, rows: int, columns: int) -> LinearOperands:
    """Return a dense 8-bit matrix."""
    return LinearOperands(
        out_features=rows,
        in_features=columns,
        bytes_=ByteTerm(
            codes_OI=torch.randint(-128, 128, (rows, columns), generator=draw, dtype=torch.int8),
            scale_O=torch.rand(rows, generator=draw),
        ),
        bias_O=torch.randn(rows, generator=draw),
    )
