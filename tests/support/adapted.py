"""An adapter of a tiny artifact, trained in seconds."""

from pathlib import Path

from onebit_core.pipeline.adapt import AdaptConfig

TEXT = "The windmill was to be finished by autumn, and the windmill was to run the threshing machine. " * 60


def adapting(artifact, source, name: str = "mill", **values) -> AdaptConfig:
    """Return a training of twelve steps."""
    usual = {"steps": 12, "batch": 2, "tokens": 32, "held_out": 2, "evaluate_every": 4, "scale_rate": 0.05}
    training = {**usual, "text": [str(source)], "dtype": "float32", **values}
    return AdaptConfig.from_dict({"artifact": str(artifact), "name": name, "training": training, "device": "cpu"})


def written_text(folder: Path) -> Path:
    """Write the text, and return where."""
    file = folder / "windmill.txt"
    file.write_text(TEXT)
    return file
