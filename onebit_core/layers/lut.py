"""LutLinear: two-bit indices into four free levels per row and group of columns.

    W_oi = l_og[q_oi],   0 <= q < 4

The levels need not be evenly spaced, so the table is the best two-bit quantizer a group can have (Lloyd, Max); the
binary methods with group bitmaps (BiLLM and its family) are special cases that fill it differently.
"""

from typing import ClassVar

import torch
from torch import Tensor

from onebit_core.kernels import LinearOperands, level_terms, lut_dequantize, lut_matmul, num_words, pack_codes
from onebit_core.layers.base import QuantizedLinear
from onebit_core.layers.salient import SalientWeights
from onebit_core.layers.spec import LayerSpec

INDEX_BITS = 2


class LutLinear(QuantizedLinear):
    """Four levels per group.

    Tensors: planes int32 [2, O, W], the bits of the indices; levels float16 [O, G, 4].
    """

    PARTS: ClassVar[dict[str, str]] = {"planes": "codes", "levels": "scales"}
    planes: Tensor
    levels: Tensor

    def __init__(self, spec: LayerSpec) -> None:
        super().__init__(spec)
        rows, words = spec.out_features, num_words(spec.in_features)
        self.register_buffer("planes", torch.empty(INDEX_BITS, rows, words, dtype=torch.int32))
        self.register_buffer("levels", torch.empty(rows, spec.groups, 4, dtype=torch.float16))

    @classmethod
    @torch.no_grad()
    def from_levels(cls, index_OI: Tensor, levels_OG4: Tensor, salient: SalientWeights | None = None) -> "LutLinear":
        """Pack a layer.

        Args:
            index_OI: integer 0 to 3.
            levels_OG4: floating; stored as float16.
            salient: weights that replace the base, or None.
        """
        rows, columns = index_OI.shape
        spec = LayerSpec(
            format="lut",
            in_features=columns,
            out_features=rows,
            planes=INDEX_BITS,
            groups=levels_OG4.shape[1],
            salient=salient.spec() if salient else None,
        )
        with index_OI.device:
            layer = cls(spec)
        layer.planes.copy_(pack_codes(index_OI, INDEX_BITS))
        layer.levels.copy_(levels_OG4)
        if layer.salient is not None and salient is not None:
            layer.salient.fill(salient)
        return layer

    def base_weight(self) -> Tensor:
        """Return the dense weight, float32 [O, I]."""
        return lut_dequantize(self.planes, self.levels, self.in_features)

    def base_matmul(self, x: Tensor) -> Tensor:
        """Multiply through `lut_matmul`."""
        return lut_matmul(x, self.planes, self.levels)

    def chain(self) -> tuple[LinearOperands, ...]:
        """Return the levels in the form that packed kernels read."""
        return (self.product(level_terms(self.planes, self.levels)),)
