"""Configuration and model to an ordered list of layer tasks; what cannot be meant stops here, before any work."""

from dataclasses import dataclass

import psutil
from torch import nn

from onebit_core.errors import ConfigError, NotEnoughMemory
from onebit_core.methods import Method, method_named
from onebit_core.model.blocks import Groups, linear_of
from onebit_core.model.loading import OriginalModel
from onebit_core.pipeline.config import QuantizeConfig

FLOAT_BYTES = 4
LOGITS_OF_DISTILLATION = 7
"""Arrays of the size of one window's logits that the divergence and its gradient take."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What will be done.

    Attributes:
        method: the row of the method table.
        groups: linears of each block that share an input.
        num_blocks: decoder blocks.
        calibrated: whether inputs are recorded.
        memory_bytes: the most that will be in memory at once, roughly.
    """

    method: Method
    groups: Groups
    num_blocks: int
    calibrated: bool
    memory_bytes: int


def make_plan(original: OriginalModel, config: QuantizeConfig) -> Plan:
    """Check a configuration against a model.

    Raises:
        ConfigError: settings that do not fit a layer's shape, samples longer than the model's context, or an
            embedding that cannot be stored in 8 bit.
        UnsupportedModel: a block without the linears of its architecture.
        NotEnoughMemory: one block with its statistics and activations does not fit.
    """
    embedding = type(original.model.get_input_embeddings())
    if config.embedding_bits == 8 and embedding is not nn.Embedding:
        raise ConfigError(
            f"embedding_bits 8: the model's embedding is a {embedding.__name__}, not a plain table; use 16"
        )
    method = method_named(config.method)
    settings = config.method_settings()
    for index, block in enumerate(original.blocks):
        for name in (name for group in original.layout.groups for name in group):
            linear = linear_of(block, name)
            try:
                method.check(settings, linear.out_features, linear.in_features)
            except ConfigError as error:
                raise ConfigError(f"{config.method}: block {index}, {name}: {error}") from error
    calibrated = method.needs_statistics(settings) or config.reconstruction.enabled
    context = getattr(original.config.get_text_config(), "max_position_embeddings", None)
    if calibrated and context and config.calibration.tokens > context:
        raise ConfigError(
            f"calibration.tokens {config.calibration.tokens} is more than the model's context; use at most {context}"
        )
    memory = _memory_bytes(original, config, calibrated=calibrated)
    free = psutil.virtual_memory().available
    if memory > free:
        raise NotEnoughMemory(
            f"{config.model}: one block at a time needs about {memory / 2**30:.1f} GiB of memory, and "
            f"{free / 2**30:.1f} GiB are free; use fewer or shorter samples, or a machine with more memory"
        )
    return Plan(
        method=method,
        groups=original.layout.groups,
        num_blocks=len(original.blocks),
        calibrated=calibrated,
        memory_bytes=memory,
    )


def _memory_bytes(original: OriginalModel, config: QuantizeConfig, *, calibrated: bool) -> int:
    """Estimate the peak: outer weights, one block twice, the largest Hessian four times, activations in and out."""
    blocks = f"{original.layout.blocks}."
    outer = sum(tensor.numel() for name, tensor in original.model.named_parameters() if not name.startswith(blocks))
    block = sum(tensor.numel() for tensor in original.blocks[0].parameters())
    linears = [linear_of(original.blocks[0], name) for group in original.layout.groups for name in group]
    widest = max(linear.in_features for linear in linears)
    elements = outer + 2 * block
    if calibrated:
        hidden = original.config.get_text_config().hidden_size
        activations = config.calibration.samples * config.calibration.tokens * hidden
        elements += 4 * widest**2 + (3 if config.reconstruction.needs_teacher else 2) * activations
        if config.reconstruction.epochs:
            elements += 6 * block + activations  # latents, their gradients, Adam's moments; targets
        if config.reconstruction.distill_epochs:
            elements += 2 * (original.num_parameters - outer)  # latents of all blocks, and what stands beside them
            vocabulary = original.config.get_text_config().vocab_size
            elements += LOGITS_OF_DISTILLATION * config.calibration.tokens * vocabulary
    packed = original.num_parameters // 4  # bytes of finished layers, at most two bits a weight or so
    return elements * FLOAT_BYTES + packed
