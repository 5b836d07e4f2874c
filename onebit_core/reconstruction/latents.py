"""A packed layer as something that can be trained: continuous latents behind signs and codes, and factors on scales.

    signs      s = sign(t)                      t starts at the decided sign, with the size the weight had
    codes      q = round(t), 0 <= q < 2**B      t starts at the weight, drawn to within its decided code
    levels     l[nearest(t)]                    t starts at the weight, drawn into its decided level's cell
    scales     c = c_stored * f                 f starts at 1, so one learning rate fits all

Rounding passes the gradient straight through (arXiv:1308.3432): forward the rounded value, backward as if it were t.
Salient weights are frozen. `harden` packs the layer again; its tensors have the same shapes, so bits do not change.

Shape suffixes: P = planes, O = output features, I = input features, G = groups, R = rank, T = tokens.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from onebit_core.kernels import expand_groups, unpack_codes, unpack_signs
from onebit_core.layers import FactorLinear, GroupedIntLinear, LutLinear, QuantizedLinear, SignLinear
from onebit_core.layers.grid import round_to_float16

LARGEST_LATENT = 3.0
SMALLEST_LATENT = 0.05
CELL_MARGIN = 0.02
"""How near to the edge of its level's cell a latent may start, in standard deviations of the levels."""

LEVEL_SHARE = 0.8
"""How far from its decided level a latent starts towards the original weight; at the cell's edge too many flip."""

LARGEST_REST = 0.45
"""How near to the next code a latent may start, in steps."""


