"""A packed layer as something that can be trained: continuous latents behind signs and codes, and factors on scales.

    signs      s = sign(t)                      t starts at the decided sign, with the size the weight had
    codes      q = round(t), 0 <= q < 2**B      t starts at the weight, drawn to within its decided code
    levels     l[nearest(t)]                    t starts at the weight, drawn into its decided level's cell
    scales     c = c_stored * f                 f starts at 1, so one learning rate fits all

Rounding passes the gradient straight through (arXiv:1308.3432): forward the rounded value, backward as if it were t.
Salient weights are frozen. `harden` packs the layer again; its tensors have the same shapes, so bits do not change.

Shape suffixes: O = output features, I = input features.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from typing import ClassVar

import torch
from torch import Tensor, nn

from onebit_core.latents.straight_through import Surrogate
from onebit_core.layers import QuantizedLinear


class Latent(nn.Module, ABC):
    """A layer in training; its parameters are the latents behind signs and codes, and the factors of scales."""

    RATE: ClassVar[float] = 1.0
    """Times the configured rate of latents: what trains best differs by format."""

    def __init__(self, layer: QuantizedLinear) -> None:
        super().__init__()
        self.surrogate: Surrogate = "identity"
        self.layer = (layer,)  # in a tuple: its buffers are not this module's
        bias = layer._buffers.get("bias")
        self.bias = None if bias is None else bias.float()
        self.salient_mask: Tensor | None = None
        if layer.salient is not None:
            rows, columns = layer.salient.places()
            self.salient_mask = torch.zeros(layer.out_features, layer.in_features, dtype=torch.bool, device=rows.device)
            self.salient_mask[rows, columns] = True
            self.salient_values = torch.zeros_like(self.salient_mask, dtype=torch.float32)
            self.salient_values[rows, columns] = layer.salient.values(rows)

    @abstractmethod
    def base_weight(self) -> Tensor:
        """Return the dense weight without the salient part, float32 [O, I], with gradients."""

    @abstractmethod
    def write(self, layer: QuantizedLinear) -> None:
        """Write the trained values into a layer of the same spec."""

    def latents(self) -> list[nn.Parameter]:
        """Return the parameters behind signs and codes."""
        return [value for name, value in self.named_parameters() if name.startswith("latent")]

    def signs(self) -> list[nn.Parameter]:
        """Return those of this layer, its parts excepted, of which nothing but the sign is used."""
        return []

    def rated_latents(self) -> list[tuple[list[nn.Parameter], float]]:
        """Return the same in lists, each with what the configured rate is multiplied by."""
        return [(self.latents(), self.RATE)]

    def factors(self) -> list[nn.Parameter]:
        """Return the parameters behind scales and levels."""
        return [value for name, value in self.named_parameters() if not name.startswith("latent")]

    def state(self) -> dict[str, Tensor]:
        """Return a copy of the parameters."""
        return {key: value.clone() for key, value in self.state_dict().items()}

    def whole_weight(self) -> Tensor:
        """Return the dense weight, salient part included, float32 [O, I]."""
        weight_OI = self.base_weight()
        if self.salient_mask is not None:
            weight_OI = torch.where(self.salient_mask, self.salient_values, weight_OI)
        return weight_OI

    def forward(self, x: Tensor) -> Tensor:
        """Multiply; [..., I] to [..., O]."""
        return nn.functional.linear(x, self.whole_weight().to(x.dtype), self.bias)

    @torch.no_grad()
    def harden(self) -> QuantizedLinear:
        """Return the layer with what was learned, packed as before."""
        (layer,) = self.layer
        self.write(layer)
        layer._dense = None
        return layer

    def settle(self) -> None:
        """Bring the latents of this layer back that a step has carried to where no gradient reaches them."""

    def use_closed_form(self) -> None:
        """Recompute scales from the latents where the format has a formula for them, in place of training them."""


def each_latent(latents: Iterable[Latent]) -> Iterator[Latent]:
    """Yield latents, each with those of its parts."""
    for latent in latents:
        yield from (module for module in latent.modules() if isinstance(module, Latent))


def ones_like(scale: Tensor) -> nn.Parameter:
    """Return factors of one for a scale, float32 of its shape."""
    return nn.Parameter(torch.ones_like(scale, dtype=torch.float32))
