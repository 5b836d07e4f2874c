"""`pack`: which kernels will compute a weight, and the tensors they read."""

import torch
from torch import Tensor

from onebit_core.errors import KernelError
from onebit_core.kernels.planes import LinearOperands, Packed
from onebit_core.kernels.triton.int8_gemm import pack_int8
from onebit_core.kernels.triton.layout import BYTES_KIND, INT8_KIND, PLANES_KIND, Plan
from onebit_core.kernels.triton.prepack import Stack, pack_planes
from onebit_core.kernels.triton.sparse import pack_sparse
from onebit_core.kernels.triton.workspace import prepare


@torch.no_grad()
def pack_operands(operands: LinearOperands, act: str = "float") -> Packed:
    """Pack a weight; see the package's `pack`.

    Raises:
        KernelError: there is nothing to multiply by, or `act` is unknown.
    """
    if act not in ("float", "int8"):
        raise KernelError(f"act={act!r}: use float or int8")
    if operands.bytes_ is None and not operands.planes:
        raise KernelError("the weight has neither planes nor bytes: there is nothing to pack")
    stacks: list[Stack] = []
    tensors: list[Tensor] = []
    kind, sparse = PLANES_KIND, None
    integers = pack_int8(operands) if act == "int8" else None
    if operands.bytes_ is not None:
        kind = BYTES_KIND
        tensors += [operands.bytes_.codes_OI.contiguous(), operands.bytes_.scale_O.float().contiguous()]
    elif integers is not None:
        kind, stacks, tensors = INT8_KIND, [integers[0]], list(integers[1])
    else:
        stacks, parts = pack_planes(operands)
        tensors += [tensor for each in parts for tensor in each]
    if operands.sparse is not None:
        sparse, sparse_tensors = pack_sparse(operands, operands.sparse)
        tensors += sparse_tensors
    if operands.bias_O is not None:
        tensors.append(operands.bias_O.float().contiguous())
    plan = Plan(
        operands.out_features, operands.in_features, kind, tuple(stacks), operands.bias_O is not None, sparse
    )  # fmt: skip
    if tensors[0].device.type == "cuda":
        prepare(tensors[0].device)
    return Packed(parts=tuple(tensors), layout=plan.to_layout())
