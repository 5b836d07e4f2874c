"""An original, described like an artifact: nothing was done to it, and that took all of its bits.

So whoever shows, serves or compares models need not ask which kind they have. The method is called `original`; bits are
those of the weight files, and the hash is over them: the `source.sha256` of every artifact that was made from them.
"""

from datetime import UTC, datetime
from pathlib import Path

from onebit_core.artifact.manifest import FORMAT_VERSION, ORIGINAL, BitsInfo, Manifest, SourceInfo
from onebit_core.model.loading import architecture_of, read_config
from onebit_core.model.weights import WeightStore


def describe_original(folder: Path, name: str, model: str) -> Manifest:
    """Read what a Hugging Face folder is; its weights are hashed.

    Args:
        folder: with config.json and safetensors.
        name: to serve it under.
        model: as the user named it.

    Raises:
        UnsupportedModel: transformers does not know it, or it holds no safetensors weights.
    """
    config = read_config(folder)
    store = WeightStore(folder)
    num_parameters = store.num_parameters()
    num_bytes = sum(store.num_bytes(tensor) for tensor in store.names())
    bits = 8 * num_bytes / num_parameters
    newest = max(file.stat().st_mtime for file in store.files)
    sha256 = store.sha256()
    return Manifest(
        format_version=FORMAT_VERSION,
        name=name,
        method=ORIGINAL,
        settings={},
        source=SourceInfo(
            model=model, sha256=sha256, architecture=architecture_of(config, folder), parameters=num_parameters
        ),
        calibration={},
        versions={},
        created=datetime.fromtimestamp(newest, UTC).isoformat(timespec="seconds"),
        bits=BitsInfo(linear_true=bits, linear_nominal=bits, whole_model=bits),
        bytes_by_part={"full_precision": num_bytes},
        sha256=sha256,
    )
