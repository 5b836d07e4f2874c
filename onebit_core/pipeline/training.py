"""The last stage of a quantization, or a run of its own on a finished artifact: all layers are trained together.

In memory are the student's latents with their gradients and moments (20 bytes a weight, the best so far included), the
original in the dtype of products, and the activations of a few windows.

Shape suffixes: S = windows, T = tokens.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from onebit_core.calibration.sampling import CalibrationTokens, evenly, fingerprint_of
from onebit_core.errors import TrainingError
from onebit_core.evaluation.run import choose_dtype
from onebit_core.latents.student import in_training
from onebit_core.model.loading import OriginalModel, load_original
from onebit_core.pipeline.calibrate import draw_windows
from onebit_core.pipeline.config import CalibrationConfig
from onebit_core.progress import Watch
from onebit_core.qat import Checkpoints, Distillation, Trainer, TrainingConfig, TrainingResult, TrainingWindows
from onebit_core.qat.losses import divergence

CHECKED_TOKENS = 64
LARGEST_EXPORT_KL = 1e-3
"""Nats per token between the trained model and its packed layers, whose scales are rounded to float16."""

PLACE = "training"
"""Folder of checkpoints inside the work folder."""


def train_layers(
    original: OriginalModel,
    config: TrainingConfig,
    calibration: CalibrationConfig,
    *,
    device: str,
    watch: Watch,
    work: Path | None,
    run: Mapping[str, Any],
) -> tuple[dict[str, Any], TrainingResult]:
    """Train the quantized layers in the blocks of a model, in place.

    Args:
        original: the model, with quantized layers in its blocks; all that is outside of them is read here.
        config: how.
        calibration: what texts and windows are where `config` does not say.
        device: where both models are run.
        watch: told of every step, in stage `train`.
        work: folder that checkpoints are kept in; None for nowhere.
        run: what must be equal for a run to continue from a checkpoint.

    Returns:
        What the manifest says of it, and what came of it.

    Raises:
        TrainingError: the loss is not finite, or the packed layers do not say what was trained.
    """
    tokens = _windows(original, config, calibration, device, work, watch)
    windows = split_windows(tokens.ids_ST, config.held_out)
    folder = work / PLACE if work else None
    place = {**run, "training": config.to_dict(), "windows": fingerprint_of(tokens.ids_ST)}
    checkpoints = Checkpoints(folder, place) if folder else None

    dtype = choose_dtype(config.dtype, device)
    watch.report("train", 0, config.steps)
    teacher, _ = load_original(original.name, device=device, dtype=dtype)
    original.load_outer(device)
    blocks = original.blocks.to(device)

    def weight_of(name: str) -> Tensor:
        stored = original.stored_name(f"{original.layout.blocks}.{name}.weight")
        return original.store.tensor(stored).to(device=device, dtype=torch.float32)

    probe_1T = windows.held_out_ST[:1, :CHECKED_TOKENS]
    with in_training(blocks, weight_of) as latents:
        pair = Distillation(original.model, teacher, probe_1T[0], dtype=dtype, recompute=config.recompute)
        result = Trainer(pair, latents, windows, config, checkpoints).run(watch)
        trained = _logits(original, probe_1T)
    _check_export(trained, _logits(original, probe_1T))
    blocks.cpu()
    return _record(config, tokens, result), result


def split_windows(ids_ST: Tensor, held_out: int) -> TrainingWindows:
    """Hold out windows spread evenly over all."""
    places = evenly(len(ids_ST), held_out)
    mask = torch.ones(len(ids_ST), dtype=torch.bool)
    mask[places] = False
    return TrainingWindows(train_ST=ids_ST[mask], held_out_ST=ids_ST[places])


def _windows(
    original: OriginalModel,
    config: TrainingConfig,
    calibration: CalibrationConfig,
    device: str,
    work: Path | None,
    watch: Watch,
) -> CalibrationTokens:
    """Draw the windows of the training, those held out among them."""
    texts = CalibrationConfig(
        text=config.text or calibration.text,
        weights=config.weights if config.text else calibration.weights,
        tokens=config.tokens or calibration.tokens,
        seed=config.seed,
    )
    place = work / PLACE if work else None
    return draw_windows(original, texts, config.sample_counts, device=device, work=place, watch=watch)


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
    lost = float(divergence(packed_TV, trained_TV)) / len(trained_TV)
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
