"""The artifacts that lie in artifact_root, served or not: found, described, deleted.

Only what lies directly in the root is looked at, and links are never followed, listed or touched. Hidden folders are
somebody's work in progress (a job's, a writer's) and no artifacts. A damaged artifact is listed with the reason. Sizes
are compared with the manifest, which finds files that are missing or cut short; the weights are hashed only where that
is asked for, since it reads all of them.

Deleting renames first, to a hidden name: the artifact is there whole or not at all, however long it takes to remove.
"""

import hashlib
import json
import logging
import re
import shutil
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from onebit_core.artifact.identity import ModelKind, kind_of, read_manifest, read_report
from onebit_core.artifact.manifest import WEIGHTS_FILE, Manifest
from onebit_core.errors import OnebitError
from service.errors import BadRequest, Conflict, NotFound
from service.settings import Settings

logger = logging.getLogger(__name__)

ENTRY_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,254}")
SHARD_NAMES = "model-*-of-*.safetensors"
LONGEST_HEADER_BYTES = 100_000_000
DELETING = ".deleting-"


@dataclass(frozen=True, kw_only=True)
class Item:
    """Something in the root that could be loaded, or looks as if it should.

    Attributes:
        name: of the folder or file.
        path: where it is.
        kind: artifact, folder or gguf; the last two are originals.
        manifest: an artifact's, if it can be read.
        num_bytes: of its files.
        damage: why it cannot be loaded; None if nothing is known.
    """

    name: str
    path: Path
    kind: ModelKind
    manifest: Manifest | None
    num_bytes: int
    damage: str | None


def list_items(root: Path, *, verify: bool = False) -> list[Item]:
    """Describe everything in the root, by name.

    Args:
        root: of the artifacts.
        verify: compare the weights with the manifests' hashes, too.

    Raises:
        NotFound: there is no such folder, or it cannot be read.
    """
    try:
        entries = sorted(root.iterdir())
    except OSError as error:
        raise NotFound(f"artifact_root cannot be read: {error.strerror}") from None
    return [item for entry in entries if (item := _describe(entry, verify=verify)) is not None]


def find_item(root: Path, name: str) -> Item:
    """Look one up by its name, which cannot lead anywhere else.

    Raises:
        BadRequest: it is no plain name, or a link.
        NotFound: there is no artifact of that name.
    """
    if not ENTRY_NAME.fullmatch(name):
        raise BadRequest("the name of an artifact is that of a folder in artifact_root: letters, digits and . _ -")
    path = root / name
    if path.is_symlink():
        raise BadRequest(f"{name!r} is a link, which is not followed; remove it on the machine itself")
    item = _describe(path, verify=False)
    if item is None:
        raise NotFound(f"there is no artifact {name!r}; GET /admin/artifacts lists them")
    return item


def delete_item(root: Path, item: Item) -> None:
    """Take an artifact away at once, then remove its files; leftovers of earlier removals go with them.

    Raises:
        Conflict: the system does not let it go.
    """
    hidden = root / f".{item.name}{DELETING}{uuid.uuid4().hex}"
    try:
        item.path.rename(hidden)
    except OSError as error:
        raise Conflict(f"artifact {item.name!r} cannot be deleted: {error.strerror}") from None
    for leftover in root.glob(f".*{DELETING}*"):
        if leftover.is_dir() and not leftover.is_symlink():
            shutil.rmtree(leftover, onerror=_log_left)
        else:
            leftover.unlink(missing_ok=True)


def is_being_written(root: Path, name: str) -> bool:
    """Whether a writer is at work on an artifact of that name."""
    return any(root.glob(f".{name}.writing-*"))


