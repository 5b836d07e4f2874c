"""WeightStore: the tensors of an original model, read one by one from its safetensors files.

Files are memory-mapped, so only what is asked for is read, and nothing of a model beyond the block at work needs to be
in memory. Pickled weights (.bin, .pt) are never opened.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from onebit_core.errors import BadWeight, ModelNotFound, UnsupportedModel, first_line

INDEX_FILE = "model.safetensors.index.json"


class WeightStore:
    """Named tensors of a folder.

    Raises:
        UnsupportedModel: the folder holds no safetensors weights, or a file of them is damaged.
        ModelNotFound: the index names a file that is not there.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files = _weight_files(folder)
        self._readers: dict[Path, Any] = {}
        self._file_of: dict[str, Path] = {}
        for file in self.files:
            for name in self._reader(file).keys():  # noqa: SIM118  (a safetensors reader is not iterable)
                self._file_of[name] = file

    def __contains__(self, name: str) -> bool:
        return name in self._file_of

    def names(self) -> list[str]:
        """Return all tensor names."""
        return sorted(self._file_of)

    def tensor(self, name: str) -> Tensor:
        """Read one tensor, in the dtype on disk.

        Raises:
            UnsupportedModel: there is none of that name.
            BadWeight: it holds a NaN or an infinity.
        """
        if name not in self._file_of:
            raise UnsupportedModel(f"{self.folder}: the weights hold no tensor {name!r}, which the architecture needs")
        tensor: Tensor = self._reader(self._file_of[name]).get_tensor(name)
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise BadWeight(f"{self.folder}: tensor {name!r} holds NaN or infinite values; the original is damaged")
        return tensor

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a tensor's shape without reading it."""
        return tuple(self._reader(self._file_of[name]).get_slice(name).get_shape())

    def num_parameters(self) -> int:
        """Return the number of elements of all tensors."""
        return sum(torch.Size(self.shape(name)).numel() for name in self._file_of)

    def sha256(self) -> str:
        """Return the hash of all weight files, in name order."""
        digest = hashlib.sha256()
        for file in self.files:
            with file.open("rb") as stream:
                while chunk := stream.read(1 << 22):
                    digest.update(chunk)
        return digest.hexdigest()

    def _reader(self, file: Path) -> Any:
        if file not in self._readers:
            try:
                self._readers[file] = safe_open(file, framework="pt")
            except (SafetensorError, OSError) as error:
                raise UnsupportedModel(f"{file}: not a readable safetensors file ({error})") from error
        return self._readers[file]


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
