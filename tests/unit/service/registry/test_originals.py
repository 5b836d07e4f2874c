"""Originals beside artifacts: what a path is, how a dense model is described, and what is refused by name."""

import asyncio
import json

import pytest
from safetensors.torch import load_file

from onebit_core.artifact.identity import ModelKind, kind_of
from onebit_core.artifact.manifest import ORIGINAL
from onebit_core.artifact.reader import read_manifest
from onebit_core.errors import OnebitError, UnsupportedFormat, UnsupportedModel
from service.engine.types import ARTIFACT_LOADER, ORIGINAL_LOADER
from service.metrics import Metrics
from service.registry.artifacts import read_identity
from service.registry.registry import ModelRegistry
from service.registry.shelf import resolve_artifact
from service.settings import Settings
from tests.support.paper_artifact import write_paper_artifact
from tests.support.quantized import quantize_tiny
from tests.support.scripted_engine import ScriptedStarter
from tests.support.tiny_model import save_tiny_model


def test_an_original_is_served_beside_an_artifact(tmp_path):
    """Under its folder's name, by a loader of dense weights; metrics say that it is one and what it weighs."""
    artifact, original = write_paper_artifact(tmp_path / "paper"), save_tiny_model(tmp_path / "tiny model")
    starter, metrics = ScriptedStarter(), Metrics()
    registry = ModelRegistry(Settings(artifacts=["x"], score_share=1.0), metrics, starter)
    asyncio.run(registry.load_initial([str(artifact), str(original)]))
    assert [model.name for model in registry.models()] == ["paper", "tiny-model"]
    assert [engine.config.loader for engine in starter.engines] == [ARTIFACT_LOADER, ORIGINAL_LOADER]
    page = metrics.page().decode()
    assert 'method="original",model="tiny-model"' in page
    tensors = load_file(original / "model.safetensors").values()
    assert 'onebit_artifact_weight_bytes{model="tiny-model",part="full_precision"} ' in page
    assert registry.get("tiny-model").manifest.bytes_by_part == {"full_precision": sum(each.nbytes for each in tensors)}


def test_an_original_has_the_hash_that_its_artifacts_name(tmp_path):
    """So that whoever compares the two knows that they belong together."""
    original = save_tiny_model(tmp_path / "model")
    manifest = asyncio.run(read_identity(original)).manifest
    made = read_manifest(quantize_tiny(original, tmp_path / "artifact"))
    assert (manifest.method, manifest.bits.whole_model) == (ORIGINAL, 32.0)
    assert (manifest.source.sha256, manifest.source.parameters) == (made.source.sha256, made.source.parameters)
    assert manifest.source.architecture == made.source.architecture == "LlamaForCausalLM"


def test_a_path_is_what_its_files_say(tmp_path):
    """An artifact whose manifest was lost is not taken for an original, whose packed weights would load as noise."""
    artifact, original = write_paper_artifact(tmp_path / "artifact"), save_tiny_model(tmp_path / "model")
    (tmp_path / "model.gguf").touch()
    kinds = [kind_of(path) for path in (artifact, original, tmp_path / "model.gguf")]
    assert kinds == [ModelKind.ARTIFACT, ModelKind.FOLDER, ModelKind.GGUF]
    config = json.loads((original / "config.json").read_text())
    (original / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "onebit"}}))
    for path in (original, tmp_path, tmp_path / "nothing"):
        with pytest.raises(UnsupportedFormat, match=r"manifest\.json is missing"):
            kind_of(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"no model", "does not start like a GGUF file"), (b"GGUF" + b"\xff" * 64, "transformers cannot convert it")],
)
def test_a_gguf_file_that_cannot_be_converted_is_refused_by_name(tmp_path, monkeypatch, content, message):
    """Here or in the child process that converts, the sentence is about the file, and no folder is left behind."""
    monkeypatch.setenv("HOME", str(tmp_path))
    file = tmp_path / "broken.gguf"
    file.write_bytes(content)
    with pytest.raises(UnsupportedModel, match=f"broken.gguf: {message}"):
        asyncio.run(read_identity(file))
    assert list((tmp_path / ".cache").glob("onebit/originals/*")) == []


def test_an_original_without_weights_is_refused(tmp_path):
    """Before an engine is started."""
    original = save_tiny_model(tmp_path / "model")
    (original / "model.safetensors").unlink()
    starter = ScriptedStarter()
    with pytest.raises(OnebitError, match="safetensors"):
        asyncio.run(ModelRegistry(Settings(artifacts=["x"]), Metrics(), starter).load(original))
    assert starter.engines == []


def test_an_admin_may_load_a_gguf_file_inside_of_the_root(tmp_path):
    """A folder or a .gguf file; other files are not there, and nothing outside is."""
    file = tmp_path / "model.gguf"
    file.touch()
    (tmp_path / "model.bin").touch()
    settings = Settings(artifacts=[], artifact_root=tmp_path)
    assert resolve_artifact(settings, "model.gguf") == file.resolve()
    with pytest.raises(Exception, match=r"no GGUF file 'model\.bin'"):
        resolve_artifact(settings, "model.bin")
