"""A text, as the windows of tokens that perplexity is measured on.

The convention of the field (GPTQ and everything after it): the whole file is one string, tokenized once with
the tokenizer's defaults, cut from the start into windows that do not overlap; what is left over at the end is
not used. Line ends are read as Python's text mode reads them: a file with CR LF and one with LF are the same text
(left in, the CRs make WikiText-2 look 1 % easier).

Every token but the first of a window is predicted from those before it in the same window.

Two perplexities are comparable only on the same tokens, so windows carry a fingerprint of theirs.

Shape suffixes: W = windows, T = tokens of a window.
"""

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from onebit_core.calibration.sources import read_text
from onebit_core.errors import CalibrationError, EvaluationError


@dataclass(frozen=True, kw_only=True, eq=False)
class TokenWindows:
    """The windows of one named text.

    Attributes:
        name: what the user calls the text.
        tokens_WT: int64 token ids.
        fingerprint: sha256 of the ids as little-endian int32, in reading order.
    """

    name: str
    tokens_WT: Tensor
    fingerprint: str

    @classmethod
    def of(cls, name: str, tokens_WT: Tensor) -> "TokenWindows":
        """Name the windows and take their fingerprint."""
        ids = tokens_WT.cpu().numpy().astype("<i4").tobytes()
        return cls(name=name, tokens_WT=tokens_WT.long(), fingerprint=hashlib.sha256(ids).hexdigest())


def read_windows(
    name: str,
    source: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    window_tokens: int = 2048,
    windows: int | None = None,
) -> TokenWindows:
    """Cut a text into windows.

    Args:
        name: what to call the text in results.
        source: a file, a folder or a built-in text, see onebit_core.calibration.sources.
        tokenizer: of the model under evaluation.
        window_tokens: length of a window, at least 2.
        windows: how many, from the start of the text; None for as many as the text has.

    Raises:
        EvaluationError: the source cannot be read as text, or has fewer tokens than asked for.
    """
    if window_tokens < 2:
        raise EvaluationError(f"text {name}: a window needs at least 2 tokens, not {window_tokens}")
    if windows is not None and windows < 1:
        raise EvaluationError(f"text {name}: at least 1 window is needed, not {windows}")
    text = _read_text(name, source)
    ids = tokenizer(text, return_attention_mask=False, verbose=False)["input_ids"]
    wanted = 1 if windows is None else windows
    if len(ids) < wanted * window_tokens:
        raise EvaluationError(
            f"text {name}: {source} has {len(ids)} tokens, too few for {wanted} windows of {window_tokens} tokens; "
            "give a longer text, or ask for fewer or shorter windows"
        )
    count = len(ids) // window_tokens if windows is None else windows
    tokens_WT = torch.tensor(ids[: count * window_tokens], dtype=torch.int64).view(count, window_tokens)
    return TokenWindows.of(name, tokens_WT)


def _read_text(name: str, source: str) -> str:
    """Read a source, refusing what is not text."""
    try:
        text = read_text(source)
    except CalibrationError as error:
        raise EvaluationError(f"text {name}: {error}") from error
    if "\0" in text:
        raise EvaluationError(f"text {name}: {source} is a binary file, not text")
    return text
