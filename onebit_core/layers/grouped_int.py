"""GroupedIntLinear: integer codes of 1 to 8 bits with one scale and one zero point per group of columns.

    W_oi = s_og * (q_oi - z_og),   0 <= q, z < 2**B

Codes and zero points are stored as bit planes, so a weight costs exactly B bits and a zero point B more per group.
RTN and GPTQ store their result so.
"""

from typing import ClassVar

import torch
from torch import Tensor

from onebit_core.kernels import LinearOperands, code_terms, int_dequantize, int_matmul, num_words, pack_codes
from onebit_core.layers.base import QuantizedLinear
from onebit_core.layers.salient import SalientWeights
from onebit_core.layers.spec import LayerSpec


class GroupedIntLinear(QuantizedLinear):
    """Grouped integers.

    Tensors: planes int32 [B, O, W]; scale float16 [O, G]; zero int32 [B, ceil(O * G / 32)]: the zero points of
    all rows in one run, so that they too cost exactly B bits.
    """

    PARTS: ClassVar[dict[str, str]] = {"planes": "codes", "scale": "scales", "zero": "scales"}
    planes: Tensor
    scale: Tensor
    zero: Tensor

    def __init__(self, spec: LayerSpec) -> None:
        super().__init__(spec)
        bits, rows, groups = spec.planes, spec.out_features, spec.groups
        self.register_buffer("planes", torch.empty(bits, rows, num_words(spec.in_features), dtype=torch.int32))
        self.register_buffer("scale", torch.empty(rows, groups, dtype=torch.float16))
        self.register_buffer("zero", torch.empty(bits, num_words(rows * groups), dtype=torch.int32))

    @classmethod
    @torch.no_grad()
    def from_codes(
        cls, codes_OI: Tensor, scale_OG: Tensor, zero_OG: Tensor, bits: int, salient: SalientWeights | None = None
    ) -> "GroupedIntLinear":
        """Pack a layer.

        Args:
            codes_OI: integer, 0 <= code < 2**bits.
            scale_OG: floating; stored as float16.
            zero_OG: integer, 0 <= zero < 2**bits.
            bits: 1 to 8.
            salient: weights that replace the base, or None.
        """
        rows, columns = codes_OI.shape
        spec = LayerSpec(
            format="grouped_int",
            in_features=columns,
            out_features=rows,
            planes=bits,
            groups=scale_OG.shape[1],
            salient=salient.spec() if salient else None,
        )
        with codes_OI.device:
            layer = cls(spec)
        layer.planes.copy_(pack_codes(codes_OI, bits))
        layer.scale.copy_(scale_OG)
        layer.zero.copy_(pack_codes(zero_OG.reshape(1, -1), bits)[:, 0])
        if layer.salient is not None and salient is not None:
            layer.salient.fill(salient)
        return layer

    def base_weight(self) -> Tensor:
        """Return the dense weight, float32 [O, I]."""
        return int_dequantize(self.planes, self.scale, self.zero, self.in_features)

    def base_matmul(self, x: Tensor) -> Tensor:
        """Multiply through `int_matmul`."""
        return int_matmul(x, self.planes, self.scale, self.zero)

    def chain(self) -> tuple[LinearOperands, ...]:
        """Return the codes in the form that packed kernels read."""
        return (self.product(code_terms(self.planes, self.scale, self.zero)),)
