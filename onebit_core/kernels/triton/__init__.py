"""The GPU backend: packed low-bit products in Triton, for NVIDIA devices of compute capability 8.0 and later.

    pack      LinearOperands -> planes in the order of the tensor core's fragments (`prepack`, `sparse`)
    matmul    few tokens: one tensor-core kernel over packed planes (`sign_gemm`, `byte_gemm`); many: unpack, then a
              dense product (`dequantize`); tiles from tables (`tiles`, `onebit tune`)

Triton is an optional import: nothing here needs it until `pack` or `matmul` is called, and `why_unavailable` says what
is missing. Under TRITON_INTERPRET=1 the same kernels run on CPU tensors, slowly: that is how they are tested without a
GPU.
"""

import importlib.util
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from onebit_core.kernels.planes import LinearOperands, Packed

OLDEST_TRITON = (3, 6)
OLDEST_CAPABILITY = (8, 0)


@lru_cache(maxsize=1)
def why_unavailable() -> str | None:
    """Return None if the kernels can run here, else one sentence that says why not and what would help."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed; install onebit[gpu]"
    import triton

    from onebit_core.kernels.triton.tiles import triton_version

    if triton_version() < OLDEST_TRITON:
        oldest = ".".join(str(part) for part in OLDEST_TRITON)
        return f"Triton {triton.__version__} is too old; install {oldest} or later"
    if triton.knobs.runtime.interpret:
        return None
    if not torch.cuda.is_available() or torch.version.cuda is None:
        return "this machine has no CUDA device that PyTorch can use; use the cpu backend"
    capability = torch.cuda.get_device_capability()
    if capability < OLDEST_CAPABILITY:
        name = torch.cuda.get_device_name()
        return (
            f"{name} has compute capability {capability[0]}.{capability[1]}; 8.0 is the oldest that the kernels support"
        )
    return None


def pack(operands: LinearOperands, *, act: str = "float") -> Packed:
    """Pack a weight for `matmul`, on the device it is on.

    Args:
        operands: the weight.
        act: how activations are multiplied: `float`, in their own dtype, or `int8`, rounded to 8 bits per token. The
            latter is faster for 64 tokens and more, costs about 1 % relative error, and is taken where it exists: row
            scales, no input scale, up to 7 bits.
    """
    from onebit_core.kernels.triton.packed import pack_operands

    return pack_operands(operands, act)


def matmul(x: Tensor, parts: Sequence[Tensor], layout: Sequence[int]) -> Tensor:
    """Multiply x [T, I] by a packed weight: [T, O] in x's dtype."""
    from onebit_core.kernels.triton import launch

    return launch.matmul(x, parts, layout)


def describe() -> str:
    """Return one line for log and metrics."""
    import triton

    if triton.knobs.runtime.interpret:
        return f"triton {triton.__version__} (interpreter)"
    from onebit_core.kernels.triton.tiles import gpu_of, user_table

    gpu = gpu_of(torch.device("cuda", torch.cuda.current_device()))
    tuned = "tuned" if user_table(gpu) else "shipped tiles"
    return f"triton {triton.__version__} sm_{gpu.architecture} ({gpu.name}, {tuned})"
