"""Which adapters belong to a model: those of the settings that were trained on its weights."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from onebit_core.adapters.identity import AdapterInfo, check_adapter_name, read_adapter_info
from onebit_core.artifact.manifest import Manifest
from onebit_core.errors import ArtifactError, ConfigError

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """One adapter that is to be served.

    Attributes:
        name: what it is called behind a model's name.
        folder: where it is.
        info: what it says about itself.
    """

    name: str
    folder: Path
    info: AdapterInfo


def read_adapters(arguments: Sequence[str]) -> list[Adapter]:
    """Read what adapters say about themselves.

    Args:
        arguments: FOLDER, or NAME=FOLDER for another name than the adapter's own.

    Raises:
        ArtifactError: a folder holds no adapter, or a damaged one.
        ConfigError: a name cannot be one, or is given twice for one model.
    """
    found: dict[tuple[str, str], Adapter] = {}
    for argument in arguments:
        adapter = _read(argument)
        check_adapter_name(adapter.name)
        before = found.setdefault((adapter.info.base_sha256, adapter.name), adapter)
        if before is not adapter:
            raise ConfigError(
                f"adapter {adapter.name}: {before.folder} and {adapter.folder} have one name and one model; "
                f"give one of them another, as in OTHER={adapter.folder}"
            )
    return list(found.values())


def _read(argument: str) -> Adapter:
    """Read FOLDER or NAME=FOLDER; where a slash comes before the sign, it is of the folder's own name."""
    name, is_named, folder = argument.partition("=")
    if not is_named or "/" in name:
        name, folder = "", argument
    place = Path(folder).expanduser()
    info = read_adapter_info(place)
    return Adapter(name=name or info.name, folder=place, info=info)


def adapters_of(arguments: Sequence[str], manifest: Manifest) -> list[Adapter]:
    """Return the adapters that were trained on a model's weights.

    All were read when the server started. One that can no longer be read, whose model may be another, is left out with
    a warning.

    Raises:
        ConfigError: see `read_adapters`.
    """
    readable = []
    for argument in arguments:
        try:
            _read(argument)
        except ArtifactError as error:
            logger.warning("adapter left out: %s", error, extra={"adapter": argument})
        else:
            readable.append(argument)
    return [adapter for adapter in read_adapters(readable) if adapter.info.base_sha256 == manifest.sha256]
