"""Planes of signs, and two sign matrices in a row, in training.

Shape suffixes: P = planes, O = output features, I = input features, G = groups, R = rank.
"""

import torch
from torch import Tensor, nn

from onebit_core.kernels import expand_groups, unpack_signs
from onebit_core.latents.base import Latent, ones_like
from onebit_core.latents.straight_through import product_dtype, sign_through
from onebit_core.layers import FactorLinear, QuantizedLinear, SignLinear
from onebit_core.layers.grid import round_to_float16

LARGEST_LATENT = 3.0
SMALLEST_LATENT = 0.05


def start_of_signs(signs: Tensor, ratio: Tensor) -> nn.Parameter:
    """Return latents of the decided signs: as large as the weight where it agrees, small where feedback flipped it."""
    size = (ratio * signs).clamp(SMALLEST_LATENT, LARGEST_LATENT)
    return nn.Parameter(signs * size)


class SignLatent(Latent):
    """Planes of signs with their scales."""

    RATE = 1.0
    PLAIN_RATE = 6.0
    """Of a single plane of the weight's own signs. Signs that a method has decided against each other, by feedback
    or together with other planes, are better than they look: turning many at once loses what was found."""

    def __init__(self, layer: SignLinear, weight_OI: Tensor) -> None:
        super().__init__(layer)
        stored = layer._buffers
        self.stored = {
            name: stored[name].float()  # type: ignore[union-attr]  # only names that are there
            for name in ("scale_in", "scale_out", "group_scale", "shift")
            if stored.get(name) is not None
        }
        signs_POI = unpack_signs(layer.signs, layer.in_features)
        self.plain = len(signs_POI) == 1 and layer.salient is None and bool((signs_POI[0] * weight_OI >= 0).all())
        shift_OG = self.stored.get("shift")
        rest_OI = weight_OI.clone() if shift_OG is None else weight_OI - expand_groups(shift_OG, layer.in_features)
        starts = []
        for plane in range(signs_POI.shape[0]):
            scale_OI = self._scale(plane, signs_POI.shape[1:], self.stored)
            starts.append(start_of_signs(signs_POI[plane], rest_OI / scale_OI.clamp(min=1e-12)).data)
            rest_OI -= signs_POI[plane] * scale_OI
        self.latent_POI = nn.Parameter(torch.stack(starts))
        self.start_O: Tensor | None = None
        self.factor = nn.ParameterDict(
            {name: ones_like(value) for name, value in self.stored.items() if name != "shift"}
        )
        if "shift" in self.stored:
            self.factor["shift"] = nn.Parameter(torch.zeros_like(self.stored["shift"]))
            self.typical = weight_OI.abs().mean()

    def signs(self) -> list[nn.Parameter]:
        """Return the plane's latent."""
        return [self.latent_POI]

    def rated_latents(self) -> list[tuple[list[nn.Parameter], float]]:
        """Return them with the rate of their kind."""
        return [(self.latents(), self.PLAIN_RATE if self.plain else self.RATE)]

    @staticmethod
    def _scale(plane: int, shape: torch.Size, scales: dict[str, Tensor]) -> Tensor:
        """Return what the signs of a plane are multiplied with, [O, I]."""
        result = torch.ones(shape, device=next(iter(scales.values())).device if scales else None)
        if "scale_out" in scales:
            result = result * scales["scale_out"][plane][:, None]
        if "scale_in" in scales:
            result = result * scales["scale_in"][plane]
        if "group_scale" in scales:
            result = result * expand_groups(scales["group_scale"][plane], shape[1])
        return result

    def use_closed_form(self) -> None:
        """Let the output scale be what fits the latents' magnitudes best, in place of a factor that is trained.

            h_o = sum over j of |w_oj| g_j / sum over j of g_j^2,   w = t h g, j over the weights that are signs

        For plain rows that is their mean magnitude: PB-LLM, arXiv:2310.00034, section 3.4. Relative to the start,
        where the layer stays what it is.
        """
        if len(self.latent_POI) == 1 and "scale_out" in self.stored:
            del self.factor["scale_out"]
            with torch.no_grad():
                self.start_O = self._magnitude()

    def _magnitude(self) -> Tensor:
        """Return the mean of the latents' magnitudes over the weights that are signs, weighted by g^2: [O]."""
        size_OI = self.latent_POI[0].detach().abs()
        weight_OI = torch.ones_like(size_OI)
        if "scale_in" in self.stored:
            weight_OI = weight_OI * self.stored["scale_in"][0].square()
        if self.salient_mask is not None:
            weight_OI = weight_OI.masked_fill(self.salient_mask, 0)
        return (size_OI * weight_OI).sum(1) / weight_OI.sum(1).clamp(min=1e-12)

    def _scales(self) -> dict[str, Tensor]:
        """Return the scales as trained so far."""
        scales = {
            name: value * self.factor[name]
            for name, value in self.stored.items()
            if name != "shift" and name in self.factor
        }
        if self.start_O is not None:
            scales["scale_out"] = self.stored["scale_out"] * self._magnitude() / self.start_O.clamp(min=1e-12)
        if "shift" in self.stored:
            scales["shift"] = self.stored["shift"] + self.factor["shift"] * self.typical
        return scales

    def base_weight(self) -> Tensor:
        """Return the sum of the planes."""
        scales = self._scales()
        shape = self.latent_POI.shape[1:]
        planes = [
            sign_through(latent_OI, self.surrogate) * self._scale(plane, shape, scales)
            for plane, latent_OI in enumerate(self.latent_POI)
        ]
        weight_OI = torch.stack(planes).sum(0)
        return weight_OI + expand_groups(scales["shift"], shape[1]) if "shift" in scales else weight_OI

    def forward(self, x: Tensor) -> Tensor:
        """Multiply; where only rows and columns have scales they are put on x and the product, which costs less."""
        if len(self.latent_POI) > 1 or self.salient_mask is not None or self.stored.keys() - {"scale_in", "scale_out"}:
            return super().forward(x)
        scales = self._scales()
        if "scale_in" in scales:
            x = x * scales["scale_in"][0].to(x.dtype)
        signs_OI = sign_through(self.latent_POI[0], self.surrogate, product_dtype(x))
        result = nn.functional.linear(x, signs_OI)
        if "scale_out" in scales:
            result = result * scales["scale_out"][0].to(result.dtype)
        return result if self.bias is None else result + self.bias.to(result.dtype)

    def write(self, layer: QuantizedLinear) -> None:
        """Pack signs and scales."""
        signs_POI = torch.where(self.latent_POI < 0, -1.0, 1.0)
        fresh = SignLinear.from_parts(signs_POI)
        layer.get_buffer("signs").copy_(fresh.signs)
        for name, value in self._scales().items():
            layer.get_buffer(name).copy_(round_to_float16(value))


