"""Finished blocks on disk: a run that was stopped continues after the last one.

    WORK/run.json                fingerprints of configuration, original and calibration tokens
    WORK/written.safetensors     calibration windows that the original wrote itself, if it did
    WORK/block_0007.safetensors  packed tensors of block 7; its metadata holds specs and reports

A block file appears at once (written beside, renamed) and only when its block is complete. The activations are not
kept: a continued run carries the calibration samples through the finished blocks again, which costs one forward pass.
"""

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from onebit_core.artifact.manifest import LayerReport
from onebit_core.errors import ArtifactError, ConfigError, CorruptArtifact, first_line
from onebit_core.layers import LayerSpec, QuantizedLinear, build_layer
from onebit_core.model.weights import open_safetensors

RUN_FILE = "run.json"
WRITTEN_FILE = "written.safetensors"

BlockResult = dict[str, tuple[QuantizedLinear, LayerReport]]
"""Linear name inside the block to its packed layer and report."""


class WorkFolder:
    """The finished blocks of one run.

    Raises:
        ConfigError: the folder belongs to another run, or cannot be made.
    """

    def __init__(self, folder: Path, fingerprint: dict[str, Any]) -> None:
        self.folder = folder
        run = folder / RUN_FILE
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if not run.is_file():
                temporary = run.with_suffix(".writing")
                temporary.write_text(json.dumps(fingerprint), encoding="utf-8")
                temporary.replace(run)
            found = json.loads(run.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"{folder}: cannot hold finished blocks ({first_line(error)}); choose another --work-dir, or remove it"
            ) from error
        if found != fingerprint:
            raise ConfigError(
                f"{folder}: holds blocks of another run (other model, settings, calibration text or version); "
                "choose another --work-dir, or remove it"
            )

    def save(self, index: int, result: BlockResult) -> None:
        """Keep a finished block.

        Raises:
            ArtifactError: the folder cannot be written.
        """
        tensors = {
            f"{name}:{child}": tensor.contiguous().cpu()
            for name, (layer, _) in result.items()
            for child, _, tensor in layer.stored_tensors()
        }
        metadata = {
            name: json.dumps({"spec": layer.spec.to_dict(), "report": report.to_dict()})
            for name, (layer, report) in result.items()
        }
        temporary = self._file(index).with_suffix(".writing")
        try:
            save_file(tensors, temporary, metadata=metadata)
            temporary.replace(self._file(index))
        except (SafetensorError, OSError) as error:
            temporary.unlink(missing_ok=True)
            raise ArtifactError(f"{self._file(index)}: cannot be written ({first_line(error)})") from error

    def load(self, index: int) -> BlockResult | None:
        """Return a finished block, or None if it has yet to be done.

        Raises:
            CorruptArtifact: the file is damaged.
        """
        file = self._file(index)
        if not file.is_file():
            return None
        result: BlockResult = {}
        try:
            with open_safetensors(file) as reader:
                for name, text in (reader.metadata() or {}).items():
                    values = json.loads(text)
                    layer = build_layer(LayerSpec.from_dict(values["spec"]))
                    for child, _, tensor in list(layer.stored_tensors()):
                        stored = reader.get_tensor(f"{name}:{child}")
                        if child == "bias":
                            layer.set_bias(stored)
                        else:
                            tensor.copy_(stored)
                    result[name] = (layer, LayerReport.from_dict(values["report"]))
        except (SafetensorError, OSError, ValueError, KeyError, TypeError, RuntimeError, ConfigError) as error:
            raise CorruptArtifact(
                f"{file}: damaged ({first_line(error)}); remove it to compute the block again"
            ) from error
        return result

    def _file(self, index: int) -> Path:
        return self.folder / f"block_{index:04d}.safetensors"


def save_written(folder: Path, ids_ST: Tensor, key: str) -> None:
    """Keep calibration windows that the original wrote.

    Args:
        folder: the work folder; made if missing.
        ids_ST: the windows.
        key: what they depend on.

    Raises:
        ArtifactError: the folder cannot be written.
    """
    temporary = (folder / WRITTEN_FILE).with_suffix(".writing")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        save_file({"ids": ids_ST.contiguous()}, temporary, metadata={"key": key})
        temporary.replace(folder / WRITTEN_FILE)
    except (SafetensorError, OSError) as error:
        temporary.unlink(missing_ok=True)
        raise ArtifactError(f"{folder / WRITTEN_FILE}: cannot be written ({first_line(error)})") from error


def load_written(folder: Path, key: str) -> Tensor | None:
    """Return the windows that the original wrote, or None if it has yet to.

    Raises:
        ConfigError: they are of another run.
        CorruptArtifact: the file is damaged.
    """
    file = folder / WRITTEN_FILE
    if not file.is_file():
        return None
    try:
        with open_safetensors(file) as reader:
            found, ids_ST = (reader.metadata() or {}).get("key"), reader.get_tensor("ids")
    except (SafetensorError, OSError) as error:
        raise CorruptArtifact(f"{file}: damaged ({first_line(error)}); remove it to write the text again") from error
    if found != key:
        raise ConfigError(
            f"{folder}: holds text that was written for another run (other model, amounts or seed); "
            "choose another --work-dir, or remove it"
        )
    written_ST: Tensor = ids_ST
    return written_ST
