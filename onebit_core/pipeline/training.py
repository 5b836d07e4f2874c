"""The last stage of a quantization, or a run of its own on a finished artifact: all layers are trained together.

In memory are the student's latents with their gradients and moments (20 bytes a weight, the best so far included), the
original in the dtype of products, and the activations of a few windows.

Shape suffixes: S = windows, T = tokens.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from onebit_core.artifact.registration import ties_embedding
from onebit_core.calibration.sampling import CalibrationTokens, evenly, fingerprint_of
from onebit_core.errors import TrainingError
from onebit_core.evaluation.run import choose_dtype
from onebit_core.latents import Latent
from onebit_core.latents.student import in_training
from onebit_core.layers import EMBEDDINGS, quantize_table
from onebit_core.model.head import summed_divergence
from onebit_core.model.loading import OriginalModel, load_original
from onebit_core.pipeline.calibrate import check_context, draw_windows
from onebit_core.pipeline.config import CalibrationConfig
from onebit_core.progress import Watch
from onebit_core.qat import (
    Checkpoints,
    Distillation,
    Trainer,
    TrainingConfig,
    TrainingResult,
    TrainingWindows,
    World,
    prepare,
)
from onebit_core.qat.sharding import ShardedBlock, load_sharded
from onebit_core.qat.teacher import to_eight_bit

if TYPE_CHECKING:  # not every build of torch has them
    from torch.distributed.device_mesh import DeviceMesh

CHECKED_TOKENS = 64
LARGEST_EXPORT_KL = 1e-3
"""Nats per token between the trained model and its packed layers, whose scales are rounded to float16."""

PLACE = "training"
"""Folder of checkpoints inside the work folder."""


@dataclass(frozen=True, kw_only=True)
class TrainingPlace:
    """Where a training runs.

    Attributes:
        device: of both models.
        watch: told of every step, in stage `train`.
        work: folder that checkpoints are kept in; None for nowhere.
        run: what must be equal for a run to continue from a checkpoint.
    """

    device: str
    watch: Watch
    work: Path | None
    run: Mapping[str, Any]


def training_tokens(
    original: OriginalModel,
    config: TrainingConfig,
    calibration: CalibrationConfig,
    *,
    device: str,
    work: Path | None,
    watch: Watch,
) -> CalibrationTokens | None:
    """Draw the windows of a training, those held out among them; None where nothing is trained.

    Args:
        original: the model.
        config: what is asked for.
        calibration: what texts and windows are where `config` does not say.
        device: where the original writes, if it shall.
        work: where what it wrote is kept; None for nowhere.
        watch: told how far the writing is.

    Raises:
        CalibrationError: see draw_windows.
        ConfigError: windows longer than the model's context.
    """
    if not config.enabled:
        return None
    texts = CalibrationConfig(
        text=config.text or calibration.text,
        weights=config.weights if config.text else calibration.weights,
        tokens=config.tokens or calibration.tokens,
        seed=config.seed,
    )
    check_context(original, texts.tokens)
    place = work / PLACE if work else None
    return draw_windows(original, texts, config.sample_counts, device=device, work=place, watch=watch)


def train_layers(
    original: OriginalModel,
    config: TrainingConfig,
    tokens: CalibrationTokens,
    embedding_bits: int,
    place: TrainingPlace,
) -> tuple[dict[str, Any], TrainingResult]:
    """Train the quantized layers in the blocks of a model, in place.

    Args:
        original: the model, with quantized layers in its blocks; all that is outside of them is read here.
        config: how.
        tokens: the windows.
        embedding_bits: in how many bits embedding and head will be stored.
        place: where.

    Returns:
        What the manifest says of it, and what came of it.

    Raises:
        TrainingError: the loss is not finite, or the packed layers do not say what was trained.
    """
    windows = split_windows(tokens.ids_ST, config.held_out)
    dtype = choose_dtype(config.dtype, place.device)
    run = {**place.run, **config.fingerprint(), "dtype": str(dtype), "windows": fingerprint_of(tokens.ids_ST)}
    is_sharded = config.shard and World().size > 1
    checkpoints = _checkpoints(place.work / PLACE, run, is_sharded=is_sharded) if place.work else None

    place.watch.report("train", 0, config.steps)
    mesh = World().mesh(place.device) if is_sharded else None
    teacher = _teacher(original, config, place.device, dtype, mesh)
    original.load_outer(place.device)
    _round_tables(original, embedding_bits)
    blocks = original.blocks.to(place.device)

    probe_1T = windows.held_out_ST[:1, :CHECKED_TOKENS]
    with in_training(blocks, partial(prepare, config=config), partial(_spread, mesh=mesh) if mesh else None) as latents:
        pair = Distillation(original.model, teacher, probe_1T[0], dtype=dtype, recompute=config.recompute)
        result = Trainer(pair, latents, windows, config, checkpoints).run(place.watch)
        trained = _logits(original, probe_1T)
    _check_export(trained, _logits(original, probe_1T))
    blocks.cpu()
    return _record(config, tokens, result), result


def _checkpoints(folder: Path, run: Mapping[str, Any], *, is_sharded: bool) -> Checkpoints:
    """Return where checkpoints are kept, all by one process or each one's share."""
    if not is_sharded:
        return Checkpoints(folder, run)
    from onebit_core.qat.sharded_checkpoint import ShardedCheckpoints

    return ShardedCheckpoints(folder, run)


