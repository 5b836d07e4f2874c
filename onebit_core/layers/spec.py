"""LayerSpec: what a quantized linear stores, as plain values.

The specs of all layers stand in `config.json` under `quantization_config.layers`. From its spec alone an empty layer is
built whose tensors have exactly the names, shapes and dtypes on disk, so a reader can refuse anything else.
"""

from dataclasses import dataclass
from typing import Literal

from onebit_core.config import StrictConfig
from onebit_core.errors import ConfigError

SALIENT_BLOCK = 128
"""Columns per block of the block-relative salient index; a column index then fits one byte."""


MOST_PLANES = 8
"""Sign planes, or bits of a code."""

NUM_PARTS = {"split": 2, "rotated": 1, "normed": 1}
"""How many layers a layer is made of: one bit per column tells those of a split one apart."""


@dataclass(frozen=True, kw_only=True)
class SalientSpec(StrictConfig):
    """The weights kept in 8 bit.

    Attributes:
        count: how many weights, N.
        index: how their places are stored: `block` (a byte per weight and a byte per row and 128 columns), `even` (a
            byte per weight: as many in every row and block) or `bitmap` (a bit per weight of the whole matrix).
        blocks: even only: into how many equal blocks a row is cut.
    """

    count: int
    index: Literal["block", "even", "bitmap"]
    blocks: int = 0

    def __post_init__(self) -> None:
        if (self.index == "even") != (self.blocks > 0):
            raise ConfigError(
                f"SalientSpec.blocks: {self.blocks} with index {self.index}; an even index has blocks, others have none"
            )

    def check_fit(self, out_features: int, in_features: int) -> None:
        """Refuse what a matrix of that shape cannot have.

        Raises:
            ConfigError: more weights than the matrix has, or blocks that are not equal or not filled equally.
        """
        if not 0 < self.count <= in_features * out_features:
            raise ConfigError(f"LayerSpec.salient.count: {self.count} weights do not fit the matrix")
        if self.index != "even":
            return
        width = in_features // self.blocks
        if in_features % self.blocks or width > SALIENT_BLOCK or self.count % (out_features * self.blocks):
            raise ConfigError(
                f"LayerSpec.salient.blocks: {self.blocks} blocks for {self.count} weights of a "
                f"{out_features} x {in_features} matrix; they are equal, of at most {SALIENT_BLOCK} columns, "
                "and hold as many weights each"
            )


@dataclass(frozen=True, kw_only=True)
class LayerSpec(StrictConfig):
    """One quantized linear.

    Attributes:
        format: `sign`, `grouped_int`, `lut`, `factor`, `split`, `rotated` or `normed`.
        in_features: I.
        out_features: O.
        bias: whether a bias is stored.
        planes: sign: number of sign planes P. grouped_int: bits per code B, 1 to 8. lut: 2. factor: 1.
        groups: sign: scale groups per row, 0 for none. grouped_int and lut: groups per row, at least 1.
        shift_groups: sign only: shift groups per row, 0 for none.
        scale_in: sign only: whether an input scale is stored (else 1).
        scale_out: sign only: whether an output scale is stored (else 1).
        rank: factor only: R, the size between the two sign matrices.
        salient: the weights kept in 8 bit, if any.
        parts: split: the two layers whose columns make up this one's, not made of parts themselves. rotated: the layer
            behind the rotation; normed: the one before the LayerNorm. Without a bias.
    """

    format: Literal["sign", "grouped_int", "lut", "factor", "split", "rotated", "normed"]
    in_features: int
    out_features: int
    bias: bool = False
    planes: int = 1
    groups: int = 0
    shift_groups: int = 0
    scale_in: bool = False
    scale_out: bool = False
    rank: int = 0
    salient: SalientSpec | None = None
    parts: tuple["LayerSpec", ...] = ()

    def __post_init__(self) -> None:
        for name in ("in_features", "out_features", "planes"):
            if getattr(self, name) < 1:
                raise ConfigError(f"LayerSpec.{name}: {getattr(self, name)} is not positive")
        for name in ("groups", "shift_groups"):
            value = getattr(self, name)
            if value < 0 or (value and self.in_features % value):
                raise ConfigError(f"LayerSpec.{name}: {value} groups do not divide {self.in_features} input features")
        self._check_format()
        self._check_parts()
        if self.salient is not None:
            self.salient.check_fit(self.out_features, self.in_features)

    def _check_format(self) -> None:
        """Refuse what the format cannot have."""
        if self.planes > MOST_PLANES:
            raise ConfigError(f"LayerSpec.planes: {self.planes}; at most {MOST_PLANES} are possible")
        if self.format == "grouped_int" and self.groups < 1:
            raise ConfigError(f"LayerSpec: grouped_int needs 1 to 8 bits and a group, got {self.planes}, {self.groups}")
        if self.format == "lut" and (self.planes != 2 or self.groups < 1):
            raise ConfigError(f"LayerSpec: lut needs 2 bits and a group, got {self.planes}, {self.groups}")
        if (self.format == "factor") != (self.rank > 0):
            raise ConfigError(f"LayerSpec.rank: {self.rank}; a factor layer has one above 0, others have none")
        if self.format == "factor" and self.salient is not None:
            raise ConfigError("LayerSpec: a factor layer has no salient part")

    def _check_parts(self) -> None:
        """Refuse parts that do not make up the whole."""
        wanted = NUM_PARTS.get(self.format, 0)
        if len(self.parts) != wanted:
            raise ConfigError(f"LayerSpec.parts: a {self.format} layer has {wanted}, got {len(self.parts)}")
        if not wanted:
            return
        own = (self.planes, self.groups, self.shift_groups, self.scale_in, self.scale_out, self.salient)
        if own != (1, 0, 0, False, False, None):
            raise ConfigError(
                f"LayerSpec: planes, groups, scales and salient weights of a {self.format} layer are of its parts"
            )
        inside = ("split",) if self.format == "rotated" else ()
        if any((part.format in NUM_PARTS and part.format not in inside) or part.bias for part in self.parts):
            raise ConfigError(f"LayerSpec.parts: a part of a {self.format} layer has no parts of that kind and no bias")
        columns = [part.in_features for part in self.parts]
        rows = {part.out_features for part in self.parts}
        if sum(columns) != self.in_features or rows != {self.out_features}:
            shapes = " and ".join(f"{part.out_features} x {part.in_features}" for part in self.parts)
            raise ConfigError(
                f"LayerSpec.parts: {shapes} do not make up a matrix of {self.out_features} x {self.in_features}"
            )
