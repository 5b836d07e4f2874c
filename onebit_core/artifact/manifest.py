"""What an artifact says about itself: `manifest.json` (identity, never changes) and `report.json` (what was measured).

An artifact is a folder:

    config.json              the model's own configuration plus `quantization_config` (what transformers reads)
    model.safetensors        packed tensors, in the layouts of onebit_core/layers; above 5 GB several files and an index
    manifest.json            Manifest
    report.json              Report; `onebit evaluate` adds to it
    golden.json              prompts with what the model says to them (artifact/golden.py), where it could be computed
    tokenizer files          copied from the original
    generation_config.json   copied from the original, where it has one

Bits per weight are counted from the bytes of the tensors written, never from a formula.
"""

from dataclasses import dataclass, field
from typing import Any

from onebit_core.config import StrictConfig

FORMAT_VERSION = 1
MANIFEST_FILE = "manifest.json"
REPORT_FILE = "report.json"
GOLDEN_FILE = "golden.json"
WEIGHTS_FILE = "model.safetensors"
ORIGINAL = "original"
"""The method of a manifest that describes an original (artifact/original.py); no artifact has it."""

MOST_PACKED_PER_STORED = 2.2
"""Packed weights hold scales in float32 and pad rows and groups: 1.1 to 2.1 times what is stored, by format."""

PARTS = ("signs", "codes", "scales", "salient", "index", "embedding", "full_precision")
"""Where the bytes of an artifact can be: keys of `Manifest.bytes_by_part`."""


@dataclass(frozen=True, kw_only=True)
class SourceInfo(StrictConfig):
    """The original model.

    Attributes:
        model: folder, hub id or GGUF file as the user named it.
        sha256: over the original's weight files, in name order.
        architecture: transformers' class name, such as LlamaForCausalLM.
        parameters: number of weights, tied ones counted once.
    """

    model: str
    sha256: str
    architecture: str
    parameters: int


@dataclass(frozen=True, kw_only=True)
class BitsInfo(StrictConfig):
    """Bits per weight.

    Attributes:
        linear_true: stored bits of all quantized linears, scales and indices included, per weight of them.
        linear_nominal: what the method's paper would advertise for the same settings.
        whole_model: stored bits of the whole artifact, embedding and head included, per parameter.
    """

    linear_true: float
    linear_nominal: float
    whole_model: float


@dataclass(frozen=True, kw_only=True)
class Manifest(StrictConfig):
    """Identity of an artifact.

    Attributes:
        format_version: of the artifact's layout; a reader refuses newer ones.
        name: model name to serve under, unless the server is told another.
        method: name in onebit_core.methods.METHODS, or onebit where OneBit's authors made the model.
        settings: the method's complete settings.
        source: the original model.
        calibration: sources with their fingerprints and what each covers (the whole "text", or the token ids of the
            "windows" drawn), weights, samples, tokens, seed and first token weight; empty if none was needed.
        reconstruction: how blocks were trained after their layers were quantized; empty if they were not.
        training: how all layers were trained together afterwards, on what, and how far; empty if they were not.
        rotation: whether linears were quantized behind a rotation of their inputs: off, auto (some) or all.
        allocation: how bits were spread over layers, and the settings of those that differ; empty if none does.
        versions: of onebit, torch, transformers and Python.
        created: ISO 8601, UTC.
        bits: bits per weight.
        bytes_by_part: bytes written, by PARTS.
        sha256: of model.safetensors, or of its shards one after the other.
        golden_sha256: of golden.json; empty where there is none.
    """

    format_version: int
    name: str
    method: str
    settings: dict[str, Any]
    source: SourceInfo
    calibration: dict[str, Any]
    versions: dict[str, str]
    created: str
    bits: BitsInfo
    bytes_by_part: dict[str, int]
    sha256: str
    reconstruction: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)
    allocation: dict[str, Any] = field(default_factory=dict)
    rotation: str = "off"
    golden_sha256: str = ""


