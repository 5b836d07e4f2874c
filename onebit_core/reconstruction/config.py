"""ReconstructionConfig: how long and how fast blocks are trained.

One epoch costs about four forward passes of the model over the calibration text. For the same cost, one epoch of much
text is better than several of little, which is learned by heart; so a preset also says how much text is usual.
"""

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

from onebit_core.config import StrictConfig
from onebit_core.errors import ConfigError


class _Amount(NamedTuple):
    epochs: int
    latent_rate: float
    scale_rate: float
    distill_epochs: int
    distill_rate: float


PRESETS = {
    "off": _Amount(0, 0.0, 0.0, 0, 0.0),
    "light": _Amount(1, 1e-2, 5e-3, 0, 0.0),
    "full": _Amount(1, 1e-2, 5e-3, 1, 2e-3),
}
"""Preset to epochs and learning rates."""

USUAL_SAMPLES = {"off": 32, "light": 64, "full": 256}
"""Preset to calibration windows, where the configuration does not say and the text has as many."""

STATISTICS_SAMPLES = 32
"""Of more windows than these, so many are enough for statistics; training reads all."""

DISTILL_SAMPLES = 64
"""So many windows, evenly over all, the scales are trained on at the end: a fraction of a bit has little to learn."""


@dataclass(frozen=True, kw_only=True)
class ReconstructionConfig(StrictConfig):
    """Training of each block after its layers were quantized; what is left out is the preset's.

    Attributes:
        preset: off, light (one epoch, usually of 64 windows) or full (of 256, and a distillation).
        epochs: passes over the calibration samples.
        latent_rate: Adam's step for signs and codes, relative to their mean magnitude or step.
        scale_rate: Adam's step for scales and levels, relative to their size.
        distill_epochs: passes over at most DISTILL_SAMPLES of them, in which the scales of all layers together learn
            the original's logits.
        distill_rate: Adam's step for them, relative to their size.
        target: what a block learns: the original block's output on the inputs the original would have had there
            (`original`), which makes up for the error of earlier blocks, or on the same inputs (`prefix`).
        batch: samples per step.
        seed: of the order of samples.
    """

    preset: Literal["off", "light", "full"] = "off"
    epochs: int | None = None
    latent_rate: float | None = None
    scale_rate: float | None = None
    distill_epochs: int | None = None
    distill_rate: float | None = None
    target: Literal["prefix", "original"] = "original"
    batch: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        if self.preset not in PRESETS:
            raise ConfigError(f"reconstruction.preset {self.preset!r}; known: {', '.join(PRESETS)}")
        for name, value in PRESETS[self.preset]._asdict().items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
        assert self.epochs is not None
        assert self.distill_epochs is not None
        for name, value in PRESETS["full"]._asdict().items():
            wanted = self.distill_epochs if name.startswith("distill") else self.epochs
            if wanted and not getattr(self, name):  # epochs were asked for, and the preset has no rate for them
                object.__setattr__(self, name, value)
            if not 0 <= getattr(self, name) < math.inf:
                raise ConfigError(f"reconstruction.{name} {getattr(self, name)}: must be a number from 0 up")
        if self.batch < 1:
            raise ConfigError(f"reconstruction.batch {self.batch}: at least 1 sample")

    @property
    def enabled(self) -> bool:
        """Whether anything is trained."""
        return bool(self.epochs or self.distill_epochs)

    @property
    def needs_teacher(self) -> bool:
        """Whether the original's own hidden states are carried along."""
        return bool(self.distill_epochs) or (bool(self.epochs) and self.target == "original")
