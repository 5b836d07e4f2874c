"""An artifact above a size is several files with an index; whoever reads it sees the same model."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import onebit_core.hf  # noqa: F401  (registers our artifacts with transformers)
from onebit_core.artifact.reader import load_model
from onebit_core.artifact.weight_files import (
    INDEX_FILE,
    read_headers,
    save_weights,
    stored_tensors,
    weight_files,
    weights_sha256,
)
from onebit_core.errors import CorruptArtifact
from tests.support.quantized import quantize_tiny

IDS = torch.arange(5, 25)[None]
SHARD_BYTES = 20_000


@pytest.fixture(scope="module")
def whole(tmp_path_factory, tiny_llama):
    return quantize_tiny(tiny_llama, tmp_path_factory.mktemp("whole") / "artifact", "rtn", embedding_bits=4)


@pytest.fixture
def sharded(whole, tmp_path):
    """The same artifact, as a writer with a lower limit would have left it."""
    folder = shutil.copytree(whole, tmp_path / "sharded")
    tensors = {name: tensor.clone() for name, tensor in stored_tensors(folder)}
    (folder / "model.safetensors").unlink()
    save_weights(folder, tensors, SHARD_BYTES)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["sha256"] = weights_sha256(folder)
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def test_shards_keep_to_the_limit_and_hold_every_tensor_once(whole, sharded):
    """No file is above the limit by more than its header; the index names the file of each tensor."""
    files = weight_files(sharded)
    assert len(files) > 2
    total = f"{len(files):05d}"
    assert [file.name for file in files] == [f"model-{i + 1:05d}-of-{total}.safetensors" for i in range(len(files))]
    assert all(file.stat().st_size < SHARD_BYTES + 8192 for file in files)
    assert read_headers(sharded) == read_headers(whole)
    index = json.loads((sharded / INDEX_FILE).read_text())
    assert set(index["weight_map"]) == set(read_headers(whole))
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for _, tensor in stored_tensors(whole))


def test_both_forms_are_the_same_model(whole, sharded):
    """For load_model, which checks hashes, and for transformers."""
    expected = load_model(whole, backend="dense").model(IDS).logits
    assert torch.equal(load_model(sharded, backend="dense").model(IDS).logits, expected)
    model, info = AutoModelForCausalLM.from_pretrained(sharded, dtype=torch.float32, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert torch.equal(model(IDS).logits, expected)


def test_one_tensor_above_the_limit_has_a_file_of_its_own(tmp_path):
    """It cannot be cut."""
    tensors = {"a": torch.zeros(10), "big": torch.zeros(1000), "b": torch.zeros(10)}
    save_weights(tmp_path, tensors, 100)
    assert [list(load_file(file)) for file in weight_files(tmp_path)] == [["a"], ["big"], ["b"]]


@pytest.mark.parametrize("damage", ["missing", "truncated", "moved", "both", "index", "outside"])
def test_shards_that_do_not_belong_together_are_refused(whole, sharded, damage):
    """By the name of the file that is wrong."""
    first, second = weight_files(sharded)[:2]
    index = sharded / INDEX_FILE
    match damage:
        case "missing":
            second.unlink()
        case "truncated":
            second.write_bytes(second.read_bytes()[:-100])
        case "moved":
            shutil.copy(second, first)
        case "both":
            shutil.copy(whole / "model.safetensors", sharded)
        case "index":
            index.write_text("{")
        case "outside":
            first.rename(sharded.parent / "secret.safetensors")
            index.write_text(index.read_text().replace(first.name, "../secret.safetensors"))
    with pytest.raises(CorruptArtifact, match="safetensors"):
        load_model(sharded)


def test_a_shard_that_changed_is_not_the_manifests(sharded):
    """Bytes of the same shape, other values: the hash tells."""
    file = weight_files(sharded)[-1]
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(bytes(content))
    with pytest.raises(CorruptArtifact, match="hash is not the manifest's"):
        load_model(sharded)
