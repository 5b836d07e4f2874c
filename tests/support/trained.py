"""A training of seconds, and a token that stops it anywhere."""

from onebit_core.pipeline.train_artifact import TrainArtifactConfig
from onebit_core.progress import CancelToken

TEXT = "All animals are equal, but some bytes are more equal than others. Four bits good, one bit better. " * 60
"""Enough for some hundred windows of 32 bytes."""


def training(source: str, **values) -> dict:
    usual = {"steps": 12, "batch": 2, "tokens": 32, "held_out": 2, "evaluate_every": 4, "latent_rate": 0.02}
    return {**usual, "scale_rate": 5e-3, "text": [source], "dtype": "float32", **values}


def configure(artifact, source, **values) -> TrainArtifactConfig:
    return TrainArtifactConfig.from_dict(
        {"artifact": str(artifact), "training": training(source, **values), "device": "cpu"}
    )


class StopsAt(CancelToken):
    """A token that is found set when it is looked at for the n-th time."""

    def __init__(self, looks: int) -> None:
        super().__init__()
        self.looks = looks

    def raise_if_cancelled(self) -> None:
        self.looks -= 1
        if self.looks < 0:
            self.cancel()
        super().raise_if_cancelled()
