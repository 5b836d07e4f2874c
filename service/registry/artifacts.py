"""What the server reads of a model itself: identity and tokenizer. The tensors are the engine's.

A model is an artifact, or an original served beside it for comparison: a Hugging Face folder, or a GGUF file, which
becomes such a folder once, in a process of its own.
"""

import asyncio
import logging
import re
import sys
from asyncio.subprocess import PIPE
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from onebit_core.artifact.identity import ModelKind, kind_of, read_manifest, read_report
from onebit_core.artifact.manifest import ORIGINAL, Manifest, Report
from onebit_core.errors import CorruptArtifact, UnsupportedModel
from service.engine.steady import fingerprint
from service.log import adopt_logger

TOKENIZER_BYTES = {
    "tokenizer.json": 128 << 20,
    "tokenizer.model": 32 << 20,
    "vocab.json": 32 << 20,
    "merges.txt": 32 << 20,
    "tokenizer_config.json": 8 << 20,
    "special_tokens_map.json": 1 << 20,
    "added_tokens.json": 1 << 20,
}
"""Files of tokenizers, and how large they may be; the largest in use has 34 MB."""

ADDED_TOKEN = b'"content"'
MOST_ADDED_TOKENS = 50_000
PROBES = tuple(f"{part * 64}{end}" for part, end in (("a", "!"), (" ", "a"), ("1", "a"), ("aB", "!"), ("-.", "a")))
NOT_IN_NAMES = re.compile(r"[^A-Za-z0-9._-]+")


@dataclass(frozen=True, kw_only=True)
class Identity:
    """What a model says of itself.

    Attributes:
        folder: where its tensors and its tokenizer are.
        manifest: an artifact's; an original's has the method "original".
        report: what was measured; empty for an original.
        fingerprint: of its files, so that no engine is started from others.
    """

    folder: Path
    manifest: Manifest
    report: Report
    fingerprint: str

    @property
    def is_original(self) -> bool:
        """Whether nothing was quantized."""
        return self.manifest.method == ORIGINAL


async def read_identity(path: Path) -> Identity:
    """Read what a model is.

    Raises:
        ArtifactError: it is missing, neither artifact nor original, or an artifact of a newer version.
        ModelError: an original that cannot be read or converted.
    """
    kind = await asyncio.to_thread(kind_of, path)
    folder = await _converted(path) if kind is ModelKind.GGUF else path
    return await asyncio.to_thread(_read_artifact if kind is ModelKind.ARTIFACT else _read_original, folder, path)


def _read_artifact(folder: Path, _: Path) -> Identity:
    before = fingerprint(folder)
    return Identity(folder=folder, manifest=read_manifest(folder), report=read_report(folder), fingerprint=before)


def _read_original(folder: Path, path: Path) -> Identity:
    from onebit_core.artifact.original import describe_original  # imports torch, which a server of artifacts need not

    whole = path.absolute()  # with its links, which may have better names than what they lead to
    name = NOT_IN_NAMES.sub("-", whole.stem if path.suffix == ".gguf" else whole.name).strip("._-")
    manifest = describe_original(folder, name or ORIGINAL, str(path))
    return Identity(folder=folder, manifest=manifest, report=Report(), fingerprint=fingerprint(folder))


async def _converted(file: Path) -> Path:
    """Return the folder a GGUF file was converted into; a child process converts it the first time.

    Raises:
        UnsupportedModel: transformers cannot convert it.
    """
    from onebit_core.model.gguf import converted_folder, is_converted  # imports torch

    folder = await asyncio.to_thread(converted_folder, file)
    if is_converted(folder):
        return folder
    command = (sys.executable, "-m", "onebit_core.model.gguf", str(file))
    child = await asyncio.create_subprocess_exec(*command, stdout=PIPE, stderr=PIPE)
    try:
        printed, complaints = await child.communicate()
    except BaseException:
        child.kill()
        raise
    if child.returncode:
        last_line = complaints.decode(errors="replace").strip().rpartition("\n")[2]
        raise UnsupportedModel(last_line or f"{file}: the conversion ended with code {child.returncode}")
    return Path(printed.decode().strip())


def check_tokenizer_size(path: Path) -> None:
    """Refuse a tokenizer that would take minutes or gigabytes to read; a million added tokens take 40 seconds.

    Raises:
        CorruptArtifact: a file is too large, or adds too many tokens.
    """
    num_added = 0
    for name, most_bytes in TOKENIZER_BYTES.items():
        file = path / name
        if not file.is_file():
            continue
        size = file.stat().st_size
        if size > most_bytes:
            raise CorruptArtifact(f"{file}: it is {size} bytes large, and a tokenizer's may have {most_bytes}")
        num_added += file.read_bytes().count(ADDED_TOKEN)
    if num_added > MOST_ADDED_TOKENS:
        raise CorruptArtifact(f"{path}: its tokenizer adds {num_added} tokens, and {MOST_ADDED_TOKENS} may be added")


def read_tokenizer(path: Path) -> Any:
    """Read the model's tokenizer, and try it on texts that break a careless pattern; code in the folder is never run.

    Raises:
        CorruptArtifact: there is none that transformers can read, or it fails.
    """
    from transformers import AutoTokenizer

    adopt_logger("transformers", logging.ERROR)  # it warns of long prompts, which we refuse ourselves
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)
        for text in PROBES:
            tokenizer(text)
    except (
        BaseException
    ) as error:  # a damaged file raises whatever it stumbles over, and Rust's panics are no Exception
        if isinstance(error, SystemExit | KeyboardInterrupt):
            raise
        raise CorruptArtifact(f"{path}: its tokenizer cannot be read: {type(error).__name__}: {error}") from None
    return tokenizer
