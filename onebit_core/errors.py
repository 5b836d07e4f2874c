"""Every exception of the core.

OnebitError
├── ConfigError            the request cannot be meant (unknown method or key, impossible value)
├── ModelError
│   ├── ModelNotFound          no such folder, file or hub id
│   ├── UnsupportedModel       an architecture without a row in model/blocks.py, or a foreign format
│   ├── BadWeight              a weight is NaN or infinite
│   └── NotEnoughMemory        the plan needs more memory than the machine has free
├── CalibrationError       the text is missing, unreadable or too short, or its activations find no room on disk
├── TrainingError          the loss is not finite
├── EvaluationError        the evaluation text cannot be used
├── ArtifactError
│   ├── UnsupportedFormat      written by a newer version, or not an artifact
│   └── CorruptArtifact        a tensor is missing, unexpected, or of the wrong shape
├── KernelError
│   └── BackendUnavailable     asked for by name, but not on this machine
└── Cancelled              a CancelToken was set; not a failure

A caller who wants "anything this package reports" catches OnebitError. A message names the thing, the value and
the remedy. Broken internal invariants are `assert`s, not members of this tree.
"""


class OnebitError(Exception):
    """Base of all reported errors."""


class ConfigError(OnebitError):
    """The request cannot be meant."""


class ModelError(OnebitError):
    """The original model cannot be used."""


class ModelNotFound(ModelError):
    """There is no such folder, file or hub id."""


class UnsupportedModel(ModelError):
    """The architecture or file format is not one we know."""


class BadWeight(ModelError):
    """A weight is NaN or infinite."""


class NotEnoughMemory(ModelError):
    """The plan needs more memory than the machine has free."""


class CalibrationError(OnebitError):
    """The calibration text is missing, unreadable or too short, or there is no room for what it makes."""


class TooLittleText(CalibrationError):
    """The calibration text is too short for the windows wanted."""


class TrainingError(OnebitError):
    """A training cannot go on."""


class EvaluationError(OnebitError):
    """The evaluation text cannot be used."""


class ArtifactError(OnebitError):
    """The artifact on disk cannot be used or written."""


class UnsupportedFormat(ArtifactError):
    """The artifact was written by a newer version, or is not an artifact."""


class CorruptArtifact(ArtifactError):
    """A tensor or file of the artifact is missing, unexpected, or of the wrong shape."""


class KernelError(OnebitError):
    """A kernel cannot run."""


class BackendUnavailable(KernelError):
    """The backend was asked for by name, but does not exist on this machine."""


class Cancelled(OnebitError):
    """The caller set the CancelToken; not a failure."""


def first_line(error: BaseException) -> str:
    """Return what another package's exception says, in one line: its first line, or its type if it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
