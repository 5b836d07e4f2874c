"""Scales learn a text, are written beside the artifact, and work row by row: others' rows are as if there were none."""

import json
from pathlib import Path

import pytest
import torch

from onebit_core.adapters.identity import read_adapter_info
from onebit_core.adapters.scales import AdapterSwitch, adapted_layers, read_scales
from onebit_core.artifact.reader import load_model, read_manifest
from onebit_core.errors import ArtifactError, Cancelled, ConfigError, CorruptArtifact, TooLittleText, UnsupportedFormat
from onebit_core.pipeline.adapt import adapt_artifact
from onebit_core.progress import Watch
from tests.support.adapted import TEXT, adapting, written_text
from tests.support.quantized import SETTINGS, quantize_tiny
from tests.support.tiny_model import save_tiny_model
from tests.support.trained import StopsAt

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return written_text(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module")
def artifact(tmp_path_factory, tiny_llama):
    return quantize_tiny(tiny_llama, tmp_path_factory.mktemp("artifact") / "small", "svid")


@pytest.fixture(scope="module")
def adapter(tmp_path_factory, artifact, text):
    out = tmp_path_factory.mktemp("adapter") / "mill"
    adapt_artifact(adapting(artifact, text), out)
    return out


def loss_of(model, ids) -> float:
    """Return the next token's cross-entropy, by other means than the training has."""
    logits = model(input_ids=ids, use_cache=False).logits[0, :-1].double().log_softmax(-1)
    return -float(logits.gather(1, ids[0, 1:, None]).mean())


@pytest.mark.parametrize("method", SETTINGS)
def test_an_adapter_of_every_format_says_the_text_better(tiny_llama, tmp_path, text, method):
    """Its loss on text not seen falls, as much as it says of itself; the artifact is untouched."""
    artifact = quantize_tiny(tiny_llama, tmp_path / "artifact", method)
    before = {file.name: file.read_bytes() for file in artifact.iterdir()}
    info = adapt_artifact(adapting(artifact, text), tmp_path / "mill")
    start, end = info.training["held_out_loss"]
    assert end < start
    assert {file.name: file.read_bytes() for file in artifact.iterdir()} == before
    loaded = load_model(artifact, dtype="float32")
    ids = torch.tensor([loaded.tokenizer(TEXT[:300])["input_ids"]])
    plain = loss_of(loaded.model, ids)
    switch = AdapterSwitch(loaded.model, CPU)
    switch.add("mill", read_scales(tmp_path / "mill", read_adapter_info(tmp_path / "mill")))
    assert loss_of(loaded.model, ids) == plain
    switch.rows = torch.ones(ids.shape[1], dtype=torch.int64)
    assert loss_of(loaded.model, ids) < plain


def test_rows_of_a_batch_take_their_own_adapters(artifact, adapter, text, tmp_path):
    """Two adapters and none in one forward give what each gives alone; rows without are bit for bit the base's."""
    adapt_artifact(adapting(artifact, text, name="other", seed=5, scale_rate=0.2), tmp_path / "other")
    loaded = load_model(artifact, dtype="float32")
    switch = AdapterSwitch(loaded.model, CPU)
    layers = adapted_layers(loaded.model)
    name, layer = next(iter(layers.items()))
    x_1TI = torch.randn(1, 6, layer.in_features, generator=torch.Generator().manual_seed(0))
    plain = layer(x_1TI)
    scales = [read_scales(folder, read_adapter_info(folder))[name].float() for folder in (adapter, tmp_path / "other")]
    for folder in (adapter, tmp_path / "other"):
        switch.add(folder.name, read_scales(folder, read_adapter_info(folder)))
    switch.rows = torch.tensor([0, 1, 2, 2, 0, 1])
    mixed = layer(x_1TI)
    for row, which in enumerate(switch.rows.tolist()):
        expected = plain[0, row] if which == 0 else plain[0, row] * scales[which - 1]
        assert torch.equal(mixed[0, row], expected)
    assert (switch.index(""), switch.index("mill"), switch.index("other")) == (0, 1, 2)


def test_experts_are_left_out(tmp_path, text):
    """They see tokens in their router's order; everything else is scaled."""
    artifact = quantize_tiny(save_tiny_model(tmp_path / "model", architecture="qwen3_moe"), tmp_path / "small", "svid")
    info = adapt_artifact(adapting(artifact, text), tmp_path / "mill")
    scales = read_scales(tmp_path / "mill", info)
    assert scales
    assert not any("experts" in name for name in scales)
    assert info.training["held_out_loss"][1] < info.training["held_out_loss"][0]


@pytest.mark.parametrize("looks", [1, 5, 9, 14])
def test_a_stopped_adapter_goes_on_to_the_same_bytes(artifact, adapter, text, tmp_path, looks):
    """Nothing half-written is left, and the second run continues."""
    out, work = tmp_path / "mill", tmp_path / "work"
    with pytest.raises(Cancelled):
        adapt_artifact(adapting(artifact, text), out, watch=Watch(cancel=StopsAt(looks)), work=work)
    assert not out.exists()
    assert adapt_artifact(adapting(artifact, text), out, work=work).sha256 == read_adapter_info(adapter).sha256
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_an_adapter_says_what_it_is(artifact, adapter, text):
    """Base, layers, settings that count, and the text's fingerprint."""
    info = read_adapter_info(adapter)
    manifest = read_manifest(artifact)
    assert (info.name, info.base_name, info.base_sha256) == ("mill", manifest.name, manifest.sha256)
    assert info.layers == len(adapted_layers(load_model(artifact).model))
    assert list(info.training["fingerprints"]) == [str(text)]
    assert "sign_rate" not in info.training
    info.check_base("whatever it is called", manifest.sha256)
    with pytest.raises(ConfigError, match="train it again"):
        info.check_base("another", "0" * 64)


@pytest.mark.parametrize(
    ("values", "error", "named"),
    [
        ({"text": ["self:"]}, ConfigError, "self:"),
        ({"text": []}, ConfigError, "training.text"),
        ({"steps": 0}, ConfigError, "training.steps"),
        ({"sign_rate": 0.5}, ConfigError, "training.sign_rate"),
        ({"tokens": 4096}, ConfigError, "context"),
        ({"tokens": 512, "samples": 4000}, TooLittleText, "windmill"),
        ({"name": "a:b"}, ConfigError, "adapter name 'a:b'"),
        ({"name": ""}, ConfigError, "adapter name"),
        ({"name": "x" * 65}, ConfigError, "adapter name"),
    ],
)
def test_what_cannot_be_meant_is_refused(artifact, text, tmp_path, values, error, named):
    """By name, and nothing is left behind."""
    with pytest.raises(error, match=named):
        adapt_artifact(adapting(artifact, text, **values), tmp_path / "mill")
    assert not list(tmp_path.iterdir())


def test_a_folder_that_exists_is_not_overwritten(artifact, adapter, text):
    """Before anything is trained."""
    with pytest.raises(ArtifactError, match="exists already"):
        adapt_artifact(adapting(artifact, text), adapter)


def spoil(folder: Path, adapter: Path, file: str, content: bytes) -> Path:
    folder.mkdir()
    for source in adapter.iterdir():
        (folder / source.name).write_bytes(content if source.name == file else source.read_bytes())
    return folder


def test_damaged_adapters_are_refused(adapter, tmp_path):
    """Whatever is missing, cut, swapped or newer, in one sentence."""
    info = json.loads((adapter / "adapter.json").read_text())
    scales = (adapter / "adapter.safetensors").read_bytes()
    with pytest.raises(UnsupportedFormat, match=r"adapter\.json is missing"):
        read_adapter_info(tmp_path)
    for number, (content, error) in enumerate(
        [
            (b"{", CorruptArtifact),
            (b"[]", UnsupportedFormat),
            (json.dumps({**info, "format_version": 2}).encode(), UnsupportedFormat),
            (json.dumps({**info, "layers": "many"}).encode(), CorruptArtifact),
            (json.dumps({key: info[key] for key in info if key != "base_sha256"}).encode(), CorruptArtifact),
        ]
    ):
        with pytest.raises(error):
            read_adapter_info(spoil(tmp_path / str(number), adapter, "adapter.json", content))
    whole = read_adapter_info(adapter)
    for name, content in (("cut", scales[:-1]), ("empty", b"")):
        with pytest.raises(CorruptArtifact):
            read_scales(spoil(tmp_path / name, adapter, "adapter.safetensors", content), whole)


def test_scales_of_another_model_are_refused(adapter, tmp_path):
    """As soon as they meet the layers."""
    other = save_tiny_model(tmp_path / "model", num_layers=1)
    switch = AdapterSwitch(load_model(quantize_tiny(other, tmp_path / "small", "svid")).model, CPU)
    with pytest.raises(CorruptArtifact, match="not for the layers"):
        switch.add("mill", read_scales(adapter, read_adapter_info(adapter)))