class FactorLatent(Latent):
    """Two sign matrices and three scales; multiplied one after the other, which costs less than their product."""

    RATE = 5.0  # its start is random, so more signs have to turn

    def __init__(self, layer: FactorLinear, weight_OI: Tensor) -> None:
        super().__init__(layer)
        del weight_OI
        rank = layer.spec.rank
        start = layer.start
        down_RI, up_OR = unpack_signs(layer.down, layer.in_features), unpack_signs(layer.up, rank)
        self.latent_RI = start_of_signs(down_RI, start["down"] if start else down_RI)
        self.latent_OR = start_of_signs(up_OR, start["up"] if start else up_OR)
        self.stored = {name: layer.get_buffer(name).float() for name in ("scale_in", "scale_mid", "scale_out")}
        self.factor = nn.ParameterDict({name: ones_like(value) for name, value in self.stored.items()})

    def signs(self) -> list[nn.Parameter]:
        """Return both factors' latents."""
        return [self.latent_RI, self.latent_OR]

    def _scale(self, name: str) -> Tensor:
        scale: Tensor = self.stored[name] * self.factor[name]
        return scale

    def base_weight(self) -> Tensor:
        """Return the dense product."""
        up_OR = sign_through(self.latent_OR, self.surrogate) * self._scale("scale_out")[:, None]
        down_RI = sign_through(self.latent_RI, self.surrogate) * self._scale("scale_in")
        return up_OR @ (self._scale("scale_mid")[:, None] * down_RI)

    def forward(self, x: Tensor) -> Tensor:
        """Multiply by the first factor, then by the second."""
        dtype = product_dtype(x)
        down_RI = sign_through(self.latent_RI, self.surrogate, dtype)
        up_OR = sign_through(self.latent_OR, self.surrogate, dtype)
        middle = nn.functional.linear(x * self._scale("scale_in").to(x.dtype), down_RI)
        result = nn.functional.linear(middle * self._scale("scale_mid").to(middle.dtype), up_OR)
        result = result * self._scale("scale_out").to(result.dtype)
        return result if self.bias is None else result + self.bias.to(result.dtype)

    def write(self, layer: QuantizedLinear) -> None:
        """Pack signs and scales."""
        assert isinstance(layer, FactorLinear)
        fresh = FactorLinear.from_factors(
            self.latent_RI,
            self.latent_OR,
            scale_in_I=round_to_float16(self._scale("scale_in")),
            scale_mid_R=round_to_float16(self._scale("scale_mid")),
            scale_out_O=round_to_float16(self._scale("scale_out")),
        )
        for name, tensor in fresh.named_buffers():
            layer.get_buffer(name).copy_(tensor)
