"""Where calibration and evaluation text comes from.

    FILE.txt, .md, .raw     the whole file is one text
    FILE.jsonl, .json       one object a line, or one JSON array of objects
    FILE.parquet, .arrow    a table, one document a row (tables.py)
    any but tables, .gz     unpacked on the way: c4.00000.json.gz
    FOLDER                  made by `datasets` (save_to_disk): its rows; otherwise all tables in it, or else all texts
                            and JSON lines, or else all .json, in name order
    SOURCE#COLUMN           which column holds the documents; without it `text`
    builtin:python          the language reference that comes with Python: always there, technical English
    self:                   text that the model writes itself (self_written.py); for calibration only

Documents are joined by blank lines. What stands behind the last # is a column unless it holds a slash; a file whose
name has a # is named with another at its end. That is decided by the name alone, never by what is on disk, so a path
that was checked is the path that is opened.

Calibration text must never overlap evaluation text (overlap.py); fingerprints of both stand in the artifact.
"""

import json
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Self

from onebit_core.calibration.documents import (
    JSON_SUFFIXES,
    LINES_SUFFIXES,
    TEXT_SUFFIXES,
    Documents,
    form_of,
    open_documents,
)
from onebit_core.calibration.tables import ARROW_SUFFIX, TABLE_SUFFIXES, open_table
from onebit_core.errors import CalibrationError, ConfigError, first_line

BUILTIN = "builtin:python"
BUILTIN_HELDOUT = "builtin:python-heldout"
BUILTIN_TEXTS = (BUILTIN, BUILTIN_HELDOUT)
HELDOUT_TOPICS = 5
"""Every fifth topic of the builtin text belongs to its held-out part."""

SELF = "self:"
COLUMN_MARK = "#"

KINDS = (TABLE_SUFFIXES, (*TEXT_SUFFIXES, *LINES_SUFFIXES), JSON_SUFFIXES)
"""A folder is read as the first kind of which it has any: a README beside tables is not their text."""

STATE_FILE, SPLITS_FILE = "state.json", "dataset_dict.json"
"""What save_to_disk of `datasets` leaves in the folder of a data set, and of several splits."""

LARGEST_STATE_CHARACTERS = 1 << 24
LARGEST_TEXT_CHARACTERS = 1 << 30


def split_source(source: str) -> tuple[str, str | None]:
    """Return a source's path and column; None is the default column."""
    path, mark, column = source.rpartition(COLUMN_MARK)
    if not mark or "/" in column:
        return source, None
    return path, column or None


def join_source(path: str, column: str | None) -> str:
    """Return the source that `split_source` takes apart into these."""
    joined = path if column is None else f"{path}{COLUMN_MARK}{column}"
    return joined if split_source(joined) == (path, column) else f"{path}{COLUMN_MARK}"


class OpenSource:
    """The documents of a source, in order, readable from any place on.

    Attributes:
        name: the source.
    """

    def __init__(self, name: str, files: Sequence[Documents]) -> None:
        self.name = name
        self._files = files

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        del kind, error, trace
        for file in self._files:
            file.close()

    @cached_property
    def _sizes(self) -> list[int]:
        sizes = []
        for file in self._files:
            sizes.append(file.size())
            file.close()
        return sizes

    @property
    def size(self) -> int:
        """The number of places; a compressed file is unpacked once to count them."""
        return sum(self._sizes)

    def read(self, first: int = 0, last: int | None = None) -> Iterator[str]:
        """Yield the documents that begin at first <= place < last, with what joins them in front of all but the first.

        Raises:
            CalibrationError: a file cannot be read, or holds something else.
        """
        start, is_first = 0, True
        for index, file in enumerate(self._files):
            if first or last is not None:  # reading all of it does without sizes
                begin, start = start, start + self._sizes[index]
                if start <= first or (last is not None and begin >= last):
                    continue
                end = None if last is None or last >= start else last - begin
                texts = file.read(max(0, first - begin), end)
            else:
                texts = file.read(0, None)
            joint = "\n\n"
            for text in texts:
                yield text if is_first else joint + text
                is_first, joint = False, file.joint
            file.close()  # a folder may hold more files than a process may have open

    def whole(self, limit: int) -> str | None:
        """Return everything as one text, or None if that has more than `limit` characters.

        Raises:
            CalibrationError: a file cannot be read, holds something else, or nothing.
        """
        parts, length = [], 0
        for part in self.read():
            parts.append(part)
            length += len(part)
            if length > limit:
                return None
        text = "".join(parts)
        if not text.strip():
            raise CalibrationError(f"{self.name}: the text is empty")
        return text


class _KnownText:
    """A text in memory."""

    joint = ""

    def __init__(self, text: str) -> None:
        self._text = text

    def size(self) -> int:
        """Return the number of characters."""
        return len(self._text)

    def read(self, first: int, last: int | None) -> Iterator[str]:
        """Yield a part."""
        yield self._text[first:last]

    def close(self) -> None:
        """Nothing is open."""


