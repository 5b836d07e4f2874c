"""What is stored: one class per format, and the table that the artifact reader and the methods build from."""

from torch import nn

from onebit_core.kernels import Backend
from onebit_core.layers.base import QuantizedLinear
from onebit_core.layers.embedding import QuantizedEmbedding, TiedHead
from onebit_core.layers.grouped_int import GroupedIntLinear
from onebit_core.layers.salient import SalientPart, SalientWeights
from onebit_core.layers.sign import SignLinear
from onebit_core.layers.spec import LayerSpec, SalientSpec

FORMATS: dict[str, type[QuantizedLinear]] = {"sign": SignLinear, "grouped_int": GroupedIntLinear}
"""Format name to layer class."""

__all__ = [
    "FORMATS",
    "GroupedIntLinear",
    "LayerSpec",
    "QuantizedEmbedding",
    "QuantizedLinear",
    "SalientPart",
    "SalientSpec",
    "SalientWeights",
    "SignLinear",
    "TiedHead",
    "build_layer",
    "use_backend",
]


def build_layer(spec: LayerSpec) -> QuantizedLinear:
    """Return an empty layer with the tensors of its spec, on torch's current default device."""
    return FORMATS[spec.format](spec)


def use_backend(model: nn.Module, backend: Backend) -> None:
    """Set the backend of every quantized layer of a model.

    Args:
        model: a torch module.
        backend: see onebit_core.kernels.backends.
    """
    for module in model.modules():
        if isinstance(module, QuantizedLinear | TiedHead):
            module.backend = backend
