"""All quantized layers of a model as latents: the student of a distillation."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from onebit_core.latents.base import Latent
from onebit_core.latents.composed import LATENTS
from onebit_core.layers import quantized_layers
from onebit_core.model.replace import replace_module


@contextmanager
def in_training(blocks: nn.ModuleList) -> Iterator[dict[str, Latent]]:
    """Put latents in the places of quantized layers; pack what they learned at the end.

    Signs start all equally far from zero, as in OneBit, and codes in the middle of their cells: what was decided was
    decided together, and a sign turns only for a gradient that lasts. Where a weight's size sets the distance, as in
    reconstruction, whatever is near to zero turns by chance with the first steps, and the loss rises.

    Yields:
        Latents by the layer's name inside `blocks`. Where the body raises, the layers stay as they were.
    """
    layers = dict(quantized_layers(blocks))
    latents: dict[str, Latent] = {}
    try:
        for name, layer in layers.items():
            latents[name] = LATENTS[layer.spec.format](layer, layer.base_weight())
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
