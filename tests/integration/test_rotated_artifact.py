"""Rotated layers through the whole journey: quantized, trained, written, read back and served."""

import pytest
import torch

from onebit_core.artifact.reader import load_model, read_manifest
from onebit_core.layers import RotatedLinear, quantized_layers
from onebit_core.pipeline.run import quantize_model
from tests.support.backends import CPU_BACKENDS
from tests.support.quantized import quantize_tiny, tiny_config

IDS = torch.arange(3, 40)[None]


@pytest.fixture(scope="module", params=["gptq", "pb_llm", "ptq161"])
def artifact(request, tiny_llama, tmp_path_factory):
    out = tmp_path_factory.mktemp("rotated") / "artifact"
    return quantize_tiny(tiny_llama, out, request.param, rotation="all", reconstruction={"preset": "light"})


@pytest.mark.parametrize("backend", CPU_BACKENDS)
def test_rotated_layers_have_one_answer_on_all_backends(artifact, backend):
    assert read_manifest(artifact).rotation == "all"
    expected = load_model(artifact, backend="dense").model
    layers = [layer for _, layer in quantized_layers(expected)]
    assert layers
    assert all(isinstance(layer, RotatedLinear) for layer in layers)
    found = load_model(artifact, backend=backend).model(IDS).logits
    torch.testing.assert_close(found, expected(IDS).logits, atol=1e-2, rtol=1e-2)


def test_auto_is_remembered_and_a_stopped_run_goes_on(tiny_llama, tmp_path):
    config = tiny_config(tiny_llama, "gptq", rotation="auto")
    first = quantize_model(config, tmp_path / "first", work=tmp_path / "work")
    second = quantize_model(config, tmp_path / "second", work=tmp_path / "work")  # all blocks come from the folder
    assert read_manifest(first).rotation == "auto"
    assert read_manifest(first).sha256 == read_manifest(second).sha256
