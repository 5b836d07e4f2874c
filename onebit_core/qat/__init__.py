"""Training: all layers of a quantized model together learn to say what the original says (quantization-aware training).

    config         how long, how fast, on what
    losses         of logits and of hidden states
    distillation   student and teacher side by side
    adaptation     a text alone, for adapters
    bop            which signs turn
    teacher        the original in 8 bit
    trainer        the loop
    checkpoint     a training on disk
    world          several processes that train together
    sharding       each of them with a share of the model

What a format can change is in onebit_core.latents, so every format takes part.
"""

from onebit_core.qat.adaptation import Adaptation
from onebit_core.qat.checkpoint import Checkpoints
from onebit_core.qat.config import TrainingConfig
from onebit_core.qat.distillation import Distillation
from onebit_core.qat.trainer import Trainer, TrainingResult, TrainingWindows, prepare
from onebit_core.qat.world import World, joined

__all__ = [
    "Adaptation",
    "Checkpoints",
    "Distillation",
    "Trainer",
    "TrainingConfig",
    "TrainingResult",
    "TrainingWindows",
    "World",
    "joined",
    "prepare",
]
