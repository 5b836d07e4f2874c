"""What is stored: one class per format, and the table that the artifact reader and the methods build from."""

from collections.abc import Iterable, Iterator, Sequence

from torch import nn

from onebit_core.kernels import Backend, describe_backend, packs
from onebit_core.layers.base import QuantizedLinear
from onebit_core.layers.embedding import EMBEDDINGS, QuantizedEmbedding, TiedHead, quantize_table
from onebit_core.layers.factor import FactorLinear
from onebit_core.layers.grouped_int import GroupedIntLinear
from onebit_core.layers.lut import LutLinear
from onebit_core.layers.normed import NormedLinear
from onebit_core.layers.rotated import RotatedLinear
from onebit_core.layers.salient import SalientPart, SalientWeights
from onebit_core.layers.shared_input import SharedInput
from onebit_core.layers.sign import SignLinear
from onebit_core.layers.spec import LayerSpec, SalientSpec
from onebit_core.layers.split import PART_FORMATS, SplitLinear

FORMATS: dict[str, type[QuantizedLinear]] = {
    **PART_FORMATS,
    "split": SplitLinear,
    "rotated": RotatedLinear,
    "normed": NormedLinear,
}
"""Format name to layer class."""

__all__ = [
    "EMBEDDINGS",
    "FORMATS",
    "FactorLinear",
    "GroupedIntLinear",
    "LayerSpec",
    "LutLinear",
    "NormedLinear",
    "QuantizedEmbedding",
    "QuantizedLinear",
    "RotatedLinear",
    "SalientPart",
    "SalientSpec",
    "SalientWeights",
    "SignLinear",
    "SplitLinear",
    "TiedHead",
    "build_layer",
    "model_backend",
    "pack_layers",
    "packed_bytes",
    "quantize_table",
    "quantized_layers",
    "release_stored",
    "use_backend",
]


def build_layer(spec: LayerSpec) -> QuantizedLinear:
    """Return an empty layer with the tensors of its spec, on torch's current default device."""
    return FORMATS[spec.format](spec)


def quantized_layers(model: nn.Module) -> Iterator[tuple[str, QuantizedLinear]]:
    """Yield name and module of every quantized layer of a model; the parts of a layer are inside of it."""
    inside: set[nn.Module] = set()
    for name, module in model.named_modules():
        if isinstance(module, QuantizedLinear) and module not in inside:
            inside.update(module.modules())
            yield name, module


def use_backend(model: nn.Module, backend: Backend) -> None:
    """Set the backend of every quantized layer of a model.

    Args:
        model: a torch module.
        backend: see onebit_core.kernels.backends.

    Raises:
        BackendUnavailable: another backend is set already, and the tensors it would read were released.
    """
    for module in model.modules():
        if isinstance(module, QuantizedLinear | TiedHead):
            module.set_backend(backend)


def pack_layers(model: nn.Module, groups: Iterable[Sequence[str]] = ()) -> None:
    """Lay every quantized layer out for its packed backend, so that the first request does not wait for it.

    Args:
        model: a torch module on its device, after `use_backend`.
        groups: names of modules that read the same input; quantized ones of equal structure become one product.
    """
    for names in groups:
        members = [module for name in names if isinstance(module := model.get_submodule(name), QuantizedLinear)]
        if len(members) < 2 or not packs(members[0].backend):
            continue
        chains = [member.chain() for member in members]
        if any(len(chain) != 1 for chain in chains):
            continue
        shared = SharedInput.join([product for (product,) in chains], members[0].backend)
        if shared is not None:
            for place, member in enumerate(members):
                member.share_input(shared, place)
    for module in model.modules():
        if isinstance(module, QuantizedLinear | TiedHead):
            module.pack()


def release_stored(model: nn.Module) -> None:
    """Drop the stored tensors of layers that a packed backend laid out; such a model only computes."""
    for _, layer in quantized_layers(model):
        layer.release_stored()


def packed_bytes(model: nn.Module) -> int:
    """Return the bytes that packed backends hold beside the model's own tensors."""
    heads = sum(module.packed_bytes() for module in model.modules() if isinstance(module, TiedHead))
    return heads + sum(layer.packed_bytes() for _, layer in quantized_layers(model))


def model_backend(model: nn.Module) -> str:
    """Say in one line who computes a model's quantized layers; "dense" where it has none."""
    for module in model.modules():
        if isinstance(module, QuantizedLinear | TiedHead):
            return describe_backend(module.backend)
    return "dense"
