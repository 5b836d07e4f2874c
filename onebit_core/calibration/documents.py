"""Files of text, read document by document from any place on, so that a file need not fit in memory.

A place is a byte offset in a text or JSON lines file (of the unpacked bytes, if it is compressed) and an index in a
JSON array. A document belongs to the place where it begins, so reading first..middle and middle..last gives every
document of first..last once.

    .txt .md .raw      lines; the text is what they are together
    .jsonl .json       one object a line, or one JSON array; the column (default "text") of each is a document
    the same and .gz   unpacked on the way; places are found by unpacking, so jumping back costs a pass from the start

Tables (Parquet, Arrow) are in tables.py.
"""

import codecs
import gzip
import io
import json
import re
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import BinaryIO, Protocol, cast

from onebit_core.errors import CalibrationError, first_line

TEXT_SUFFIXES = (".txt", ".md", ".raw")
LINES_SUFFIXES = (".jsonl",)
JSON_SUFFIXES = (".json",)
PACKED = ".gz"
DEFAULT_COLUMN = "text"

WHITE_SPACE = re.compile(r"[ \t\n\r]*")
"""Between the items of a JSON array."""

MOST_NAMED = 20
"""Fields an error lists."""

INSIDE_CHARACTER = bytes(range(0x80, 0xC0))
"""Bytes of UTF-8 that no character begins with."""

LONGEST_PIECE_BYTES = 1 << 20
"""A line of a text file that is longer is read in pieces."""

LONGEST_LINE_BYTES = 1 << 28
"""A longer line of a JSON lines file is refused: it would have to be in memory."""

LARGEST_ARRAY_BYTES = 1 << 28
"""A larger JSON array is refused: it would have to be in memory."""


class Documents(Protocol):
    """The documents of one file, in order."""

    @property
    def joint(self) -> str:
        """What stands between two documents when they become one text."""

    def size(self) -> int:
        """Return the number of places."""

    def read(self, first: int, last: int | None) -> Iterator[str]:
        """Yield the documents that begin at first <= place < last; None is the end."""

    def close(self) -> None:
        """Close the file."""


def form_of(path: Path) -> str:
    """Return a file's suffix without .gz: `.jsonl` for `c4.jsonl.gz`."""
    return Path(path.stem).suffix if path.suffix == PACKED else path.suffix


def open_documents(path: Path, column: str | None) -> Documents:
    """Open a text or JSON file.

    Raises:
        CalibrationError: it cannot be read, or it is plain text and a column was asked for.
    """
    if form_of(path) in LINES_SUFFIXES:
        return JsonLines(path, column or DEFAULT_COLUMN)
    if form_of(path) in JSON_SUFFIXES:
        with _named(path), _open(path) as stream:
            start = stream.read(LONGEST_PIECE_BYTES).lstrip()[:1]
        return JsonArray(path, column or DEFAULT_COLUMN) if start == b"[" else JsonLines(path, column or DEFAULT_COLUMN)
    if column is not None:
        raise CalibrationError(f"{path}: a text file has no column {column!r}; leave out #{column}")
    return TextFile(path)


