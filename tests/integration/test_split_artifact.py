"""Split layers through the whole journey: written, read back, resumed, trained, and refused where they are damaged."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from onebit_core.artifact.reader import load_model, read_manifest
from onebit_core.errors import Cancelled, CorruptArtifact
from onebit_core.kernels import packed_backend
from onebit_core.layers import SplitLinear, quantized_layers, release_stored
from onebit_core.pipeline.run import quantize_model
from onebit_core.progress import CancelToken, ProgressEvent, Watch
from tests.support.quantized import quantize_tiny, tiny_config
from tests.support.tiny_model import save_tiny_model

IDS = torch.arange(3, 40)[None]
LAYER = "model.layers.0.mlp.up_proj"


@pytest.fixture(scope="module")
def good(tiny_llama, tmp_path_factory):
    return quantize_tiny(tiny_llama, tmp_path_factory.mktemp("good") / "artifact", "ptq161")


@pytest.fixture
def artifact(good, tmp_path):
    return shutil.copytree(good, tmp_path / "artifact")


def test_bytes_by_part_are_those_of_the_tensors(good):
    """Codes, signs, scales and a bit per column, by the names on disk."""
    tensors = load_file(good / "model.safetensors")
    parts = read_manifest(good).bytes_by_part
    ends = {"codes": ".parts.0.planes", "signs": ".parts.1.signs", "index": ".bitmap"}
    for part, end in ends.items():
        assert parts[part] == sum(tensor.nbytes for name, tensor in tensors.items() if name.endswith(end)) > 0
    assert parts["salient"] == 0


def test_a_served_model_needs_no_stored_tensors(good):
    """Packed and released, it still has its logits, and no split layer shares a product."""
    if packed_backend("cpu").why_unavailable() is not None:
        pytest.skip("the cpu backend cannot run here")
    expected = load_model(good, backend="reference").model(IDS).logits
    model = load_model(good, backend="cpu").model
    layers = [layer for _, layer in quantized_layers(model)]
    assert all(isinstance(layer, SplitLinear) and layer._shared is None for layer in layers)
    release_stored(model)
    assert all(buffer.is_meta for layer in layers for buffer in layer.buffers())
    torch.testing.assert_close(model(IDS).logits, expected, rtol=5e-3, atol=5e-3)


def test_an_index_that_contradicts_the_parts_is_refused(artifact):
    """Of the layer that is damaged."""
    file = artifact / "model.safetensors"
    tensors = load_file(file)
    tensors[f"{LAYER}.bitmap"].zero_()
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(CorruptArtifact, match=r"up_proj: the column index of a 128 x 64 matrix names 0 columns"):
        load_model(artifact, verify=False)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda spec: spec["parts"].pop(), "a split layer has 2, got 1"),
        (lambda spec: spec["parts"][0].update(in_features=17), "do not make up a matrix of 128 x 64"),
        (lambda spec: spec["parts"][0].update(bias=True), "no bias"),
        (lambda spec: spec["parts"][0].update(format="split"), "LayerSpec"),
        (lambda spec: spec["parts"].reverse(), r"tensor 'model.layers.0.mlp.up_proj.parts.0.planes' is unexpected"),
        (lambda spec: spec.update(parts="none"), "expected a list"),
    ],
)
def test_a_spec_that_contradicts_itself_or_the_file_is_refused(artifact, change, message):
    """Before a tensor is made of it."""
    file = artifact / "config.json"
    values = json.loads(file.read_text())
    change(values["quantization_config"]["layers"][LAYER])
    file.write_text(json.dumps(values))
    with pytest.raises(CorruptArtifact, match=message):
        load_model(artifact)


def test_a_resumed_run_gives_the_same_bytes(tmp_path):
    """Parts are kept under their own names in the work folder, trained or not."""
    model = save_tiny_model(tmp_path / "model", num_layers=2)
    changes = {"reconstruction": {"preset": "light", "epochs": 2}}
    undisturbed = quantize_tiny(model, tmp_path / "undisturbed", "ptq161", **changes)
    token = CancelToken()

    def stop(event: ProgressEvent) -> None:
        if event.stage == "quantize" and event.done == 1:
            token.cancel()

    config, work, out = tiny_config(model, "ptq161", **changes), tmp_path / "work", tmp_path / "resumed"
    with pytest.raises(Cancelled):
        quantize_model(config, out, watch=Watch(sink=stop, cancel=token), work=work)
    assert "mlp.up_proj:parts.1.signs" in load_file(work / "block_0000.safetensors")
    quantize_model(config, out, work=work)
    assert read_manifest(out).sha256 == read_manifest(undisturbed).sha256


def test_distillation_trains_the_scales_of_parts(tiny_llama, good, tmp_path):
    """Signs and codes stay, scales of both parts move."""
    trained = quantize_tiny(
        tiny_llama, tmp_path / "trained", "ptq161", reconstruction={"distill_epochs": 2, "distill_rate": 2e-3}
    )
    before, after = (load_file(path / "model.safetensors") for path in (good, trained))
    changed = {name.partition("_proj.")[2] for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"parts.0.scale", "parts.1.scale_in", "parts.1.scale_out"}
