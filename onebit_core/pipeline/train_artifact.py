"""train_artifact(): a finished artifact and text to one of the same bits that says more of what its original says."""

import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from onebit_core.artifact.manifest import Manifest, Report
from onebit_core.artifact.reader import empty_model, load_model, read_manifest, read_report
from onebit_core.artifact.writer import ArtifactDraft, current_versions, refuse_existing, write_artifact
from onebit_core.calibration.sampling import CalibrationTokens
from onebit_core.config import StrictConfig
from onebit_core.errors import ConfigError
from onebit_core.evaluation.run import find_original
from onebit_core.kernels import resolve_device
from onebit_core.layers import LayerSpec, QuantizedLinear, quantized_layers
from onebit_core.model.loading import OriginalModel, open_original
from onebit_core.model.replace import replace_module
from onebit_core.pipeline.calibrate import check_context
from onebit_core.pipeline.config import CalibrationConfig
from onebit_core.pipeline.training import TrainingPlace, train_layers, training_tokens
from onebit_core.pipeline.training_forecast import (
    TrainingForecast,
    training_seconds,
    wanted_by_training,
    writing_seconds,
)
from onebit_core.pipeline.training_memory import check_training_memory, free_bytes
from onebit_core.progress import Watch
from onebit_core.qat import TrainingConfig, World

QUIET = Watch()


@dataclass(frozen=True, kw_only=True)
class TrainArtifactConfig(StrictConfig):
    """A training of a finished artifact.

    Attributes:
        artifact: its folder.
        original: what it was made from; None for the place that its manifest names.
        training: how, and on what text.
        name: model name to serve under; None for the artifact's with `-trained` behind.
        device: cpu, cuda, cuda:N, or auto.
    """

    artifact: str
    original: str | None = None
    training: TrainingConfig = field(default_factory=TrainingConfig)
    name: str | None = None
    device: str = "auto"

    def __post_init__(self) -> None:
        if not self.training.enabled:
            raise ConfigError("training.steps 0: say how many steps to train")
        if not self.training.text:
            raise ConfigError("training.text: name a text to train on, or self: for text that the original writes")


def train_artifact(config: TrainArtifactConfig, out: Path, *, watch: Watch = QUIET, work: Path | None = None) -> Path:
    """Train the layers of an artifact and write another one; with others, where processes have joined (World).

    Args:
        config: everything that decides the result.
        out: the new artifact's folder; must not exist.
        watch: where progress goes, and who may stop the run (looked at after every step).
        work: folder for checkpoints, so that a stopped run can continue; None keeps none.

    Returns:
        `out`.

    Raises:
        OnebitError: see onebit_core.errors; nothing half-written remains.
    """
    started = time.monotonic()
    refuse_existing(out)
    watch.report("load", 0, 1, model=config.artifact)
    start = _open_start(config)
    manifest, report, original = start.manifest, read_report(config.artifact), start.original
    world = World()
    device = world.device(resolve_device(config.device))
    usual = CalibrationConfig()
    processes = (world.size, world.on_this_machine())
    check_training_memory(original, config.training, usual.tokens, start.sizes, device, processes)

    def draw() -> CalibrationTokens | None:
        return training_tokens(original, config.training, usual, device=device, work=work, watch=watch)

    tokens = world.from_first(draw)
    assert tokens is not None
    layers, embedding_bits = _put_layers(original, config.artifact)
    watch.report("load", 1, 1, model=config.artifact)
    run = {"artifact": manifest.sha256, "version": current_versions()["onebit"]}
    place = TrainingPlace(device=device, watch=watch, work=work, run=run)
    trained, result = train_layers(original, config.training, tokens, embedding_bits, place)
    if not world.is_first:
        return out
    trained = {**trained, "start": manifest.sha256, "earlier": _earlier(manifest)}
    before = report.seconds.get("train", 0.0)
    seconds = {**report.seconds, "train": round(before + time.monotonic() - started, 1)}
    fresh = Report(layers=report.layers, seconds=seconds, training=tuple(result.curve))
    watch.report("write", 0, 1)
    write_artifact(original, _draft(manifest, config, trained, (layers, embedding_bits), fresh), out)
    watch.tell("write", 1, 1, artifact=str(out))  # the artifact is there: too late to cancel
    return out


