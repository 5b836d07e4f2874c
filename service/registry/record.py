"""Remembers over a restart what the admin API loaded, and under which aliases: a small file beside the artifacts.

    ARTIFACT_ROOT/.served.json    {"models": {name: path below ARTIFACT_ROOT}, "aliases": {alias: name}}

Models named at start are not in it: the settings say each time what they are, and win over it. The file is replaced as
a whole and after each change; a server that cannot write it says so in its log and goes on serving. What is read from
it is treated like an admin's request: a path outside of the root is refused.
"""

import json
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from service.settings import Settings

logger = logging.getLogger(__name__)

LARGEST_FILE_BYTES = 1 << 20


@dataclass(frozen=True, kw_only=True)
class Record:
    """What is to be served again.

    Attributes:
        models: name to path, relative to the artifact root where it lies in it.
        aliases: alias to name.
    """

    models: Mapping[str, str] = field(default_factory=dict)
    aliases: Mapping[str, str] = field(default_factory=dict)


class RecordFile:
    """The file, or none where nothing is to be remembered."""

    def __init__(self, settings: Settings) -> None:
        self._file = settings.served_file
        self._root = settings.artifact_root.resolve() if settings.artifact_root is not None else None
        self._written: Record | None = None

    def read(self) -> Record:
        """Return what was served last; nothing if there is no file, or none that can be read."""
        if self._file is None or not self._file.exists():
            return Record()
        try:
            with self._file.open("rb") as stream:
                values: Any = json.loads(stream.read(LARGEST_FILE_BYTES))
            parts = [_strings(values[part]) for part in ("models", "aliases")]
        except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
            logger.warning("%s cannot be read (%s); nothing is loaded from it", self._file, error)
            return Record()
        return Record(models=parts[0], aliases=parts[1])

    def write(self, models: Mapping[str, Path], aliases: Mapping[str, str]) -> None:
        """Replace the file, if something changed."""
        record = Record(models={name: self._relative(path) for name, path in models.items()}, aliases=dict(aliases))
        if self._file is None or record == self._written:
            return
        if self._written is None and record == Record() and not self._file.exists():
            return
        text = json.dumps({"models": record.models, "aliases": record.aliases}, indent=1) + "\n"
        temporary = self._file.with_suffix(f".{os.getpid()}")
        try:
            temporary.write_text(text, encoding="utf-8")
            temporary.replace(self._file)
        except OSError as error:
            logger.warning("%s cannot be written (%s); after a restart other models are served", self._file, error)
            return
        self._written = record

    def _relative(self, path: Path) -> str:
        return str(path.relative_to(self._root) if self._root and path.is_relative_to(self._root) else path)


def _strings(values: Any) -> dict[str, str]:
    """Check one part of the file.

    Raises:
        TypeError: it is not of names to names.
    """
    if not isinstance(values, dict) or not all(isinstance(value, str) for value in values.values()):
        raise TypeError("it should map names to names")
    return values
