"""Whether two lists of sources read the same text: what a model was calibrated on must not measure it.

Two sources overlap when they read the same column of the same file, by whatever name or link, or of two files with the
same bytes; a folder overlaps with any file in it. The same sentences in different files are not found here;
`onebit evaluate` also compares fingerprints of whole texts.
"""

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path

from onebit_core.calibration.documents import DEFAULT_COLUMN, TEXT_SUFFIXES, form_of
from onebit_core.calibration.sources import BUILTIN_TEXTS, source_files, split_source
from onebit_core.errors import CalibrationError

Part = tuple[Path, str]
"""A file and the column of it that is read; plain text has none."""


def overlapping_sources(first: Iterable[str], second: Sequence[str]) -> tuple[str, str] | None:
    """Return a source of each list that read the same text, or None; what is not there overlaps with nothing."""
    parts_of = {source: _parts(source) for source in second}
    for one in first:
        for other in second:
            if one == other and one in BUILTIN_TEXTS:
                return one, other
            if any(_is_same(part, another) for part in _parts(one) for another in parts_of[other]):
                return one, other
    return None


def _parts(source: str) -> list[Part]:
    """Return what a source reads."""
    column = split_source(source)[1] or DEFAULT_COLUMN
    try:
        files = source_files(source)
        return [(file.resolve(), "" if form_of(file) in TEXT_SUFFIXES else column) for file in files]
    except (CalibrationError, OSError, RuntimeError):
        return []


def _is_same(one: Part, other: Part) -> bool:
    """Compare two files by name, then by size, and only if that is equal by content."""
    if one[1] != other[1]:
        return False
    if one[0] == other[0]:
        return True
    try:
        return one[0].stat().st_size == other[0].stat().st_size and _sha256(one[0]) == _sha256(other[0])
    except OSError:
        return False


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
