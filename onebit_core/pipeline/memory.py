"""MemoryPlan: what a quantization holds at its worst moment, item by item, before anything is read.

    capture       outer + forward + activations + mapped
    spreading     outer + block + statistics + spreading
    blocks        block + forward + max(deciding + statistics, reconstruction) + activations + packed + mapped
    distillation  outer + forward + distillation + activations + packed
    training      outer + training + packed
    writing       writing + packed

The peak is the largest of these sums. A model is never in memory as a whole: what is read is one block, what grows is
the packed result. All items count float32 unless said otherwise. With a GPU, activations, packed layers and what is
mapped from files stay in main memory, and everything else is on the device.

Not counted are the interpreter with its libraries (0.5 GiB or so) and what an allocator loses between blocks.
docs/big-models.md compares plan and measurement.
"""

import dataclasses
from collections import Counter
from dataclasses import dataclass
from typing import Any

from torch import nn

from onebit_core.methods import method_named
from onebit_core.model.blocks import groups_of, linear_names, linear_of, steps_of
from onebit_core.model.experts import experts_in
from onebit_core.model.loading import OriginalModel
from onebit_core.pipeline.allocation import MOST_SAMPLES, MOST_TOKENS
from onebit_core.pipeline.config import QuantizeConfig
from onebit_core.pipeline.group_statistics import recorded_at_once
from onebit_core.pipeline.training_memory import training_bytes

FLOAT_BYTES = 4
HESSIAN_COPIES = 6
"""Of the widest input: the mean, the same reordered, damped, a factor, its inverse, and the inverse's factor."""

DECIDING_COPIES = 7
"""Of the largest linear: what a method works on and decides, codes, their planes, and the dense form read back."""

TRAINING_COPIES = 9
"""Of a block: latents, gradients, Adam's two moments, zero points, and what a backward pass keeps of the weights."""

FORWARD_STATES = 10
"""Of a token's hidden states in one block, beside those of the feed-forward."""

FORWARD_WIDE = 5
"""Of a token's feed-forward states in one block."""

LOGITS_OF_SPREADING = 4
LOGITS_OF_DISTILLATION = 7
"""Arrays of the size of one window's logits that the divergence and its gradient take."""

TABLE_COPIES = 2
"""Of a byte for each weight of the embedding or head, while it is packed."""


@dataclass(frozen=True, kw_only=True)
class MemoryPlan:
    """Bytes by what they are for.

    Attributes:
        outer: what is outside of the blocks, as far as it is run: embedding, norms, and the head for logits.
        block: one block, and the dense forms of its decided layers beside it.
        mapped: what is read at a time, as it is on disk; these pages are the operating system's to take back.
        forward: intermediate states of one sample in one block.
        deciding: copies of the largest linear while it is decided and packed.
        statistics: the Hessians recorded in one pass, and what is made of the widest.
        reconstruction: latents of a block, their gradients and moments, and the states a backward pass keeps.
        activations: the calibration samples between two blocks, in memory.
        disk: the same, where they are kept on disk.
        spreading: what enters every block, for measuring how sensitive layers are.
        packed: finished layers of all blocks.
        distillation: dense forms and latents of all blocks, and logits.
        training: latents of all blocks, the original whole, states of the windows of a pass, and logits of a slice.
        writing: embedding and head as they are on disk, and what is made of them.
        on_device: whether a GPU computes.
    """

    outer: int
    block: int
    mapped: int
    forward: int
    deciding: int
    statistics: int
    reconstruction: int
    activations: int
    disk: int
    spreading: int
    packed: int
    distillation: int
    training: int
    writing: int
    on_device: bool

    def stages(self) -> dict[str, tuple[int, int]]:
        """Return, by stage, what is kept in main memory in any case and what the computing device holds."""
        kept = self.activations + self.packed
        outer = self.outer if self.distillation else 0  # else released after capture
        deciding = max(self.deciding + self.statistics, self.reconstruction)
        return {
            "capture": (self.activations + self.mapped, self.outer + self.forward),
            "spreading": (self.spreading, _spread_computing(self) if self.spreading else 0),
            "blocks": (kept + self.mapped, outer + self.block + self.forward + deciding),
            "distillation": (kept, (outer + self.forward + self.distillation) if self.distillation else 0),
            "training": (self.packed, (self.outer + self.training) if self.training else 0),
            "writing": (self.packed + self.writing, 0),
        }

    @property
    def host_bytes(self) -> int:
        """The most that will be in main memory at once."""
        return max(kept + (0 if self.on_device else computing) for kept, computing in self.stages().values())

    @property
    def device_bytes(self) -> int:
        """The most that will be on the GPU at once; 0 without one."""
        return max(computing for _, computing in self.stages().values()) if self.on_device else 0

    @property
    def peak_bytes(self) -> int:
        """The most that will be in memory at once, main memory and GPU together."""
        return self.host_bytes + self.device_bytes

    def with_activations_on_disk(self) -> "MemoryPlan":
        """Return the plan of the same run with its activations in a file."""
        return dataclasses.replace(self, activations=0, disk=self.activations + self.disk)


