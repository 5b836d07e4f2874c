"""Makes an artifact of a model that OneBit's authors have published."""

import time
from pathlib import Path

from onebit_core.artifact.manifest import Report
from onebit_core.artifact.writer import ArtifactDraft, refuse_existing, write_artifact
from onebit_core.layers import QuantizedLinear
from onebit_core.model.published_onebit import open_published
from onebit_core.model.replace import replace_module
from onebit_core.progress import Watch

QUIET = Watch()
METHOD = "onebit"
"""What such an artifact's manifest says; it is none of METHODS, for we do not make such models."""


def import_onebit(model: str, out: Path, *, name: str | None = None, watch: Watch = QUIET) -> Path:
    """Write the artifact.

    Args:
        model: folder or hub id of a model as OneBit's code saves it, in safetensors.
        out: the folder to make; must not exist.
        name: to serve under; None for the folder's.
        watch: progress and cancellation.

    Returns:
        `out`.

    Raises:
        OnebitError: see onebit_core.errors; nothing half-written remains.
    """
    started = time.monotonic()
    refuse_existing(out)
    published = open_published(model)
    paths = list(published.linears())
    layers: dict[str, QuantizedLinear] = {}
    for done, path in enumerate(paths):
        watch.report("import", done, len(paths), layer=path)
        layers[path] = published.layer(path)
        replace_module(published.model, path, layers[path])
        published.store.release()
    watch.report("import", len(paths), len(paths))
    draft = ArtifactDraft(
        name=name or out.name,
        method=METHOD,
        settings={},
        nominal_bits=1.0,
        calibration={},
        reconstruction={},
        training={},
        allocation={},
        rotation="off",
        embedding_bits=16,
        layers=layers,
        report=Report(seconds={"import": round(time.monotonic() - started, 1)}),
    )
    watch.report("write", 0, 1)
    write_artifact(published, draft, out)
    watch.tell("write", 1, 1, artifact=str(out))  # the artifact is there: too late to cancel
    return out
