"""RotatedLinear: a layer whose inputs are rotated before it, so that no input stands out.

    y = A (R^T x) + bias       A: a packed layer, found for W R;   R = diag(s) blockdiag(H_b, ..., H_b)

H_b is Sylvester's Hadamard matrix over sqrt(b), b the largest power of two up to 256 that divides I, and s a fixed
pattern of signs. R is orthogonal: W x = (W R)(R^T x), but columns that were large are spread over b others, and a grid
that all of a group share fits them better. Nothing is stored for R; it costs b additions an input when computing.

Sources: rotation for quantization: QuaRot (arXiv:2404.00456, section 3), QuIP# (arXiv:2402.04396, section 3); choosing
layer by layer: RoSTE (arXiv:2502.09003, section 4). Where we differ: weights alone are quantized, so the rotation stays
next to its layer and need not be merged into others.

Shape suffixes: O = output features, I = input features.
"""

from functools import lru_cache
from typing import ClassVar, Literal

import torch
from torch import Tensor

from onebit_core.kernels import packs
from onebit_core.layers.around import AroundLinear

LARGEST_BLOCK = 256
SIGN_STEP = 2654435761
"""Knuth's multiplier (2**32 over the golden ratio): its multiples' top bits look drawn, and are the same everywhere."""


def rotation_block(in_features: int) -> int:
    """Return the size of the blocks that are rotated: 1 (no rotation) for an odd number of inputs."""
    block = in_features & -in_features
    return min(block, LARGEST_BLOCK)


@lru_cache(maxsize=64)
def _rotation(in_features: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return s float32 [I] and H float32 [b, b]."""
    block = rotation_block(in_features)
    with torch.inference_mode(False):  # kept for training too, whoever asks first  # noqa: FBT003
        hadamard = torch.ones(1, 1)
        while len(hadamard) < block:
            hadamard = torch.cat((torch.cat((hadamard, hadamard), 1), torch.cat((hadamard, -hadamard), 1)))
        place_I = torch.arange(1, in_features + 1, dtype=torch.int64)
        sign_I = 1 - 2 * ((place_I * SIGN_STEP) % 2**32 // 2**31)
        return sign_I.float().to(device), (hadamard / block**0.5).to(device)


def rotate(rows: Tensor) -> Tensor:
    """Return rows @ R, floating [..., I], in the same dtype; of a Hessian rotate both sides."""
    sign_I, hadamard = _rotation(rows.shape[-1], rows.device)
    blocks = (rows.float() * sign_I).unflatten(-1, (-1, len(hadamard)))
    rotated: Tensor = (blocks @ hadamard).flatten(-2)
    return rotated.to(rows.dtype)


def rotate_back(rows: Tensor) -> Tensor:
    """Return rows @ R^T, floating [..., I], in the same dtype."""
    sign_I, hadamard = _rotation(rows.shape[-1], rows.device)
    blocks = rows.float().unflatten(-1, (-1, len(hadamard)))
    restored: Tensor = (blocks @ hadamard).flatten(-2) * sign_I  # H is symmetric
    return restored.to(rows.dtype)


class RotatedLinear(AroundLinear):
    """A layer that was found for a rotated weight, behind the rotation; tensors as in AroundLinear."""

    FORMAT: ClassVar[Literal["rotated", "normed"]] = "rotated"

    def base_weight(self) -> Tensor:
        """Return the dense weight for inputs as they come, float32 [O, I]."""
        return rotate_back(self.inner.dequantize())

    def base_matmul(self, x: Tensor) -> Tensor:
        """Rotate and multiply."""
        seen = x.float() if x.dtype == torch.float16 else x  # a sum of many may leave the range of float16
        product: Tensor = self.inner(rotate(seen))
        return product.to(x.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Multiply: x floating [..., I], result [..., O] in x's dtype."""
        if not packs(self.backend):
            return super().forward(x)
        self.pack()
        product = self.base_matmul(x)
        bias = self._buffers.get("bias")
        return product if bias is None else product + bias.to(x.dtype)
