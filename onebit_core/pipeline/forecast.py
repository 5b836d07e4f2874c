"""What a quantization will give and take, said before anything is quantized: bits, bytes, memory and time.

Bits and bytes are exact: what is stored follows from settings and shapes alone (Method.spec). Memory is the plan's
(pipeline.memory). Time is an estimate, from two things measured here and now, in seconds: how fast this device
multiplies, and how long the method takes for one weight of each shape. Count a third more or less, and more on a busy
machine.
"""

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from onebit_core.calibration.statistics import InputStatistics
from onebit_core.errors import ConfigError
from onebit_core.kernels import resolve_device
from onebit_core.layers import EMBEDDINGS, build_layer
from onebit_core.layers.embedding import table_spec
from onebit_core.methods.base import Method
from onebit_core.model.blocks import linear_names, linear_of, steps_of
from onebit_core.model.loading import OriginalModel
from onebit_core.pipeline.allocation import MOST_SAMPLES, MOST_TOKENS, average_bits, ladder_of
from onebit_core.pipeline.config import QuantizeConfig
from onebit_core.pipeline.memory import MemoryPlan, linear_shapes
from onebit_core.pipeline.plan import Plan
from onebit_core.pipeline.speed import products_a_second, wait
from onebit_core.pipeline.training_forecast import (
    BACKWARD,
    Wanted,
    training_seconds,
    wanted_by_training,
    weights_a_token,
    writing_seconds,
)
from onebit_core.reconstruction.block import LOSS_SAMPLES
from onebit_core.reconstruction.config import DISTILL_SAMPLES

LARGEST_PROBE = 1 << 22
"""Weights of the largest matrix that a method is timed on; larger ones are reckoned up from a part of them."""

BESIDE_PRODUCTS = 1.5
"""How much longer passes take than their matrix products alone: attention, norms, elementwise work of a training."""


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """What a quantization will give and take.

    Attributes:
        linear_true_bits: stored bits per weight of the quantized linears.
        linear_nominal_bits: what the method's paper would advertise.
        whole_model_bits: stored bits of the whole artifact per parameter.
        artifact_bytes: of its tensors.
        memory: the most that is held at once.
        seconds: stage to its estimated duration.
    """

    linear_true_bits: float
    linear_nominal_bits: float
    whole_model_bits: float
    artifact_bytes: int
    memory: MemoryPlan
    seconds: dict[str, float]


def forecast(original: OriginalModel, plan: Plan, config: QuantizeConfig) -> Forecast:
    """Say what a quantization will give and take; runs for some seconds."""
    shapes = linear_shapes(original)
    settings = config.method_settings()
    weights = sum(rows * columns for rows, columns in shapes)
    bits = average_bits(plan.method, settings, shapes) if config.bits is None else config.bits
    total = round(bits * weights / 8) + _other_bytes(original, config)
    return Forecast(
        linear_true_bits=bits,
        linear_nominal_bits=_nominal_bits(plan.method, config, bits, shapes),
        whole_model_bits=8 * total / original.num_parameters,
        artifact_bytes=total,
        memory=plan.memory,
        seconds=_seconds(original, plan, config, Counter(shapes)),
    )


def _nominal_bits(method: Method, config: QuantizeConfig, bits: float, shapes: Sequence[tuple[int, int]]) -> float:
    """Return the advertised bits; of bits that are spread, what lies between those of the two nearest rungs."""
    if config.bits is None:
        return method.nominal_bits(config.method_settings())
    rungs = [rung.settings for rung in ladder_of(config, shapes)]
    steps = sorted((average_bits(method, settings, shapes), method.nominal_bits(settings)) for settings in rungs)
    for (low, below), (high, above) in pairwise(steps):
        if low <= bits <= high and low < high:
            return below + (above - below) * (bits - low) / (high - low)
    return steps[0][1]


def _other_bytes(original: OriginalModel, config: QuantizeConfig) -> int:
    """Return the bytes of everything that no method quantizes, as it will be stored."""
    table = original.model.get_input_embeddings().weight
    head = getattr(original.model.get_output_embeddings(), "weight", None)
    total = 0
    for name, parameter in original.outer_parameters(head=True):
        if config.embedding_bits < 16 and (parameter is table or parameter is head):
            total += _table_bytes(parameter, config.embedding_bits, is_head=parameter is not table)
        else:
            total += original.store.num_bytes(original.stored_name(name))
    for index, block in enumerate(original.blocks):
        linears = {f"{name}.weight" for name in linear_names(block, original.layout)}
        path = f"{original.layout.blocks}.{index}"
        others = (name for name, _ in block.named_parameters() if name not in linears)
        total += sum(original.store.num_bytes(original.stored_name(f"{path}.{name}")) for name in others)
    return total


def _table_bytes(parameter: Tensor, bits: int, *, is_head: bool) -> int:
    """Return what an embedding, or a head of its own, stores in few bits."""
    rows, columns = parameter.shape
    with torch.device("meta"):
        if is_head:
            return build_layer(table_spec(rows, columns, bits)).stored_bytes()
        return sum(tensor.nbytes for tensor in EMBEDDINGS[bits](rows, columns).state_dict().values())


