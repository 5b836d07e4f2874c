"""How adapters are named on the command line, and what becomes of one that is gone."""

import dataclasses

import pytest

from onebit_core.adapters.identity import INFO_FILE, AdapterInfo
from onebit_core.artifact.writer import write_json
from onebit_core.errors import ConfigError, UnsupportedFormat
from service.registry.adapters import adapters_of, read_adapters
from tests.support.paper_artifact import paper_manifest


def save(folder, base: str = "0" * 64):
    """Write what an adapter says about itself."""
    folder.mkdir(parents=True)
    write_json(folder / INFO_FILE, AdapterInfo(name="letters", base_name="m", base_sha256=base, layers=1, sha256="1"))
    return folder


@pytest.mark.parametrize("place", ["plain", "run=3/letters"])
def test_a_folder_is_read_whatever_its_name(tmp_path, place):
    """A sign behind a slash belongs to the folder."""
    folder = save(tmp_path / place)
    assert [(one.name, one.folder) for one in read_adapters([str(folder)])] == [("letters", folder)]
    assert [(one.name, one.folder) for one in read_adapters([f"mine={folder}"])] == [("mine", folder)]


def test_a_name_that_cannot_be_one_is_refused(tmp_path):
    """And so is one that is given twice."""
    folder = save(tmp_path / "letters")
    with pytest.raises(ConfigError, match="letters, digits"):
        read_adapters([f"a:b={folder}"])
    with pytest.raises(ConfigError, match="one name and one model"):
        read_adapters([str(folder), f"letters={folder}"])


def test_an_adapter_that_is_gone_keeps_no_model_from_loading(tmp_path, caplog):
    """It was there when the server started; a model that is loaded later does without it, with a warning."""
    manifest = dataclasses.replace(paper_manifest("m"), sha256="2" * 64)
    mine, others = save(tmp_path / "mine", "2" * 64), save(tmp_path / "others")
    arguments = [str(mine), str(others), str(tmp_path / "gone")]
    with pytest.raises(UnsupportedFormat, match="gone"):
        read_adapters(arguments)
    assert [one.folder for one in adapters_of(arguments, manifest)] == [mine]
    assert "gone" in caplog.text