def _spread(block: nn.Module, latents: list[Latent], mesh: "DeviceMesh") -> nn.Module:
    """Spread what is trained of a block over the processes that train together."""
    return ShardedBlock(block, [value for latent in latents for value in latent.parameters()], mesh)


def _teacher(
    original: OriginalModel, config: TrainingConfig, device: str, dtype: torch.dtype, mesh: "DeviceMesh | None"
) -> PreTrainedModel:
    """Load the original once more; where it is to be small, it becomes so before it goes to the device."""
    if mesh:
        return load_sharded(original.name, mesh, device, dtype, eight_bit=config.teacher == "int8")
    if config.teacher == "original":
        return load_original(original.name, device=device, dtype=dtype)[0]
    teacher, _ = load_original(original.name, device="cpu", dtype=dtype)
    to_eight_bit(teacher)
    nn.Module.to(teacher, device)
    return teacher


@torch.no_grad()
def _round_tables(original: OriginalModel, bits: int) -> None:
    """Let embedding and head be what will be stored of them, so that layers learn to live with that."""
    if bits == 16:
        return
    model: Any = original.model
    table_VD: Tensor = model.get_input_embeddings().weight
    stored = EMBEDDINGS[bits](*table_VD.shape).to(table_VD.device)
    stored.fill(table_VD)
    if not ties_embedding(model):
        head_VD = model.get_output_embeddings().weight
        head_VD.copy_(quantize_table(head_VD, bits).dequantize())
    table_VD.copy_(stored.dequantize())


def split_windows(ids_ST: Tensor, held_out: int) -> TrainingWindows:
    """Hold out windows spread evenly over all."""
    places = evenly(len(ids_ST), held_out)
    mask = torch.ones(len(ids_ST), dtype=torch.bool)
    mask[places] = False
    return TrainingWindows(train_ST=ids_ST[mask], held_out_ST=ids_ST[places])


@torch.no_grad()
def _logits(original: OriginalModel, ids_1T: Tensor) -> Tensor:
    """Return the model's logits of a few tokens, float32 [T, V]."""
    model = original.model
    logits: Tensor = model(input_ids=ids_1T.to(model.device), use_cache=False).logits
    return logits[0].float()


def _check_export(trained_TV: Tensor, packed_TV: Tensor) -> None:
    """Compare what was trained with what was packed.

    Raises:
        TrainingError: they differ by more than rounding scales explains.
    """
    lost = float(summed_divergence(packed_TV, trained_TV)) / len(trained_TV)
    if not lost <= LARGEST_EXPORT_KL:
        raise TrainingError(
            f"the packed layers differ from what was trained by {lost:.2g} nats per token; "
            "this is a bug, please report it"
        )


def _record(config: TrainingConfig, tokens: CalibrationTokens, result: TrainingResult) -> dict[str, Any]:
    """Return what the manifest says."""
    return {
        **config.to_dict(),
        "text": list(tokens.fingerprints),
        "fingerprints": tokens.fingerprints,
        "fingerprint_covers": dict(tokens.covers),
        "samples": len(tokens.ids_ST),
        "tokens": tokens.ids_ST.shape[1],
        "steps_taken": result.steps,
        "best_step": result.best["step"],
        "held_out_kl": [result.curve[0]["held_out_kl"], result.best["held_out_kl"]],
    }
