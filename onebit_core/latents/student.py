"""All quantized layers of a model as latents: the student of a distillation."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Protocol

from torch import nn

from onebit_core.latents.base import Latent
from onebit_core.latents.composed import LATENTS
from onebit_core.layers import quantized_layers
from onebit_core.model.replace import replace_module


class SpreadBlock(Protocol):
    """A module in a block's place, whose latents are whole only where it is asked for."""

    def whole(self) -> AbstractContextManager[None]:
        """Gather them for a while."""


Spread = Callable[[nn.Module, list[Latent]], nn.Module]


@contextmanager
def in_training(
    blocks: nn.ModuleList, prepare: Callable[[Latent], None] | None = None, spread: Spread | None = None
) -> Iterator[dict[str, Latent]]:
    """Put latents in the places of quantized layers; pack what they learned at the end.

    Signs start all equally far from zero, as in OneBit, and codes in the middle of their cells: what was decided was
    decided together, and a sign turns only for a gradient that lasts. Where a weight's size sets the distance, as in
    reconstruction, whatever is near to zero turns by chance with the first steps, and the loss rises.

    Args:
        blocks: with quantized layers in them.
        prepare: called with every latent.
        spread: called with every block and its latents; returns a SpreadBlock that stands in its place meanwhile.

    Yields:
        Latents by the layer's name inside `blocks`. Where the body raises, the layers stay as they were.
    """
    layers, real = dict(quantized_layers(blocks)), list(blocks)
    latents: dict[str, Latent] = {}
    try:
        for index, block in enumerate(real):
            inside = [name for name in layers if name.startswith(f"{index}.")]
            for name in inside:
                latents[name] = LATENTS[layers[name].spec.format](layers[name], layers[name].base_weight())
                replace_module(blocks, name, latents[name])
                if prepare:
                    prepare(latents[name])
            if spread:
                blocks[index] = spread(block, [latents[name] for name in inside])
        yield latents
        for index, block in enumerate(blocks):
            with block.whole() if spread else nullcontext():  # type: ignore[operator]  # a SpreadBlock
                for name, latent in latents.items():
                    if name.startswith(f"{index}."):
                        latent.harden()
    finally:
        for index, block in enumerate(real):
            blocks[index] = block
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
