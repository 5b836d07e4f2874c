"""Integer codes in training.

Shape suffixes: O = output features, I = input features, G = groups.
"""

import torch
from torch import Tensor, nn

from onebit_core.kernels import expand_groups, unpack_codes
from onebit_core.latents.base import Latent, ones_like
from onebit_core.layers import GroupedIntLinear, QuantizedLinear
from onebit_core.layers.grid import round_to_float16

LARGEST_REST = 0.45
"""How near to the next code a latent may start, in steps."""


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
        self.factor_OG = ones_like(self.scale_OG)

    def base_weight(self) -> Tensor:
        """Return scale times (code - zero)."""
        codes_OI = self.latent_OI.clamp(0, 2**self.bits - 1)
        codes_OI = codes_OI + (codes_OI.round() - codes_OI).detach()
        return (codes_OI - self.zero_OI) * expand_groups(self.scale_OG * self.factor_OG, self.columns)

    @torch.no_grad()
    def settle(self) -> None:
        """Bring codes back into their range."""
        self.latent_OI.clamp_(0, 2**self.bits - 1)

    def write(self, layer: QuantizedLinear) -> None:
        """Pack codes and scales."""
        assert isinstance(layer, GroupedIntLinear)
        codes_OI = self.latent_OI.clamp(0, 2**self.bits - 1).round().to(torch.int32)
        zero_OG = self.zero_OI.view(*self.scale_OG.shape, -1)[..., 0].to(torch.int32)
        scale_OG = round_to_float16(self.scale_OG * self.factor_OG)
        fresh = GroupedIntLinear.from_codes(codes_OI, scale_OG, zero_OG, self.bits)
        layer.planes.copy_(fresh.planes)
        layer.scale.copy_(fresh.scale)
