"""What a training of all layers, and the text that the original writes for one, will take: memory and time.

Memory is counted (pipeline.training_memory). Time is an estimate from how fast this device multiplies and moves bytes,
measured here and now: count a third more or less, and more on a busy machine.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

from onebit_core.calibration.sampling import share_samples
from onebit_core.calibration.self_written import STAGE, WINDOWS_AT_ONCE
from onebit_core.calibration.sources import SELF
from onebit_core.evaluation.run import choose_dtype
from onebit_core.model.blocks import linear_names, linear_of
from onebit_core.model.experts import experts_in
from onebit_core.model.loading import OriginalModel
from onebit_core.pipeline.calibrate import writing_dtype
from onebit_core.pipeline.config import CalibrationConfig
from onebit_core.pipeline.memory import linear_shapes
from onebit_core.pipeline.speed import bytes_a_second, products_a_second
from onebit_core.pipeline.training_memory import FLOAT_BYTES, HIDDEN_STATES, WIDE_STATES
from onebit_core.qat import TrainingConfig

BACKWARD = 2.0
"""A backward pass, in forward passes."""

CACHE_PASSES = 3
"""Reads and writes of a window's keys and values for each token it gets: a copy with the token behind, and a read."""

HEAD_PASSES = 2
"""The same of what attention heads that share them see: written out for every head, and read."""

CHOOSING_BYTES = 120
"""Read and written of a word while one is drawn: softmax and running sum in float64."""

WEIGHT_BYTES = 600
"""Read and written of a weight in a step, beside products: latent to weight and back, moments.

Measured, like those below, on SmolLM2-135M on two cores (bfloat16, steps of 32 to 2,048 tokens), in bytes of a copy.
"""

STATE_PASSES = 50
"""The same of every state of a token that a pass keeps, in float32: attention, norms, elementwise work, conversions."""

LOGIT_BYTES = 500
"""The same of a token's logit: two softmaxes, their divergence and its gradient."""


class Wanted(NamedTuple):
    """Windows of text that will be drawn."""

    sources: tuple[str, ...]
    weights: tuple[float, ...]
    samples: int
    tokens: int


def wanted_by_training(config: TrainingConfig, calibration: CalibrationConfig) -> Wanted:
    """Return the windows of a training; what it does not say is as in the calibration."""
    texts = (config.text, config.weights) if config.text else (calibration.text, calibration.weights)
    return Wanted(*texts, config.sample_counts[0], config.tokens or calibration.tokens)


@dataclass(frozen=True, kw_only=True)
class TrainingForecast:
    """What a training will take.

    Attributes:
        memory_bytes: beside the interpreter with its libraries, at most at once.
        free_bytes: what the device has free now.
        seconds: stage to its estimated duration.
    """

    memory_bytes: int
    free_bytes: int
    seconds: dict[str, float]


def writing_seconds(original: OriginalModel, wanted: Iterable[Wanted], device: str) -> dict[str, float]:
    """Return the duration of letting the original write text: products of few rows, and memory that is moved.

    A step adds a token to every window of a batch: it copies their caches, whose mean length is half a window, and
    attention reads them; choosing passes over float64 probabilities.

    Returns:
        The stage with its seconds; nothing where no text is asked of the original.
    """
    asked = [each for each in wanted if SELF in each.sources]
    if not asked:
        return {}
    text = original.config.get_text_config()
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    passes = CACHE_PASSES + HEAD_PASSES * text.num_attention_heads / heads
    a_token = 2 * len(original.blocks) * heads * width * writing_dtype(device).itemsize
    rate = products_a_second(text.hidden_size, WINDOWS_AT_ONCE, device)
    multiplied = 2 * (weights_a_token(original) + text.vocab_size * text.hidden_size) / rate
    bandwidth = bytes_a_second(device)
    seconds = 0.0
    for sources, weights, samples, tokens in asked:
        windows = share_samples(sources, samples, weights)[sources.index(SELF)]
        moved = passes * a_token * tokens / 2 + CHOOSING_BYTES * text.vocab_size
        steps = math.ceil(windows / WINDOWS_AT_ONCE) * tokens
        seconds += steps * min(windows, WINDOWS_AT_ONCE) * (multiplied + moved / bandwidth)
    return {STAGE: seconds}


def training_seconds(original: OriginalModel, config: TrainingConfig, tokens: int, device: str) -> dict[str, float]:
    """Return the duration of training all layers together.

    Args:
        original: the model.
        config: how it is trained.
        tokens: per window, where `config` does not say.
        device: where.

    Returns:
        The stage with its seconds; nothing where nothing is trained.
    """
    if not config.enabled:
        return {}
    text = original.config.get_text_config()
    tokens = config.tokens or tokens
    rate = products_a_second(text.hidden_size, tokens, device, choose_dtype(config.dtype, device))
    bandwidth = bytes_a_second(device)
    product = 2 * weights_a_token(original) / rate
    head = 2 * text.vocab_size * text.hidden_size / rate
    shapes = linear_shapes(original)
    kept = HIDDEN_STATES * text.hidden_size + WIDE_STATES * max(map(max, shapes))
    states = STATE_PASSES * FLOAT_BYTES * len(original.blocks) * kept / bandwidth
    logits = LOGIT_BYTES * text.vocab_size / bandwidth
    usual = 2 + BACKWARD  # the original's pass, and the student's forward and backward
    passes = usual + (1 if config.recompute else 0)
    a_token = passes * product + (2 + BACKWARD / 2) * head + passes / usual * states + logits
    a_step = WEIGHT_BYTES * sum(rows * columns for rows, columns in shapes) / bandwidth
    looks = (1 + config.steps // config.evaluate_every) * config.held_out * tokens
    looked = looks * 2 * (product + head + (states + logits) / usual)
    return {"train": config.steps * (config.batch * tokens * a_token + a_step) + looked}


def weights_a_token(original: OriginalModel) -> float:
    """Return how many weights of the blocks a token is multiplied by: of a mixture, those of the experts it sees."""
    text = original.config.get_text_config()
    total = 0.0
    for block in original.blocks:
        mixture = experts_in(block)
        share = 1.0 if mixture is None else text.num_experts_per_tok / len(mixture[1])
        for name in linear_names(block, original.layout):
            inside = mixture is not None and name.startswith(f"{mixture[0]}.")
            total += linear_of(block, name).weight.numel() * (share if inside else 1.0)
    return total
