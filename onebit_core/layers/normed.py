"""NormedLinear: a layer whose outputs are normalized, as OneBit publishes its models.

    y = LayerNorm(A x) + bias       A: a packed layer;   LayerNorm over the outputs of a token, without weights

Only to read and serve those models: with it a layer no longer does what the original's did, whatever A is, and nothing
but long training makes up for that. Our own layers have none.

Source: OneBit, arXiv:2402.11295, section 3.2, and its published code.
"""

from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from onebit_core.layers.around import AroundLinear

EPSILON = 1e-5
"""Added to the variance, as torch does by default."""


class NormedLinear(AroundLinear):
    """A layer before a LayerNorm; tensors as in AroundLinear. It is no matrix: `dequantize` is the inner layer's."""

    FORMAT: ClassVar[Literal["rotated", "normed"]] = "normed"

    def base_weight(self) -> Tensor:
        """Return the inner layer's dense weight, float32 [O, I]."""
        return self.inner.dequantize()

    def base_matmul(self, x: Tensor) -> Tensor:
        """Multiply by the inner layer and normalize; [..., I] to [..., O], x's dtype."""
        seen = x.float() if x.dtype == torch.float16 else x  # a product before its norm may leave the range of float16
        return normalize(self.inner(seen)).to(x.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Compute: x floating [..., I], result [..., O] in x's dtype, whichever backend the inner layer has."""
        self.pack()
        result = self.base_matmul(x)
        bias = self._buffers.get("bias")
        return result if bias is None else result + bias.to(x.dtype)


def normalize(product: Tensor) -> Tensor:
    """Return LayerNorm over the last dimension, without weights, in the product's dtype; computed in float32."""
    return nn.functional.layer_norm(product.float(), product.shape[-1:], eps=EPSILON).to(product.dtype)
