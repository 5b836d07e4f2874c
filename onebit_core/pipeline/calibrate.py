"""The calibration windows of a run: drawn from texts, or written by the original.

For the source `self:` the whole original is in memory once, before the first block is begun: as float32 on the CPU, as
bfloat16 on a GPU. What it wrote is kept in the work folder, because it costs minutes to hours, and because a run that
continues must see the same windows on another device too.
"""

import logging
from collections.abc import Sequence
from pathlib import Path

import psutil
import torch
from torch import Tensor

from onebit_core.calibration.sampling import CalibrationTokens, WriteSamples, sample_tokens
from onebit_core.calibration.self_written import WINDOWS_AT_ONCE, write_windows
from onebit_core.errors import CalibrationError, ConfigError, NotEnoughMemory, TooLittleText
from onebit_core.model.loading import OriginalModel, load_original
from onebit_core.pipeline.config import CalibrationConfig, QuantizeConfig
from onebit_core.pipeline.resume import load_written, save_written
from onebit_core.progress import Watch

_log = logging.getLogger(__name__)

LOGITS_BYTES = 40
"""A logit of one window while the next token is chosen: in the model's dtype, and four times as float64."""


def calibration_tokens(
    original: OriginalModel, config: QuantizeConfig, *, device: str, work: Path | None, watch: Watch
) -> CalibrationTokens:
    """Get the calibration windows of a quantization; see draw_windows."""
    return draw_windows(original, config.calibration, config.sample_counts, device=device, work=work, watch=watch)


def draw_windows(
    original: OriginalModel,
    calibration: CalibrationConfig,
    counts: Sequence[int],
    *,
    device: str,
    work: Path | None,
    watch: Watch,
) -> CalibrationTokens:
    """Get windows of text; all ids are rows of the embedding.

    Args:
        original: the model.
        calibration: the texts; its number of samples is not looked at.
        counts: how many windows are wanted; the next is tried where the text has too few for one.
        device: where the original writes, if it shall.
        work: where what it wrote is kept; None for nowhere.
        watch: told how far the writing is.

    Raises:
        CalibrationError: see sample_tokens; or the tokenizer is not the model's.
        NotEnoughMemory: the original shall write, and does not fit.
    """

    def write(samples: int) -> Tensor:
        key = f"{original.store.sha256()} {samples} {calibration.tokens} {calibration.seed}"
        ids_ST = load_written(work, key) if work else None
        if ids_ST is None:
            ids_ST = _write(original, calibration, samples, device, watch)
            if work:
                save_written(work, ids_ST, key)
        return ids_ST

    tokens = _drawn(original, calibration, counts, write)
    rows, largest = original.config.get_text_config().vocab_size, int(tokens.ids_ST.max())
    if largest >= rows:
        raise CalibrationError(
            f"{original.folder}: the tokenizer gives id {largest}, and the embedding has {rows} rows; "
            "tokenizer and weights are not of the same model"
        )
    return tokens


def _drawn(
    original: OriginalModel, calibration: CalibrationConfig, counts: Sequence[int], write: WriteSamples
) -> CalibrationTokens:
    """Draw the first number of windows that the text has enough for; with the last, too little text is an error."""
    *more, last = counts

    def draw(samples: int) -> CalibrationTokens:
        return sample_tokens(
            original.tokenizer,
            calibration.text,
            samples=samples,
            tokens=calibration.tokens,
            seed=calibration.seed,
            weights=calibration.weights,
            write=write,
        )

    for count, fewer in zip(more, counts[1:], strict=True):
        try:
            return draw(count)
        except TooLittleText as error:
            _log.warning("%s; trying %d samples", error, fewer)
    return draw(last)


def calibration_record(config: QuantizeConfig, tokens: CalibrationTokens | None) -> dict[str, object]:
    """Return what the manifest says about calibration; empty if there was none."""
    if tokens is None:
        return {}
    used = len(tokens.ids_ST)
    amounts = {"samples": used, "statistics_samples": min(config.statistics_samples, used)}
    record = {**config.calibration.to_dict(), **amounts}
    return {**record, "fingerprints": tokens.fingerprints, "fingerprint_covers": dict(tokens.covers)}


def check_context(original: OriginalModel, tokens: int) -> None:
    """Refuse windows longer than a model can write.

    Raises:
        ConfigError: the model's context is shorter.
    """
    context = getattr(original.config.get_text_config(), "max_position_embeddings", None)
    if context and tokens > context:
        raise ConfigError(f"{tokens} tokens are more than the model's context; use at most {context}")


def writing_dtype(device: str) -> torch.dtype:
    """Return the dtype in which an original writes: float32 on the CPU, bfloat16 on a GPU."""
    return torch.float32 if device == "cpu" else torch.bfloat16


def windows_at_once(original: OriginalModel, windows: int, tokens: int, device: str) -> int:
    """Return how many windows the original can write at once, at most 32.

    Args:
        original: the model, not yet read.
        windows: how many are wanted.
        tokens: of a window.
        device: where it will write.

    Raises:
        NotEnoughMemory: not a single one.
    """
    shape = original.config.get_text_config()
    item = writing_dtype(device).itemsize
    heads = getattr(shape, "num_key_value_heads", None) or shape.num_attention_heads
    width = getattr(shape, "head_dim", None) or shape.hidden_size // shape.num_attention_heads
    layer = 2 * heads * width * tokens * item
    # A cache grows by copying, one layer at a time; attention may spread keys and values over all query heads.
    spread = layer * shape.num_attention_heads // heads
    window = shape.num_hidden_layers * layer + layer + 2 * spread + LOGITS_BYTES * shape.vocab_size
    model = original.num_parameters * item
    free_host = psutil.virtual_memory().available
    free = free_host if device == "cpu" else torch.cuda.mem_get_info(device)[0]
    at_once = min(windows, WINDOWS_AT_ONCE)
    while at_once > 1 and model + at_once * window > free:
        at_once //= 2
    if model + at_once * window > free or model > free_host:
        raise NotEnoughMemory(
            f"{original.name}: to write text, the whole original and a window need about "
            f"{(model + window) / 2**30:.1f} GiB, and {min(free, free_host) / 2**30:.1f} GiB are free; calibrate on "
            "other text, or let a larger machine write it: onebit write-text"
        )
    return at_once


def _write(original: OriginalModel, calibration: CalibrationConfig, samples: int, device: str, watch: Watch) -> Tensor:
    """Load the whole original, let it write, and forget it."""
    at_once = windows_at_once(original, samples, calibration.tokens, device)
    model, tokenizer = load_original(original.name, device=device, dtype=writing_dtype(device))
    return write_windows(
        model,
        tokenizer,
        samples=samples,
        tokens=calibration.tokens,
        seed=calibration.seed,
        at_once=at_once,
        watch=watch,
    )
