"""TrainingConfig: how long, how fast and on what a quantized model is trained."""

import math
from dataclasses import dataclass
from typing import Any, Literal, get_args

from onebit_core.calibration.sources import check_weighted
from onebit_core.config import StrictConfig
from onebit_core.errors import ConfigError
from onebit_core.latents.straight_through import SURROGATES, Surrogate

SignOptimizer = Literal["bop", "adam"]

AT_LEAST = {
    "steps": 0,
    "tokens": 2,
    "held_out": 1,
    "batch": 1,
    "windows_at_once": 1,
    "alpha": 0,
    "sign_rate": 0,
    "latent_rate": 0,
    "scale_rate": 0,
    "evaluate_every": 1,
    "patience": 0,
    "checkpoint_every": 1,
}
"""Smallest values that can be meant."""


@dataclass(frozen=True, kw_only=True)
class TrainingConfig(StrictConfig):
    """Training of all layers together against the original, after they were quantized.

    Attributes:
        steps: of Adam; 0 trains nothing.
        text: sources (onebit_core.calibration.sources); none for those of the calibration.
        weights: of the sources, in their order; none for equal shares.
        samples: windows in all, those held out among them; None for as many as the steps read once, or the largest
            half, quarter, ... of them that the text has.
        tokens: tokens per window; None for the calibration's.
        held_out: windows that are not trained on; they tell how far the training is.
        batch: windows per step.
        windows_at_once: of a step; the gradients of several runs are added up, which takes less memory.
        shard: where several processes train together, each keeps a share of latents, moments and the original
            (onebit_core.qat.sharding); one process keeps all.
        recompute: run blocks again in the backward pass: a third slower, and one block's activations at a time.
        teacher: the `original`, or its blocks in `int8` (onebit_core.qat.teacher), which takes less memory.
        alpha: weight of the hidden states' loss beside that of the logits; 0 leaves it out.
        sign_optimizer: of single sign planes and sign factors: `bop` turns those whose gradients are the surest
            (onebit_core.qat.bop), `adam` moves a latent behind each and turns what crosses zero.
        sign_rate: with `bop`, the share of all signs that turn in a step.
        surrogate: with `adam`, whose gradient signs have (onebit_core.latents.straight_through).
        scales: `trained`, or `closed_form`: output scales of single sign planes follow from the latents at every step
            (PB-LLM), the others are trained.
        latent_rate: Adam's step for codes, and with `adam` for signs, in units of a weight's mean magnitude or step;
            a sign starts one unit from zero, so rates added up over all steps must exceed one for any to turn.
        scale_rate: Adam's step for scales and levels, relative to their size.
        warmup: share of the steps in which rates rise from nothing.
        largest_gradient: norm that gradients are scaled down to.
        evaluate_every: steps between two looks at the held-out windows.
        patience: looks without an improvement that end the training; 0 never ends it early.
        checkpoint_every: steps between two checkpoints, where there is a folder for them.
        dtype: of products: bfloat16, float32, or auto: bfloat16 where the processor multiplies it fast.
        seed: of the order of windows.
    """

    steps: int = 0
    text: tuple[str, ...] = ()
    weights: tuple[float, ...] = ()
    samples: int | None = None
    tokens: int | None = None
    held_out: int = 8
    batch: int = 4
    windows_at_once: int = 4
    shard: bool = False
    recompute: bool = False
    teacher: Literal["original", "int8"] = "original"
    alpha: float = 0.0
    sign_optimizer: SignOptimizer = "bop"
    sign_rate: float = 3e-5
    surrogate: Surrogate = "identity"
    scales: Literal["trained", "closed_form"] = "trained"
    latent_rate: float = 1e-2
    scale_rate: float = 2e-3
    warmup: float = 0.05
    largest_gradient: float = 1.0
    evaluate_every: int = 50
    patience: int = 0
    checkpoint_every: int = 50
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    seed: int = 0

    def __post_init__(self) -> None:
        if self.surrogate not in SURROGATES:
            raise ConfigError(f"training.surrogate {self.surrogate!r}; known: {', '.join(SURROGATES)}")
        self._check_signs()
        for name, least in AT_LEAST.items():
            value = getattr(self, name)
            if value is not None and not least <= value < math.inf:
                raise ConfigError(f"training.{name} {value}: must be a number from {least} up")
        if not 0 <= self.warmup < 1:
            raise ConfigError(f"training.warmup {self.warmup}: a share of the steps, from 0 to below 1")
        if not self.largest_gradient > 0:
            raise ConfigError(f"training.largest_gradient {self.largest_gradient}: must be positive")
        if not 0 <= self.seed < 2**63:
            raise ConfigError(f"training.seed {self.seed}: from 0 to 2**63 - 1")
        self._check_windows()

    def _check_signs(self) -> None:
        """Refuse settings of one optimizer beside the other."""
        if self.sign_optimizer not in get_args(SignOptimizer):
            known = ", ".join(get_args(SignOptimizer))
            raise ConfigError(f"training.sign_optimizer {self.sign_optimizer!r}; known: {known}")
        if self.sign_rate > 1:
            raise ConfigError(f"training.sign_rate {self.sign_rate}: a share of all signs, at most 1")
        if self.sign_optimizer == "adam":
            return
        for name, value in (("surrogate", self.surrogate), ("scales", self.scales)):
            if value not in ("identity", "trained"):
                raise ConfigError(
                    f"training.{name} {value}: follows the size of latents, which bop does not change; "
                    "set training.sign_optimizer to adam"
                )

    def _check_windows(self) -> None:
        """Refuse windows that leave nothing to train on, and weights that do not fit the texts."""
        if self.samples is not None and self.samples <= self.held_out:
            raise ConfigError(
                f"training.samples {self.samples}: {self.held_out} are held out (training.held_out), so at least "
                f"{self.held_out + 1} are needed"
            )
        check_weighted("training", self.text, self.weights)

    def fingerprint(self) -> dict[str, Any]:
        """Return what decides the steps: not what only saves memory, or says how often something is written."""
        spared = ("windows_at_once", "recompute", "checkpoint_every")
        return {key: value for key, value in self.to_dict().items() if key not in spared}

    @property
    def enabled(self) -> bool:
        """Whether anything is trained."""
        return self.steps > 0

    @property
    def sample_counts(self) -> tuple[int, ...]:
        """How many windows to ask for: the first number that the text has enough for."""
        if self.samples is not None:
            return (self.samples,)
        wanted = self.steps * self.batch
        halves = [wanted >> halvings for halvings in range(wanted.bit_length())]
        return tuple(count + self.held_out for count in halves)
