"""Reads what an artifact says about itself, without its weights: no tensors, no torch, milliseconds."""

import json
from enum import StrEnum
from pathlib import Path
from typing import Any

from onebit_core.artifact.manifest import FORMAT_VERSION, MANIFEST_FILE, REPORT_FILE, Manifest, Report
from onebit_core.errors import ArtifactError, ConfigError, CorruptArtifact, UnsupportedFormat


class ModelKind(StrEnum):
    """What a path holds."""

    ARTIFACT = "artifact"  # a folder that onebit wrote
    FOLDER = "folder"  # an original: a Hugging Face folder
    GGUF = "gguf"  # an original in one file


def kind_of(path: str | Path) -> ModelKind:
    """Say what a path holds, by the names of its files and no more.

    Raises:
        UnsupportedFormat: neither an artifact nor an original, or an artifact without its manifest.
    """
    place = Path(path)
    if place.is_file() and place.suffix == ".gguf":
        return ModelKind.GGUF
    if (place / MANIFEST_FILE).is_file():
        return ModelKind.ARTIFACT
    if not (place / "config.json").is_file():
        raise UnsupportedFormat(
            f"{path}: not an onebit artifact ({MANIFEST_FILE} is missing), nor an original (a folder with config.json, "
            "or a .gguf file)"
        )
    config = _read_json(place, "config.json")
    if isinstance(config, dict) and config.get("quantization_config"):
        raise UnsupportedFormat(f"{path}: not an onebit artifact ({MANIFEST_FILE} is missing), and not an original")
    return ModelKind.FOLDER


def read_manifest(path: str | Path) -> Manifest:
    """Read an artifact's identity.

    Raises:
        UnsupportedFormat: not an artifact, or of a newer version.
        CorruptArtifact: the manifest is damaged.
    """
    values = _read_json(Path(path), MANIFEST_FILE)
    version = values.get("format_version") if isinstance(values, dict) else None
    if not isinstance(version, int) or version > FORMAT_VERSION:
        raise UnsupportedFormat(
            f"{path}: artifact format {version} cannot be read; this version reads up to {FORMAT_VERSION}"
        )
    try:
        return Manifest.from_dict(values)
    except ConfigError as error:
        raise CorruptArtifact(f"{path}: {MANIFEST_FILE}: {error}") from error


def read_report(path: str | Path) -> Report:
    """Read what was measured about an artifact.

    Raises:
        ArtifactError: not an artifact, or a damaged report.
    """
    try:
        return Report.from_dict(_read_json(Path(path), REPORT_FILE))
    except ConfigError as error:
        raise CorruptArtifact(f"{path}: {REPORT_FILE}: {error}") from error


def _read_json(folder: Path, name: str) -> Any:
    """Read one JSON file of an artifact."""
    file = folder / name
    if not file.is_file():
        raise UnsupportedFormat(f"{folder}: not an onebit artifact ({name} is missing)")
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise ArtifactError(f"{file}: cannot be read ({error})") from error