class _ByteFile:
    """A file, compressed or not, that stays open between two reads."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @cached_property
    def _stream(self) -> BinaryIO:
        return _open(self.path)

    def size(self) -> int:
        """Return the number of bytes; of a compressed file by unpacking it once."""
        with _named(self.path):
            return self._stream.seek(0, io.SEEK_END)

    def close(self) -> None:
        """Close the file."""
        if "_stream" in self.__dict__:
            self._stream.close()

    def _lines(self, first: int, last: int | None, longest: int) -> Iterator[tuple[int, bytes]]:
        """Yield place and bytes of the lines that begin at first <= place < last; a longer line comes in pieces."""
        with _named(self.path):
            place = self._stream.seek(max(0, first - 1))
            if first:
                place += len(self._stream.readline(longest))  # the rest of the line before
        while last is None or place < last:
            with _named(self.path):
                self._stream.seek(place)  # another reader may have moved it
                line = self._stream.readline(longest)
            if not line:
                return
            yield place, line
            place += len(line)


class TextFile(_ByteFile):
    """A file of plain text; line ends become LF."""

    joint = ""

    def read(self, first: int, last: int | None) -> Iterator[str]:
        """Yield the lines."""
        begin = first
        decoder = io.IncrementalNewlineDecoder(codecs.getincrementaldecoder("utf-8")(), translate=True)
        try:
            for index, (place, line) in enumerate(self._lines(first, last, LONGEST_PIECE_BYTES)):
                begin = place
                # Behind a piece of a long line, the first bytes may be the rest of a character.
                yield decoder.decode(line.lstrip(INSIDE_CHARACTER) if first and not index else line)
            if last is None:
                yield decoder.decode(b"", final=True)
        except UnicodeDecodeError as error:
            raise CalibrationError(f"{self.path}: not UTF-8 text (near byte {begin + error.start})") from error


class JsonLines(_ByteFile):
    """One object a line; a line ends at LF only, for JSON may hold U+2028 and its like."""

    joint = "\n\n"

    def __init__(self, path: Path, column: str) -> None:
        super().__init__(path)
        self.column = column

    def read(self, first: int, last: int | None) -> Iterator[str]:
        """Yield the column of each object."""
        for number, (place, line) in enumerate(self._lines(first, last, LONGEST_LINE_BYTES), 1):
            where = f"the line at byte {place}" if first else f"line {number}"
            if len(line) == LONGEST_LINE_BYTES:
                raise CalibrationError(f"{self.path}: {where} is longer than {LONGEST_LINE_BYTES >> 20} MiB")
            if not line.strip():
                continue
            try:
                value = json.loads(line.decode())
            except UnicodeDecodeError as error:
                raise CalibrationError(f"{self.path}: not UTF-8 text (near byte {place + error.start})") from error
            except (ValueError, RecursionError) as error:
                raise CalibrationError(f"{self.path}: {where} is not JSON ({first_line(error)})") from error
            yield text_of(value, self.column, self.path, where)


class JsonArray:
    """A JSON array of objects, or of strings; parsed as a whole."""

    joint = "\n\n"

    def __init__(self, path: Path, column: str) -> None:
        self.path, self.column = path, column

    @cached_property
    def _items(self) -> list[str]:
        with _named(self.path), _open(self.path) as stream:
            content = stream.read(LARGEST_ARRAY_BYTES + 1)
        if len(content) > LARGEST_ARRAY_BYTES:
            raise CalibrationError(
                f"{self.path}: a JSON array has to be in memory as a whole, and this one is larger than "
                f"{LARGEST_ARRAY_BYTES >> 20} MiB; save it as JSON lines or Parquet"
            )
        try:
            return list(self._parse(content.decode()))
        except (ValueError, RecursionError) as error:
            raise CalibrationError(f"{self.path}: not a JSON array ({first_line(error)})") from error

    def _parse(self, content: str) -> Iterator[str]:
        """Yield the text of each item, parsed one by one: parsed together, they may take a hundred times the file."""
        decoder, place, index = json.JSONDecoder(), _after(content, "[", 0), 0
        while content[place : place + 1] != "]" or index:
            value, place = decoder.raw_decode(content, place)
            where = f"item {index}"
            is_text = isinstance(value, str)
            yield (
                whole_characters(value, self.path, where) if is_text else text_of(value, self.column, self.path, where)
            )
            index += 1
            place = _after(content, "", place)
            if content[place : place + 1] == "]":
                break
            place = _after(content, ",", place)
        if _after(content, "]", place) != len(content):
            raise ValueError(f"something stands behind the array, at character {place + 1}")

    def size(self) -> int:
        """Return the number of items."""
        return len(self._items)

    def read(self, first: int, last: int | None) -> Iterator[str]:
        """Yield the text of each item."""
        yield from self._items[first:last]

    def close(self) -> None:
        """Nothing is open."""


def _after(content: str, mark: str, place: int) -> int:
    """Return the place of what follows a mark and white space."""
    start = _end_of_space(content, place)
    if not content.startswith(mark, start):
        raise ValueError(f"expected {mark!r} at character {start}")
    return _end_of_space(content, start + len(mark))


def _end_of_space(content: str, place: int) -> int:
    match = WHITE_SPACE.match(content, place)
    return place if match is None else match.end()


def text_of(value: object, column: str, path: Path, where: str) -> str:
    """Return one column of an object.

    Raises:
        CalibrationError: it is no object, has no such column, or that is not a string.
    """
    if not isinstance(value, dict):
        raise CalibrationError(f'{path}: {where} is not an object with a "{column}" field')
    if column not in value:
        known = ", ".join(map(repr, list(value)[:MOST_NAMED]))
        raise CalibrationError(
            f'{path}: {where} is not an object with a "{column}" field; its fields: {known or "none"}; '
            "name one as SOURCE#COLUMN"
        )
    text = value[column]
    if not isinstance(text, str):
        raise CalibrationError(f'{path}: the "{column}" of {where} is not a string')
    return whole_characters(text, path, where)


def whole_characters(text: str, path: Path, where: str) -> str:
    """Return a text, if it has no half characters, which JSON can write and no tokenizer can read.

    Raises:
        CalibrationError: it has one.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise CalibrationError(f"{path}: {where} holds half a character (a lone surrogate); repair the file") from error
    return text


def _open(path: Path) -> BinaryIO:
    """Open a file to read bytes, unpacked."""
    if not path.is_file():
        raise CalibrationError(f"{path}: no such text file")
    with _named(path):
        return cast(BinaryIO, gzip.open(path) if path.suffix == PACKED else path.open("rb"))


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """Say which file could not be read."""
    try:
        yield
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or first_line(error)
        raise CalibrationError(f"{path}: cannot be read ({reason})") from error
