"""How often a job has killed what runs it: FOLDER/attempts.json.

    {"is_running": true, "mark": "block 7", "crashes": 1}

Written before the command starts and when it ends in an orderly way. Who finds `is_running` true was preceded by a
crash: of the worker, of the machine, of the command alone. Only crashes in a row at the same mark count, since a job
that finishes a block between two crashes gets on, however often its machine is taken away. DBOS counts starts, orderly
ones too, and knows nothing of blocks, so its own limit is only the last resort.
"""

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

ATTEMPTS_FILE = "attempts.json"


@dataclass(frozen=True, kw_only=True)
class Attempts:
    """What the file holds.

    Attributes:
        is_running: whether the command runs, or died.
        mark: how far the job was when it was started last.
        crashes: in a row, at that mark.
    """

    is_running: bool = False
    mark: str = ""
    crashes: int = 0


def begin(folder: Path, mark: str) -> int:
    """Note that the command starts.

    Args:
        folder: the job's, locked by us.
        mark: how far the job is.

    Returns:
        Crashes in a row at that mark, before this start.
    """
    before = _read(folder)
    crashes = before.crashes if before.mark == mark else 0
    if before.is_running and before.mark == mark:
        crashes += 1
    _write(folder, Attempts(is_running=True, mark=mark, crashes=crashes))
    return crashes


def end(folder: Path) -> None:
    """Note that the command ended in an orderly way: it is done, it failed with a sentence, or it was told to stop."""
    before = _read(folder)
    _write(folder, Attempts(mark=before.mark, crashes=before.crashes))


def forget(folder: Path) -> None:
    """Start counting anew, for a job that has ended."""
    (folder / ATTEMPTS_FILE).unlink(missing_ok=True)


def _read(folder: Path) -> Attempts:
    """Read the file; one that is absent or damaged counts for nothing."""
    try:
        return Attempts(**json.loads((folder / ATTEMPTS_FILE).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return Attempts()


def _write(folder: Path, attempts: Attempts) -> None:
    """Replace the file at once, and on the disk: a power cut must not hide a crash."""
    temporary = folder / f"{ATTEMPTS_FILE}.writing"
    with temporary.open("w", encoding="utf-8") as stream:
        json.dump(asdict(attempts), stream)
        stream.flush()
        os.fsync(stream.fileno())
    temporary.replace(folder / ATTEMPTS_FILE)
