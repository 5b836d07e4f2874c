"""load_model refuses whatever is missing, unexpected, misshapen, damaged or newer."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from onebit_core.artifact.reader import load_model, read_manifest, read_report
from onebit_core.errors import (
    ArtifactError,
    BackendUnavailable,
    ConfigError,
    CorruptArtifact,
    UnsupportedFormat,
)
from tests.support.quantized import quantize_tiny

SIGNS = "model.layers.0.mlp.up_proj.signs"


@pytest.fixture(scope="module")
def good(tiny_llama, tmp_path_factory):
    return quantize_tiny(tiny_llama, tmp_path_factory.mktemp("good") / "artifact", "pb_llm")


@pytest.fixture
def artifact(good, tmp_path):
    return shutil.copytree(good, tmp_path / "artifact")


def rewrite(artifact, change):
    """Change the tensors of an artifact."""
    file = artifact / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def edit_json(file, change):
    """Change a JSON file of an artifact."""
    values = json.loads(file.read_text())
    change(values)
    file.write_text(json.dumps(values))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors.pop(SIGNS), f"'{SIGNS}' is missing"),
        (lambda tensors: tensors.update(extra=torch.zeros(1)), "'extra' is unexpected"),
        (lambda tensors: tensors.update({SIGNS: tensors[SIGNS][:, :-1].contiguous()}), f"'{SIGNS}' is I32"),
        (lambda tensors: tensors.update({SIGNS: tensors[SIGNS].long()}), f"'{SIGNS}' is I64"),
    ],
)
def test_wrong_tensors_are_named(artifact, change, message):
    """Missing, unexpected, misshapen and mistyped tensors are refused before anything is loaded."""
    rewrite(artifact, change)
    with pytest.raises(CorruptArtifact) as caught:
        load_model(artifact)
    assert message in str(caught.value)


def test_a_flipped_bit_is_noticed(artifact):
    """The weights are compared with the manifest's hash."""
    file = artifact / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(CorruptArtifact, match="the hash is not the manifest's"):
        load_model(artifact)


@pytest.mark.parametrize("keep", [0, 5, 100, 5000, -10])
def test_a_truncated_file_is_refused(artifact, keep):
    """Cut anywhere, the file is refused with its name."""
    file = artifact / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(CorruptArtifact, match=r"model.safetensors"):
        load_model(artifact)


def test_a_newer_format_is_refused(artifact):
    """The message says to upgrade, or which version is read."""
    edit_json(artifact / "manifest.json", lambda values: values.update(format_version=99))
    with pytest.raises(UnsupportedFormat, match="format 99"):
        load_model(artifact)


@pytest.mark.parametrize("name", ["manifest.json", "report.json", "config.json"])
def test_broken_json_is_refused(artifact, name):
    """Not JSON, or JSON of another shape."""
    for text in ("{", "[]", '"x"', '{"a": 1}'):
        (artifact / name).write_text(text)
        with pytest.raises(ArtifactError):
            read_report(artifact) if name == "report.json" else load_model(artifact)


def test_an_unknown_layer_is_refused(artifact):
    """A layer path that the architecture lacks cannot be reached through config.json."""

    def change(values):
        layers = values["quantization_config"]["layers"]
        layers["model.layers.7.mlp.up_proj"] = layers["model.layers.0.mlp.up_proj"]

    edit_json(artifact / "config.json", change)
    with pytest.raises(CorruptArtifact, match=r"model.layers.7.mlp.up_proj"):
        load_model(artifact)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layers": ["a"]}, "layers of type list"),
        ({"embedding_bits": 5}, "embedding_bits 5"),
        ({"format_version": "1"}, "config.json"),
        ({"layers": {"model.embed_tokens": {"format": "sign", "in_features": 64, "out_features": 320}}}, "Embedding"),
        ({"layers": {SIGNS.removesuffix(".signs"): {"format": "sign", "in_features": 64, "out_features": 128,
                                                    "planes": 10**18}}}, "config.json"),
    ],
)  # fmt: skip
def test_an_impossible_quantization_config_is_refused(artifact, change, message):
    """Values of a wrong type or size are no traceback."""
    edit_json(artifact / "config.json", lambda values: values["quantization_config"].update(change))
    with pytest.raises(CorruptArtifact, match=message):
        load_model(artifact)


def test_salient_places_that_do_not_fit_their_codes_are_refused(artifact):
    """Kernels trust the index, so a reader does not."""
    bitmap = SIGNS.replace("signs", "salient.bitmap")
    rewrite(artifact, lambda tensors: tensors[bitmap].zero_())
    with pytest.raises(CorruptArtifact, match=r"up_proj.salient: the salient index names 0 places"):
        load_model(artifact, verify=False)


def test_a_foreign_folder_is_not_an_artifact(tiny_llama, tmp_path):
    """Plain models and empty folders are refused in one sentence."""
    for folder in (tiny_llama, tmp_path, tmp_path / "nowhere"):
        with pytest.raises(UnsupportedFormat, match="not an onebit artifact"):
            load_model(folder)


def test_choices_that_do_not_exist_are_refused(artifact):
    """Backends, dtypes and devices are checked by name."""
    with pytest.raises(BackendUnavailable, match="'fast' does not exist; available here: auto, reference, dense"):
        load_model(artifact, backend="fast")
    with pytest.raises(ConfigError, match="'int8' is not one of"):
        load_model(artifact, dtype="int8")
    if not torch.cuda.is_available():
        with pytest.raises(BackendUnavailable, match="no CUDA device"):
            load_model(artifact, device="cuda")


def test_reading_the_manifest_needs_no_weights(artifact):
    """Identity is cheap."""
    (artifact / "model.safetensors").unlink()
    assert read_manifest(artifact).method == "pb_llm"
