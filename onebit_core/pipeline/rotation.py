"""Quantizing behind a rotation, where that loses less.

    W x = (W R)(R^T x):      W R is quantized with the statistics R^T H R of the rotated inputs

Shape suffixes: O = output features, I = input features.
"""

from typing import Any, Literal

from torch import Tensor

from onebit_core.calibration.statistics import InputStatistics
from onebit_core.layers import QuantizedLinear, RotatedLinear
from onebit_core.layers.rotated import rotate, rotation_block
from onebit_core.methods import Method
from onebit_core.methods.second_order import output_error, weight_error

LEAST_GAIN = 0.02
"""A rotation has to save this share of the error: it costs time in every product."""


def quantize_weight(
    method: Method,
    weight_OI: Tensor,
    statistics: InputStatistics | None,
    settings: Any,
    rotation: Literal["off", "auto", "all"],
) -> QuantizedLinear:
    """Quantize a weight as it is, or behind a rotation of its inputs.

    Args:
        method: how.
        weight_OI: float32.
        statistics: of the inputs as they come; None without calibration.
        settings: the method's.
        rotation: off, all, or auto: whichever has the smaller output error (weight error without calibration).
    """
    if rotation == "off" or rotation_block(weight_OI.shape[1]) == 1:
        return method.quantize(weight_OI, statistics, settings)
    rotated = None if statistics is None else rotated_statistics(statistics)
    layer = RotatedLinear.around(method.quantize(rotate(weight_OI), rotated, settings))
    if rotation == "all":
        return layer
    plain = method.quantize(weight_OI, statistics, settings)
    errors = [_error(weight_OI, choice, statistics) for choice in (layer, plain)]
    return layer if errors[0] < (1 - LEAST_GAIN) * errors[1] else plain


def rotated_statistics(statistics: InputStatistics) -> InputStatistics:
    """Return the statistics of rotated inputs."""
    return InputStatistics(
        hessian_II=rotate(rotate(statistics.hessian_II).T.contiguous()).T.contiguous(), num_tokens=statistics.num_tokens
    )


def _error(weight_OI: Tensor, layer: QuantizedLinear, statistics: InputStatistics | None) -> float:
    decided_OI = layer.dequantize()
    if statistics is None:
        return weight_error(weight_OI, decided_OI)
    return output_error(weight_OI, decided_OI, statistics.hessian_II)
