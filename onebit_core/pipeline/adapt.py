"""adapt_artifact(): a finished artifact and a user's text to an adapter, a scale for every output of its layers.

In memory are the dense weights of the model, its activations of a few windows, and the scales with their moments.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from onebit_core.adapters.identity import INFO_FILE, AdapterInfo, check_adapter_name
from onebit_core.adapters.scales import OutputScale, scales_learning, write_scales
from onebit_core.artifact.manifest import Manifest
from onebit_core.artifact.reader import LoadedModel, load_model
from onebit_core.artifact.writer import current_versions, refuse_existing, temporary_folder, write_json
from onebit_core.calibration.sampling import CalibrationTokens, fingerprint_of, sample_tokens
from onebit_core.calibration.sources import SELF
from onebit_core.config import StrictConfig
from onebit_core.errors import ConfigError, TooLittleText
from onebit_core.evaluation.run import choose_dtype
from onebit_core.kernels import resolve_device
from onebit_core.pipeline.training import PLACE, split_windows
from onebit_core.progress import Watch
from onebit_core.qat import Adaptation, Checkpoints, Trainer, TrainingConfig, TrainingResult

QUIET = Watch()
USUAL_TOKENS = 512
USUAL_RATE = 5e-3
DISTILLATION_ONLY = ("teacher", "shard", "alpha", "sign_optimizer", "sign_rate", "surrogate", "scales", "latent_rate")
"""Settings of a training that say nothing to an adapter, which has no teacher, no signs that turn, and is small."""


@dataclass(frozen=True, kw_only=True)
class AdaptConfig(StrictConfig):
    """The training of an adapter.

    Attributes:
        artifact: folder of the model that it is for.
        training: how, and on what text; its `scale_rate` is Adam's step for the scales, and USUAL_RATE is a good
            one (the default is another's).
        name: what the adapter is called; it is served as `model:name`.
        device: cpu, cuda, cuda:N, or auto.
    """

    artifact: str
    name: str
    training: TrainingConfig = field(default_factory=TrainingConfig)
    device: str = "auto"

    def __post_init__(self) -> None:
        check_adapter_name(self.name)
        if not self.training.enabled:
            raise ConfigError("training.steps 0: say how many steps to train")
        if not self.training.text:
            raise ConfigError("training.text: name the text that the adapter shall learn")
        if SELF in self.training.text:
            raise ConfigError("training.text: self: is what the model writes already; name a text that it shall learn")
        usual = TrainingConfig()
        for key in DISTILLATION_ONLY:
            if getattr(self.training, key) != getattr(usual, key):
                raise ConfigError(f"training.{key}: an adapter has only scales, and no teacher; leave it out")


def adapt_artifact(config: AdaptConfig, out: Path, *, watch: Watch = QUIET, work: Path | None = None) -> AdapterInfo:
    """Train an adapter for an artifact, and write it.

    Args:
        config: everything that decides the result.
        out: the adapter's folder; must not exist.
        watch: where progress goes, and who may stop the run (looked at after every step).
        work: folder for checkpoints, so that a stopped run can continue; None keeps none.

    Returns:
        What the adapter says about itself.

    Raises:
        OnebitError: see onebit_core.errors; nothing half-written remains.
    """
    refuse_existing(out)
    watch.report("load", 0, 1, model=config.artifact)
    device = resolve_device(config.device)
    dtype = choose_dtype(config.training.dtype, device)
    # The weights are float32 and products run in `dtype`, as in a training of the whole model.
    loaded = load_model(config.artifact, device=device, dtype="float32", backend="dense")
    tokens = _draw(loaded, config.training)
    windows = split_windows(tokens.ids_ST, config.training.held_out)
    watch.report("load", 1, 1, model=config.artifact)
    run = {
        **config.training.fingerprint(),
        "adapter of": loaded.manifest.sha256,
        "dtype": str(dtype),
        "windows": fingerprint_of(tokens.ids_ST),
        "version": current_versions()["onebit"],
    }
    checkpoints = Checkpoints(work / PLACE, run) if work else None
    loaded.model.requires_grad_(requires_grad=False)
    with scales_learning(loaded.model) as scales:
        objective = Adaptation(loaded.model, windows.held_out_ST[0], dtype=dtype, recompute=config.training.recompute)
        result = Trainer(objective, scales, windows, config.training, checkpoints).run(watch)
    watch.report("write", 0, 1)
    info = _write(out, config, loaded.manifest, scales, _record(config.training, tokens, result))
    watch.tell("write", 1, 1, adapter=str(out))
    return info


def _draw(loaded: LoadedModel, config: TrainingConfig) -> CalibrationTokens:
    """Draw the windows, those held out among them."""
    tokens = config.tokens or USUAL_TOKENS
    context = getattr(loaded.model.config.get_text_config(), "max_position_embeddings", None)
    if context and tokens > context:
        raise ConfigError(f"training.tokens {tokens}: more than the model's context; use at most {context}")
    *counts, last = config.sample_counts
    for samples in counts:
        try:
            return _sample(loaded, config, samples, tokens)
        except TooLittleText:
            continue
    return _sample(loaded, config, last, tokens)


def _sample(loaded: LoadedModel, config: TrainingConfig, samples: int, tokens: int) -> CalibrationTokens:
    return sample_tokens(
        loaded.tokenizer, config.text, samples=samples, tokens=tokens, seed=config.seed, weights=config.weights
    )


def _record(config: TrainingConfig, tokens: CalibrationTokens, result: TrainingResult) -> dict[str, Any]:
    """Return what the adapter says of its training."""
    said = {key: value for key, value in config.to_dict().items() if key not in DISTILLATION_ONLY}
    return {
        **said,
        "text": list(tokens.fingerprints),
        "fingerprints": tokens.fingerprints,
        "fingerprint_covers": dict(tokens.covers),
        "samples": len(tokens.ids_ST),
        "tokens": tokens.ids_ST.shape[1],
        "steps_taken": result.steps,
        "best_step": result.best["step"],
        "held_out_loss": [result.curve[0]["held_out_loss"], result.best["held_out_loss"]],
        "curve": result.curve,
    }


def _write(
    out: Path, config: AdaptConfig, base: Manifest, scales: Mapping[str, OutputScale], training: dict[str, Any]
) -> AdapterInfo:
    """Write both files; the folder has its name when it is whole."""
    with temporary_folder(out) as folder:
        sha256 = write_scales(folder, {name: scale.scale_O for name, scale in scales.items()})
        info = AdapterInfo(
            name=config.name,
            base_name=base.name,
            base_sha256=base.sha256,
            layers=len(scales),
            sha256=sha256,
            training=training,
            versions=current_versions(),
        )
        write_json(folder / INFO_FILE, info)
        folder.rename(out)
    return info
