"""A training on disk: latents, Adam's moments, the best latents so far, and the curve; what it takes to go on.

    WORK/training.json                 fingerprint of the run and the step reached
    WORK/training_000250.safetensors   everything after step 250

A checkpoint appears at once (written beside, renamed), and the one before is removed only then.
"""

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from onebit_core.errors import ArtifactError, ConfigError, CorruptArtifact, first_line
from onebit_core.model.weights import open_safetensors

RUN_FILE = "training.json"


@dataclass(frozen=True, kw_only=True)
class TrainingState:
    """A moment of a training.

    Attributes:
        step: steps done.
        tensors: by name; see Trainer.
        curve: what was measured so far.
    """

    step: int
    tensors: dict[str, Tensor]
    curve: list[dict[str, Any]]


class Checkpoints:
    """The checkpoints of one run.

    Raises:
        ConfigError: the folder holds those of another run, or cannot be made.
    """

    def __init__(self, folder: Path, fingerprint: Mapping[str, Any]) -> None:
        self.folder, self.fingerprint = folder, dict(fingerprint)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for leftover in folder.glob("training*.writing"):  # of a process that was killed
                _remove(leftover)
            self.step = self._step_reached()
        except (OSError, ValueError, KeyError) as error:
            raise ConfigError(
                f"{folder}: cannot hold checkpoints ({first_line(error)}); choose another --work-dir, or remove it"
            ) from error

    def _step_reached(self) -> int:
        """Return the last checkpoint's step, 0 where there is none."""
        file = self.folder / RUN_FILE
        if not file.is_file():
            return 0
        values = json.loads(file.read_text(encoding="utf-8"))
        if values["run"] != self.fingerprint:
            raise ConfigError(
                f"{self.folder}: holds checkpoints of another training (other artifact, settings, text or version); "
                "choose another --work-dir, or remove it"
            )
        return int(values["step"])

    def save(self, state: TrainingState) -> None:
        """Keep a moment, in place of the one before.

        Raises:
            ArtifactError: the folder cannot be written.
        """
        file, before = self._file(state.step), self._file(self.step)
        temporary = file.with_suffix(".writing")
        try:
            save_file(state.tensors, temporary, metadata={"curve": json.dumps(state.curve)})
            temporary.replace(file)
            temporary = (self.folder / RUN_FILE).with_suffix(".writing")
            temporary.write_text(json.dumps({"run": self.fingerprint, "step": state.step}), encoding="utf-8")
            temporary.replace(self.folder / RUN_FILE)
            if before != file:
                before.unlink(missing_ok=True)
        except (SafetensorError, OSError) as error:
            temporary.unlink(missing_ok=True)
            raise ArtifactError(f"{file}: cannot be written ({first_line(error)})") from error
        self.step = state.step

    def load(self, values: Mapping[str, Tensor]) -> TrainingState | None:
        """Return the last moment kept, on the device of the values that are trained, or None.

        Raises:
            CorruptArtifact: its file is missing or damaged.
        """
        if not self.step:
            return None
        file, device = self._file(self.step), next(iter(values.values())).device
        try:
            with open_safetensors(file, str(device)) as reader:
                curve = json.loads((reader.metadata() or {})["curve"])
                tensors = {name: reader.get_tensor(name) for name in reader.keys()}  # noqa: SIM118  (no mapping)
        except (SafetensorError, OSError, ValueError, KeyError) as error:
            raise CorruptArtifact(
                f"{file}: damaged ({first_line(error)}); remove {self.folder / RUN_FILE} to train from the start"
            ) from error
        return TrainingState(step=self.step, tensors=tensors, curve=curve)

    def _file(self, step: int) -> Path:
        return self.folder / f"training_{step:06d}.safetensors"


def _remove(leftover: Path) -> None:
    """Remove a file, or the folder of a training that was spread; another process may be faster."""
    if leftover.is_dir():
        shutil.rmtree(leftover, ignore_errors=True)
    else:
        leftover.unlink(missing_ok=True)
