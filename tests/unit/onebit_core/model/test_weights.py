"""What is read of an original: what is asked for, from one file or many, and not held longer than needed."""

import os
import shutil
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from benchmarks.big_model import Shape, write_model
from onebit_core.artifact.reader import read_manifest
from onebit_core.errors import UnsupportedModel
from onebit_core.model.loading import open_original
from onebit_core.model.weights import INDEX_FILE
from tests.support.quantized import quantize_tiny

SHAPE = Shape(hidden=64, intermediate=128, heads=4, kv_heads=2, blocks=3, vocab=320)


@pytest.fixture
def sharded(tmp_path):
    """A random bfloat16 model of five files."""
    return write_model(tmp_path / "sharded", SHAPE)


def test_shards_are_the_model_that_one_file_would_be(sharded, tmp_path):
    """Quantized to the same bytes."""
    whole = tmp_path / "whole"
    shutil.copytree(sharded, whole, ignore=shutil.ignore_patterns("*.safetensors", INDEX_FILE))
    tensors = {name: tensor for file in sharded.glob("*.safetensors") for name, tensor in load_file(file).items()}
    save_file(tensors, whole / "model.safetensors", metadata={"format": "pt"})
    shas = [
        read_manifest(quantize_tiny(folder, tmp_path / f"{folder.name}-out", "gptq", embedding_bits=4)).sha256
        for folder in (sharded, whole)
    ]
    assert len(list(sharded.glob("*.safetensors"))) == 5
    assert shas[0] == shas[1]


def test_sizes_are_known_without_reading(sharded):
    """From the headers: shape, and bytes in the dtype on disk."""
    store = open_original(str(sharded)).store
    assert store.shape("model.layers.1.mlp.down_proj.weight") == (64, 128)
    assert store.num_bytes("model.layers.1.mlp.down_proj.weight") == 2 * 64 * 128
    assert sum(store.num_bytes(name) for name in store.names()) == 2 * store.num_parameters()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self/maps")
def test_files_are_mapped_only_while_a_block_is_read(sharded):
    """Neither before, nor after blocks and embedding are in memory as float32."""
    original = open_original(str(sharded))

    def mapped() -> bool:
        return str(sharded) in Path("/proc/self/maps").read_text()

    assert not mapped()
    tensor = original.store.tensor("model.layers.0.mlp.up_proj.weight")
    assert mapped()
    original.store.release()
    assert mapped()  # somebody holds a tensor
    del tensor
    original.load_outer("cpu")
    original.load_block(0, "cpu")
    assert not mapped()


def test_what_is_outside_of_the_blocks_can_be_left_out_and_released(sharded):
    """The head is read only where logits are asked for; after a release nothing is held, and it can be read again."""
    original = open_original(str(sharded))
    embedding, head = original.model.get_input_embeddings(), original.model.get_output_embeddings()
    original.load_outer("cpu", head=False)
    assert (embedding.weight.is_meta, head.weight.is_meta) == (False, True)
    first = embedding.weight.clone()
    original.release_outer()
    assert all(parameter.is_meta for parameter in original.model.parameters())
    original.load_outer("cpu")
    assert torch.equal(embedding.weight, first)
    assert not head.weight.is_meta


@pytest.mark.parametrize("damage", ["missing", "misshapen"])
def test_a_tensor_that_is_wrong_is_found_when_a_model_is_opened(sharded, damage):
    """In the last block: before the others are quantized, not after."""
    name, file = "model.layers.2.mlp.up_proj.weight", sharded / "block-00002.safetensors"
    tensors = load_file(file)
    tensors[name] = tensors[name][:3].clone()
    if damage == "missing":
        del tensors[name]
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(UnsupportedModel, match=name):
        open_original(str(sharded))


def test_weights_that_may_not_be_read_are_not_called_missing():
    """Transformers saves them for their owner alone; whoever else quantizes is told so."""
    with tempfile.TemporaryDirectory() as name:
        file = sorted(write_model(Path(name) / "model", SHAPE).glob("*.safetensors"))[1]
        for folder in (file.parent, file.parent.parent):
            folder.chmod(0o755)
        for other in file.parent.iterdir():
            other.chmod(0o644)
        file.chmod(0)
        owner = os.geteuid()
        if owner == 0:
            os.seteuid(65534)  # root may read everything
        try:
            with pytest.raises(UnsupportedModel, match=f"{file.name}.*Permission denied"):
                open_original(file.parent)
        finally:
            os.seteuid(owner)
