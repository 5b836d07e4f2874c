"""Documents in a column of a Parquet or Arrow file; a place is a row.

A Parquet file is read row group by row group, and of those only the column, in small batches. An Arrow file (what
`datasets` writes with save_to_disk, or Feather) is mapped into memory, and the operating system reads the pages that
are looked at. So neither has to fit in memory. Rows without a text (null) are passed over.

pyarrow is needed only here: `pip install 'onebit[datasets]'`.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from onebit_core.calibration.documents import DEFAULT_COLUMN, Documents
from onebit_core.errors import CalibrationError, first_line

PARQUET_SUFFIX, ARROW_SUFFIX = ".parquet", ".arrow"
TABLE_SUFFIXES = (PARQUET_SUFFIX, ARROW_SUFFIX)

ROWS_AT_ONCE = 256


def open_table(path: Path, column: str | None) -> Documents:
    """Open a table.

    Args:
        path: a .parquet or .arrow file.
        column: which one holds the documents; None for "text".

    Raises:
        CalibrationError: pyarrow is not installed, the file cannot be read, or it has no such column of text.
    """
    if not path.is_file():
        raise CalibrationError(f"{path}: no such file")
    try:
        import pyarrow  # noqa: F401
    except ImportError as error:
        raise CalibrationError(
            f"{path}: Parquet and Arrow files need pyarrow; install it with pip install 'onebit[datasets]'"
        ) from error
    kind = ParquetTable if path.suffix == PARQUET_SUFFIX else ArrowTable
    return kind(path, column or DEFAULT_COLUMN)


class ParquetTable:
    """A column of a Parquet file."""

    joint = "\n\n"

    def __init__(self, path: Path, column: str) -> None:
        from pyarrow.parquet import ParquetFile

        self.path, self.column = path, column
        with _named(path):
            self._file: Any = ParquetFile(path, pre_buffer=False)
        _check_column(path, self._file.schema_arrow, column)

    def size(self) -> int:
        """Return the number of rows."""
        return int(self._file.metadata.num_rows)

    def read(self, first: int, last: int | None) -> Iterator[str]:
        """Yield the texts of some rows; row groups without any of them are not touched."""
        last, start = self.size() if last is None else last, 0
        for group in range(self._file.metadata.num_row_groups):
            end = start + self._file.metadata.row_group(group).num_rows
            if start < last and end > first:
                yield from self._read_group(group, start, first, last)
            start = end

    def _read_group(self, group: int, start: int, first: int, last: int) -> Iterator[str]:
        """Yield the texts of the rows of one group, which begins at row `start`, that lie in first..last."""
        batches = self._file.iter_batches(
            batch_size=ROWS_AT_ONCE, row_groups=[group], columns=[self.column], use_threads=False
        )
        while start < last:
            with _named(self.path):
                batch = next(batches, None)
            if batch is None:
                return
            inside = batch.column(0)[max(0, first - start) : last - start]
            start += batch.num_rows
            yield from (text for text in inside.to_pylist() if text is not None)

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class ArrowTable:
    """A column of an Arrow file, in either of its two forms (stream or random access)."""

    joint = "\n\n"

    def __init__(self, path: Path, column: str) -> None:
        import pyarrow

        self.path = path
        with _named(path):
            self._mapped: Any = pyarrow.memory_map(str(path))
            try:
                table: Any = pyarrow.ipc.open_stream(self._mapped).read_all()
            except pyarrow.ArrowInvalid:
                table = pyarrow.ipc.open_file(self._mapped).read_all()
        _check_column(path, table.schema, column)
        self._column: Any = table.column(column)

    def size(self) -> int:
        """Return the number of rows."""
        return len(self._column)

    def read(self, first: int, last: int | None) -> Iterator[str]:
        """Yield the texts of some rows."""
        last = self.size() if last is None else last
        for start in range(first, last, ROWS_AT_ONCE):
            texts = self._column.slice(start, min(ROWS_AT_ONCE, last - start)).to_pylist()
            yield from (text for text in texts if text is not None)

    def close(self) -> None:
        """Forget the column; the file is unmapped with it."""
        self._column = ()
        self._mapped.close()


def _check_column(path: Path, schema: Any, column: str) -> None:
    """Refuse a column that is not there or holds no text, and list those that do."""
    held = {name: kind for name, kind in zip(schema.names, schema.types, strict=True) if _is_text(kind)}
    if column in held and schema.names.count(column) == 1:
        return
    others = ", ".join(repr(name) for name in schema.names if name not in held) or "none"
    known = ", ".join(map(repr, held)) or "none"
    raise CalibrationError(
        f"{path}: no column of text named {column!r}; columns of text: {known}; others: {others}; "
        "name one as SOURCE#COLUMN"
    )


def _is_text(kind: Any) -> bool:
    """Tell whether a column's type is text, plain or by dictionary."""
    from pyarrow import types

    if types.is_dictionary(kind):
        kind = kind.value_type
    return bool(types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind))


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """Say which file could not be read."""
    from pyarrow import ArrowException

    try:
        yield
    except (ArrowException, OSError) as error:
        raise CalibrationError(f"{path}: not a readable table ({first_line(error)})") from error
