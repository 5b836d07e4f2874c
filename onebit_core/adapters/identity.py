"""What an adapter says about itself, read without torch: which artifact it belongs to, and how it was made.

Two files: `adapter.json` holds AdapterInfo, `adapter.safetensors` a float16 tensor [out_features] for every adapted
layer, named like the layer (scales.py).
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from onebit_core.config import StrictConfig
from onebit_core.errors import ArtifactError, ConfigError, CorruptArtifact, UnsupportedFormat

INFO_FILE = "adapter.json"
SCALES_FILE = "adapter.safetensors"
ADAPTER_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class AdapterInfo(StrictConfig):
    """An adapter's identity.

    Attributes:
        format_version: of these two files.
        name: what it is called unless somebody says otherwise.
        base_name: name of the artifact that it was trained on.
        base_sha256: of that artifact's weights; on others the scales mean nothing.
        layers: how many layers it scales.
        sha256: of the file of scales.
        training: settings, texts with their fingerprints, and the loss on windows held out before and after.
        versions: of the packages that made it.
    """

    name: str
    base_name: str
    base_sha256: str
    layers: int
    sha256: str
    training: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, Any] = field(default_factory=dict)
    format_version: int = ADAPTER_VERSION

    def check_base(self, name: str, sha256: str) -> None:
        """Refuse an artifact that the adapter was not trained on.

        Raises:
            ConfigError: with both names.
        """
        if sha256 != self.base_sha256:
            raise ConfigError(
                f"adapter {self.name}: trained on {self.base_name} ({self.base_sha256[:12]}), and the weights of "
                f"{name} are others ({sha256[:12]}); train it again on these"
            )


def read_adapter_info(folder: str | Path) -> AdapterInfo:
    """Read what an adapter says about itself.

    Raises:
        UnsupportedFormat: no adapter, or of a newer version.
        CorruptArtifact: the file is damaged.
        ArtifactError: it may not be read.
    """
    file = Path(folder) / INFO_FILE
    if not file.is_file():
        raise UnsupportedFormat(f"{folder}: not an adapter ({INFO_FILE} is missing)")
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ArtifactError(f"{file}: cannot be read ({error})") from error
    except ValueError as error:
        raise CorruptArtifact(f"{file}: not JSON ({error})") from error
    version = values.get("format_version") if isinstance(values, dict) else None
    if not isinstance(version, int) or version > ADAPTER_VERSION:
        raise UnsupportedFormat(
            f"{folder}: adapter format {version} cannot be read; this version reads up to {ADAPTER_VERSION}"
        )
    try:
        return AdapterInfo.from_dict(values)
    except ConfigError as error:
        raise CorruptArtifact(f"{file}: {error}") from error


def check_adapter_name(name: str) -> None:
    """Refuse a name that cannot stand behind a model's, as in `model:name`.

    Raises:
        ConfigError: it has other characters than letters, digits and . _ -, or more than 64.
    """
    if not name or len(name) > 64 or not all(c.isascii() and (c.isalnum() or c in "._-") for c in name):
        raise ConfigError(f"adapter name {name[:80]!r}: letters, digits and . _ - only, at most 64")
