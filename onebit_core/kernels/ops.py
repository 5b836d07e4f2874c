"""The ops, declared once with torch.library: schema, fake implementation, shape checks, reference.

    onebit::sign_matmul      y_o = sum_p h_po * sum_i c_pog(i) * S_poi * (g_pi * x_i)  +  sum_i m_og(i) * x_i
    onebit::int_matmul       y_o = sum_i s_og(i) * (q_oi - z_og(i)) * x_i
    onebit::lut_matmul       y_o = sum_i l_og(q_oi) * x_i,   q = 0..3, four levels a group
    onebit::factor_matmul    y   = u * (U (v * (V (g * x)))),   U and V signs
    onebit::salient_matmul   y_o = sum_n [row_n = o] * d_n * x_column(n)
    onebit::packed_matmul    any of them plus bias, from weights that a backend packed (see `planes`)

Every op takes x of any leading shape and any floating dtype, accumulates in float32 and returns x's dtype.
`sign_matmul` carries OneBit (P = 1, h, g), residual binaries (P > 1), group scales c and shifts m; `factor_matmul` is
NanoQuant's, DBF's and LittleBit's pair. All but `packed_matmul` read the layout on disk and are the reference, on every
device; `packed_matmul` is the fast path, one declaration for all backends. Schema and implementation are separate
(`Library.define`, not `custom_op`), which costs 5 us a call in place of 16.

An empty tensor stands for "no group scale" or "no shift".
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from onebit_core.kernels import reference
from onebit_core.kernels.backends import packed_backend
from onebit_core.kernels.planes import CPU_CODE, TRITON_CODE, Packed

_LIBRARY = torch.library.Library("onebit", "DEF")
_LIBRARY.define(
    "sign_matmul(Tensor x, Tensor signs, Tensor scale_in, Tensor scale_out, Tensor group_scale, Tensor shift) -> Tensor"
)
_LIBRARY.define("int_matmul(Tensor x, Tensor planes, Tensor scale, Tensor zero) -> Tensor")
_LIBRARY.define("lut_matmul(Tensor x, Tensor planes, Tensor levels) -> Tensor")
_LIBRARY.define(
    "factor_matmul(Tensor x, Tensor down, Tensor up, Tensor scale_in, Tensor scale_mid, Tensor scale_out) -> Tensor"
)
_LIBRARY.define("packed_matmul(Tensor x, Tensor[] parts, int[] layout) -> Tensor")
_LIBRARY.define("salient_matmul(Tensor x, Tensor rows, Tensor columns, Tensor delta, int num_rows) -> Tensor")


_BACKEND_OF_CODE = {CPU_CODE: "cpu", TRITON_CODE: "triton"}


def _check(x: Tensor, num_columns: int) -> None:
    if x.shape[-1] != num_columns:
        raise ValueError(f"x has {x.shape[-1]} input features, the weight has {num_columns}")


def _rows(x: Tensor) -> Tensor:
    """Return x as [T, I], whatever its leading shape, for no tokens too."""
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


def _sign_matmul(
    x: Tensor, signs: Tensor, scale_in: Tensor, scale_out: Tensor, group_scale: Tensor, shift: Tensor
) -> Tensor:
    _check(x, scale_in.shape[-1])
    result = reference.sign_matmul(_rows(x), signs, scale_in, scale_out, group_scale, shift)
    return result.view(*x.shape[:-1], scale_out.shape[-1])


def _int_matmul(x: Tensor, planes: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    return reference.int_matmul(_rows(x), planes, scale, zero).view(*x.shape[:-1], planes.shape[1])


def _lut_matmul(x: Tensor, planes: Tensor, levels: Tensor) -> Tensor:
    return reference.lut_matmul(_rows(x), planes, levels).view(*x.shape[:-1], planes.shape[1])


def _factor_matmul(
    x: Tensor, down: Tensor, up: Tensor, scale_in: Tensor, scale_mid: Tensor, scale_out: Tensor
) -> Tensor:
    _check(x, scale_in.shape[0])
    result = reference.factor_matmul(_rows(x), down, up, scale_in, scale_mid, scale_out)
    return result.view(*x.shape[:-1], scale_out.shape[0])


def _packed_matmul(x: Tensor, parts: Sequence[Tensor], layout: Sequence[int]) -> Tensor:
    _check(x, layout[1])
    rows = _rows(x)
    if rows.dtype == torch.float64:
        rows = rows.float()  # kernels accumulate in float32
    if rows.stride(-1) != 1 or rows.stride(0) < rows.shape[1]:  # not rows one after the other, or rows that overlap
        rows = rows.contiguous()
    result = packed_backend(_BACKEND_OF_CODE[layout[2]]).matmul(rows, parts, layout)
    return result.view(*x.shape[:-1], layout[0]).to(x.dtype)


def _salient_matmul(x: Tensor, rows: Tensor, columns: Tensor, delta: Tensor, num_rows: int) -> Tensor:
    return reference.salient_matmul(_rows(x), rows, columns, delta, num_rows).view(*x.shape[:-1], num_rows)


def _fake_sign_matmul(
    x: Tensor, signs: Tensor, scale_in: Tensor, scale_out: Tensor, group_scale: Tensor, shift: Tensor
) -> Tensor:
    del signs, group_scale, shift
    _check(x, scale_in.shape[-1])
    return x.new_empty((*x.shape[:-1], scale_out.shape[-1]))


def _fake_int_matmul(x: Tensor, planes: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    del scale, zero
    return x.new_empty((*x.shape[:-1], planes.shape[1]))


def _fake_lut_matmul(x: Tensor, planes: Tensor, levels: Tensor) -> Tensor:
    del levels
    return x.new_empty((*x.shape[:-1], planes.shape[1]))


def _fake_factor_matmul(
    x: Tensor, down: Tensor, up: Tensor, scale_in: Tensor, scale_mid: Tensor, scale_out: Tensor
) -> Tensor:
    del down, up, scale_mid
    _check(x, scale_in.shape[0])
    return x.new_empty((*x.shape[:-1], scale_out.shape[0]))


def _fake_packed_matmul(x: Tensor, parts: Sequence[Tensor], layout: Sequence[int]) -> Tensor:
    del parts
    _check(x, layout[1])
    return x.new_empty((*x.shape[:-1], layout[0]))


def _fake_salient_matmul(x: Tensor, rows: Tensor, columns: Tensor, delta: Tensor, num_rows: int) -> Tensor:
    del rows, columns, delta
    return x.new_empty((*x.shape[:-1], num_rows))


for _name, _implementation, _fake in (
    ("sign_matmul", _sign_matmul, _fake_sign_matmul),
    ("int_matmul", _int_matmul, _fake_int_matmul),
    ("lut_matmul", _lut_matmul, _fake_lut_matmul),
    ("factor_matmul", _factor_matmul, _fake_factor_matmul),
    ("salient_matmul", _salient_matmul, _fake_salient_matmul),
    ("packed_matmul", _packed_matmul, _fake_packed_matmul),
):
    _LIBRARY.impl(_name, _implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"onebit::{_name}", _fake, lib=_LIBRARY)


def sign_matmul(
    x: Tensor, signs: Tensor, scale_in: Tensor, scale_out: Tensor, group_scale: Tensor, shift: Tensor
) -> Tensor:
    """Multiply by a sum of scaled sign planes.

    Args:
        x: floating [..., I].
        signs: int32 [P, O, ceil(I / 32)], layout of `packing`.
        scale_in: floating [P, I].
        scale_out: floating [P, O].
        group_scale: floating [P, O, G] or empty.
        shift: floating [O, G] or empty; G = 1 shifts whole rows.

    Returns:
        [..., O] in x's dtype.

    Raises:
        ValueError: x's last dimension is not I.
    """
    result: Tensor = torch.ops.onebit.sign_matmul(x, signs, scale_in, scale_out, group_scale, shift)
    return result


def int_matmul(x: Tensor, planes: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """Multiply by grouped integer codes.

    Args:
        x: floating [..., I].
        planes: int32 [B, O, ceil(I / 32)], B bits per code.
        scale: floating [O, G].
        zero: int32 [B, ceil(O * G / 32)]: zero points of all rows in one run, packed like codes.

    Returns:
        [..., O] in x's dtype.
    """
    result: Tensor = torch.ops.onebit.int_matmul(x, planes, scale, zero)
    return result


def salient_matmul(x: Tensor, rows: Tensor, columns: Tensor, delta: Tensor, num_rows: int) -> Tensor:
    """Multiply by a sparse matrix.

    Args:
        x: floating [..., I].
        rows: int64 [N], output feature of each entry.
        columns: int64 [N], input feature of each entry.
        delta: floating [N].
        num_rows: O.

    Returns:
        [..., O] in x's dtype.
    """
    result: Tensor = torch.ops.onebit.salient_matmul(x, rows, columns, delta, num_rows)
    return result


def lut_matmul(x: Tensor, planes: Tensor, levels: Tensor) -> Tensor:
    """Multiply by two-bit indices into four levels per group.

    Args:
        x: floating [..., I].
        planes: int32 [2, O, ceil(I / 32)], the low and the high bit of every index.
        levels: floating [O, G, 4].

    Returns:
        [..., O] in x's dtype.
    """
    result: Tensor = torch.ops.onebit.lut_matmul(x, planes, levels)
    return result


def factor_matmul(
    x: Tensor, down: Tensor, up: Tensor, scale_in: Tensor, scale_mid: Tensor, scale_out: Tensor
) -> Tensor:
    """Multiply by a product of two sign matrices with scales before, between and after.

    Args:
        x: floating [..., I].
        down: int32 [R, ceil(I / 32)], signs of V.
        up: int32 [O, ceil(R / 32)], signs of U.
        scale_in: floating [I].
        scale_mid: floating [R].
        scale_out: floating [O].

    Returns:
        [..., O] in x's dtype.
    """
    result: Tensor = torch.ops.onebit.factor_matmul(x, down, up, scale_in, scale_mid, scale_out)
    return result


def packed_matmul(x: Tensor, packed: Packed) -> Tensor:
    """Multiply by a weight that a backend packed, bias included.

    Args:
        x: floating [..., I], on the device the weight was packed for.
        packed: what `pack` of a backend returned.

    Returns:
        [..., O] in x's dtype.
    """
    result: Tensor = torch.ops.onebit.packed_matmul(x, packed.parts, packed.layout)
    return result
