"""Sources to calibration tokens: windows spread evenly over each source, the same for the same seed.

A source of up to 16 Mi characters is tokenized as one text, and its windows are cut anywhere in it. A larger one is
never read as a whole: its places are divided into as many equal parts as there are windows, and each window is the
text that follows a random place of its part. A document much longer than a window is entered anywhere in it, as usual
with C4 (GPTQ, arXiv:2210.17323, section 4); shorter ones are joined until the window is full, so that no window needs
padding.

Several sources share the windows by their weights, equally without any; what remains after rounding down goes to the
largest remainders, the first source first.

Shape suffixes: S = samples, T = tokens of a sample.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, Literal

import torch
from torch import Tensor

from onebit_core.calibration.sources import SELF, OpenSource, open_source
from onebit_core.errors import CalibrationError, TooLittleText

WHOLE_CHARACTERS = 1 << 24
"""Sources up to this size are tokenized whole: about 4 Mi tokens, which takes seconds and half a gigabyte."""

ROOM_CHARACTERS = 16
"""Of a document, at most this much per token of a window is looked at; no ordinary text has longer tokens."""

USUAL_CHARACTERS = 6
"""Of a token; a window is tokenized when it should be full, and then with twice as much text until it is."""

Covers = Literal["text", "windows"]
"""What a fingerprint covers: the whole text, in UTF-8, or the windows' token ids, as little-endian int32."""

WriteSamples = Callable[[int], Tensor]
"""Writes that many windows with the model itself: int64 [S, T]."""


@dataclass(frozen=True, kw_only=True)
class CalibrationTokens:
    """What a model is calibrated on.

    Attributes:
        ids_ST: int64 [S, T].
        fingerprints: source to sha256 of what `covers` names.
        covers: source to what its fingerprint covers.
    """

    ids_ST: Tensor
    fingerprints: dict[str, str]
    covers: dict[str, Covers]


def evenly(samples: int, most: int) -> Tensor:
    """Return the places of at most so many samples, spread evenly over all from the first to the last: int64 [S]."""
    return torch.linspace(0, samples - 1, min(samples, most), dtype=torch.float64).round().long()


def sample_tokens(
    tokenizer: Any,
    sources: Sequence[str],
    *,
    samples: int,
    tokens: int,
    seed: int,
    weights: Sequence[float] = (),
    write: WriteSamples | None = None,
) -> CalibrationTokens:
    """Draw windows from sources.

    Args:
        tokenizer: of the original model.
        sources: see onebit_core.calibration.sources.
        samples: S, windows in all.
        tokens: T, tokens per window.
        seed: of the place of each window inside its share of the text.
        weights: of the sources, in their order; none for equal shares.
        write: writes the windows of the source `self:`.

    Raises:
        CalibrationError: a source is missing, or its share is no sample at all.
        TooLittleText: a source is too short for its share.
    """
    generator = torch.Generator().manual_seed(seed)
    drawn: dict[str, tuple[Tensor, str, Covers]] = {}
    shares = dict(zip(sources, share_samples(sources, samples, weights), strict=True))
    # Writing takes minutes to hours: a text that is too short for its share is to be found before.
    for source, share in sorted(shares.items(), key=lambda item: item[0] == SELF):
        if source != SELF:
            drawn[source] = _draw(tokenizer, source, (share, tokens), generator)
        elif write is not None:
            ids_ST = write(share)
            drawn[source] = ids_ST, fingerprint_of(ids_ST), "windows"
        else:
            raise CalibrationError(f"{SELF} needs a model that writes")
    return CalibrationTokens(
        ids_ST=torch.cat([drawn[source][0] for source in sources]),
        fingerprints={source: drawn[source][1] for source in sources},
        covers={source: drawn[source][2] for source in sources},
    )


def share_samples(sources: Sequence[str], samples: int, weights: Sequence[float] = ()) -> list[int]:
    """Divide samples among sources by weight.

    Raises:
        CalibrationError: a source would get none; the manifest would name a text that was not used.
    """
    if samples < len(sources):
        raise CalibrationError(f"{samples} samples of {len(sources)} texts: ask for at least one sample a text")
    weights = weights or [1.0] * len(sources)
    largest = max(weights)
    total = sum(weight / largest for weight in weights)  # a sum of large weights may be infinite
    exact = [samples * (weight / largest) / total for weight in weights]
    shares = [int(share) for share in exact]
    order = sorted(range(len(sources)), key=lambda index: shares[index] - exact[index])
    for index in order[: samples - sum(shares)]:
        shares[index] += 1
    if 0 in shares:
        starved = sources[shares.index(0)]
        raise CalibrationError(f"{starved}: its weight gives it none of {samples} samples; ask for more samples")
    return shares


