"""WeightStore: the tensors of an original model, read one by one from its safetensors files.

Files are memory-mapped, so only what is asked for is read, and nothing of a model beyond the block at work needs to be
in memory. What was read stays mapped until `release`, which a pipeline calls after every block. Pickled weights (.bin,
.pt) are never opened.
"""

import hashlib
import json
import math
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from onebit_core.errors import BadWeight, ModelNotFound, UnsupportedModel, first_line
from onebit_core.model.experts import StoredPart, stored_parts

INDEX_FILE = "model.safetensors.index.json"
PART_ELEMENTS = 1 << 24


class WeightStore:
    """Named tensors of a folder; experts also by the names that LinearExperts gives them, however they are stored.

    Raises:
        UnsupportedModel: the folder holds no safetensors weights, or a file of them is damaged.
        ModelNotFound: the index names a file that is not there.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files = _weight_files(folder)
        self._digest: str | None = None
        self._readers: dict[Path, Any] = {}
        self._file_of: dict[str, Path] = {}
        self._headers: dict[str, tuple[tuple[int, ...], str]] = {}
        self._parts: dict[str, StoredPart] = {}
        for file in self.files:
            reader = self._reader(file)
            for name in reader.keys():  # noqa: SIM118  (a safetensors reader is not iterable)
                part = reader.get_slice(name)
                self._file_of[name] = file
                self._headers[name] = (tuple(part.get_shape()), part.get_dtype())
                self._parts.update(stored_parts(name, self._headers[name][0]))
        self.release()

    def __contains__(self, name: str) -> bool:
        return name in self._file_of or name in self._parts

    def names(self) -> list[str]:
        """Return all tensor names."""
        return sorted(self._file_of)

    def tensor(self, name: str) -> Tensor:
        """Read one tensor, in the dtype on disk.

        Raises:
            UnsupportedModel: there is none of that name.
            BadWeight: it holds a NaN or an infinity.
        """
        self._header(name)
        tensor = self._part(self._parts[name]) if name in self._parts else self._whole(name)
        if tensor.is_floating_point() and not _is_finite(tensor):
            raise BadWeight(f"{self.folder}: tensor {name!r} holds NaN or infinite values; the original is damaged")
        return tensor

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a tensor's shape without reading it.

        Raises:
            UnsupportedModel: there is none of that name.
        """
        return self._header(name)[0]

    def num_parameters(self) -> int:
        """Return the number of elements of all tensors."""
        return sum(math.prod(self.shape(name)) for name in self._file_of)

    def num_bytes(self, name: str) -> int:
        """Return a tensor's size on disk without reading it."""
        shape, dtype = self._header(name)
        return math.prod(shape) * int("".join(filter(str.isdigit, dtype.partition("_")[0])) or 8) // 8

    def release(self) -> None:
        """Unmap the files; what was read stays valid as long as somebody holds it, and files open again when needed."""
        self._readers.clear()

    def sha256(self) -> str:
        """Return the hash of all weight files, in name order; they are read once."""
        if self._digest is not None:
            return self._digest
        digest = hashlib.sha256()
        for file in self.files:
            with file.open("rb") as stream:
                while chunk := stream.read(1 << 22):
                    digest.update(chunk)
        self._digest = digest.hexdigest()
        return self._digest

    def _whole(self, name: str) -> Tensor:
        tensor: Tensor = self._reader(self._file_of[name]).get_tensor(name)
        return tensor

    def _part(self, part: StoredPart) -> Tensor:
        """Read no more than the part."""
        if part.expert is None:
            return self._whole(part.tensor)
        rows = slice(part.first_row, part.first_row + part.shape[0])
        stored = self._reader(self._file_of[part.tensor]).get_slice(part.tensor)
        tensor: Tensor = stored[part.expert : part.expert + 1, rows][0]
        return tensor

    def _header(self, name: str) -> tuple[tuple[int, ...], str]:
        if name in self._parts:
            part = self._parts[name]
            return part.shape, self._headers[part.tensor][1]
        if name not in self._headers:
            raise UnsupportedModel(f"{self.folder}: the weights hold no tensor {name!r}, which the architecture needs")
        return self._headers[name]

    def _reader(self, file: Path) -> Any:
        if file not in self._readers:
            try:
                self._readers[file] = open_safetensors(file)
            except (SafetensorError, OSError) as error:
                raise UnsupportedModel(f"{file}: not a readable safetensors file ({error})") from error
        return self._readers[file]


def open_safetensors(file: Path, device: str = "cpu") -> Any:
    """Open a file of tensors, to read onto a device; safetensors itself calls files that it may not read missing.

    Raises:
        OSError: it is not there, or may not be read.
        SafetensorError: it is another kind of file, or damaged.
    """
    file.open("rb").close()
    return safe_open(file, framework="pt", device=device)


def _is_finite(tensor: Tensor) -> bool:
    """Look for NaN and infinity a part at a time: the masks of a whole embedding would take as much as itself."""
    return all(bool(torch.isfinite(part).all()) for part in tensor.flatten().split(PART_ELEMENTS))


def _indexed_names(index: Path) -> list[str]:
    """Return the names of the files an index lists, without folders: nothing outside of the model's is opened."""
    try:
        return sorted({Path(name).name for name in json.loads(index.read_text("utf-8"))["weight_map"].values()})
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        reason = first_line(error)
        raise UnsupportedModel(f"{index}: has no weight_map of tensors to files ({reason}); fetch it again") from error


def _weight_files(folder: Path) -> list[Path]:
    """Return the safetensors files of a model folder."""
    index = folder / INDEX_FILE
    if index.is_file():
        files = [folder / name for name in _indexed_names(index)]
    else:
        files = sorted(folder.glob("*.safetensors"))
    for file in files:
        if not file.is_file():
            raise ModelNotFound(f"{file}: named in {INDEX_FILE}, but not there; the download is incomplete")
    if not files:
        pickled = sorted(file.name for pattern in ("*.bin", "*.pt", "*.pth") for file in folder.glob(pattern))
        hint = f"; pickled weights ({pickled[0]}) are not opened, convert them to safetensors" if pickled else ""
        raise UnsupportedModel(f"{folder}: no .safetensors weights{hint}")
    return files
