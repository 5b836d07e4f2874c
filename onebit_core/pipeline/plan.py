"""Configuration and model to an ordered list of layer tasks; what cannot be meant stops here, before any work."""

from dataclasses import dataclass

import psutil
import torch
from torch import nn

from onebit_core.config import StrictConfig
from onebit_core.errors import ConfigError, NotEnoughMemory
from onebit_core.kernels import resolve_device
from onebit_core.methods import Method, method_named
from onebit_core.model.blocks import BlockLayout, linear_names, linear_of
from onebit_core.model.loading import OriginalModel
from onebit_core.pipeline.allocation import Allocation, check_bits
from onebit_core.pipeline.config import QuantizeConfig
from onebit_core.pipeline.memory import MemoryPlan, estimate_memory
from onebit_core.pipeline.training_memory import training_remedy


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What will be done.

    Attributes:
        method: the row of the method table.
        layout: where blocks and linears are.
        num_blocks: how many it has.
        calibrated: whether inputs are recorded.
        memory: what will be in memory at once, roughly, and whether activations go to disk.
    """

    method: Method
    layout: BlockLayout
    num_blocks: int
    calibrated: bool
    memory: MemoryPlan
    allocation: Allocation | None = None

    def settings_of(self, path: str, config: QuantizeConfig) -> StrictConfig:
        """Return the settings that one linear, by its path in the model, is quantized with."""
        if self.allocation is None:
            return config.method_settings()
        return self.method.config.from_dict(self.allocation.settings[path])


def make_plan(original: OriginalModel, config: QuantizeConfig) -> Plan:
    """Check a configuration against a model.

    Raises:
        ConfigError: settings that do not fit a layer's shape, samples longer than the model's context, or an
            embedding that cannot be stored in 8 or 4 bit.
        UnsupportedModel: a block without the linears of its architecture.
        NotEnoughMemory: one block with its statistics and activations does not fit.
    """
    embedding = type(original.model.get_input_embeddings())
    if config.embedding_bits < 16 and embedding is not nn.Embedding:
        raise ConfigError(
            f"embedding_bits {config.embedding_bits}: the model's embedding is a {embedding.__name__}, "
            "not a plain table; use 16"
        )
    method = method_named(config.method)
    settings = config.method_settings()
    shapes: list[tuple[int, int]] = []
    for index, block in enumerate(original.blocks):
        for name in linear_names(block, original.layout):
            linear = linear_of(block, name)
            shapes.append((linear.out_features, linear.in_features))
            if config.bits is not None:
                continue  # settings vary
            try:
                method.check(settings, linear.out_features, linear.in_features)
            except ConfigError as error:
                raise ConfigError(f"{config.method}: block {index}, {name}: {error}") from error
    if config.bits is not None:
        check_bits(config, shapes)
    calibrated = config.is_calibrated
    context = getattr(original.config.get_text_config(), "max_position_embeddings", None)
    if calibrated and context and config.calibration.tokens > context:
        raise ConfigError(
            f"calibration.tokens {config.calibration.tokens} is more than the model's context; use at most {context}"
        )
    return Plan(
        method=method,
        layout=original.layout,
        num_blocks=len(original.blocks),
        calibrated=calibrated,
        memory=_memory(original, config, calibrated=calibrated),
    )


def _memory(original: OriginalModel, config: QuantizeConfig, *, calibrated: bool) -> MemoryPlan:
    """Estimate the memory, with activations on disk where they would not fit and may go there.

    Raises:
        NotEnoughMemory: main memory or the GPU is too small.
    """
    device = resolve_device(config.device)
    free = psutil.virtual_memory().available
    plan = estimate_memory(original, config, calibrated=calibrated, on_device=device != "cpu")
    if plan.host_bytes > free and config.activations == "auto":
        plan = plan.with_activations_on_disk()
    trains = plan.training > plan.peak_bytes // 2
    what = "training all layers together" if trains else "one block at a time"
    lighter = f"{training_remedy(config.training)}, " if trains else ""
    if plan.distillation > plan.peak_bytes // 2:  # it alone holds all blocks
        lighter = "--reconstruct light, "
    if plan.host_bytes > free:
        remedy = lighter + ("--activations disk, " if plan.activations else "")
        raise NotEnoughMemory(
            f"{config.model}: {what} needs about {plan.host_bytes / 2**30:.1f} GiB of memory, and "
            f"{free / 2**30:.1f} GiB are free; use {remedy}fewer or shorter samples, or a machine with more memory"
        )
    free_there = torch.cuda.mem_get_info(device)[0] if plan.on_device else 0
    if plan.device_bytes > free_there:
        raise NotEnoughMemory(
            f"{config.model}: {what} needs about {plan.device_bytes / 2**30:.1f} GiB on {device}, and "
            f"{free_there / 2**30:.1f} GiB are free; use {lighter}shorter samples, --device cpu, or a larger GPU"
        )
    return plan
