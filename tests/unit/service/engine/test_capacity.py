"""Pool and context fit the memory that was given, or the engine says what to change."""

import pytest
import torch

from service.engine.capacity import plan_capacity
from service.engine.model_shape import ModelShape
from service.engine.types import EngineConfig
from service.errors import EngineStartFailed

PAGE_BYTES = 2 * 4 * 16 * 2 * 8 * 4  # keys and values, layers, tokens, heads, head size, float32


def make_shape(max_positions=512, limited_by="the model's max_position_embeddings"):
    return ModelShape(
        num_layers=4,
        num_heads=2,
        num_kv_heads=2,
        head_dim=8,
        dtype=torch.float32,
        max_positions=max_positions,
        limited_by=limited_by,
    )


def plan(num_pages, shape=None, **config):
    shape = shape or make_shape()
    return plan_capacity(shape, EngineConfig(artifact="x", kv_cache_bytes=num_pages * PAGE_BYTES, **config))


def test_the_memory_is_cut_into_pages():
    """As many whole pages as fit."""
    assert plan(100).num_pages == 100


def test_keys_in_8_bit_hold_more_pages():
    """A head of 8 takes 8 bytes and a scale of 4 in place of 32, so the same memory holds 8/3 as many pages."""
    assert plan(90, kv_cache_dtype="int8").num_pages == 240


def test_no_more_pages_than_all_sequences_could_use():
    """Two sequences of 512 tokens need 64 pages, so the rest of the memory is left alone."""
    assert plan(10_000, max_num_sequences=2).num_pages == 64


def test_the_context_is_the_models_by_default():
    """Nothing is shortened, and nothing noted, when the model's own length fits."""
    capacity = plan(100)
    assert (capacity.max_model_len, capacity.notes) == (512, ())


def test_a_small_pool_shortens_the_default_context_and_says_so():
    """One sequence must fit alone: ten pages hold 160 tokens."""
    capacity = plan(10)
    assert capacity.max_model_len == 160
    assert "shortened from 512 to 160" in capacity.notes[0]


def test_what_limits_the_context_besides_the_model_is_noted():
    """A window shorter than the model's length is worth a sentence."""
    capacity = plan(100, make_shape(max_positions=64, limited_by="the model's sliding attention window"))
    assert capacity.max_model_len == 64
    assert "sliding attention window" in capacity.notes[0]


@pytest.mark.parametrize(
    ("num_pages", "max_positions", "asked", "words"),
    [
        (100, 512, 513, "max_model_len=513 is over 512, the model's max_position_embeddings"),
        (10, 512, 161, "max_model_len=161 does not fit the KV cache: .* holds 160 tokens"),
        (0, 512, None, "holds no page"),
        (100, None, None, "set max_model_len"),
    ],
)
def test_what_cannot_fit_is_refused_with_the_remedy(num_pages, max_positions, asked, words):
    """Asking for more than model or memory have is an error, never a silent cut."""
    with pytest.raises(EngineStartFailed, match=words):
        plan(num_pages, make_shape(max_positions=max_positions), max_model_len=asked)


def test_the_asked_context_is_taken():
    """A context that fits is taken as it is."""
    assert plan(10, max_model_len=160).max_model_len == 160
