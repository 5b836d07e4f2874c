"""Where calibration and evaluation text comes from.

    FILE.txt, .md, .raw     the whole file is one text
    FILE.jsonl              one object a line with a "text" field; joined by blank lines
    FOLDER                  all of these in it, in name order
    builtin:python          the language reference that comes with Python: always there, technical English

Calibration text must never overlap evaluation text; fingerprints of both stand in the artifact.
"""

import json
from pathlib import Path

from onebit_core.errors import CalibrationError, first_line

BUILTIN = "builtin:python"
SUFFIXES = (".txt", ".md", ".raw", ".jsonl")
BUILTIN_HELDOUT = "builtin:python-heldout"
HELDOUT_TOPICS = 5
"""Every fifth topic of the builtin text belongs to its held-out part."""


def read_text(source: str) -> str:
    """Return the text of a source.

    Raises:
        CalibrationError: missing, not UTF-8, or empty.
    """
    if source in (BUILTIN, BUILTIN_HELDOUT):
        return _builtin(source)
    try:
        path = Path(source).expanduser()
        is_folder = path.is_dir()
    except (OSError, RuntimeError) as error:
        raise CalibrationError(f"{source}: not a path this machine can follow ({first_line(error)})") from error
    if is_folder:
        files = sorted(file for file in path.iterdir() if file.suffix in SUFFIXES)
        if not files:
            raise CalibrationError(f"{source}: the folder holds no text ({', '.join(SUFFIXES)})")
        return "\n\n".join(_read_file(file) for file in files)
    return _read_file(path)


def _read_file(path: Path) -> str:
    """Read one file of a known form."""
    if not path.is_file():
        raise CalibrationError(f"{path}: no such text file")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise CalibrationError(f"{path}: not UTF-8 text (byte {error.start})") from error
    except OSError as error:
        raise CalibrationError(f"{path}: cannot be read ({error.strerror})") from error
    if path.suffix == ".jsonl":
        text = _join_lines(path, text)
    if not text.strip():
        raise CalibrationError(f"{path}: the text is empty")
    return text


def _join_lines(path: Path, text: str) -> str:
    """Join the "text" fields of a JSON lines file; a line ends at LF only, for JSON may hold U+2028 and its like."""
    parts = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            part = json.loads(line)["text"]
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise CalibrationError(f'{path}: line {number} is not an object with a "text" field') from error
        if not isinstance(part, str):
            raise CalibrationError(f"{path}: the text of line {number} is not a string")
        parts.append(part)
    return "\n\n".join(parts)


def _builtin(source: str) -> str:
    """Return the calibration or the held-out part of Python's own reference text."""
    from pydoc_data import topics

    texts = [text for _, text in sorted(topics.topics.items())]
    paragraphs = [[part.strip("\n") for part in text.split("\n\n")] for text in texts]
    heldout = dict.fromkeys(part for topic in paragraphs[::HELDOUT_TOPICS] for part in topic)
    if source == BUILTIN_HELDOUT:
        return "\n\n".join(heldout)
    # Topics repeat each other's paragraphs; what is held out must stand in no other.
    everything = dict.fromkeys(part for topic in paragraphs for part in topic)
    return "\n\n".join(part for part in everything if part not in heldout)