class _SignThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, latent: Tensor) -> Tensor:
        del ctx
        return latent.ge(0).to(latent.dtype).mul_(2).sub_(1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        del ctx
        return gradient


def sign_through(latent: Tensor) -> Tensor:
    """Return +1 and -1, with the gradient of the identity; the sign of zero is +1."""
    signs: Tensor = _SignThrough.apply(latent)  # type: ignore[no-untyped-call]  # torch's
    return signs


class Latent(nn.Module, ABC):
    """A layer in training; its parameters are the latents behind signs and codes, and the factors of scales."""

    RATE: ClassVar[float] = 1.0
    """Times the configured rate of latents: what trains best differs by format."""

    def __init__(self, layer: QuantizedLinear) -> None:
        super().__init__()
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


def _factor(like: Tensor) -> nn.Parameter:
    return nn.Parameter(torch.ones_like(like, dtype=torch.float32))


def _start_of_signs(signs: Tensor, ratio: Tensor) -> nn.Parameter:
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
            starts.append(_start_of_signs(signs_POI[plane], rest_OI / scale_OI.clamp(min=1e-12)).data)
            rest_OI -= signs_POI[plane] * scale_OI
        self.latent_POI = nn.Parameter(torch.stack(starts))
        self.factor = nn.ParameterDict({name: _factor(value) for name, value in self.stored.items() if name != "shift"})
        if "shift" in self.stored:
            self.factor["shift"] = nn.Parameter(torch.zeros_like(self.stored["shift"]))
            self.typical = weight_OI.abs().mean()

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

    def _scales(self) -> dict[str, Tensor]:
        """Return the scales as trained so far."""
        scales = {name: value * self.factor[name] for name, value in self.stored.items() if name != "shift"}
        if "shift" in self.stored:
            scales["shift"] = self.stored["shift"] + self.factor["shift"] * self.typical
        return scales

    def base_weight(self) -> Tensor:
        """Return the sum of the planes."""
        scales = self._scales()
        shape = self.latent_POI.shape[1:]
        planes = [
            sign_through(latent_OI) * self._scale(plane, shape, scales)
            for plane, latent_OI in enumerate(self.latent_POI)
        ]
        weight_OI = torch.stack(planes).sum(0)
        return weight_OI + expand_groups(scales["shift"], shape[1]) if "shift" in scales else weight_OI

    def write(self, layer: QuantizedLinear) -> None:
        """Pack signs and scales."""
        signs_POI = torch.where(self.latent_POI < 0, -1.0, 1.0)
        fresh = SignLinear.from_parts(signs_POI)
        layer.get_buffer("signs").copy_(fresh.signs)
        for name, value in self._scales().items():
            layer.get_buffer(name).copy_(round_to_float16(value))


class IntLatent(Latent):
    """Integer codes with the scales of their groups; zero points stay."""

    def __init__(self, layer: GroupedIntLinear, weight_OI: Tensor) -> None:
        super().__init__(layer)
        self.bits, self.columns = layer.spec.planes, layer.in_features
        self.scale_OG = layer.scale.float()
        zero_OG = unpack_codes(layer.zero[:, None], self.scale_OG.numel()).float().view_as(self.scale_OG)
        self.zero_OI = expand_groups(zero_OG, self.columns)
        codes_OI = unpack_codes(layer.planes, self.columns).float()
        wanted_OI = weight_OI / expand_groups(self.scale_OG, self.columns) + self.zero_OI
        rest_OI = (wanted_OI - codes_OI).clamp(-LARGEST_REST, LARGEST_REST)
        self.latent_OI = nn.Parameter((codes_OI + rest_OI).clamp(0, 2**self.bits - 1))  # outside no gradient leads back
        self.factor_OG = _factor(self.scale_OG)

    def base_weight(self) -> Tensor:
        """Return scale times (code - zero)."""
        codes_OI = self.latent_OI.clamp(0, 2**self.bits - 1)
        codes_OI = codes_OI + (codes_OI.round() - codes_OI).detach()
        return (codes_OI - self.zero_OI) * expand_groups(self.scale_OG * self.factor_OG, self.columns)

    def write(self, layer: QuantizedLinear) -> None:
        """Pack codes and scales."""
        assert isinstance(layer, GroupedIntLinear)
        codes_OI = self.latent_OI.clamp(0, 2**self.bits - 1).round().to(torch.int32)
        zero_OG = self.zero_OI.view(*self.scale_OG.shape, -1)[..., 0].to(torch.int32)
        scale_OG = round_to_float16(self.scale_OG * self.factor_OG)
        fresh = GroupedIntLinear.from_codes(codes_OI, scale_OG, zero_OG, self.bits)
        layer.planes.copy_(fresh.planes)
        layer.scale.copy_(fresh.scale)


class LutLatent(Latent):
    """Indices into four levels, and the levels."""

    def __init__(self, layer: LutLinear, weight_OI: Tensor) -> None:
        super().__init__(layer)
        self.columns = layer.in_features
        self.levels_OG4 = layer.levels.float()
        self.spread_OG = self.levels_OG4.std(-1).clamp(min=1e-8)
        self.latent_OI = nn.Parameter(self._start(layer, weight_OI))
        self.delta_OG4 = nn.Parameter(torch.zeros_like(self.levels_OG4))

    def _start(self, layer: LutLinear, weight_OI: Tensor) -> Tensor:
        """Return the weights, drawn into the cells of the levels that were decided, in units of the spread."""
        infinity_OG1 = torch.full_like(self.levels_OG4[..., :1], torch.inf)
        middle_OG3 = (self.levels_OG4[..., 1:] + self.levels_OG4[..., :-1]) / 2
        edges_OG5 = torch.cat((-infinity_OG1, middle_OG3, infinity_OG1), -1)
        index_OI = unpack_codes(layer.planes, self.columns).long()
        size = self.columns // edges_OG5.shape[1]
        edges_OI5 = edges_OG5.repeat_interleave(size, 1)
        spread_OI = expand_groups(self.spread_OG, self.columns)
        low_OI, high_OI = (edges_OI5.gather(2, (index_OI + side).unsqueeze(-1)).squeeze(-1) for side in (0, 1))
        margin_OI = torch.minimum(CELL_MARGIN * spread_OI, (high_OI - low_OI) / 2)
        inside_OI = torch.minimum(torch.maximum(weight_OI, low_OI + margin_OI), high_OI - margin_OI)
        level_OI = layer.base_weight()
        return (level_OI + LEVEL_SHARE * (inside_OI - level_OI)) / spread_OI

    def _levels(self) -> Tensor:
        """Return the levels as trained so far, [O, G, 4]; ascending while indices may change."""
        levels_OG4 = self.levels_OG4 + self.delta_OG4 * self.spread_OG[..., None]
        return levels_OG4.sort(-1).values if self.latent_OI.requires_grad else levels_OG4

    def _steps(self, levels_OG4: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield, for each of the three edges between levels: which latents lie above it, and the step there.

        Bool [O, G, K] and float32 [O, G, 1]; a group's K columns are an axis of their own.
        """
        latent_OGK = self.latent_OI.detach().view(*self.spread_OG.shape, -1)
        # Frozen indices are those of the start, wherever levels move.
        deciding_OG4 = levels_OG4.detach() if self.latent_OI.requires_grad else self.levels_OG4
        for edge in range(3):
            middle_OG = (deciding_OG4[..., edge] + deciding_OG4[..., edge + 1]) / 2 / self.spread_OG
            step_OG = levels_OG4[..., edge + 1] - levels_OG4[..., edge]
            yield latent_OGK > middle_OG[..., None], step_OG[..., None]

    def base_weight(self) -> Tensor:
        """Return the levels that the latents are nearest to."""
        levels_OG4 = self._levels()
        chosen_OGK = levels_OG4[..., :1]
        for above_OGK, step_OG1 in self._steps(levels_OG4):
            chosen_OGK = chosen_OGK + above_OGK * step_OG1
        through = (self.latent_OI - self.latent_OI.detach()) * expand_groups(self.spread_OG, self.columns)
        weight_OI: Tensor = chosen_OGK.reshape(self.latent_OI.shape) + through
        return weight_OI

    def write(self, layer: QuantizedLinear) -> None:
        """Pack indices and levels."""
        assert isinstance(layer, LutLinear)
        levels_OG4 = self._levels()
        above = [above_OGK for above_OGK, _ in self._steps(levels_OG4)]
        index_OI = torch.stack(above).sum(0).reshape(self.latent_OI.shape)
        fresh = LutLinear.from_levels(index_OI, round_to_float16(levels_OG4))
        layer.planes.copy_(fresh.planes)
        layer.levels.copy_(fresh.levels)


class FactorLatent(Latent):
    """Two sign matrices and three scales; multiplied one after the other, which costs less than their product."""

    RATE = 5.0  # its start is random, so more signs have to turn

    def __init__(self, layer: FactorLinear, weight_OI: Tensor) -> None:
        super().__init__(layer)
        del weight_OI
        rank = layer.spec.rank
        start = layer.start
        down_RI, up_OR = unpack_signs(layer.down, layer.in_features), unpack_signs(layer.up, rank)
        self.latent_RI = _start_of_signs(down_RI, start["down"] if start else down_RI)
        self.latent_OR = _start_of_signs(up_OR, start["up"] if start else up_OR)
        self.stored = {name: layer.get_buffer(name).float() for name in ("scale_in", "scale_mid", "scale_out")}
        self.factor = nn.ParameterDict({name: _factor(value) for name, value in self.stored.items()})

    def _scale(self, name: str) -> Tensor:
        scale: Tensor = self.stored[name] * self.factor[name]
        return scale

    def base_weight(self) -> Tensor:
        """Return the dense product."""
        up_OR = sign_through(self.latent_OR) * self._scale("scale_out")[:, None]
        return up_OR @ (self._scale("scale_mid")[:, None] * sign_through(self.latent_RI) * self._scale("scale_in"))

    def forward(self, x: Tensor) -> Tensor:
        """Multiply by the first factor, then by the second."""
        middle = nn.functional.linear(x * self._scale("scale_in"), sign_through(self.latent_RI))
        result = nn.functional.linear(middle * self._scale("scale_mid"), sign_through(self.latent_OR))
        result = result * self._scale("scale_out")
        return result if self.bias is None else result + self.bias

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
