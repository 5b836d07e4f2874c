"""A model as OneBit's authors publish it becomes an artifact that computes what theirs does."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from onebit_core.artifact.reader import load_model, read_manifest
from onebit_core.errors import EvaluationError, UnsupportedModel
from onebit_core.evaluation.run import EvaluateConfig, evaluate_artifact
from onebit_core.layers import NormedLinear, quantized_layers
from onebit_core.pipeline.import_onebit import import_onebit
from tests.support.backends import CPU_BACKENDS
from tests.support.published_onebit import save_published

IDS = torch.arange(3, 40)[None]


@pytest.fixture(scope="module", params=["packed", "floating"])
def imported(request, tmp_path_factory):
    """An artifact, and the model it was made of."""
    folder = tmp_path_factory.mktemp(request.param)
    published, model = save_published(folder / "published", packed=request.param == "packed")
    return import_onebit(str(published), folder / "artifact"), model


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_logits_are_the_published_models(imported, backend):
    artifact, model = imported
    loaded = load_model(artifact, dtype="float32", backend=backend).model
    layers = [layer for _, layer in quantized_layers(loaded)]
    assert len(layers) == 14
    assert all(isinstance(layer, NormedLinear) for layer in layers)
    with torch.no_grad():
        torch.testing.assert_close(loaded(IDS).logits, model(IDS).logits, atol=2e-3, rtol=2e-3)


def test_bits_are_counted_as_written(imported):
    """A sign a weight, and two scales of 16 bits for every row and column."""
    manifest = read_manifest(imported[0])
    shapes = [(layer.out_features, layer.in_features) for _, layer in quantized_layers(load_model(imported[0]).model)]
    weights = sum(rows * columns for rows, columns in shapes)
    assert manifest.bits.linear_true == pytest.approx(1 + 16 * sum(map(sum, shapes)) / weights, abs=1e-3)
    assert (manifest.method, manifest.bits.linear_nominal) == ("onebit", 1.0)


def test_what_is_not_such_a_model_is_refused(tiny_llama, tmp_path):
    with pytest.raises(UnsupportedModel, match="model_type 'llama'; a model as OneBit's authors save it"):
        import_onebit(str(tiny_llama), tmp_path / "artifact")
    published, _ = save_published(tmp_path / "published")
    tensors = load_file(published / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight_scale"
    save_file({**tensors, name: tensors[name][:-1]}, published / "model.safetensors")
    with pytest.raises(UnsupportedModel, match=rf"{name}' has shape \[127\], expected \[128\]"):
        import_onebit(str(published), tmp_path / "artifact")
    del tensors[name]
    save_file(tensors, published / "model.safetensors")
    with pytest.raises(UnsupportedModel, match=name):
        import_onebit(str(published), tmp_path / "artifact")
    assert not (tmp_path / "artifact").exists()


def test_it_is_compared_only_with_a_model_that_is_named(imported, tiny_llama, tmp_path):
    (tmp_path / "text.txt").write_text("A model is compared with the one it was made from. " * 20)
    asked = {"texts": {"text": str(tmp_path / "text.txt")}, "windows": 2, "window_tokens": 64, "device": "cpu"}
    with pytest.raises(EvaluationError, match="is the compressed model itself; say with --original"):
        evaluate_artifact(imported[0], EvaluateConfig(**asked))
    (result,) = evaluate_artifact(imported[0], EvaluateConfig(**asked, original=str(tiny_llama))).texts
    assert result.kl_mean > 0
