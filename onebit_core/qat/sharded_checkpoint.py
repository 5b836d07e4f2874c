"""A training on disk, of which every process writes its share; any number of processes can go on from it.

    WORK/training.json      fingerprint of the run, the step reached, the curve
    WORK/training_000250/   everything after step 250, in torch's format of distributed checkpoints

The folder has its name when it is whole, and the one before is removed only then. All processes must see it.
torch unpickles what the folder says of its files, so continue from work folders of your own only.
"""

import json
import pickle
import shutil
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from onebit_core.errors import ArtifactError, CorruptArtifact, first_line
from onebit_core.qat.checkpoint import RUN_FILE, Checkpoints, TrainingState
from onebit_core.qat.world import World

DAMAGED = (CheckpointException, OSError, ValueError, KeyError, EOFError, RuntimeError, pickle.UnpicklingError)
PER_VALUE = ("value", "best", "exp_avg", "exp_avg_sq")
"""What there is of every parameter, of its shape, and kept where it is."""


class ShardedCheckpoints(Checkpoints):
    """The checkpoints of one run; all processes call every method together."""

    def __init__(self, folder: Path, fingerprint: Mapping[str, Any]) -> None:
        super().__init__(folder, fingerprint)
        self.world = World()

    def save(self, state: TrainingState) -> None:
        """Keep a moment, in place of the one before.

        Raises:
            ArtifactError: a process cannot write.
        """
        place = self._file(state.step)
        temporary = place.with_suffix(".writing")
        self.world.from_first(partial(shutil.rmtree, temporary, ignore_errors=True))
        try:
            save(state.tensors, checkpoint_id=temporary)
        except (CheckpointException, OSError) as error:
            self.world.from_first(partial(shutil.rmtree, temporary, ignore_errors=True))
            raise ArtifactError(f"{place}: cannot be written ({first_line(error)})") from error
        problem = self.world.from_first(partial(self._publish, temporary, place, state))
        if problem:
            raise ArtifactError(f"{place}: cannot be written ({problem})")
        if self.world.any(not place.exists()):
            raise ArtifactError(f"{place}: some process does not see it; --work-dir must be on a disk that all see")
        self.step = state.step

    def _publish(self, temporary: Path, place: Path, state: TrainingState) -> str:
        """Give a whole folder its name; return what went wrong."""
        before = self._file(self.step)
        said = {"run": self.fingerprint, "step": state.step, "curve": state.curve}
        try:
            if place.exists():  # of this step, by a run that was stopped before it said so
                shutil.rmtree(place)
            temporary.replace(place)
            file = self.folder / RUN_FILE
            fresh = file.with_suffix(".writing")
            fresh.write_text(json.dumps(said), encoding="utf-8")
            fresh.replace(file)
        except OSError as error:
            return first_line(error)
        if before != place:
            shutil.rmtree(before, ignore_errors=True)
        return ""

    def load(self, values: Mapping[str, Tensor]) -> TrainingState | None:
        """Return the last moment kept, spread as the values are, or None.

        Raises:
            CorruptArtifact: its files are missing, damaged, or of other layers.
        """
        if not self.step:
            return None
        place = self._file(self.step)
        try:
            curve = json.loads((self.folder / RUN_FILE).read_text(encoding="utf-8"))["curve"]
            known = FileSystemReader(place).read_metadata().state_dict_metadata
            tensors = {key: _empty(key, entry, values) for key, entry in known.items()}
            load(tensors, checkpoint_id=place)
        except DAMAGED as error:
            raise CorruptArtifact(
                f"{place}: damaged ({first_line(error)}); remove {self.folder / RUN_FILE} to train from the start"
            ) from error
        return TrainingState(step=self.step, tensors=tensors, curve=curve)

    def _file(self, step: int) -> Path:
        return self.folder / f"training_{step:06d}"


def _empty(key: str, entry: object, values: Mapping[str, Tensor]) -> Tensor:
    """Return where a tensor of a checkpoint is read into."""
    if not isinstance(entry, TensorStorageMetadata):
        raise ValueError(f"{key!r} is no tensor")  # noqa: TRY004  (of the file, and reported as its damage)
    kind, _, name = key.partition(":")
    device = next(iter(values.values())).device
    if kind not in PER_VALUE:
        return torch.empty(entry.size, dtype=entry.properties.dtype, device="cpu" if not name else device)
    if name not in values or values[name].shape != entry.size:
        raise ValueError(f"it has {key!r} of shape {list(entry.size)}, which the layers have not")
    return torch.zeros_like(values[name].detach())
