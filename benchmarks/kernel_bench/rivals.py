"""What others would take for the same product: torch dense and int4/int8, and on a GPU gemlite, BitBLAS and humming.

A rival gets the same weight as we do where it can hold it (dense, gemlite, BitBLAS); where it cannot, it rounds the
dense weight to a grid of its own, and only its time is compared. What is not installed, or does not take a shape, is
left out with its reason. Libraries that tune themselves do so in the untimed calls before the capture.

Shape suffixes: O = output features, I = input features, G = groups, T = tokens.
"""

import importlib
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from benchmarks.kernel_bench.check import OWN_GRID_TOLERANCE
from benchmarks.kernel_bench.contestants import Contestant, Maker
from benchmarks.kernel_bench.weights import group_size
from onebit_core.kernels.packing import unpack_bits, unpack_codes
from onebit_core.kernels.planes import LinearOperands, dense_weight
from onebit_core.kernels.reference import expand_groups

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
GRID_TOLERANCE = 0.02
GRID_COLUMNS = 128
"""Group of the rivals' own grids."""


def rivals(device: str) -> dict[str, Maker]:
    """Return every rival that may run on a device, by name."""
    found: dict[str, Maker] = {f"torch {name}": partial(_dense, name) for name in _dense_names(device)}
    if device == "cpu":
        return {**found, "torch int8": _torch_int8, "torch int4": _torch_int4_cpu}
    return {
        **found,
        "torch int4": _torch_int4_gpu,
        "gemlite": _gemlite,
        "bitblas": _bitblas,
        "humming": _humming,
    }


def _dense_names(device: str) -> tuple[str, ...]:
    return ("bf16", "fp32", "fp16") if device == "cpu" else ("fp16", "bf16")


def _dense(name: str, operands: LinearOperands, dtype: torch.dtype) -> Contestant:
    """What the original model does, and our dense backend."""
    del dtype
    weight_OI = dense_weight(operands).to(DTYPES[name])
    return Contestant(
        name=f"torch {name}",
        weight=weight_OI,
        multiply=lambda weight, x_TI: functional.linear(x_TI, weight),
        copy=Tensor.clone,
        weight_bytes=weight_OI.nbytes,
        dtype=DTYPES[name],
    )


def _torch_int8(operands: LinearOperands, dtype: torch.dtype) -> Contestant:
    """Torch's 8-bit weights with a scale a row."""
    weight_OI = dense_weight(operands)
    scale_O = weight_OI.abs().amax(1) / 127
    codes_OI = (weight_OI / scale_O[:, None]).round().to(torch.int8)
    return Contestant(
        name="torch int8",
        weight=(codes_OI, scale_O.to(dtype)),
        multiply=lambda weight, x_TI: torch.ops.aten._weight_int8pack_mm(x_TI, *weight),
        copy=_clone_all,
        weight_bytes=codes_OI.nbytes + scale_O.nbytes // 2,
        dtype=dtype,
        tolerance=OWN_GRID_TOLERANCE,
    )


def _int4_grid(operands: LinearOperands, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return codes int32 [O, I] and (scale, offset) [G, O, 2] of w = scale * (code - 8) + offset."""
    weight_OI = dense_weight(operands)
    size = min(group_size(operands.in_features), GRID_COLUMNS)
    grouped = weight_OI.unflatten(1, (-1, size))
    low, high = grouped.amin(-1), grouped.amax(-1)
    scale_OG = ((high - low) / 15).clamp_min(1e-9)
    codes = ((grouped - low[..., None]) / scale_OG[..., None]).round().clamp(0, 15).flatten(1).int()
    both = torch.stack((scale_OG, low + 8 * scale_OG), -1).transpose(0, 1).contiguous().to(dtype)
    return codes, both


def _torch_int4_cpu(operands: LinearOperands, dtype: torch.dtype) -> Contestant:
    """Torch's 4-bit weights with a scale a group; what gpt-fast and torchao run on a CPU."""
    codes_OI, scales = _int4_grid(operands, dtype)
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes_OI, 1)
    return _int4(operands, dtype, (packed, scales), torch.ops.aten._weight_int4pack_mm_for_cpu)


def _torch_int4_gpu(operands: LinearOperands, dtype: torch.dtype) -> Contestant:
    """The same on a GPU (tinygemm), which takes bfloat16 only."""
    del dtype
    codes_OI, scales = _int4_grid(operands, torch.bfloat16)
    pairs = (codes_OI[:, ::2] << 4 | codes_OI[:, 1::2]).to(torch.uint8)
    packed = torch.ops.aten._convert_weight_to_int4pack(pairs, 8)
    return _int4(operands, torch.bfloat16, (packed, scales), torch.ops.aten._weight_int4pack_mm)


def _int4(operands: LinearOperands, dtype: torch.dtype, weight: tuple[Tensor, Tensor], op: Any) -> Contestant:
    size = min(group_size(operands.in_features), GRID_COLUMNS)
    return Contestant(
        name="torch int4",
        weight=weight,
        multiply=lambda weight, x_TI: op(x_TI, weight[0], size, weight[1]),
        copy=_clone_all,
        weight_bytes=sum(tensor.nbytes for tensor in weight),
        dtype=dtype,
        tolerance=OWN_GRID_TOLERANCE,
    )


