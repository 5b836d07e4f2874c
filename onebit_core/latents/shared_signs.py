"""One latent for all sign planes of a weight: their signs are those of the sum nearest to it.

    [t] = the nearest to t of all sums  +-a_1 +- ... +-a_P,   a_p = the scale of plane p,       what = [t] + shift

With a latent per plane, as a single plane has it, all planes of a weight receive the same gradient: they turn together
where one should, and the step across zero, for which two planes must turn against each other, is never taken. One
latent passes through the sums in their order. It starts at the original weight, drawn into the cell of the decided sum,
in units of the sums' spread; the gradient passes through the choice.

Source: RaBiT, arXiv:2602.05367 (planes derived from one shared weight). Where we differ: the signs are those of the
nearest of all sums; there each plane is the sign of what the planes before it left over.

Shape suffixes: P = planes, O = output features, I = input features.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from onebit_core.kernels import expand_groups, unpack_signs
from onebit_core.latents.base import Latent
from onebit_core.latents.lut import CELL_MARGIN, LEVEL_SHARE
from onebit_core.latents.sign import SignLatent
from onebit_core.layers import QuantizedLinear, SignLinear
from onebit_core.layers.grid import round_to_float16
from onebit_core.layers.sums import nearest_sum, signs_of, sum_of


def sign_latent(layer: SignLinear, weight_OI: Tensor) -> Latent:
    """Return the trainable form of a sign layer: one latent a weight, however many planes it has."""
    return SignLatent(layer, weight_OI) if layer.spec.planes == 1 else SharedSignLatent(layer, weight_OI)


class SharedSignLatent(SignLatent):
    """Planes of signs that follow one latent, each with its scales."""

    def __init__(self, layer: SignLinear, weight_OI: Tensor) -> None:
        super().__init__(layer, weight_OI)
        del self.latent_POI
        self.columns, self.planes = layer.in_features, layer.spec.planes
        self.shape = weight_OI.shape
        negative_POI = unpack_signs(layer.signs, self.columns) < 0
        bits = [negative_OI.to(torch.uint8) << plane for plane, negative_OI in enumerate(negative_POI)]
        self.code_OI = torch.stack(bits).sum(0, dtype=torch.uint8)
        scales_POI = self._plane_scales(self.stored)
        self.unit_OI = scales_POI.square().sum(0).sqrt().clamp(min=1e-8)
        self.latent_OI = nn.Parameter(self._start(scales_POI, weight_OI - self._shift(self.stored)))

    def _start(self, scales_POI: Tensor, weight_OI: Tensor) -> Tensor:
        """Return the weights, drawn into the cells of the sums that were decided, in units of the spread."""
        decided_OI = (signs_of(self.code_OI, self.planes) * scales_POI).sum(0)
        low_OI, high_OI = torch.full_like(decided_OI, -torch.inf), torch.full_like(decided_OI, torch.inf)
        for code in range(2**self.planes):
            other_OI = sum_of(code, scales_POI)
            middle_OI = (other_OI + decided_OI) / 2
            low_OI = torch.where(other_OI < decided_OI, torch.maximum(low_OI, middle_OI), low_OI)
            high_OI = torch.where(other_OI > decided_OI, torch.minimum(high_OI, middle_OI), high_OI)
        margin_OI = torch.minimum(CELL_MARGIN * self.unit_OI, (high_OI - low_OI) / 2)
        inside_OI = torch.minimum(torch.maximum(weight_OI, low_OI + margin_OI), high_OI - margin_OI)
        return (decided_OI + LEVEL_SHARE * (inside_OI - decided_OI)) / self.unit_OI

    def _plane_scales(self, scales: dict[str, Tensor]) -> Tensor:
        """Return what the signs are multiplied with, [P, O, I]."""
        return torch.stack([self._scale(plane, self.shape, scales) for plane in range(self.planes)])

    def _shift(self, scales: Mapping[str, Tensor]) -> Tensor:
        """Return what is added to the sums, [O, I]; zero where nothing is."""
        return expand_groups(scales["shift"], self.columns) if "shift" in scales else self.unit_OI.new_zeros(())

    def _signs(self, scales_POI: Tensor) -> Tensor:
        """Return the signs of the nearest sums, [P, O, I]; those decided before while only scales are trained."""
        code_OI = self.code_OI
        if self.latent_OI.requires_grad:
            code_OI = nearest_sum(self.latent_OI.detach() * self.unit_OI, scales_POI.detach())
        return signs_of(code_OI, self.planes)

    def base_weight(self) -> Tensor:
        """Return the sums that the latents are nearest to."""
        scales = self._scales()
        scales_POI = self._plane_scales(scales)
        through_OI = (self.latent_OI - self.latent_OI.detach()) * self.unit_OI
        return (self._signs(scales_POI) * scales_POI).sum(0) + self._shift(scales) + through_OI

    def signs(self) -> list[nn.Parameter]:
        """Return none: the latent decides by its size, too."""
        return []

    def use_closed_form(self) -> None:
        """Do nothing: the scales of several planes have no such formula."""

    def forward(self, x: Tensor) -> Tensor:
        """Multiply; [..., I] to [..., O]."""
        return Latent.forward(self, x)

    def write(self, layer: QuantizedLinear) -> None:
        """Pack signs and scales."""
        scales = self._scales()
        fresh = SignLinear.from_parts(self._signs(self._plane_scales(scales)))
        layer.get_buffer("signs").copy_(fresh.signs)
        for name, value in scales.items():
            layer.get_buffer(name).copy_(round_to_float16(value))