def forecast_training(config: TrainArtifactConfig) -> TrainingForecast:
    """Say what a training of one process will take; writes nothing, and runs for a second or two.

    Raises:
        OnebitError: as train_artifact does before it begins.
    """
    start, usual = _open_start(config), CalibrationConfig()
    training, device = config.training, resolve_device(config.device)
    needed = check_training_memory(start.original, training, usual.tokens, start.sizes, device)
    wanted = wanted_by_training(training, usual)
    check_context(start.original, wanted.tokens)
    return TrainingForecast(
        memory_bytes=needed,
        free_bytes=free_bytes(device),
        seconds={
            **writing_seconds(start.original, [wanted], device),
            **training_seconds(start.original, training, wanted.tokens, device),
        },
    )


@dataclass(frozen=True, kw_only=True)
class _Start:
    """What a training starts from, before weights are read."""

    manifest: Manifest
    original: OriginalModel
    sizes: list[tuple[int, LayerSpec]]


def _open_start(config: TrainArtifactConfig) -> _Start:
    """Open an artifact and what it was made from.

    Raises:
        OnebitError: one of them is not there, or they do not belong together.
    """
    manifest = read_manifest(config.artifact)
    original = open_original(find_original(config.original, manifest.source))
    if config.original is not None and original.store.sha256() != manifest.source.sha256:
        raise ConfigError(
            f"{original.name}: its weights are not those that {config.artifact} was made from; "
            f"name with --original the model that it was made from ({manifest.source.model})"
        )
    prefix = f"{original.layout.blocks}."
    layers = [layer for name, layer in quantized_layers(empty_model(Path(config.artifact))) if name.startswith(prefix)]
    sizes = [(layer.in_features * layer.out_features, layer.spec) for layer in layers]
    return _Start(manifest=manifest, original=original, sizes=sizes)


def _put_layers(original: OriginalModel, artifact: str) -> tuple[dict[str, QuantizedLinear], int]:
    """Put the artifact's layers into the original's blocks, beside what was not quantized.

    Returns:
        The layers by path, and the bits of the artifact's embedding.
    """
    model = load_model(artifact, device="cpu", dtype="float32", backend="reference").model
    prefix = f"{original.layout.blocks}."
    layers = {name: layer for name, layer in quantized_layers(model) if name.startswith(prefix)}
    for index in range(len(original.blocks)):
        original.load_block(index, "cpu")
        for name, layer in layers.items():
            if name.startswith(f"{prefix}{index}."):
                layer.set_backend("dense")
                replace_module(original.blocks, name.removeprefix(prefix), layer)
    return layers, model.config.quantization_config.embedding_bits


def _earlier(manifest: Manifest) -> list[dict[str, Any]]:
    """Return the trainings that the artifact has behind it, the first one first: their texts are known to it, too."""
    if not manifest.training:
        return []
    last = {key: value for key, value in manifest.training.items() if key != "earlier"}
    return [*manifest.training.get("earlier", []), last]


def _draft(
    manifest: Manifest,
    config: TrainArtifactConfig,
    trained: dict[str, object],
    stored: tuple[dict[str, QuantizedLinear], int],
    report: Report,
) -> ArtifactDraft:
    """Describe the new artifact: the old one's origin, and how it was trained."""
    layers, embedding_bits = stored
    return ArtifactDraft(
        name=config.name or f"{manifest.name}-trained",
        method=manifest.method,
        settings=manifest.settings,
        nominal_bits=manifest.bits.linear_nominal,
        calibration=manifest.calibration,
        reconstruction=manifest.reconstruction,
        rotation=manifest.rotation,
        allocation=manifest.allocation,
        embedding_bits=embedding_bits,
        training=trained,
        layers=layers,
        report=report,
    )
