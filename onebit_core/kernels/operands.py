"""From what an op or a layer stores to LinearOperands: one function per format, plain algebra, nothing tuned.

    signs    c * S = c - 2c * B                                   coefficient -2c, offset sum of c
    codes    s * (q - z)                                          coefficient s, offset -s * z
    levels   l0 + (l1 - l0) * B0 + (l2 - l0) * B1 + (l3 - l2 - l1 + l0) * (B0 & B1)
    factors  U diag(mid) V: two products, the first with V and mid, the second with U

Shape suffixes: P = planes, B = bits, O = output features, I = input features, R = rank, W = words, G = groups.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from onebit_core.kernels.packing import unpack_codes
from onebit_core.kernels.planes import ByteTerm, LinearOperands, PlaneTerm, SparseTerm


def sign_terms(
    signs_POW: Tensor,
    *,
    scale_in_PI: Tensor | None,
    scale_out_PO: Tensor | None,
    group_scale_POG: Tensor | None,
    shift_OG: Tensor | None,
) -> tuple[PlaneTerm, ...]:
    """Return the terms of `sign_matmul`; None stands for ones, and for no shift.

    Planes with input scales of their own become a term each, because each reads other inputs.
    """
    planes, rows, _ = signs_POW.shape
    scale_POG = torch.ones(planes, rows, 1, device=signs_POW.device)
    if scale_out_PO is not None:
        scale_POG = scale_POG * scale_out_PO.float()[:, :, None]
    if group_scale_POG is not None:
        scale_POG = scale_POG * group_scale_POG.float()
    if scale_in_PI is None:
        terms = [PlaneTerm(words_QOW=signs_POW, coefficient_COG=-2 * scale_POG, offset_OG=scale_POG.sum(0))]
    else:
        terms = [
            PlaneTerm(
                words_QOW=signs_POW[plane : plane + 1],
                coefficient_COG=-2 * scale_POG[plane : plane + 1],
                offset_OG=scale_POG[plane],
                scale_in_I=scale_in_PI[plane].float(),
            )
            for plane in range(planes)
        ]
    if shift_OG is not None:
        nothing = signs_POW[:0]
        no_scale = torch.empty(0, rows, shift_OG.shape[-1], device=signs_POW.device)
        terms.append(PlaneTerm(words_QOW=nothing, coefficient_COG=no_scale, offset_OG=shift_OG.float()))
    return tuple(terms)


def code_terms(planes_BOW: Tensor, scale_OG: Tensor, zero_BW: Tensor) -> tuple[PlaneTerm, ...]:
    """Return the term of `int_matmul`."""
    zero_OG = unpack_codes(zero_BW[:, None], scale_OG.numel()).float().view_as(scale_OG)
    scale_OG = scale_OG.float()
    return (
        PlaneTerm(
            words_QOW=planes_BOW, coefficient_COG=scale_OG[None], offset_OG=-scale_OG * zero_OG, binary_code=True
        ),
    )


def level_terms(planes_2OW: Tensor, levels_OG4: Tensor) -> tuple[PlaneTerm, ...]:
    """Return the term of `lut_matmul`: two index planes and their product."""
    levels = levels_OG4.float()
    first, second, third, fourth = levels.unbind(-1)
    words_3OW = torch.cat((planes_2OW, planes_2OW[:1] & planes_2OW[1:]))
    coefficient_3OG = torch.stack((second - first, third - first, fourth - third - second + first))
    return (PlaneTerm(words_QOW=words_3OW, coefficient_COG=coefficient_3OG, offset_OG=first),)


def factor_operands(
    down_RW: Tensor, up_OW: Tensor, *, scale_in_I: Tensor, scale_mid_R: Tensor, scale_out_O: Tensor
) -> tuple[LinearOperands, LinearOperands]:
    """Return the two products of `factor_matmul`: [I] to [R], then [R] to [O]."""
    rank, rows, columns = down_RW.shape[0], up_OW.shape[0], scale_in_I.shape[0]
    down = sign_terms(
        down_RW[None],
        scale_in_PI=scale_in_I[None],
        scale_out_PO=scale_mid_R[None],
        group_scale_POG=None,
        shift_OG=None,
    )
    up = sign_terms(up_OW[None], scale_in_PI=None, scale_out_PO=scale_out_O[None], group_scale_POG=None, shift_OG=None)
    return (
        LinearOperands(out_features=rank, in_features=columns, planes=down),
        LinearOperands(out_features=rows, in_features=rank, planes=up),
    )


def byte_operands(codes_OI: Tensor, scale_O: Tensor) -> LinearOperands:
    """Return the operands of a dense 8-bit matrix."""
    rows, columns = codes_OI.shape
    return LinearOperands(
        out_features=rows, in_features=columns, bytes_=ByteTerm(codes_OI=codes_OI, scale_O=scale_O.float())
    )


def concatenate(members: Sequence[LinearOperands]) -> LinearOperands | None:
    """Join weights that multiply the same input, row after row; None where their structures differ.

    They fit together if their terms have equal planes, groups and input scales: query, key and value of one method
    usually do, unless each learned input scales of its own.
    """
    if any(member.bytes_ is not None for member in members):
        return None
    first = members[0]
    if any(len(member.planes) != len(first.planes) for member in members):
        return None
    terms = [_concatenate_terms(terms) for terms in zip(*(member.planes for member in members), strict=True)]
    if any(term is None for term in terms):
        return None
    return LinearOperands(
        out_features=sum(member.out_features for member in members),
        in_features=first.in_features,
        planes=tuple(term for term in terms if term is not None),
        sparse=_concatenate_sparse(members),
        bias_O=_concatenate_bias(members),
    )


def _concatenate_terms(terms: Sequence[PlaneTerm]) -> PlaneTerm | None:
    first = terms[0]
    for term in terms[1:]:
        same_shape = (
            term.binary_code == first.binary_code
            and term.words_QOW.shape[::2] == first.words_QOW.shape[::2]
            and term.coefficient_COG.shape[::2] == first.coefficient_COG.shape[::2]
            and (term.offset_OG is None) == (first.offset_OG is None)
        )
        if not same_shape or not _equal(term.scale_in_I, first.scale_in_I):
            return None
    offsets = [term.offset_OG for term in terms if term.offset_OG is not None]
    return PlaneTerm(
        words_QOW=torch.cat([term.words_QOW for term in terms], 1),
        coefficient_COG=torch.cat([term.coefficient_COG for term in terms], 1),
        offset_OG=torch.cat(offsets) if offsets else None,
        scale_in_I=first.scale_in_I,
        binary_code=first.binary_code,
    )


def _equal(left: Tensor | None, right: Tensor | None) -> bool:
    if left is None or right is None:
        return left is right
    return torch.equal(left, right)


def _concatenate_sparse(members: Sequence[LinearOperands]) -> SparseTerm | None:
    """Join sparse parts; a member without one has an empty bitmap."""
    present = [member.sparse for member in members if member.sparse is not None]
    if not present:
        return None
    like = present[0]
    parts = [
        member.sparse
        or SparseTerm(
            bitmap_OW=like.bitmap_OW.new_zeros(member.out_features, like.bitmap_OW.shape[1]),
            codes_N=like.codes_N[:0],
            scale_O=like.scale_O.new_zeros(member.out_features),
            zero_O=like.zero_O.new_zeros(member.out_features),
        )
        for member in members
    ]
    return SparseTerm(
        bitmap_OW=torch.cat([part.bitmap_OW for part in parts]),
        codes_N=torch.cat([part.codes_N for part in parts]),
        scale_O=torch.cat([part.scale_O for part in parts]),
        zero_O=torch.cat([part.zero_O for part in parts]),
    )


def _concatenate_bias(members: Sequence[LinearOperands]) -> Tensor | None:
    """Join biases; a member without one has zeros."""
    present = [member.bias_O for member in members if member.bias_O is not None]
    if not present:
        return None
    return torch.cat(
        [present[0].new_zeros(member.out_features) if member.bias_O is None else member.bias_O for member in members]
    )
