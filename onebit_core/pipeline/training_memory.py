"""What a training holds: latents of all layers, the original, states of a pass, logits of a slice.

latents    20 bytes a weight (latent, gradient, Adam's two moments, the best so far), and what a format adds;
           spread over processes, a share of it, and one block's latents and gradients whole, twice while gathered
pass       what the backward pass keeps of dense weights, by format; of one block only with `recompute`
states     hidden and feed-forward states of the windows of a pass
original   whole, counted in float32, or its linears in a byte a weight; spread, a share of its blocks and one of them
"""

from collections.abc import Iterable
from typing import Any

import psutil
import torch

from onebit_core.errors import NotEnoughMemory
from onebit_core.layers import LayerSpec
from onebit_core.model.loading import OriginalModel
from onebit_core.qat import TrainingConfig
from onebit_core.qat.losses import POSITIONS_AT_ONCE

FLOAT_BYTES = 4
LATENT_BYTES = 20
GATHERED_BYTES = 20
"""Of a weight of one block, where blocks are spread: latent and gradient, both once more on the way, the original."""

PASS_BYTES = {"sign": 4, "grouped_int": 12, "lut": 9, "factor": 12, "split": 20, "rotated": 16, "normed": 12}
"""Of a weight, by format: constants of the latent, and tensors that a backward pass reads; measured."""

PLANE_BYTES = 12
"""The same of every plane, where several follow one latent."""

SALIENT_BYTES = 17
"""More, where a part of the weights is in 8 bit."""

HIDDEN_STATES = 14
"""Of a token in one block, and those that student and teacher are compared by."""

WIDE_STATES = 6
"""Of a token's feed-forward in one block."""

LOGITS = 6
"""Arrays of the size of a slice's logits that the divergence and its gradient take."""

Layers = Iterable[tuple[int, LayerSpec]]
"""Weights of every layer, and what is stored of it."""


def training_bytes(
    original: OriginalModel, config: TrainingConfig, tokens: int, layers: Layers, shares: int = 1
) -> int:
    """Return what a training takes beside the packed layers and what is outside of the blocks.

    Args:
        original: the model.
        config: how it is trained.
        tokens: per window, where `config` does not say.
        layers: of all blocks.
        shares: processes that the blocks are spread over.
    """
    text: Any = original.config.get_text_config()
    sizes = list(layers)
    weights = sum(size for size, _ in sizes)
    share = 1 / len(original.blocks) if config.recompute else 1.0
    kept = sum(size * _pass_bytes(spec) for size, spec in sizes) * share
    at_once = min(config.windows_at_once, config.batch) * (config.tokens or tokens)
    wide = max(max(spec.in_features, spec.out_features) for _, spec in sizes)
    compared = 2 * len(original.blocks) * text.hidden_size
    inside = (HIDDEN_STATES * text.hidden_size + WIDE_STATES * wide) * len(original.blocks) * share
    states = FLOAT_BYTES * at_once * (compared + inside)
    logits = FLOAT_BYTES * LOGITS * POSITIONS_AT_ONCE * text.vocab_size
    outer = FLOAT_BYTES * (original.num_parameters - weights)
    blocks = weights * (LATENT_BYTES + (1 if config.teacher == "int8" else FLOAT_BYTES)) / shares
    gathered = GATHERED_BYTES * weights / len(original.blocks) if shares > 1 else 0
    return int(blocks + gathered + outer + kept + states + logits)


def check_training_memory(
    original: OriginalModel,
    config: TrainingConfig,
    tokens: int,
    layers: Layers,
    device: str,
    processes: tuple[int, int] = (1, 1),
) -> int:
    """Refuse a training that does not fit.

    Args:
        original: the model.
        config: how it is trained.
        tokens: per window, where `config` does not say.
        layers: of all blocks.
        device: where it will run.
        processes: that train together, on all machines and on this one, whose memory they share if they share the
            device.

    Returns:
        What it takes in each process, in bytes.

    Raises:
        NotEnoughMemory: with what would take less.
    """
    everywhere, here = processes
    needed = training_bytes(original, config, tokens, layers, everywhere if config.shard else 1)
    free = free_bytes(device) // (here if device == "cpu" else 1)
    if needed > free:
        raise NotEnoughMemory(
            f"{original.name}: a training needs about {needed / 2**30:.1f} GiB more on {device}, and "
            f"{free / 2**30:.1f} GiB are free; use {training_remedy(config, everywhere)}, or a larger machine"
        )
    return needed


def free_bytes(device: str) -> int:
    """Return what a device has free now."""
    free: int = psutil.virtual_memory().available if device == "cpu" else torch.cuda.mem_get_info(device)[0]
    return free


def training_remedy(config: TrainingConfig, processes: int = 1) -> str:
    """Say what would make a training smaller."""
    smaller = ["training.shard true"] if processes > 1 and not config.shard else []
    if not config.recompute:
        smaller.append("training.recompute true")
    if config.teacher == "original":
        smaller.append("training.teacher int8")
    if min(config.windows_at_once, config.batch) > 1:
        smaller.append("training.windows_at_once 1")
    return ", ".join([*smaller, "fewer training.tokens"])


def _pass_bytes(spec: LayerSpec) -> int:
    """Return what a weight costs while a pass is kept."""
    inner = max((_pass_bytes(part) for part in spec.parts), default=0)
    several = PLANE_BYTES * spec.planes if spec.format == "sign" and spec.planes > 1 else 0
    own = max(PASS_BYTES[spec.format], several) + (SALIENT_BYTES if spec.salient else 0)
    return inner + FLOAT_BYTES if spec.format == "rotated" else max(own, inner)