def resolve_artifact(settings: Settings, path: str) -> Path:
    """Turn a path sent by an admin into a folder or GGUF file that may be loaded.

    Raises:
        BadRequest: it is not inside artifact_root, nor one of the artifacts named at start.
        NotFound: it is, but there is no such folder or file.
    """
    named_at_start = {Path(artifact).resolve() for artifact in settings.artifacts}
    root = settings.artifact_root.resolve() if settings.artifact_root else None
    try:
        resolved = (root / path if root else Path(path)).resolve()
        is_there = resolved.is_dir() or (resolved.suffix == ".gguf" and resolved.is_file())
    except (OSError, ValueError, RuntimeError):  # a name too long, a NUL, or links in a circle
        raise BadRequest("path is not one this machine can have", param="path") from None
    if resolved not in named_at_start and not (root and resolved.is_relative_to(root) and resolved != root):
        raise BadRequest("path must lie inside artifact_root, or be an artifact named at start", param="path")
    if root and resolved not in named_at_start and resolved.relative_to(root).parts[0].startswith("."):
        raise BadRequest("path begins with a dot: there jobs keep what they make, and what was rejected", param="path")
    if not is_there:
        raise NotFound(f"there is no artifact folder and no GGUF file {path!r}", param="path")
    return resolved


def _describe(path: Path, *, verify: bool) -> Item | None:
    """Describe one entry; None if it is nothing that is ever loaded."""
    if path.is_symlink() or not ENTRY_NAME.fullmatch(path.name):
        return None
    try:
        kind = kind_of(path)
    except OnebitError as error:
        if not (path / "config.json").is_file():
            return None
        return Item(
            name=path.name, path=path, kind=ModelKind.ARTIFACT, manifest=None, num_bytes=_size(path), damage=str(error)
        )
    manifest, damage = None, None
    if kind is ModelKind.ARTIFACT:
        manifest, damage = _examine(path, verify=verify)
    return Item(name=path.name, path=path, kind=kind, manifest=manifest, num_bytes=_size(path), damage=damage)


def _examine(folder: Path, *, verify: bool) -> tuple[Manifest | None, str | None]:
    """Return an artifact's manifest and what is wrong with it, as far as can be said without loading it."""
    try:
        manifest = read_manifest(folder)
    except OnebitError as error:
        return None, str(error)
    try:
        read_report(folder)
        files = list(_weight_files(folder))
        stored, expected = sum(map(_tensor_bytes, files)), sum(manifest.bytes_by_part.values())
    except (OnebitError, OSError, ValueError) as error:
        return manifest, str(error)
    if stored != expected:
        return manifest, f"{folder}: its weights are {stored} bytes, and its manifest says {expected}"
    if verify and _sha256(files) != manifest.sha256:
        return manifest, f"{folder}: the hash of its weights is not the manifest's; a file was damaged or changed"
    return manifest, None


def _weight_files(folder: Path) -> Iterator[Path]:
    """Yield the files of weights, in order."""
    files = [folder / WEIGHTS_FILE] if (folder / WEIGHTS_FILE).exists() else sorted(folder.glob(SHARD_NAMES))
    if not files:
        raise ValueError(f"{folder}: it has no weights ({WEIGHTS_FILE} is missing)")
    yield from files


def _tensor_bytes(file: Path) -> int:
    """Return the bytes of a file's tensors: it is 8 bytes of length, a header of that length, and the tensors.

    Raises:
        ValueError: it is not such a file, or not all of it is there.
    """
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if not 2 <= length <= min(size - 8, LONGEST_HEADER_BYTES):
            raise ValueError(f"{file}: not a safetensors file, or cut short")
        try:
            header = json.loads(stream.read(length))
            ends = [tensor["data_offsets"][1] for name, tensor in header.items() if name != "__metadata__"]
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
            raise ValueError(f"{file}: its header is damaged") from None
    if size != 8 + length + max(ends, default=0):
        raise ValueError(f"{file}: it is {size} bytes long and its header says {8 + length + max(ends, default=0)}")
    return size - 8 - length


def _sha256(files: list[Path]) -> str:
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            while chunk := stream.read(1 << 22):
                digest.update(chunk)
    return digest.hexdigest()


def _size(path: Path) -> int:
    """Return the bytes of a file, or of a folder's files; links count nothing."""
    files = [path] if path.is_file() else [file for file in path.rglob("*") if not file.is_symlink() and file.is_file()]
    return sum(file.stat().st_size for file in files)


def _log_left(_function: object, path: str, error: Any) -> None:
    logger.warning("%s could not be removed: %s", path, error[1])
