"""Golden prompts: a few prompts with what the model must say to them, so that whoever serves it can see that it does.

A hash proves that the bytes of the weights are those that were written. It does not prove that they are computed right:
a kernel that is wrong on this processor, a driver, a faulty memory module all pass it. So the writer lets the model
continue a few prompts greedily, in float32 and without packed kernels, and stores in `golden.json`, for each prompt,

    prompt       p0 p1 ... pm            token ids
    completion   c0 c1 ... cn            c_t = argmax log p(. | p, c_<t)
    top          for each c_t the most probable tokens with their log probabilities, the most probable first

The manifest has the file's sha256. A server asks its engine for the same before it serves anybody
(`service.registry.golden`). `golden_answers` computes them; here they are read and written, without tensors.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from onebit_core.artifact.manifest import GOLDEN_FILE, Manifest
from onebit_core.config import StrictConfig
from onebit_core.errors import ConfigError, CorruptArtifact


@dataclass(frozen=True, kw_only=True)
class GoldenPrompt(StrictConfig):
    """One prompt and the greedy continuation of it.

    Attributes:
        prompt: token ids.
        completion: token ids.
        top_ids: for each token of the completion the most probable tokens, the most probable first.
        top_logprobs: their log probabilities, in nats.
    """

    prompt: tuple[int, ...]
    completion: tuple[int, ...]
    top_ids: tuple[tuple[int, ...], ...]
    top_logprobs: tuple[tuple[float, ...], ...]


@dataclass(frozen=True, kw_only=True)
class GoldenPrompts(StrictConfig):
    """What golden.json holds.

    Attributes:
        prompts: at least one.
        dtype: of the activations it was computed with.
        backend: what computed it.
    """

    prompts: tuple[GoldenPrompt, ...]
    dtype: str
    backend: str


def write_golden(folder: Path, golden: GoldenPrompts) -> str:
    """Write golden.json into an artifact's folder and return its sha256."""
    text = json.dumps(golden.to_dict(), separators=(",", ":")) + "\n"
    (folder / GOLDEN_FILE).write_text(text, encoding="utf-8")
    return hashlib.sha256(text.encode()).hexdigest()


def read_golden(folder: Path, manifest: Manifest) -> GoldenPrompts | None:
    """Read an artifact's golden prompts; None if it was written without, whatever lies there.

    Raises:
        CorruptArtifact: the file is missing, damaged or changed.
    """
    if not manifest.golden_sha256:
        return None
    file = folder / GOLDEN_FILE
    try:
        data = file.read_bytes()
    except OSError as error:
        raise CorruptArtifact(f"{file}: cannot be read ({error.strerror}), and the manifest has its hash") from error
    if hashlib.sha256(data).hexdigest() != manifest.golden_sha256:
        raise CorruptArtifact(f"{file}: the hash is not the manifest's; the file was damaged or changed")
    try:
        values: Any = json.loads(data)
        return GoldenPrompts.from_dict(values)
    except (ValueError, ConfigError) as error:
        raise CorruptArtifact(f"{file}: {error}") from error
