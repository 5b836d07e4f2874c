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


@dataclass(frozen=True, kw_only=True)
class SalientSpec(StrictConfig):
    """The weights kept in 8 bit.

    Attributes:
        count: how many weights, N.
        index: how their places are stored: `block` (a byte per weight and a byte per row and 128 columns) or
            `bitmap` (a bit per weight of the whole matrix).
    """

    count: int
    index: Literal["block", "bitmap"]


@dataclass(frozen=True, kw_only=True)
class LayerSpec(StrictConfig):
    """One quantized linear.

    Attributes:
        format: `sign`, `grouped_int`, `lut` or `factor`.
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
    """

    format: Literal["sign", "grouped_int", "lut", "factor"]
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

    def __post_init__(self) -> None:
        for name in ("in_features", "out_features", "planes"):
            if getattr(self, name) < 1:
                raise ConfigError(f"LayerSpec.{name}: {getattr(self, name)} is not positive")
        for name in ("groups", "shift_groups"):
            value = getattr(self, name)
            if value < 0 or (value and self.in_features % value):
                raise ConfigError(f"LayerSpec.{name}: {value} groups do not divide {self.in_features} input features")
        self._check_format()
        if self.salient is not None and not 0 < self.salient.count <= self.in_features * self.out_features:
            raise ConfigError(f"LayerSpec.salient.count: {self.salient.count} weights do not fit the matrix")

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
