"""What the server reads of an artifact itself: identity and tokenizer. The tensors are the engine's."""

import logging
from pathlib import Path
from typing import Any

from onebit_core.artifact.identity import read_manifest, read_report
from onebit_core.artifact.manifest import Manifest, Report
from onebit_core.errors import CorruptArtifact
from service.log import adopt_logger


def read_identity(path: Path) -> tuple[Manifest, Report]:
    """Read manifest and report of an artifact folder.

    Raises:
        ArtifactError: it is missing, not an artifact, or written by a newer version.
    """
    return read_manifest(path), read_report(path)


def read_tokenizer(path: Path) -> Any:
    """Read the artifact's tokenizer; code in the folder is never run.

    Raises:
        CorruptArtifact: there is none that transformers can read.
    """
    from transformers import AutoTokenizer

    adopt_logger("transformers", logging.ERROR)  # it warns of long prompts, which we refuse ourselves
    try:
        return AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # noqa: BLE001  (a damaged file makes transformers raise whatever it stumbles over)
        raise CorruptArtifact(f"{path}: its tokenizer cannot be read: {type(error).__name__}: {error}") from None
