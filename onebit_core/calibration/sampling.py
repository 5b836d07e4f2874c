"""Text to calibration tokens: windows spread evenly over each text, the same for the same seed.

Shape suffixes: S = samples, T = tokens of a sample.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from onebit_core.calibration.sources import read_text
from onebit_core.errors import CalibrationError


@dataclass(frozen=True, kw_only=True)
class CalibrationTokens:
    """What a model is calibrated on.

    Attributes:
        ids_ST: int64 [S, T].
        fingerprints: source to sha256 of its text, in UTF-8.
    """

    ids_ST: Tensor
    fingerprints: dict[str, str]


def sample_tokens(tokenizer: Any, sources: Sequence[str], *, samples: int, tokens: int, seed: int) -> CalibrationTokens:
    """Draw windows from texts, equally many from each (the first ones get the remainder).

    Args:
        tokenizer: of the original model.
        sources: see onebit_core.calibration.sources.
        samples: S, windows in all.
        tokens: T, tokens per window.
        seed: of the place of each window inside its share of the text.

    Raises:
        CalibrationError: a source is missing, or too short for its share, or there are more sources than samples.
    """
    if samples < len(sources):
        raise CalibrationError(f"{samples} samples of {len(sources)} texts: ask for at least one sample a text")
    generator = torch.Generator().manual_seed(seed)
    windows, fingerprints = [], {}
    for index, source in enumerate(sources):
        share = samples // len(sources) + (index < samples % len(sources))
        text = read_text(source)
        fingerprints[source] = hashlib.sha256(text.encode()).hexdigest()
        windows.append(_windows(tokenizer, source, text, share, tokens, generator))
    return CalibrationTokens(ids_ST=torch.cat(windows), fingerprints=fingerprints)


def _windows(tokenizer: Any, source: str, text: str, share: int, tokens: int, generator: torch.Generator) -> Tensor:
    """Cut `share` windows out of one text."""
    ids = torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], dtype=torch.int64)
    if len(ids) < share * tokens:
        raise CalibrationError(
            f"{source}: {len(ids)} tokens are too few for {share} samples of {tokens} tokens "
            f"({share * tokens}); give more text, or ask for fewer or shorter samples"
        )
    stride = len(ids) // share
    jitter = torch.randint(0, stride - tokens + 1, (share,), generator=generator)
    starts = torch.arange(share) * stride + jitter
    return torch.stack([ids[start : start + tokens] for start in starts.tolist()])
