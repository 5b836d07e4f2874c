"""Plain PyTorch truth for every op: written to be read, never tuned. Other backends are tested against it.

Shape suffixes: T = tokens, P = planes, B = bits, O = output features, I = input features, W = words, G = groups of
input columns.
"""

import torch
from torch import Tensor

from onebit_core.kernels.packing import unpack_codes, unpack_signs


def expand_groups(values_OG: Tensor, num_columns: int) -> Tensor:
    """Repeat per-group values over their columns: [..., G] to [..., I]; G divides I."""
    return values_OG.repeat_interleave(num_columns // values_OG.shape[-1], dim=-1)


def sign_dequantize(
    signs_POW: Tensor, scale_in_PI: Tensor, scale_out_PO: Tensor, group_scale_POG: Tensor, shift_OG: Tensor
) -> Tensor:
    """Return the dense float32 weight [O, I] that `sign_matmul` multiplies with; see there for the arguments."""
    num_columns = scale_in_PI.shape[-1]
    signs_POI = unpack_signs(signs_POW, num_columns)
    weight_POI = signs_POI * scale_out_PO.float()[:, :, None] * scale_in_PI.float()[:, None, :]
    if group_scale_POG.numel():
        weight_POI = weight_POI * expand_groups(group_scale_POG.float(), num_columns)
    weight_OI = weight_POI.sum(0)
    if shift_OG.numel():
        weight_OI = weight_OI + expand_groups(shift_OG.float(), num_columns)
    return weight_OI


def sign_matmul(
    x_TI: Tensor,
    signs_POW: Tensor,
    scale_in_PI: Tensor,
    scale_out_PO: Tensor,
    group_scale_POG: Tensor,
    shift_OG: Tensor,
) -> Tensor:
    """Y = x @ W.T for a sum of P scaled sign planes, accumulated in float32; returns x's dtype, [T, O]."""
    weight_OI = sign_dequantize(signs_POW, scale_in_PI, scale_out_PO, group_scale_POG, shift_OG)
    return (x_TI.float() @ weight_OI.T).to(x_TI.dtype)


def int_dequantize(planes_BOW: Tensor, scale_OG: Tensor, zero_BW: Tensor, num_columns: int) -> Tensor:
    """Return the dense float32 weight [O, I] = scale * (code - zero)."""
    codes_OI = unpack_codes(planes_BOW, num_columns).float()
    zero_OG = unpack_codes(zero_BW[:, None], scale_OG.numel()).float().view_as(scale_OG)
    return (codes_OI - expand_groups(zero_OG, num_columns)) * expand_groups(scale_OG.float(), num_columns)


def int_matmul(x_TI: Tensor, planes_BOW: Tensor, scale_OG: Tensor, zero_BW: Tensor) -> Tensor:
    """Y = x @ W.T for grouped integer codes, accumulated in float32; returns x's dtype, [T, O]."""
    weight_OI = int_dequantize(planes_BOW, scale_OG, zero_BW, x_TI.shape[-1])
    return (x_TI.float() @ weight_OI.T).to(x_TI.dtype)


def salient_matmul(x_TI: Tensor, rows_N: Tensor, columns_N: Tensor, delta_N: Tensor, num_rows: int) -> Tensor:
    """Y = x @ D.T for a sparse matrix D with N entries, accumulated in float32; returns x's dtype, [T, O]."""
    delta_OI = x_TI.new_zeros((num_rows, x_TI.shape[-1]), dtype=torch.float32)
    delta_OI[rows_N, columns_N] = delta_N.float()
    return (x_TI.float() @ delta_OI.T).to(x_TI.dtype)


def lut_dequantize(planes_2OW: Tensor, levels_OG4: Tensor, num_columns: int) -> Tensor:
    """Return the dense float32 weight [O, I] that four levels per group and two-bit indices stand for."""
    index_OI = unpack_codes(planes_2OW, num_columns).long()
    levels_OI4 = levels_OG4.float().repeat_interleave(num_columns // levels_OG4.shape[1], dim=1)
    return levels_OI4.gather(2, index_OI.unsqueeze(-1)).squeeze(-1)


def lut_matmul(x_TI: Tensor, planes_2OW: Tensor, levels_OG4: Tensor) -> Tensor:
    """Y = x @ W.T for four levels per group, accumulated in float32; returns x's dtype, [T, O]."""
    weight_OI = lut_dequantize(planes_2OW, levels_OG4, x_TI.shape[-1])
    return (x_TI.float() @ weight_OI.T).to(x_TI.dtype)


def factor_matmul(
    x_TI: Tensor, down_RW: Tensor, up_OW: Tensor, scale_in_I: Tensor, scale_mid_R: Tensor, scale_out_O: Tensor
) -> Tensor:
    """Y = u * (U (v * (V (g * x)))) for sign matrices U and V, accumulated in float32; returns x's dtype, [T, O]."""
    down_RI = unpack_signs(down_RW, scale_in_I.shape[0])
    up_OR = unpack_signs(up_OW, scale_mid_R.shape[0])
    middle_TR = ((x_TI.float() * scale_in_I.float()) @ down_RI.T) * scale_mid_R.float()
    return ((middle_TR @ up_OR.T) * scale_out_O.float()).to(x_TI.dtype)
