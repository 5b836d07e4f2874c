"""Which adapters belong to a model: those of the settings that were trained on its weights."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from onebit_core.adapters.identity import AdapterInfo, check_adapter_name, read_adapter_info
from onebit_core.artifact.manifest import Manifest
from onebit_core.errors import ConfigError


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
        name, is_named, folder = argument.rpartition("=")
        place = Path(folder).expanduser()
        info = read_adapter_info(place)
        adapter = Adapter(name=name if is_named else info.name, folder=place, info=info)
        check_adapter_name(adapter.name)
        before = found.setdefault((info.base_sha256, adapter.name), adapter)
        if before is not adapter:
            raise ConfigError(
                f"adapter {adapter.name}: {before.folder} and {place} have one name and one model; "
                f"give one of them another, as in OTHER={place}"
            )
    return list(found.values())


def adapters_of(arguments: Sequence[str], manifest: Manifest) -> list[Adapter]:
    """Return the adapters that were trained on a model's weights; raises like `read_adapters`."""
    return [adapter for adapter in read_adapters(arguments) if adapter.info.base_sha256 == manifest.sha256]
