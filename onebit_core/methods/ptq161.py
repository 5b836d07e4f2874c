"""PTQ1.61: a fifth of the input columns at 4 bit, all others as signs with a scale per row and one per column.

    W ~= 4-bit codes in the columns with the largest inputs;   S * (h g^T) in the others

Inputs of a language model are large in a few columns and always in the same ones, so a mask over columns, one bit for
all rows together, says what to keep better: 0.8 + 4 * 0.2 = 1.6 bits a weight, scales aside.

Source: arXiv:2502.13179, section 3 (the mask, the scales). Where we differ: columns are ranked by the mean square of
their input; the scales, there learned block by block, are solved in closed form against the layer's inputs, with error
feedback from signs to codes (onebit_core.methods.sign_columns); learning block by block is `reconstruction` here, and
works on top. The paper's preprocessing (LoRA training of the original) is left out.

Shape suffixes: O = output features, I = input features.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from onebit_core.calibration.statistics import InputStatistics
from onebit_core.config import StrictConfig
from onebit_core.errors import ConfigError
from onebit_core.layers import LayerSpec, SplitLinear
from onebit_core.methods.base import Method, check_bits, ladder_over
from onebit_core.methods.sign_columns import SplitRule, fine_columns, quantize_split, split_spec


@dataclass(frozen=True, kw_only=True)
class Ptq161Config(StrictConfig):
    """Settings of ptq161.

    Attributes:
        ratio: share of columns that get codes, above 0 and below 1; rounded to whole groups.
        bits: of these columns, 1 to 8.
        group_size: of these columns share a scale; 0 for one group a row.
        feedback: move errors from column to column, and from signs to codes at last.
        damping: added to the Hessian's diagonal, relative to its mean.
        iterations: of the rank-one fit that the scales start from.
    """

    ratio: float = 0.2
    bits: int = 4
    group_size: int = 64
    feedback: bool = True
    damping: float = 0.01
    iterations: int = 20

    def __post_init__(self) -> None:
        check_bits(self.bits)
        if not 0 < self.ratio < 1:
            raise ConfigError(f"ratio {self.ratio}: a share above 0 and below 1; for none use svid, for all use gptq")
        if self.group_size < 0 or self.group_size == 1:
            raise ConfigError(f"group_size {self.group_size}: use 0 for one group per row, or at least 2 columns")
        if self.damping <= 0:
            raise ConfigError(f"damping {self.damping}: must be positive; 0.01 is usual")
        if self.iterations < 1:
            raise ConfigError(f"iterations {self.iterations}: at least 1")

    def rule(self) -> SplitRule:
        """Return how both kinds of columns are quantized."""
        return SplitRule(
            bits=self.bits,
            group_size=self.group_size,
            column_scale=True,
            search=True,
            feedback=self.feedback,
            damping=self.damping,
            iterations=self.iterations,
        )


def quantize_ptq161(weight_OI: Tensor, statistics: InputStatistics | None, config: Ptq161Config) -> SplitLinear:
    """Split a weight by the size of its inputs; float32 [O, I]."""
    assert statistics is not None
    hessian_II = statistics.hessian_II
    count = fine_columns(config.ratio, config.group_size, weight_OI.shape[1])
    fine_I = torch.zeros_like(hessian_II[0], dtype=torch.bool)
    fine_I[hessian_II.diagonal().argsort(dim=0, descending=True, stable=True)[:count]] = True
    return quantize_split(weight_OI, hessian_II, fine_I, config.rule())


def _check(config: Ptq161Config, rows: int, columns: int) -> None:
    """Refuse a share that leaves no column for signs."""
    del rows
    count = fine_columns(config.ratio, config.group_size, columns)
    if count >= columns:
        raise ConfigError(
            f"ratio {config.ratio} in groups of {config.group_size} gives {config.bits} bits to {count} of {columns} "
            "columns; some must be signs"
        )


def _spec(config: Ptq161Config, rows: int, columns: int) -> LayerSpec:
    """Return what is stored."""
    return split_spec(fine_columns(config.ratio, config.group_size, columns), config.rule(), rows, columns)


PTQ161 = Method(
    summary="columns with large inputs at 4 bit, all others as signs (arXiv:2502.13179)",
    config=Ptq161Config,
    quantize=quantize_ptq161,
    needs_statistics=lambda _config: True,
    nominal_bits=lambda config: config.bits * config.ratio + (1 - config.ratio),
    check=_check,
    spec=_spec,
    ladder=ladder_over("ratio", (0.05, 0.1, 0.2, 0.3, 0.5)),
)
