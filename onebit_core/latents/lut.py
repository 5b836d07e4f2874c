"""Indices into tables of four levels, and the levels, in training.

Shape suffixes: O = output features, I = input features, G = groups, K = columns of a group.
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from onebit_core.kernels import expand_groups, unpack_codes
from onebit_core.latents.base import Latent
from onebit_core.layers import LutLinear, QuantizedLinear
from onebit_core.layers.grid import round_to_float16

CELL_MARGIN = 0.02
"""How near to the edge of its level's cell a latent may start, in standard deviations of the levels."""

LEVEL_SHARE = 0.8
"""How far from its decided level a latent starts towards the original weight; at the cell's edge too many flip."""


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