class _ClosedFile:
    """A file that is opened when it is asked for something, and may be closed and asked again."""

    def __init__(self, path: Path, column: str | None) -> None:
        self._path, self._column = path, column
        self._open: Documents | None = None

    def _opened(self) -> Documents:
        if self._open is None:
            self._open = _open_file(self._path, self._column)
        return self._open

    @property
    def joint(self) -> str:
        """What stands between two of its documents."""
        return self._opened().joint

    def size(self) -> int:
        """Return the number of places."""
        return self._opened().size()

    def read(self, first: int, last: int | None) -> Iterator[str]:
        """Yield the documents of some places."""
        yield from self._opened().read(first, last)

    def close(self) -> None:
        """Close the file, if it is open."""
        if self._open is not None:
            self._open.close()
            self._open = None


def open_source(source: str) -> OpenSource:
    """Open a source to read its documents; use as a context.

    Raises:
        CalibrationError: missing, of an unknown form, or text that only the model could write.
    """
    if source in BUILTIN_TEXTS:
        return OpenSource(source, [_KnownText(_builtin(source))])
    _, column = split_source(source)
    return OpenSource(source, [_ClosedFile(file, column) for file in source_files(source)])


def read_text(source: str) -> str:
    """Return the text of a source.

    Raises:
        CalibrationError: missing, not UTF-8, empty, or too large to be one text.
    """
    with open_source(source) as opened:
        text = opened.whole(LARGEST_TEXT_CHARACTERS)
    if text is None:
        raise CalibrationError(f"{source}: more than {LARGEST_TEXT_CHARACTERS >> 30} Gi characters; give a part of it")
    return text


def source_files(source: str) -> list[Path]:
    """Return the files that a source is read from, none of a builtin text.

    Raises:
        CalibrationError: missing, of an unknown form, or text that only the model could write.
    """
    if source in BUILTIN_TEXTS:
        return []
    name, _ = split_source(source)
    if SELF in (source, name):
        raise CalibrationError(f"{source}: text that the model writes itself is for calibration only, without a column")
    try:
        path = Path(name).expanduser()
        is_folder = path.is_dir()
    except (OSError, RuntimeError, ValueError) as error:
        raise CalibrationError(f"{source}: not a path this machine can follow ({first_line(error)})") from error
    if is_folder:
        try:
            return _files_in(path)
        except OSError as error:
            raise CalibrationError(f"{path}: cannot be read ({error.strerror})") from error
    if not path.is_file():
        hint = f"; if its name has a {COLUMN_MARK}, add another at the end" if name != source else ""
        raise CalibrationError(f"{path}: no such text file{hint}")
    return [path]


def _files_in(folder: Path) -> list[Path]:
    """Return the files of a folder that hold its text."""
    if (folder / SPLITS_FILE).is_file():
        splits = ", ".join(sorted(path.name for path in folder.iterdir() if (path / STATE_FILE).is_file()))
        raise CalibrationError(f"{folder}: a data set of several splits ({splits}); name one, such as {folder}/train")
    found = sorted(path for path in folder.iterdir() if path.is_file())
    if (folder / STATE_FILE) in found and any(path.suffix == ARROW_SUFFIX for path in found):
        return _saved_files(folder)
    for suffixes in KINDS:
        files = [path for path in found if (path.suffix if suffixes is TABLE_SUFFIXES else form_of(path)) in suffixes]
        if files:
            return files
    known = ", ".join(suffix for suffixes in KINDS for suffix in suffixes)
    raise CalibrationError(f"{folder}: the folder holds no text ({known})")


def _saved_files(folder: Path) -> list[Path]:
    """Return the files that a saved data set's state lists, without folders: nothing outside of its own is opened."""
    try:
        with (folder / STATE_FILE).open(encoding="utf-8") as stream:
            state = json.loads(stream.read(LARGEST_STATE_CHARACTERS))
        names = [Path(entry["filename"]).name for entry in state["_data_files"]]
        for name in names:
            name.encode()  # a lone surrogate names no file
    except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
        raise CalibrationError(f"{folder / STATE_FILE}: lists no files ({first_line(error)}); save it again") from error
    if not names:
        raise CalibrationError(f"{folder}: the data set is empty")
    return [folder / name for name in names]


def _open_file(path: Path, column: str | None) -> Documents:
    """Open one file of a known form; an unknown one is read as text."""
    return open_table(path, column) if path.suffix in TABLE_SUFFIXES else open_documents(path, column)


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


def check_weighted(where: str, sources: Sequence[str], weights: Sequence[float]) -> None:
    """Refuse sources and weights that cannot be meant together.

    Args:
        where: name of the configuration's part, for the message.
        sources: each once.
        weights: of the sources, in their order; empty for equal shares.

    Raises:
        ConfigError: a source named twice, a weight too many or too few, or one that is not positive.
    """
    for source in sources:
        if sources.count(source) > 1:
            raise ConfigError(f"{where}.text: {source} is named twice; give it a larger weight instead")
    if weights and len(weights) != len(sources):
        raise ConfigError(
            f"{where}.weights: {len(weights)} weights for {len(sources)} texts; "
            "give each text one, in the same order, or none"
        )
    if any(weight <= 0 for weight in weights):
        raise ConfigError(f"{where}.weights {list(weights)}: each must be positive")
