"""The engine's embeddings are what transformers' own model holds after its final norm, at the last token."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from onebit_core.artifact.reader import load_model
from service.engine.types import ARTIFACT_LOADER, FinishReason, GenerationRequest, SamplingParams
from tests.support.inline_engine import InlineEngine, greedy
from tests.support.plain_loader import load_plain
from tests.support.quantized import quantize_tiny
from tests.support.tiny_model import save_tiny_model

pytestmark = pytest.mark.integration

PROMPTS = [[7], list(range(5, 9)), list(range(40, 75)), list(range(100, 160)), list(range(40, 75))]


def embed(index, prompt):
    sampling = SamplingParams(max_tokens=0, temperature=0.0)
    return GenerationRequest(request_id=f"embed-{index}", prompt_token_ids=tuple(prompt), sampling=sampling, embed=True)


def last_hidden_state(model, prompt):
    """Of the decoder without its head, by one whole forward; length 1."""
    with torch.no_grad():
        return F.normalize(model.base_model(input_ids=torch.tensor([prompt])).last_hidden_state[0, -1], dim=-1)


def assert_embeds_like(engine, model):
    """Beside sequences that generate, in chunks, from cached pages, twice the same text."""
    requests = [embed(index, prompt) for index, prompt in enumerate(PROMPTS)]
    others = [greedy(index, range(30 + index, 60), 9) for index in range(3)]
    results = engine.run([requests[0], others[0], *requests[1:3], *others[1:], *requests[3:]])
    vectors = [result.embedding for result in results if result.embedding is not None]
    for vector, prompt in zip(vectors, PROMPTS, strict=True):
        actual = torch.from_numpy(np.frombuffer(vector, dtype="<f4").copy())
        torch.testing.assert_close(actual, last_hidden_state(model, prompt), rtol=2e-3, atol=2e-3)
    ends = [(result.finish_reason, result.token_ids) for result in results if result.embedding is not None]
    assert ends == [(FinishReason.STOP, [])] * len(PROMPTS)
    assert engine.stats.kv_cache_usage == 0


@pytest.mark.parametrize("architecture", ["llama", "gemma2", "opt", "gpt_neox", "phi"])
def test_embeddings_are_the_last_hidden_states(tmp_path, architecture):
    """Whatever norm stands before the head, and whether or not the model takes the rows that are wanted."""
    folder = save_tiny_model(tmp_path, architecture=architecture)
    engine = InlineEngine(folder, max_batched_tokens=24)
    assert engine.info.embedding_size == 64
    assert_embeds_like(engine, load_plain(folder).model)


@pytest.mark.parametrize("embedding_bits", [8, 16])
def test_a_packed_model_embeds_too(tmp_path, embedding_bits):
    """Through fused blocks and a tied head in few bits."""
    folder = save_tiny_model(tmp_path / "model")
    artifact = quantize_tiny(folder, tmp_path / "artifact", embedding_bits=embedding_bits)
    assert_embeds_like(InlineEngine(artifact, loader=ARTIFACT_LOADER), load_model(artifact, backend="dense").model)