def _seconds(
    original: OriginalModel, plan: Plan, config: QuantizeConfig, shapes: Counter[tuple[int, int]]
) -> dict[str, float]:
    """Return the duration of every stage that will run."""
    device = resolve_device(config.device)
    settings = config.method_settings()
    deciding = {shape: _time_method(plan.method, settings, shape, device) for shape in shapes}
    decide = sum(deciding[shape] * count for shape, count in shapes.items()) * (2 if config.rotation == "auto" else 1)
    seconds = writing_seconds(original, _written(config), device)
    if config.bits is not None:
        rungs = ladder_of(config, shapes)
        trials = [_time_method(plan.method, rung.trial, max(shapes, key=_size), device) for rung in rungs]
        largest = deciding[max(shapes, key=_size)]
        seconds["spread"] = decide * sum(trials) / largest
    training = training_seconds(original, config.training, config.calibration.tokens, device)
    if not plan.calibrated:
        return {**seconds, "quantize": decide, **training}
    rate = products_a_second(original.config.get_text_config().hidden_size, config.calibration.tokens, device)
    tokens = config.sample_counts[0] * config.calibration.tokens
    one_pass = BESIDE_PRODUCTS * 2 * tokens * weights_a_token(original) / rate
    if config.bits is not None:
        share = min(MOST_SAMPLES * MOST_TOKENS / tokens, 1.0)
        seconds["spread"] += (2 + BACKWARD) * share * one_pass
    return {**seconds, **_stages(original, config, one_pass, decide, 2 * tokens / rate), **training}


def _written(config: QuantizeConfig) -> list[Wanted]:
    """Return the windows that are drawn, for calibration and for training."""
    calibration, training = config.calibration, config.training
    wanted = []
    if config.is_calibrated:
        wanted.append(Wanted(calibration.text, calibration.weights, config.sample_counts[0], calibration.tokens))
    if training.enabled:
        wanted.append(wanted_by_training(training, calibration))
    return wanted


def _stages(
    original: OriginalModel, config: QuantizeConfig, one_pass: float, decide: float, product: float
) -> dict[str, float]:
    """Return the durations of quantizing, training and distilling.

    Args:
        original: the model.
        config: what will be done.
        one_pass: seconds of a forward pass of all samples through all blocks.
        decide: seconds of the method on all weights.
        product: seconds that all tokens take for one weight of a matrix product.
    """
    samples = config.sample_counts[0]
    block = original.blocks[0]
    groups = [step[0] for step in steps_of(block, original.layout)]  # of the experts of a step a token sees few
    widths = [linear_of(block, group[0]).in_features for group in groups]
    partial = (len(groups) + 1) / 2  # statistics run a block up to the group
    share = min(config.statistics_samples / samples, 1.0)
    measure = share * (partial * one_pass + len(original.blocks) * product * sum(width**2 for width in widths))
    training = config.reconstruction
    seconds = {"quantize": decide + measure + one_pass}
    if training.needs_teacher:
        seconds["quantize"] += one_pass
    if training.epochs:
        learned = 1 if training.target == "prefix" else 0
        compare = 2 * min(LOSS_SAMPLES / samples, 1.0)
        seconds["reconstruct"] = (training.epochs * (1 + BACKWARD) + compare + learned) * one_pass + measure
    if training.distill_epochs:
        text = original.config.get_text_config()
        head = product * text.vocab_size * text.hidden_size
        step = (2 + BACKWARD) * one_pass + (2 + BACKWARD) * head
        share = min(DISTILL_SAMPLES / samples, 1.0)
        seconds["distill"] = share * (training.distill_epochs * step + 2 * (one_pass + 2 * head))
    return seconds


def _size(shape: tuple[int, int]) -> int:
    return shape[0] * shape[1]


def _time_method(method: Method, settings: object, shape: tuple[int, int], device: str) -> float:
    """Return the seconds a method takes for a random weight of a shape; of a part of it, if it is large."""
    rows, columns = shape
    scale = 1.0
    while rows * columns > LARGEST_PROBE and rows > columns // 2:
        rows, scale = rows // 2, scale * 2
    while rows * columns > LARGEST_PROBE and columns % 2 == 0:
        columns, scale = columns // 2, scale * 4  # error feedback is quadratic in columns
    try:
        method.check(settings, rows, columns)
    except ConfigError:
        rows, columns, scale = *shape, 1.0
    draw = torch.Generator().manual_seed(0)
    weight_OI = torch.randn(rows, columns, generator=draw).to(device)
    inputs_TI = torch.randn(columns + 32, columns, generator=draw).to(device)
    statistics = InputStatistics(hessian_II=inputs_TI.T @ inputs_TI / len(inputs_TI), num_tokens=len(inputs_TI))
    wait(device)
    started = time.perf_counter()
    method.quantize(weight_OI, statistics, settings)
    wait(device)
    return scale * (time.perf_counter() - started)
