"""QuantizeConfig: everything that decides a quantization."""

import hashlib
import json
from dataclasses import dataclass, field
from typing import Any, Literal

from onebit_core.calibration.sources import BUILTIN, check_weighted
from onebit_core.config import StrictConfig
from onebit_core.errors import ConfigError
from onebit_core.methods import method_named
from onebit_core.qat.config import TrainingConfig
from onebit_core.reconstruction.config import STATISTICS_SAMPLES, USUAL_SAMPLES, ReconstructionConfig


@dataclass(frozen=True, kw_only=True)
class CalibrationConfig(StrictConfig):
    """What the model is calibrated on.

    Attributes:
        text: sources (onebit_core.calibration.sources), each once; several are mixed.
        weights: of the sources, in their order: their shares of the windows; none for equal shares.
        samples: windows in all; None for as many as the reconstruction's preset is usually given (USUAL_SAMPLES), or
            the largest half, quarter or eighth of them that the text has.
        statistics_samples: windows of them, evenly over all, that statistics are recorded on; None for all, and with
            reconstruction for at most STATISTICS_SAMPLES.
        tokens: tokens per window.
        seed: of the windows' places, and of text that the model writes; 0 to 2**63 - 1.
        first_token_weight: how much the first token of a window counts in the statistics of attention's inputs.
    """

    text: tuple[str, ...] = (BUILTIN,)
    weights: tuple[float, ...] = ()
    samples: int | None = None
    statistics_samples: int | None = None
    tokens: int = 1024
    seed: int = 0
    first_token_weight: float = 64.0

    def __post_init__(self) -> None:
        if not self.text:
            raise ConfigError("calibration.text: name at least one text")
        check_weighted("calibration", self.text, self.weights)
        samples = 1 if self.samples is None else self.samples
        if samples < 1 or self.tokens < 2:
            raise ConfigError(
                f"calibration: {samples} samples of {self.tokens} tokens; at least 1 sample of 2 tokens is needed"
            )
        if self.statistics_samples is not None and self.statistics_samples < 1:
            raise ConfigError(f"calibration.statistics_samples {self.statistics_samples}: at least 1 of the samples")
        if not 0 <= self.seed < 2**63:
            raise ConfigError(f"calibration.seed {self.seed}: from 0 to 2**63 - 1")
        if self.first_token_weight <= 0:
            raise ConfigError(f"calibration.first_token_weight {self.first_token_weight}: must be positive")


@dataclass(frozen=True, kw_only=True)
class QuantizeConfig(StrictConfig):
    """A quantization.

    Attributes:
        model: Hugging Face folder, hub id or GGUF file.
        method: name in METHODS.
        settings: the method's settings; missing ones take the method's defaults, which are written out here.
        calibration: text and amounts.
        bits: average true bits of the quantized linears, spread over them by measured sensitivity; None gives all
            the same settings.
        rotation: whether linears are quantized behind a rotation of their inputs: none, those that lose less with it
            (which takes twice as long to decide), or all.
        reconstruction: training of each block against the original's, off by default.
        training: of all layers together after that, off by default.
        embedding_bits: 16 keeps embedding and head as they are, 8 and 4 store them in so many bits.
        name: model name to serve under; default: made from model and method.
        device: cpu, cuda, cuda:N, or auto.
        activations: where calibration samples are between two blocks: memory, disk, or auto: on disk where the plan
            needs more memory than is free. The result is the same, bit for bit.
    """

    model: str
    method: str
    settings: dict[str, Any] = field(default_factory=dict)
    calibration: CalibrationConfig = field(default_factory=CalibrationConfig)
    bits: float | None = None
    rotation: Literal["off", "auto", "all"] = "off"
    reconstruction: ReconstructionConfig = field(default_factory=ReconstructionConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    embedding_bits: Literal[4, 8, 16] = 16
    name: str | None = None
    device: str = "auto"
    activations: Literal["auto", "memory", "disk"] = "auto"

    def __post_init__(self) -> None:
        complete = self.method_settings().to_dict()
        object.__setattr__(self, "settings", complete)
        if self.bits is not None and not 0 < self.bits <= 16:
            raise ConfigError(f"bits {self.bits}: an average of true bits a weight, above 0 and up to 16")

    def method_settings(self) -> StrictConfig:
        """Return the settings as the method's own class.

        Raises:
            ConfigError: unknown method, or settings it does not take.
        """
        return method_named(self.method).config.from_dict(self.settings)

    @property
    def is_calibrated(self) -> bool:
        """Whether inputs are recorded, so that calibration text is read."""
        needs_statistics = method_named(self.method).needs_statistics(self.method_settings())
        return needs_statistics or self.reconstruction.enabled or self.bits is not None

    @property
    def texts_read(self) -> tuple[str, ...]:
        """Sources that the result depends on, each once."""
        trained = (self.training.text or self.calibration.text) if self.training.enabled else ()
        return tuple(dict.fromkeys((*(self.calibration.text if self.is_calibrated else ()), *trained)))

    @property
    def sample_counts(self) -> tuple[int, ...]:
        """How many calibration windows to ask for: the first number that the text has enough for."""
        if self.calibration.samples is not None:
            return (self.calibration.samples,)
        usual = USUAL_SAMPLES[self.reconstruction.preset]
        return tuple(usual >> halvings for halvings in range(4) if usual >> halvings >= USUAL_SAMPLES["off"])

    @property
    def statistics_samples(self) -> int:
        """How many windows statistics are recorded on, at most."""
        if self.calibration.statistics_samples is not None:
            return self.calibration.statistics_samples
        trains = bool(self.reconstruction.epochs)
        return min(self.sample_counts[0], STATISTICS_SAMPLES) if trains else self.sample_counts[0]

    def fingerprint(self) -> str:
        """Return a hash of what decides the blocks: not of name, device, place of the activations, and training."""
        values = self.to_dict()
        del values["name"], values["device"], values["activations"], values["training"]
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()
