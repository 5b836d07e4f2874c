"""SVID, sign-value-independent decomposition: signs times a rank-one model of the magnitudes.

    W ~= sign(W) * (h g^T),      y = h * (sign(W) @ (g * x))

|W| is non-negative, so its best rank-one fit has non-negative factors and the error of the whole is the error of that
fit. More planes decompose what the planes before left over. With `importance` the fit weighs column j by the mean
square of its input.

Source: OneBit, arXiv:2402.11295, section 3.3. There SVID is the START of training with distillation. Used alone, as
here, one plane leaves noise on real models (docs/methods/svid.md); it is the base and the baseline of better methods.
Where we differ: alternating closed forms in place of a full SVD (the same optimum), mean(g) = 1, no LayerNorm after the
product.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from onebit_core.calibration.statistics import InputStatistics
from onebit_core.config import StrictConfig
from onebit_core.errors import ConfigError
from onebit_core.layers import LayerSpec, SignLinear
from onebit_core.methods.base import Method, ladder_over
from onebit_core.methods.rank_one import fit_rank_one


@dataclass(frozen=True, kw_only=True)
class SvidConfig(StrictConfig):
    """Settings of svid.

    Attributes:
        planes: sign planes, 1 to 4.
        importance: weigh the fit by nothing, or by the mean square of each input (needs calibration).
        iterations: of the rank-one fit.
    """

    planes: int = 1
    importance: Literal["none", "inputs"] = "none"
    iterations: int = 20

    def __post_init__(self) -> None:
        if not 1 <= self.planes <= 4:
            raise ConfigError(f"planes {self.planes}: 1 to 4 sign planes are possible")
        if self.iterations < 1:
            raise ConfigError(f"iterations {self.iterations}: at least 1")


def quantize_svid(weight_OI: Tensor, statistics: InputStatistics | None, config: SvidConfig) -> SignLinear:
    """Decompose a weight; float32 [O, I]."""
    column_weight_I = None
    if config.importance == "inputs":
        assert statistics is not None
        diagonal_I = statistics.hessian_II.diagonal()
        column_weight_I = diagonal_I.clamp(min=1e-6 * float(diagonal_I.mean()) + 1e-30)
    rest_OI = weight_OI.clone()
    signs, outputs, inputs = [], [], []
    for _ in range(config.planes):
        sign_OI = torch.where(rest_OI < 0, -1.0, 1.0)
        h_O, g_I = fit_rank_one(rest_OI.abs(), None, column_weight_I, config.iterations)
        rest_OI -= sign_OI * torch.outer(h_O, g_I)
        signs.append(sign_OI)
        outputs.append(h_O)
        inputs.append(g_I)
    return SignLinear.from_parts(torch.stack(signs), scale_in_PI=torch.stack(inputs), scale_out_PO=torch.stack(outputs))


def _spec(config: SvidConfig, rows: int, columns: int) -> LayerSpec:
    """Return what is stored."""
    return LayerSpec(
        format="sign", in_features=columns, out_features=rows, planes=config.planes, scale_in=True, scale_out=True
    )


def _accept(config: SvidConfig, rows: int, columns: int) -> None:
    """Every shape will do."""
    del config, rows, columns


SVID = Method(
    summary="signs times a rank-one magnitude (arXiv:2402.11295); the start of OneBit training, noise on its own",
    config=SvidConfig,
    quantize=quantize_svid,
    needs_statistics=lambda config: config.importance == "inputs",
    nominal_bits=lambda config: float(config.planes),
    check=_accept,
    spec=_spec,
    ladder=ladder_over("planes", (1, 2, 3, 4)),
)
