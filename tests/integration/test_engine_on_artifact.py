"""The engine over packed layers: what it serves is what transformers would generate from the same artifact."""

import pytest
import torch

from onebit_core.artifact.reader import load_model
from service.engine.types import EngineConfig
from tests.support.backends import backends_on
from tests.support.inline_engine import InlineEngine, greedy
from tests.support.quantized import quantize_tiny

ON_CPU = [pytest.param("cpu", *backend.values, marks=backend.marks) for backend in backends_on("cpu")]
ON_CUDA = [
    pytest.param("cuda", *backend.values, marks=[pytest.mark.gpu, *backend.marks]) for backend in backends_on("cuda")
]


@pytest.mark.parametrize(("device", "backend"), [*ON_CPU, *ON_CUDA])
def test_sixteen_prompts_together_equal_generate(tiny_llama, tmp_path, device, backend):
    """Token for token, greedy, float32, mixed lengths, with 8-bit embedding and head."""
    artifact = quantize_tiny(tiny_llama, tmp_path / "artifact", "pb_llm", embedding_bits=8)
    prompts = [list(range(5, 8 + 3 * index)) for index in range(16)]
    model = load_model(artifact, device=device, dtype="float32", backend=backend).model
    loader = EngineConfig(artifact=str(artifact)).loader
    engine = InlineEngine(artifact, loader=loader, device=device, dtype="float32", backend=backend)
    results = engine.run([greedy(index, prompt, 12) for index, prompt in enumerate(prompts)])
    for prompt, result in zip(prompts, results, strict=True):
        ids = torch.tensor([prompt], device=device)
        expected = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False, eos_token_id=-1
        )
        assert result.token_ids == expected[0, len(prompt) :].tolist()
