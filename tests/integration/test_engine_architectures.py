"""Every architecture of docs/models.md is served as transformers computes it, past its sliding window too."""

import random

import pytest

from tests.support.generated import generated
from tests.support.inline_engine import InlineEngine, greedy
from tests.support.plain_loader import load_plain
from tests.support.tiny_model import ARCHITECTURES, WINDOW, save_tiny_model

pytestmark = pytest.mark.integration

PROMPT_LENGTHS = (1, 2, 3, 5, 8, 13, 16, 17, 23, 24, 25, 30, 33, 60, 90, 44)
NUM_NEW = 20
CONFIGS = {
    "long steps": {},
    "chunks": {"max_batched_tokens": 48},
    "small chunks and odd pages": {"max_batched_tokens": 10, "page_size": 7},
    "a small pool": {"kv_cache_bytes": 1 << 17, "max_model_len": 128},
}


@pytest.fixture(scope="module")
def prompts():
    numbers = random.Random(0)
    assert min(PROMPT_LENGTHS) < WINDOW - NUM_NEW < WINDOW < max(PROMPT_LENGTHS)
    return [[numbers.randrange(256) for _ in range(length)] for length in PROMPT_LENGTHS]


@pytest.fixture(scope="module", params=ARCHITECTURES)
def served(request, tmp_path_factory, prompts):
    """A folder, and what transformers' own generate() continues each prompt with."""
    folder = save_tiny_model(tmp_path_factory.mktemp("model"), architecture=request.param)
    model = load_plain(folder).model
    return folder, [generated(model, prompt, NUM_NEW, eos_token_id=None) for prompt in prompts]


@pytest.mark.parametrize("config", CONFIGS)
def test_greedy_tokens_equal_generate(served, prompts, config):
    """Nothing in the engine knows Llama: windows, soft caps, sinks, learned positions, fused projections, experts.

    Token for token in float32, from many prompts together, whatever their chunks and pages are, and when sequences are
    preempted and computed again.
    """
    folder, expected = served
    engine = InlineEngine(folder, **CONFIGS[config])
    results = engine.run(greedy(index, prompt, NUM_NEW) for index, prompt in enumerate(prompts))
    assert [result.token_ids for result in results] == expected
    assert (engine.stats.num_preemptions > 0) == (config == "a small pool")
    assert len({tuple(tokens) for tokens in expected}) > len(prompts) // 2  # the models do not say the same always
