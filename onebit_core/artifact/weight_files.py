"""The weights of an artifact on disk: one file, or several with an index where one would be above 5 GB.

    model.safetensors                           or      model-00001-of-00003.safetensors, ...
                                                        model.safetensors.index.json: {"weight_map": {tensor: file}}

These are transformers' own names, so it loads both. Tensors are written from where they are and read back one at a
time: neither needs memory for a second copy.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from onebit_core.artifact.manifest import WEIGHTS_FILE
from onebit_core.errors import CorruptArtifact, first_line
from onebit_core.model.weights import open_safetensors

INDEX_FILE = "model.safetensors.index.json"
SHARD_BYTES = 5_000_000_000


def save_weights(folder: Path, tensors: Mapping[str, Tensor], shard_bytes: int = SHARD_BYTES) -> None:
    """Write tensors, contiguous and on the CPU, in their order.

    Args:
        folder: of the artifact.
        tensors: all of them, by name.
        shard_bytes: a file gets no more than that, but for a single tensor that is larger.
    """
    shards: list[dict[str, Tensor]] = [{}]
    size = 0
    for name, tensor in tensors.items():
        if shards[-1] and size + tensor.nbytes > shard_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += tensor.nbytes
    if len(shards) == 1:
        _save(folder / WEIGHTS_FILE, shards[0])
        return
    files: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        file = folder / f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        _save(file, shard)
        files.update(dict.fromkeys(shard, file.name))
    total = sum(tensor.nbytes for tensor in tensors.values())
    index = json.dumps({"metadata": {"total_size": total}, "weight_map": files}, indent=1)
    (folder / INDEX_FILE).write_text(index + "\n", encoding="utf-8")


def _save(file: Path, tensors: dict[str, Tensor]) -> None:
    save_file(tensors, file, metadata={"format": "pt"})
    file.chmod(0o644)


def weight_files(folder: Path) -> list[Path]:
    """Return the files of weights, in order of name; an index reaches no file outside of the folder.

    Raises:
        CorruptArtifact: the index cannot be read, or stands beside a single file, of which transformers would take one.
    """
    index = folder / INDEX_FILE
    if not index.is_file():
        return [folder / WEIGHTS_FILE]
    if (folder / WEIGHTS_FILE).exists():
        raise CorruptArtifact(f"{index}: there is a {WEIGHTS_FILE} too; one of them does not belong to the artifact")
    return [folder / name for name in sorted(set(_weight_map(index).values()))]


def _weight_map(index: Path) -> dict[str, str]:
    """Return tensor to file name."""
    try:
        found = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        files = {str(tensor): str(file) for tensor, file in found.items()}
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise CorruptArtifact(f"{index}: has no weight_map of tensors to files ({first_line(error)})") from error
    for file in set(files.values()):
        if Path(file).name != file:  # transformers would follow it
            raise CorruptArtifact(f"{index}: {file!r} is not the name of a file in the artifact's folder")
    return files


def weights_sha256(folder: Path) -> str:
    """Return the hash of an artifact's weights: of its files one after the other."""
    digest = hashlib.sha256()
    for file in weight_files(folder):
        with file.open("rb") as stream:
            while chunk := stream.read(1 << 22):
                digest.update(chunk)
    return digest.hexdigest()


def read_headers(folder: Path) -> dict[str, tuple[tuple[int, ...], str]]:
    """Return shape and dtype of every tensor on disk, without reading them.

    Raises:
        CorruptArtifact: a file is missing or unreadable, holds what another holds too, or not what the index says.
    """
    headers: dict[str, tuple[tuple[int, ...], str]] = {}
    files: dict[str, str] = {}
    for file in weight_files(folder):
        for name, part in _parts(file):
            if name in headers:
                raise CorruptArtifact(f"{file}: tensor {name!r} is in {files[name]} too")
            headers[name] = (tuple(part.get_shape()), part.get_dtype())
            files[name] = file.name
    index = folder / INDEX_FILE
    if index.is_file() and _weight_map(index) != files:
        wrong = min(name for name, _ in set(_weight_map(index).items()) ^ set(files.items()))
        raise CorruptArtifact(f"{index}: tensor {wrong!r} is not in the file that the index names")
    return headers


def _parts(file: Path) -> Iterator[tuple[str, Any]]:
    """Yield name and slice of every tensor of a file."""
    try:
        with open_safetensors(file) as reader:
            yield from ((name, reader.get_slice(name)) for name in reader.keys())  # noqa: SIM118  (not iterable)
    except (SafetensorError, OSError) as error:
        raise CorruptArtifact(f"{file}: not a readable safetensors file ({error})") from error


def stored_tensors(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """Yield every tensor on disk, only the last one still mapped into memory."""
    for file in weight_files(folder):
        names = [name for name, _ in _parts(file)]
        for name in names:
            with open_safetensors(file) as reader:
                yield name, reader.get_tensor(name)
