"""FactorLinear: a product of two sign matrices with scales before, between and after.

    W = diag(u) U diag(v) V diag(g),    U [O, R] and V [R, I] of +1 and -1,    y = u * (U (v * (V (g * x))))

R sets the bits: (O + I) * R / (O * I) a weight, any number from far below one upwards. DBF (arXiv:2505.11076),
LittleBit (arXiv:2506.13771) and NanoQuant (arXiv:2602.06694) store their result so.
"""

from typing import ClassVar

import torch
from torch import Tensor

from onebit_core.kernels import (
    LinearOperands,
    factor_matmul,
    factor_operands,
    num_words,
    pack_signs,
    unpack_signs,
)
from onebit_core.layers.base import QuantizedLinear
from onebit_core.layers.spec import LayerSpec


class FactorLinear(QuantizedLinear):
    """Two sign matrices.

    Tensors: down int32 [R, ceil(I / 32)]; up int32 [O, ceil(R / 32)]; scale_in float16 [I]; scale_mid float16 [R];
    scale_out float16 [O].
    """

    PARTS: ClassVar[dict[str, str]] = {
        "down": "signs",
        "up": "signs",
        "scale_in": "scales",
        "scale_mid": "scales",
        "scale_out": "scales",
    }
    down: Tensor
    up: Tensor
    scale_in: Tensor
    scale_mid: Tensor
    scale_out: Tensor

    def __init__(self, spec: LayerSpec) -> None:
        super().__init__(spec)
        rank, rows, columns = spec.rank, spec.out_features, spec.in_features
        self.register_buffer("down", torch.empty(rank, num_words(columns), dtype=torch.int32))
        self.register_buffer("up", torch.empty(rows, num_words(rank), dtype=torch.int32))
        for name, size in (("scale_in", columns), ("scale_mid", rank), ("scale_out", rows)):
            self.register_buffer(name, torch.empty(size, dtype=torch.float16))

    @classmethod
    @torch.no_grad()
    def from_factors(
        cls, down_RI: Tensor, up_OR: Tensor, *, scale_in_I: Tensor, scale_mid_R: Tensor, scale_out_O: Tensor
    ) -> "FactorLinear":
        """Pack a layer.

        Args:
            down_RI: floating or integer; negative entries become -1, all others +1.
            up_OR: likewise.
            scale_in_I: floating; scales are stored as float16.
            scale_mid_R: floating.
            scale_out_O: floating.
        """
        rank, columns = down_RI.shape
        spec = LayerSpec(format="factor", in_features=columns, out_features=up_OR.shape[0], rank=rank)
        with down_RI.device:
            layer = cls(spec)
        layer.down.copy_(pack_signs(down_RI))
        layer.up.copy_(pack_signs(up_OR))
        for name, value in (("scale_in", scale_in_I), ("scale_mid", scale_mid_R), ("scale_out", scale_out_O)):
            layer.get_buffer(name).copy_(value)
        return layer

    def base_weight(self) -> Tensor:
        """Return the dense product, float32 [O, I]."""
        up_OR = unpack_signs(self.up, self.spec.rank) * self.scale_out.float()[:, None]
        down_RI = unpack_signs(self.down, self.in_features) * self.scale_in.float()
        return up_OR @ (self.scale_mid.float()[:, None] * down_RI)

    def base_matmul(self, x: Tensor) -> Tensor:
        """Multiply through `factor_matmul`."""
        return factor_matmul(x, self.down, self.up, self.scale_in, self.scale_mid, self.scale_out)

    def chain(self) -> tuple[LinearOperands, ...]:
        """Return the two products, bias in the second."""
        down, up = factor_operands(
            self.down, self.up, scale_in_I=self.scale_in, scale_mid_R=self.scale_mid, scale_out_O=self.scale_out
        )
        return down, self.with_bias(up)
