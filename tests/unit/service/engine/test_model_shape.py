"""What the engine asks of a model before it pages its keys, and which models it refuses."""

import pytest
import torch
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

from service.engine.model_shape import model_shape
from service.engine.runner import Runner
from service.engine.types import EngineConfig
from service.errors import EngineStartFailed
from tests.support.plain_loader import load_plain
from tests.support.tiny_model import save_tiny_model

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
}


@pytest.mark.parametrize(("architecture", "num_kv_heads"), [("llama", 2), ("qwen3", 2), ("opt", 4), ("gpt_neox", 4)])
def test_the_shape_is_read_off_the_model(tmp_path, architecture, num_kv_heads):
    """Layers, key heads, head size and length are found in every architecture, whatever its config calls them."""
    shape = model_shape(load_plain(str(save_tiny_model(tmp_path, architecture=architecture, num_layers=3))).model)
    assert (shape.num_layers, shape.num_kv_heads, shape.head_dim) == (3, num_kv_heads, 16)
    assert (shape.dtype, shape.max_positions) == (torch.float32, 512)


def test_a_sliding_window_limits_the_context():
    """Within its window the model is exact, so the window is the longest sequence."""
    shape = model_shape(MistralForCausalLM(MistralConfig(**SIZES, sliding_window=100)).eval())
    assert shape.max_positions == 100
    assert "sliding attention window" in shape.limited_by


def test_a_rotary_embedding_that_changes_with_length_limits_the_context():
    """Dynamic scaling would let one request's length change another's positions, so it is not reached."""
    rope = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0, "original_max_position_embeddings": 64}
    shape = model_shape(LlamaForCausalLM(LlamaConfig(**SIZES, rope_parameters=rope)).eval())
    assert shape.max_positions == 64


def test_a_soft_cap_is_refused_by_name():
    """Gemma 2 caps its scores, which paged attention does not compute."""
    model = Gemma2ForCausalLM(Gemma2Config(**SIZES)).eval()
    with pytest.raises(EngineStartFailed, match="Gemma2ForCausalLM asks attention for a soft cap"):
        model_shape(model)


def test_a_model_with_its_own_attention_is_refused():
    """Bloom does not go through AttentionInterface, so its keys cannot be paged."""
    model = BloomForCausalLM(BloomConfig(vocab_size=64, hidden_size=32, n_layer=2, n_head=4)).eval()
    with pytest.raises(EngineStartFailed, match="BloomForCausalLM does not compute attention through"):
        model_shape(model)


def test_a_model_whose_paged_logits_differ_is_refused(tmp_path):
    """The self check compares with the untouched model: here attention quietly forgets its scale."""
    model = load_plain(str(save_tiny_model(tmp_path))).model
    runner = Runner(model, EngineConfig(artifact="tiny", kv_cache_bytes=1 << 20))
    for layer in model.model.layers:
        layer.self_attn.scaling = 10.0
    with pytest.raises(EngineStartFailed, match="LlamaForCausalLM fails the engine's self check"):
        runner.self_check()
