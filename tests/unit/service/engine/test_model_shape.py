"""What the engine asks of a model before it pages its keys, and which models it refuses."""

import pytest
import torch
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

from service.engine.model_shape import PROBE_TOKENS, exposed, model_shape
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


def test_a_sliding_window_is_read_off_and_limits_nothing():
    """Windows are masked, so the context is the model's own; in the self check they are small enough to hide a key."""
    shape = model_shape(MistralForCausalLM(MistralConfig(**SIZES, sliding_window=100)).eval())
    assert (shape.max_positions, shape.windows) == (256, (100,))
    assert 1 < shape.exposed_windows[0] < len(PROBE_TOKENS)


def test_windows_and_caps_are_set_back_after_they_were_exposed():
    """Config and modules hold what they held, also when the work inside failed."""
    model = Gemma2ForCausalLM(Gemma2Config(**SIZES)).eval()

    def fail():
        with exposed(model):
            assert model.config.sliding_window == model.model.layers[0].self_attn.sliding_window == 5
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    held = [(layer.self_attn.sliding_window, layer.self_attn.attn_logit_softcapping) for layer in model.model.layers]
    assert held == [(4096, 50.0), (None, 50.0)]
    assert (model.config.sliding_window, model.config.attn_logit_softcapping) == (4096, 50.0)


def test_a_rotary_embedding_that_changes_with_length_limits_the_context():
    """Dynamic scaling would let one request's length change another's positions, so it is not reached."""
    rope = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0, "original_max_position_embeddings": 64}
    shape = model_shape(LlamaForCausalLM(LlamaConfig(**SIZES, rope_parameters=rope)).eval())
    assert shape.max_positions == 64


def test_one_of_several_rotary_embeddings_that_changes_with_length_limits_the_context():
    """Gemma 3 has one for each kind of layer."""
    rope = {
        "full_attention": {"rope_type": "dynamic", "factor": 4.0, "original_max_position_embeddings": 64},
        "sliding_attention": {"rope_type": "default"},
    }
    shape = model_shape(Gemma3ForCausalLM(Gemma3TextConfig(**SIZES, rope_parameters=rope)).eval())
    assert shape.max_positions == 64


def test_layers_of_different_sizes_are_refused():
    """One page has to fit the keys of every layer."""
    model = LlamaForCausalLM(LlamaConfig(**SIZES)).eval()
    attention = model.model.layers[1].self_attn
    attention.k_proj, attention.v_proj = torch.nn.Linear(32, 8), torch.nn.Linear(32, 8)
    attention.num_key_value_groups = 4
    with pytest.raises(EngineStartFailed, match="attention layers of different shapes"):
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


@pytest.mark.parametrize("forgotten", ["sliding_window", "attn_logit_softcapping"])
def test_a_forgotten_window_or_cap_is_seen_at_the_start(tmp_path, forgotten):
    """Though the check has fewer tokens than a real window, and scores far below a real cap."""
    config = Gemma2Config(**SIZES, sliding_window=4096, attn_logit_softcapping=50.0, query_pre_attn_scalar=1)
    torch.manual_seed(0)
    model = Gemma2ForCausalLM(config).eval().requires_grad_(requires_grad=False)
    for parameter in model.parameters():
        parameter.mul_(8.0)
    runner = Runner(model, EngineConfig(artifact="tiny", kv_cache_bytes=1 << 20))
    for layer in model.model.layers:
        setattr(layer.self_attn, forgotten, None)
    with pytest.raises(EngineStartFailed, match="Gemma2ForCausalLM fails the engine's self check"):
        runner.self_check()