def fingerprint_of(ids_ST: Tensor) -> str:
    """Return the sha256 of token ids as little-endian int32, in reading order."""
    return hashlib.sha256(ids_ST.cpu().numpy().astype("<i4").tobytes()).hexdigest()


def _draw(tokenizer: Any, source: str, size: tuple[int, int], generator: torch.Generator) -> tuple[Tensor, str, Covers]:
    """Draw the windows of one source; return them with their fingerprint and what it covers."""
    with open_source(source) as opened:
        text = opened.whole(WHOLE_CHARACTERS)
        if text is not None:
            digest = hashlib.sha256(text.encode()).hexdigest()
            return _cut(tokenizer, source, text, size, generator), digest, "text"
        ids_ST = _spread(tokenizer, opened, size, generator)
        return ids_ST, fingerprint_of(ids_ST), "windows"


def _cut(tokenizer: Any, source: str, text: str, size: tuple[int, int], generator: torch.Generator) -> Tensor:
    """Cut windows out of one text."""
    share, tokens = size
    ids = torch.tensor(_ids_of(tokenizer, text), dtype=torch.int64)
    if len(ids) < share * tokens:
        raise TooLittleText(
            f"{source}: {len(ids)} tokens are too few for {share} samples of {tokens} tokens "
            f"({share * tokens}); give more text, or ask for fewer or shorter samples"
        )
    stride = len(ids) // share
    jitter = torch.randint(0, stride - tokens + 1, (share,), generator=generator)
    starts = torch.arange(share) * stride + jitter
    return torch.stack([ids[start : start + tokens] for start in starts.tolist()])


def _spread(tokenizer: Any, opened: OpenSource, size: tuple[int, int], generator: torch.Generator) -> Tensor:
    """Read one window at a random place of each of `share` equal parts of a source."""
    share, tokens = size
    if opened.size < share:
        raise TooLittleText(
            f"{opened.name}: {opened.size} long documents for {share} samples; ask for at most {opened.size} samples, "
            "or save the documents as text files"
        )
    windows = []
    for index in range(share):
        first, last = opened.size * index // share, opened.size * (index + 1) // share
        start = int(torch.randint(first, last, (), generator=generator))
        # Long documents may begin in no part but the first, so a window may go on past its own.
        around = chain(opened.read(start), ["\n\n"], opened.read(0, start))
        ids = _fill(tokenizer, _enter(around, ROOM_CHARACTERS * tokens, generator), tokens)
        if len(ids) < tokens:
            raise TooLittleText(
                f"{opened.name}: {len(ids)} tokens in all, too few for a sample of {tokens}; "
                "give more text, or ask for fewer or shorter samples"
            )
        windows.append(torch.tensor(ids[:tokens], dtype=torch.int64))
    return torch.stack(windows)


def _enter(texts: Iterator[str], room: int, generator: torch.Generator) -> Iterator[str]:
    """Pass on texts, each up to `room` characters; of the first, if it is longer, from a random place on."""
    text = next(texts, "")
    start = int(torch.randint(0, max(0, len(text) - room) + 1, (), generator=generator))
    yield text[start : start + room]
    for text in texts:
        yield text[:room]


def _fill(tokenizer: Any, texts: Iterator[str], tokens: int) -> list[int]:
    """Tokenize texts, joined, until there are enough tokens or no more texts."""
    parts: list[str] = []
    length, wanted = 0, USUAL_CHARACTERS * tokens
    for text in texts:
        parts.append(text)
        length += len(text)
        if length >= wanted:
            ids = _ids_of(tokenizer, "".join(parts))
            if len(ids) >= tokens:
                return ids
            wanted = 2 * length
    return _ids_of(tokenizer, "".join(parts))


def _ids_of(tokenizer: Any, text: str) -> list[int]:
    """Tokenize without special tokens."""
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return ids