def _clone_all(weight: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(tensor.clone() for tensor in weight)


def as_grid(operands: LinearOperands) -> tuple[Tensor, Tensor, Tensor, int]:
    """Return codes uint8 [O, I], scale and zero [O, G], bits: w = scale * (code - zero), for one term of one grid.

    A sign plane is a code of one bit with zero 0.5: c * S = -2c * (B - 0.5).

    Raises:
        ValueError: the weight is no single grid, or has input scales, which the other libraries do not take.
    """
    if len(operands.planes) != 1 or operands.sparse is not None or operands.bias_O is not None:
        raise ValueError("holds weights of one grid only")
    term = operands.planes[0]
    planes = term.words_QOW.shape[0]
    if not (term.binary_code or planes == 1) or term.offset_OG is None:
        raise ValueError("holds integer grids only")
    codes_OI = (
        unpack_codes(term.words_QOW, operands.in_features)
        if term.binary_code
        else unpack_bits(term.words_QOW[0], operands.in_features).to(torch.uint8)
    )
    scale_OG = term.coefficient_COG[0]
    return codes_OI, scale_OG, -term.offset_OG / scale_OG, planes


def _tolerance(operands: LinearOperands) -> float:
    """Return what a rival may be off that holds our grid in 16 bits, and leaves out input scales."""
    return GRID_TOLERANCE if operands.planes[0].scale_in_I is None else OWN_GRID_TOLERANCE


def _gemlite(operands: LinearOperands, dtype: torch.dtype) -> Contestant:
    """Gemlite's weight-only kernels (1, 2, 4 bits); input scales are left to x, which favours gemlite."""
    helper = importlib.import_module("gemlite.helper")
    codes_OI, scale_OG, zero_OG, bits = as_grid(operands)
    if bits not in (1, 2, 4):
        raise ValueError(f"has no {bits}-bit weights")
    size = operands.in_features // scale_OG.shape[1]

    def make() -> Any:
        maker = helper.A16Wn(device=str(codes_OI.device), dtype=dtype)
        return maker.from_weights(codes_OI, scale_OG.to(dtype), zero_OG.to(dtype), bits, size)

    return Contestant(
        name="gemlite",
        weight=make(),
        multiply=lambda layer, x_TI: layer(x_TI),
        copy=lambda _: make(),
        weight_bytes=operands.out_features * operands.in_features * bits // 8,
        dtype=dtype,
        tolerance=_tolerance(operands),
    )


def _bitblas(operands: LinearOperands, dtype: torch.dtype) -> Contestant:
    """BitBLAS, unsigned codes with scale and zero; it compiles for minutes at the first shape."""
    library = importlib.import_module("bitblas")
    codes_OI, scale_OG, zero_OG, bits = as_grid(operands)
    size = operands.in_features // scale_OG.shape[1]
    config = library.MatmulConfig(
        M=[1, 16, 64, 256],
        N=operands.out_features,
        K=operands.in_features,
        A_dtype=str(dtype).removeprefix("torch."),
        W_dtype=f"uint{bits}",
        accum_dtype="float32",
        out_dtype=str(dtype).removeprefix("torch."),
        layout="nt",
        group_size=size,
        with_scaling=True,
        with_zeros=True,
        zeros_mode="original",
    )
    product = library.Matmul(config=config)
    packed = product.transform_weight(codes_OI.to(torch.int8))
    weight = (packed, scale_OG.to(dtype), zero_OG.to(dtype))
    return Contestant(
        name="bitblas",
        weight=weight,
        multiply=lambda weight, x_TI: product(x_TI, weight[0], scale=weight[1], zeros=weight[2]),
        copy=_clone_all,
        weight_bytes=sum(tensor.nbytes for tensor in weight),
        dtype=dtype,
        tolerance=_tolerance(operands),
    )


def _humming(operands: LinearOperands, dtype: torch.dtype) -> Contestant:
    """Humming's layer, which rounds the dense weight itself; needs the CUDA compiler."""
    library = importlib.import_module("humming.layer")
    codes_OI, scale_OG, zero_OG, bits = as_grid(operands)
    size = operands.in_features // scale_OG.shape[1]
    dense_OI = (
        (codes_OI - expand_groups(zero_OG, operands.in_features)) * expand_groups(scale_OG, codes_OI.shape[1])
    ).to(dtype)

    def make() -> Any:
        layer = library.HummingLayer(
            shape_n=operands.out_features,
            shape_k=operands.in_features,
            weight_config={"dtype": f"int{bits}", "group_size": 0 if scale_OG.shape[1] == 1 else size},
            torch_dtype=dtype,
        ).to(codes_OI.device)
        layer.load_from_unquantized(dense_OI)
        layer.transform()
        return layer

    return Contestant(
        name="humming",
        weight=make(),
        multiply=lambda layer, x_TI: layer(x_TI),
        copy=lambda _: make(),
        weight_bytes=operands.out_features * operands.in_features * bits // 8,
        dtype=dtype,
        tolerance=OWN_GRID_TOLERANCE,
    )
