"""The engine over packed layers: what it serves is what transformers would generate from the same artifact."""

import pytest
import torch

from onebit_core.artifact.reader import load_model
from onebit_core.pipeline.import_onebit import import_onebit
from service.engine.types import EngineConfig
from tests.support.backends import backends_on
from tests.support.generated import generated
from tests.support.inline_engine import InlineEngine, greedy
from tests.support.published_onebit import save_published
from tests.support.quantized import quantize_tiny
from tests.support.tiny_model import save_tiny_model

ON_CPU = [pytest.param("cpu", *backend.values, marks=backend.marks) for backend in backends_on("cpu")]
ON_CUDA = [
    pytest.param("cuda", *backend.values, marks=[pytest.mark.gpu, *backend.marks]) for backend in backends_on("cuda")
]


@pytest.mark.parametrize("embedding_bits", [4, 8])
@pytest.mark.parametrize(("device", "backend"), [*ON_CPU, *ON_CUDA])
def test_sixteen_prompts_together_equal_generate(tiny_llama, tmp_path, device, backend, embedding_bits):
    """Token for token, greedy, float32, mixed lengths, with embedding and head in few bits."""
    artifact = quantize_tiny(tiny_llama, tmp_path / "artifact", "pb_llm", embedding_bits=embedding_bits)
    assert_serves_what_generate_gives(artifact, device, backend)


@pytest.mark.parametrize(("device", "backend"), [*ON_CPU, *ON_CUDA])
def test_a_mixture_of_experts_is_served_from_its_bits(tmp_path, device, backend):
    """Sixteen prompts share a step, and the router sends their tokens to different experts: no token changes."""
    folder = save_tiny_model(tmp_path / "model", architecture="qwen3_moe")
    artifact = quantize_tiny(folder, tmp_path / "artifact", "gptq")
    assert_serves_what_generate_gives(artifact, device, backend)


@pytest.mark.parametrize("method", ["rtn", "svid"])
@pytest.mark.parametrize("architecture", ["mistral", "gemma2", "gemma3", "phi", "phi3"])
def test_windows_caps_and_fused_projections_are_served_from_bits(tmp_path, architecture, method):
    """Integer and sign layers in models that are not like Llama, sequences past the window: no token changes."""
    folder = save_tiny_model(tmp_path / "model", architecture=architecture)
    artifact = quantize_tiny(folder, tmp_path / "artifact", method)
    assert_serves_what_generate_gives(artifact, "cpu", "auto")


@pytest.mark.parametrize(("device", "backend"), [*ON_CPU, *ON_CUDA])
def test_a_model_of_onebits_authors_is_served_from_its_bits(tmp_path, device, backend):
    """Layers that end in a LayerNorm, which no fused step knows."""
    published, _ = save_published(tmp_path / "published")
    artifact = import_onebit(str(published), tmp_path / "artifact")
    assert_serves_what_generate_gives(artifact, device, backend)


def assert_serves_what_generate_gives(artifact, device, backend):
    prompts = [list(range(5, 8 + 3 * index)) for index in range(16)]
    model = load_model(artifact, device=device, dtype="float32", backend=backend).model
    loader = EngineConfig(artifact=str(artifact)).loader
    engine = InlineEngine(artifact, loader=loader, device=device, dtype="float32", backend=backend)
    results = engine.run([greedy(index, prompt, 12) for index, prompt in enumerate(prompts)])
    for prompt, result in zip(prompts, results, strict=True):
        assert result.token_ids == generated(model, prompt, 12, eos_token_id=-1)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no CUDA device")
@pytest.mark.parametrize("architecture", ["llama", "mistral", "gemma2"])
def test_recorded_steps_give_the_same_tokens_on_a_gpu(tmp_path, architecture):
    """CUDA graphs against plain steps, crowds of sixteen that shrink, windows and soft caps."""
    folder = save_tiny_model(tmp_path / "model", architecture=architecture)
    artifact = quantize_tiny(folder, tmp_path / "artifact", "svid")
    requests = [greedy(index, list(range(5, 8 + 3 * index)), 6 + 2 * index) for index in range(16)]
    loader = EngineConfig(artifact=str(artifact)).loader
    plain, recorded = (
        InlineEngine(artifact, loader=loader, device="cuda", dtype="float32", decode_graphs=on) for on in (False, True)
    )
    assert "decode graphs" in recorded.info.backend
    expected = [result.token_ids for result in plain.run(requests)]
    assert [result.token_ids for result in recorded.run(requests)] == expected