def estimate_memory(
    original: OriginalModel, config: QuantizeConfig, *, calibrated: bool, on_device: bool = False
) -> MemoryPlan:
    """Estimate what a quantization will hold.

    Args:
        original: the model, not yet read.
        config: what will be done; `activations` "disk" counts them as a file.
        calibrated: whether inputs are recorded.
        on_device: whether a GPU computes.
    """
    sizes = [sum(tensor.numel() for tensor in block.parameters()) for block in original.blocks]
    largest = max(sizes)
    index = sizes.index(largest)
    block = original.blocks[index]
    linears = [linear_of(block, name) for name in linear_names(block, original.layout)]
    forward = _forward_elements(original, config, linears) if calibrated else 0
    plan = MemoryPlan(
        outer=FLOAT_BYTES * _outer_elements(original, config) if calibrated or config.training.enabled else 0,
        block=FLOAT_BYTES * (2 if calibrated else 1) * largest,
        mapped=_mapped(original, index, calibrated=calibrated),
        forward=FLOAT_BYTES * forward,
        deciding=FLOAT_BYTES * DECIDING_COPIES * max(linear.weight.numel() for linear in linears),
        statistics=_statistics(original, block, linears) if calibrated else 0,
        reconstruction=_reconstruction(config, largest, forward),
        activations=_activations(original, config) if calibrated else 0,
        disk=0,
        spreading=_spreading(original, config),
        packed=_packed(original, config),
        distillation=_distillation(original, config, sum(sizes), largest),
        training=_training(original, config),
        writing=_writing(original, config),
        on_device=on_device,
    )
    return plan.with_activations_on_disk() if config.activations == "disk" else plan


def _spread_computing(plan: MemoryPlan) -> int:
    """Return what measuring computes with: a block forward and backward, and layers decided on trial."""
    return plan.outer + plan.block + plan.statistics + plan.deciding + 2 * plan.forward


def _text_config(original: OriginalModel) -> Any:
    return original.config.get_text_config()


def _mapped(original: OriginalModel, index: int, *, calibrated: bool) -> int:
    """Return the size on disk of the largest block, or of what is read before the first if that is more."""
    inside = (f"{original.layout.blocks}.{index}.{name}" for name, _ in original.blocks[index].named_parameters())
    outside = [name for name, _ in original.outer_parameters(head=False)] if calibrated else []
    return max(
        sum(original.store.num_bytes(original.stored_name(name)) for name in names) for names in (inside, outside)
    )


def _outer_elements(original: OriginalModel, config: QuantizeConfig) -> int:
    """Count what is outside of the blocks and will be run: the head only for logits."""
    head = bool(config.reconstruction.distill_epochs) or config.bits is not None or config.training.enabled
    return sum(parameter.numel() for _, parameter in original.outer_parameters(head=head))


def _activations(original: OriginalModel, config: QuantizeConfig) -> int:
    """Return the bytes of the calibration samples: the prefix's, the original's, and what a block shall learn."""
    copies = 2 if config.reconstruction.needs_teacher else 1
    if config.reconstruction.epochs and config.reconstruction.target == "prefix":
        copies += 1
    hidden: int = _text_config(original).hidden_size
    return FLOAT_BYTES * copies * config.sample_counts[0] * config.calibration.tokens * hidden


