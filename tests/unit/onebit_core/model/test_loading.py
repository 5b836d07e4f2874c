"""What an original must be: every row of the architecture table builds, and what cannot be used is named."""

import json
import shutil

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from onebit_core.errors import ModelNotFound, UnsupportedModel
from onebit_core.model.blocks import LAYOUTS, blocks_of, linear_names, linear_of
from onebit_core.model.loading import build_skeleton, find_folder, load_original, open_original

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
}


@pytest.fixture
def model(tiny_llama, tmp_path):
    return shutil.copytree(tiny_llama, tmp_path / "model")


@pytest.mark.parametrize("architecture", LAYOUTS)
def test_every_supported_architecture_builds_and_has_its_linears(architecture):
    """The paths in the table are those of the installed transformers."""
    skeleton = build_skeleton(getattr(transformers, architecture).config_class(**SIZES))
    assert type(skeleton).__name__ == architecture
    layout = LAYOUTS[architecture]
    block = blocks_of(skeleton, layout)[0]
    named = set(linear_names(block, layout))
    assert all(linear_of(block, name).in_features for name in named)
    assert named == {name for name, module in block.named_modules() if type(module) is torch.nn.Linear}


@pytest.mark.parametrize(
    "change",
    [
        {"architectures": None},
        {"architectures": "LlamaForCausalLM"},
        {"architectures": [3]},
        {"num_attention_heads": 0},
        {"hidden_size": "big"},
        {"hidden_size": -4},
        {"num_hidden_layers": 0},
        {"hidden_act": "nonsense"},
        {"model_type": "opt"},
        {"model_type": "unheard-of", "auto_map": {"AutoConfig": "evil.Config"}},
    ],
)
def test_a_config_that_makes_no_model_is_refused(model, change):
    """Whatever transformers trips over becomes one sentence about config.json."""
    values = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**values, **change}))
    with pytest.raises(UnsupportedModel, match=r"config\.json"):
        open_original(str(model))


@pytest.mark.parametrize("text", ["", "{}", "[]", "null", "{"])
def test_a_config_that_is_no_object_is_refused(model, text):
    """An interrupted download leaves such files."""
    (model / "config.json").write_text(text)
    with pytest.raises(UnsupportedModel, match=r"config\.json cannot be used"):
        open_original(str(model))


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"weight_map": ["a"]}', '{"weight_map": {"a": 3}}'])
def test_a_broken_index_is_refused(model, text):
    """The index file is named."""
    (model / "model.safetensors.index.json").write_text(text)
    with pytest.raises(UnsupportedModel, match=r"model\.safetensors\.index\.json: has no weight_map"):
        open_original(str(model))


def test_an_index_reaches_no_file_outside_of_the_model(model):
    """Folders in a file name are dropped."""
    shutil.copy(model / "model.safetensors", model.parent / "secret.safetensors")
    (model / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../secret.safetensors"}}')
    with pytest.raises(ModelNotFound, match="download is incomplete"):
        open_original(str(model))


def test_a_whole_original_has_all_its_tensors(model):
    """Transformers would fill a missing one with random numbers, and an evaluation would compare with noise."""
    name = "model.layers.1.mlp.up_proj.weight"
    tensors = load_file(model / "model.safetensors")
    wanted = tensors.pop(name)
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UnsupportedModel, match=f"no tensor '{name}'"):
        load_original(str(model))
    save_file({**tensors, name: wanted[:3]}, model / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UnsupportedModel, match="transformers cannot load it"):
        load_original(str(model))


@pytest.mark.parametrize("name", ["./not-there", "../not-there", "a--b/c", "~no-such-user/x", "a" * 5000, "a\0b"])
def test_a_name_that_leads_nowhere_is_refused(name):
    """Paths that are not there, impossible hub ids, impossible paths."""
    with pytest.raises(ModelNotFound):
        find_folder(name)


@pytest.mark.parametrize("content", [b"GGUF", b"GGUF" + bytes(60), b"GGUF\3\0\0\0" + b"\1" + bytes(15) + b"\xff" * 9])
def test_a_truncated_gguf_file_is_refused(tmp_path, monkeypatch, content):
    """Nothing of it stays in the cache."""
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "x.gguf").write_bytes(content)
    with pytest.raises(UnsupportedModel, match=r"x\.gguf: transformers cannot convert it"):
        find_folder(str(tmp_path / "x.gguf"))
    assert not list((tmp_path / ".cache" / "onebit" / "originals").iterdir())
