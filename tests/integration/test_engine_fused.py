"""Fused decoder blocks: which models have them, and that nothing but speed changes."""

import pytest

from onebit_core.artifact.reader import load_model
from onebit_core.kernels.cpu import why_unavailable
from service.engine.types import EngineConfig
from tests.support.generated import generated
from tests.support.inline_engine import InlineEngine, greedy
from tests.support.quantized import quantize_tiny
from tests.support.tiny_model import save_tiny_model

pytestmark = pytest.mark.skipif(why_unavailable() is not None, reason=f"no CPU kernels: {why_unavailable()}")

LOADER = EngineConfig(artifact="").loader
PROMPTS = [list(range(5, 8 + 5 * index)) for index in range(12)]


def engine_on(artifact, **config):
    return InlineEngine(artifact, loader=LOADER, device="cpu", **config)


def requests(**sampling):
    return [greedy(index, prompt, 10, **sampling) for index, prompt in enumerate(PROMPTS)]


@pytest.mark.parametrize("method", ["svid", "nanoquant", "pb_llm", "gptq", "lut2"])
@pytest.mark.parametrize("architecture", ["llama", "mistral", "qwen2", "qwen3"])
def test_fused_blocks_write_what_generate_writes(tmp_path, architecture, method):
    """Projections merged or not, chains, salient parts, biases, head norms, windows; prompts in chunks."""
    if architecture != "llama" and method not in ("svid", "nanoquant"):
        pytest.skip("formats are covered on llama")
    folder = save_tiny_model(tmp_path / "model", architecture=architecture)
    artifact = quantize_tiny(folder, tmp_path / "artifact", method)
    engine = engine_on(artifact, max_batched_tokens=24)
    assert "fused blocks" in engine.info.backend
    model = load_model(artifact, device="cpu", dtype="float32", backend="cpu").model
    for prompt, result in zip(PROMPTS, engine.run(requests()), strict=True):
        assert result.token_ids == generated(model, prompt, 10, eos_token_id=-1)


def test_alone_or_together_the_same_bits(tiny_llama, tmp_path):
    """Log probabilities are equal to the last bit, with a packed head, also where sequences had to start over."""
    artifact = quantize_tiny(tiny_llama, tmp_path / "artifact", "svid", embedding_bits=8)
    roomy = engine_on(artifact)
    alone = [roomy.run([request])[0] for request in requests(logprobs=2, temperature=1.0, seed=3)]
    crowded = engine_on(artifact, kv_cache_bytes=1 << 17, max_batched_tokens=32, max_model_len=128)
    together = crowded.run(requests(logprobs=2, temperature=1.0, seed=3))
    assert crowded.stats.num_preemptions > 0
    for one, other in zip(alone, together, strict=True):
        assert one.token_ids == other.token_ids
        assert one.logprobs == other.logprobs


@pytest.mark.parametrize(
    ("architecture", "method", "changes"),
    [
        ("gemma2", "svid", {}),
        ("llama", "svid", {"rotation": "all"}),
        ("llama", "svid", {"backend": "dense"}),
        ("llama", "svid", {"page_size": 8}),
        ("llama", "svid", {"fuse": False}),
    ],
    ids=["another family", "rotated layers", "another backend", "other pages", "not wanted"],
)
def test_other_models_keep_their_own_blocks(tmp_path, architecture, method, changes):
    """And are served all the same."""
    folder = save_tiny_model(tmp_path / "model", architecture=architecture)
    quantization = {key: value for key, value in changes.items() if key == "rotation"}
    config = {key: value for key, value in changes.items() if key != "rotation"}
    artifact = quantize_tiny(folder, tmp_path / "artifact", method, **quantization)
    engine = engine_on(artifact, **config)
    assert "fused" not in engine.info.backend
    assert all(len(result.token_ids) == 10 for result in engine.run(requests()))