def _spreading(original: OriginalModel, config: QuantizeConfig) -> int:
    """Return what measuring takes if bits are to be spread: what enters every block, and all its moments, or logits."""
    if config.bits is None:
        return 0
    length = min(config.calibration.tokens, MOST_TOKENS)
    tokens = min(config.sample_counts[0], MOST_SAMPLES) * length
    text = _text_config(original)
    block = original.blocks[-1]
    widths = [linear_of(block, group[0]).in_features for group in groups_of(block, original.layout)]
    moments = 2 * sum(width**2 for width in widths)  # of all groups at once, sums and means
    logits: int = LOGITS_OF_SPREADING * length * text.vocab_size
    kept: int = (len(original.blocks) + 3) * tokens * text.hidden_size
    return FLOAT_BYTES * (kept + max(moments, logits))


def _statistics(original: OriginalModel, block: nn.Module, linears: list[nn.Linear]) -> int:
    """Return what the Hessians of one pass take, and what is made of the widest."""
    recorded = 0
    for step in steps_of(block, original.layout):
        width = linear_of(block, step[0][0]).in_features
        recorded = max(recorded, recorded_at_once(len(step), width) * width**2)
    return FLOAT_BYTES * (recorded + (HESSIAN_COPIES - 1) * max(linear.in_features for linear in linears) ** 2)


def _forward_elements(original: OriginalModel, config: QuantizeConfig, linears: list[nn.Linear]) -> int:
    """Count the states of one sample in one block."""
    hidden: int = _text_config(original).hidden_size
    wide = max(max(linear.in_features, linear.out_features) for linear in linears)
    mixed = any(experts_in(block) for block in original.blocks)
    chosen: int = _text_config(original).num_experts_per_tok if mixed else 1
    return config.calibration.tokens * (FORWARD_STATES * hidden + FORWARD_WIDE * wide * chosen)


def _reconstruction(config: QuantizeConfig, block_elements: int, forward_elements: int) -> int:
    """Return what training a block takes beside the block."""
    if not config.reconstruction.epochs:
        return 0
    states = 2 * config.reconstruction.batch * forward_elements  # and their gradients
    return FLOAT_BYTES * (TRAINING_COPIES * block_elements + states)


def linear_shapes(original: OriginalModel) -> list[tuple[int, int]]:
    """Return (out_features, in_features) of all linears that will be quantized."""
    linears = [linear_of(block, name) for block in original.blocks for name in linear_names(block, original.layout)]
    return [(linear.out_features, linear.in_features) for linear in linears]


def _packed(original: OriginalModel, config: QuantizeConfig) -> int:
    """Return what the finished layers of all blocks take."""
    method, settings = method_named(config.method), config.method_settings()
    counts = Counter(linear_shapes(original))
    bits = {shape: config.bits or method.true_bits(settings, *shape) for shape in counts}
    return int(sum(count * shape[0] * shape[1] * bits[shape] for shape, count in counts.items()) / 8)


def _distillation(original: OriginalModel, config: QuantizeConfig, all_blocks: int, one_block: int) -> int:
    """Return what training all scales together takes: every block as latents and dense, and logits."""
    if not config.reconstruction.distill_epochs:
        return 0
    vocabulary: int = _text_config(original).vocab_size
    logits = LOGITS_OF_DISTILLATION * config.calibration.tokens * vocabulary
    return FLOAT_BYTES * (2 * all_blocks + TRAINING_COPIES * one_block + logits)


def _training(original: OriginalModel, config: QuantizeConfig) -> int:
    """Return what training all layers together takes."""
    if not config.training.enabled:
        return 0
    method, settings = method_named(config.method), config.method_settings()
    shapes = linear_shapes(original)
    specs = {shape: method.spec(settings, *shape) for shape in set(shapes)}
    layers = [(rows * columns, specs[rows, columns]) for rows, columns in shapes]
    return training_bytes(original, config.training, config.calibration.tokens, layers)


def _writing(original: OriginalModel, config: QuantizeConfig) -> int:
    """Return what embedding and head take: mapped from the original's files, and packed if they will be."""
    outer = list(original.outer_parameters(head=True))
    stored = sum(original.store.num_bytes(original.stored_name(name)) for name, _ in outer)
    if config.embedding_bits == 16:
        return stored
    elements = sum(parameter.numel() for _, parameter in outer)
    return stored + int(elements * (TABLE_COPIES + config.embedding_bits / 8))
