"""The largest entries of long rows, without sorting a vocabulary.

A row is seen as a table of `height` lines, entry i in column i % width, and a short rest:

    V entries -> [height, width] + rest        the n largest lie in the n columns with the largest maxima, or in the
                    |                          rest: a column with an entry of them has a maximum of them
    maxima of the columns [width] -> topk n -> their n * height entries, and the rest -> topk n

Two short searches stand for one long one: on the CPU a tenth of the time of `topk` for 64 of 49152. Everything works
row by row, so a row's answer does not depend on the other rows.

Legend: R rows, V entries of a row, N largest ones, H lines, W columns, C candidates, B blocks, K entries of a block.
"""

import math

import torch
from torch import Tensor

BLOCK = 256  # neighbours that are reduced to one first


def largest(values_RV: Tensor) -> tuple[Tensor, Tensor]:
    """Return each row's largest entry and where it is, the first of equal ones; a NaN anywhere is the largest."""
    if not values_RV.numel():
        return values_RV.new_empty(0), torch.empty(0, dtype=torch.int64, device=values_RV.device)
    head_RBK, rest_RK = blocks(values_RV)
    maxima_RB = head_RBK.amax(dim=-1)
    if rest_RK.shape[-1]:
        maxima_RB = torch.cat([maxima_RB, rest_RK.amax(dim=-1, keepdim=True)], dim=-1)
    largest_R, block_R = maxima_RB.max(dim=-1)
    index_RK = entries(block_R, values_RV.shape[-1])
    inside_R1 = values_RV.gather(-1, index_RK).argmax(dim=-1, keepdim=True)
    return largest_R, index_RK.gather(-1, inside_R1)[:, 0]


def most(values_RV: Tensor, number: int) -> tuple[Tensor, Tensor]:
    """Return each row's `number` largest entries, the largest first, and where they are."""
    size = values_RV.shape[-1]
    height = math.isqrt(size // number)
    if height < 4:  # no shorter
        return values_RV.topk(number, dim=-1)
    width = size // height
    maxima_RW = values_RV[:, : width * height].unflatten(-1, (height, width)).amax(dim=-2)
    column_RN = maxima_RW.topk(number, dim=-1, sorted=False).indices
    line_H = torch.arange(height, device=values_RV.device) * width
    rest = torch.arange(width * height, size, device=values_RV.device).expand(len(values_RV), -1)
    index_RC = torch.cat([(column_RN[:, None, :] + line_H[:, None]).flatten(1), rest], dim=-1)
    top_RN, place_RN = values_RV.gather(-1, index_RC).topk(number, dim=-1)
    return top_RN, index_RC.gather(-1, place_RN)


def blocks(values_RV: Tensor) -> tuple[Tensor, Tensor]:
    """View every row as blocks [R, B, K] of BLOCK neighbours, and the shorter rest [R, K], which may be empty."""
    number = values_RV.shape[-1] // BLOCK
    return values_RV[:, : number * BLOCK].unflatten(-1, (number, BLOCK)), values_RV[:, number * BLOCK :]


def entries(block_R: Tensor, size: int) -> Tensor:
    """Return where the entries of a block of each row are [R, K]; those past the row's end name its last one."""
    return (block_R[:, None] * BLOCK + torch.arange(BLOCK, device=block_R.device)).clamp(max=size - 1)
