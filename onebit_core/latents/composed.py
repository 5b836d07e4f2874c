"""Layers made of layers in training, and the table of all formats' latents.

A split layer trains both parts, a rotated or a normed one the layer inside; none has parameters of its own.

Shape suffixes: O = output features, I = input features.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from onebit_core.latents.base import Latent
from onebit_core.latents.grouped_int import IntLatent
from onebit_core.latents.lut import LutLatent
from onebit_core.latents.shared_signs import sign_latent
from onebit_core.latents.sign import FactorLatent
from onebit_core.layers import NormedLinear, QuantizedLinear, RotatedLinear, SplitLinear
from onebit_core.layers.around import AroundLinear
from onebit_core.layers.normed import normalize
from onebit_core.layers.rotated import rotate, rotate_back


class SplitLatent(Latent):
    """The latents of both parts."""

    def __init__(self, layer: SplitLinear, weight_OI: Tensor) -> None:
        super().__init__(layer)
        self.columns = layer.columns()
        self.places_I = torch.cat(self.columns).argsort()
        self.parts = nn.ModuleList(
            LATENTS[part.spec.format](part, weight_OI[:, columns])
            for columns, part in zip(self.columns, layer.layers, strict=True)
        )

    def _parts(self) -> Iterator[Latent]:
        return (part for part in self.parts if isinstance(part, Latent))

    def latents(self) -> list[nn.Parameter]:
        """Return those of the parts."""
        return [value for part in self._parts() for value in part.latents()]

    def rated_latents(self) -> list[tuple[list[nn.Parameter], float]]:
        """Return those of the parts."""
        return [rated for part in self._parts() for rated in part.rated_latents()]

    def factors(self) -> list[nn.Parameter]:
        """Return those of the parts."""
        return [value for part in self._parts() for value in part.factors()]

    def base_weight(self) -> Tensor:
        """Return the weights of the parts in the columns' order."""
        return torch.cat([part.whole_weight() for part in self._parts()], 1)[:, self.places_I]

    def write(self, layer: QuantizedLinear) -> None:
        """Pack both parts."""
        assert isinstance(layer, SplitLinear)
        for latent, part in zip(self._parts(), layer.layers, strict=True):
            latent.write(part)


class _AroundLatent(Latent):
    """The latents of the one layer inside another."""

    inner: Latent

    def latents(self) -> list[nn.Parameter]:
        """Return those of the inner layer."""
        return self.inner.latents()

    def rated_latents(self) -> list[tuple[list[nn.Parameter], float]]:
        """Return those of the inner layer."""
        return self.inner.rated_latents()

    def factors(self) -> list[nn.Parameter]:
        """Return those of the inner layer."""
        return self.inner.factors()

    def write(self, layer: QuantizedLinear) -> None:
        """Pack the inner layer."""
        assert isinstance(layer, AroundLinear)
        self.inner.write(layer.inner)
        layer.inner._dense = None


class RotatedLatent(_AroundLatent):
    """The latents of the layer behind the rotation."""

    def __init__(self, layer: RotatedLinear, weight_OI: Tensor) -> None:
        super().__init__(layer)
        self.inner = LATENTS[layer.inner.spec.format](layer.inner, rotate(weight_OI))

    def base_weight(self) -> Tensor:
        """Return the inner weight, rotated back."""
        return rotate_back(self.inner.whole_weight())

    def forward(self, x: Tensor) -> Tensor:
        """Rotate and multiply."""
        result: Tensor = self.inner(rotate(x))
        return result if self.bias is None else result + self.bias


class NormedLatent(_AroundLatent):
    """The latents of the layer before the LayerNorm."""

    def __init__(self, layer: NormedLinear, weight_OI: Tensor) -> None:
        super().__init__(layer)
        self.inner = LATENTS[layer.inner.spec.format](layer.inner, weight_OI)

    def base_weight(self) -> Tensor:
        """Return the inner weight."""
        return self.inner.whole_weight()

    def forward(self, x: Tensor) -> Tensor:
        """Multiply and normalize."""
        result = normalize(self.inner(x))
        return result if self.bias is None else result + self.bias


LATENTS: dict[str, Callable[[Any, Tensor], Latent]] = {
    "sign": sign_latent,
    "grouped_int": IntLatent,
    "lut": LutLatent,
    "factor": FactorLatent,
    "split": SplitLatent,
    "rotated": RotatedLatent,
    "normed": NormedLatent,
}
"""Format name to its trainable form; built from (layer, original weight)."""