@dataclass(frozen=True, kw_only=True)
class LayerReport(StrictConfig):
    """What quantizing one linear did.

    Attributes:
        name: module path in the model.
        block: index of the decoder block.
        projection: last part of the name, such as q_proj.
        method: how the weight was found.
        bits: stored bits per weight, everything included.
        weight_error: squared relative Frobenius error of the weight.
        output_error: the same of the layer's output on its calibration inputs; None without calibration.
        seconds: time spent.
        notes: what else a reader should know, such as an expert that calibration never reached.
    """

    name: str
    block: int
    projection: str
    method: str
    bits: float
    weight_error: float
    output_error: float | None
    seconds: float
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Perplexity(StrictConfig):
    """exp of the mean negative log-likelihood, with its standard error over windows."""

    value: float
    standard_error: float


@dataclass(frozen=True, kw_only=True)
class EvaluationResult(StrictConfig):
    """The compressed model against its original on one text.

    Attributes:
        dataset: the name the user gave the text.
        fingerprint: sha256 of the int32 token ids evaluated.
        windows: number of non-overlapping windows.
        window_tokens: tokens per window.
        tokens: predicted tokens in all.
        original: perplexity of the original.
        compressed: perplexity of the artifact.
        kl_mean: mean of KL(original || compressed) per token, in nats; the other kl_ fields likewise.
        kl_standard_error: of the mean, over windows.
        kl_median: median over tokens.
        kl_p99: 99th percentile over tokens.
        kl_max: largest over tokens.
        top1_agreement: share of tokens where both models rank the same token first.
        top1_standard_error: of that share, over windows.
        device: where it ran.
        dtype: of the forward passes.
        date: ISO 8601, UTC.
        versions: of onebit, torch and transformers.
        warning: why the figures are not what they seem, such as text that was calibrated on; None if nothing is known.
    """

    dataset: str
    fingerprint: str
    windows: int
    window_tokens: int
    tokens: int
    original: Perplexity
    compressed: Perplexity
    kl_mean: float
    kl_standard_error: float
    kl_median: float
    kl_p99: float
    kl_max: float
    top1_agreement: float
    top1_standard_error: float
    device: str
    dtype: str
    date: str
    versions: dict[str, str]
    warning: str | None = None


@dataclass(frozen=True, kw_only=True)
class Accuracy(StrictConfig):
    """Share of questions answered rightly, 0 to 1, with its standard error over questions."""

    value: float
    standard_error: float


@dataclass(frozen=True, kw_only=True)
class TaskResult(StrictConfig):
    """The compressed model against its original on one zero-shot task, a set of multiple-choice questions.

    Attributes:
        task: the name the user gave the file, or lm-eval's name of its own task.
        fingerprint: sha256 of the questions asked, word by word with their choices and answers.
        questions: how many were asked.
        available: how many the task has.
        chance: accuracy of guessing.
        original: accuracy of the original; its answer is the choice with the largest log-likelihood.
        compressed: accuracy of the artifact.
        difference_standard_error: of compressed minus original, over questions, each against itself.
        original_norm: the same, the log-likelihood divided by the letters of the choice; None where the task has none.
        compressed_norm: likewise of the artifact.
        agreement: share of questions where both models choose the same.
        agreement_standard_error: of that share, over questions.
        device: where it ran.
        dtype: of the forward passes.
        date: ISO 8601, UTC.
        versions: of onebit, torch, transformers and lm_eval.
    """

    task: str
    fingerprint: str
    questions: int
    available: int
    chance: float
    original: Accuracy
    compressed: Accuracy
    difference_standard_error: float
    original_norm: Accuracy | None
    compressed_norm: Accuracy | None
    agreement: float
    agreement_standard_error: float
    device: str
    dtype: str
    date: str
    versions: dict[str, str]


@dataclass(frozen=True, kw_only=True)
class Report(StrictConfig):
    """What was measured about an artifact: per layer while quantizing, per text and per task afterwards.

    Attributes:
        layers: one entry a quantized linear, as it was before a training.
        seconds: by stage.
        evaluation: one entry a text.
        tasks: one entry a task.
        training: the learning curve, one entry a look at the held-out windows: step, tokens trained on, held_out_kl
            (nats per token), seconds, and means over the steps since the look before: kl, hidden.
    """

    layers: tuple[LayerReport, ...] = ()
    seconds: dict[str, float] = field(default_factory=dict)
    evaluation: tuple[EvaluationResult, ...] = ()
    tasks: tuple[TaskResult, ...] = ()
    training: tuple[dict[str, float], ...] = ()
