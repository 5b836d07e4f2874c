"""All quantized layers of a model as latents: the student of a distillation.

Shape suffixes: O = output features, I = input features.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import Tensor, nn

from onebit_core.latents.base import Latent
from onebit_core.latents.composed import LATENTS
from onebit_core.layers import quantized_layers
from onebit_core.model.replace import replace_module


@contextmanager
def in_training(blocks: nn.ModuleList, weight_of: Callable[[str], Tensor] | None = None) -> Iterator[dict[str, Latent]]:
    """Put latents in the places of quantized layers; pack what they learned at the end.

    Args:
        blocks: of a model, with quantized layers.
        weight_of: gives the original weight, float32 [O, I], of a layer by its name inside `blocks`; signs and codes
            start with its sizes. None: with the layer's own.

    Yields:
        Latents by that name. Where the body raises, the layers stay as they were.
    """
    layers = dict(quantized_layers(blocks))
    latents: dict[str, Latent] = {}
    try:
        for name, layer in layers.items():
            weight_OI = layer.base_weight() if weight_of is None else weight_of(name)
            latents[name] = LATENTS[layer.spec.format](layer, weight_OI)
            replace_module(blocks, name, latents[name])
        yield latents
        for latent in latents.values():
            latent.harden()
    finally:
        for name, layer in layers.items():
            replace_module(blocks, name, layer)


@contextmanager
def scales_in_training(blocks: nn.ModuleList) -> Iterator[dict[str, Latent]]:
    """Do the same where signs, codes and indices stay as they are."""
    with in_training(blocks) as latents:
        for latent in latents.values():
            for value in latent.latents():
                value.requires_grad = False
        yield latents
