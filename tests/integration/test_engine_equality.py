"""What the engine computes for many requests together equals what each gets alone, and what `generate()` gives."""

import random

import pytest

from service.engine.types import FinishReason, GenerationRequest, SamplingParams
from tests.support.generated import generated
from tests.support.inline_engine import InlineEngine, greedy
from tests.support.plain_loader import load_plain
from tests.support.tiny_model import EOS_ID, save_tiny_model

pytestmark = pytest.mark.integration

PROMPT_LENGTHS = (1, 2, 3, 5, 8, 13, 16, 17, 30, 31, 32, 33, 60, 90, 5, 44)
NUM_NEW = 20
SMALL_POOL = {"kv_cache_bytes": 1 << 17, "max_model_len": 128}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def prompts():
    numbers = random.Random(0)
    return [[numbers.randrange(256) for _ in range(length)] for length in PROMPT_LENGTHS]


def all_generated(folder, prompts, **options):
    """Return what transformers' own generate() gives for each prompt by itself."""
    model = load_plain(folder).model
    return [generated(model, prompt, NUM_NEW, **options) for prompt in prompts]


@pytest.fixture(scope="module")
def expected(folder, prompts):
    return all_generated(folder, prompts, eos_token_id=None)


@pytest.mark.parametrize(
    "config", [{}, {"max_batched_tokens": 16}, {"page_size": 7}, {"max_num_sequences": 3}], ids=str
)
def test_sixteen_mixed_prompts_equal_generate(folder, prompts, expected, config):
    """Greedy float32 output is generate()'s, token for token; whole prompts, chunks, odd pages or few places alike."""
    engine = InlineEngine(folder, **config)
    results = engine.run(greedy(index, prompt, NUM_NEW) for index, prompt in enumerate(prompts))
    assert [result.token_ids for result in results] == expected
    assert engine.stats.kv_cache_usage == 0


def test_output_is_the_same_when_sequences_are_preempted(folder, prompts, expected):
    """A pool that cannot hold everybody makes sequences wait and start again, and changes no token."""
    engine = InlineEngine(folder, **SMALL_POOL)
    results = engine.run(greedy(index, prompt, NUM_NEW) for index, prompt in enumerate(prompts))
    assert engine.stats.num_preemptions > 0
    assert [result.token_ids for result in results] == expected


def test_a_sequence_ends_where_generate_ends(tmp_path, prompts):
    """At an end-of-sequence token the engine stops with STOP, the token counted and not shown; otherwise at LENGTH."""
    folder = save_tiny_model(tmp_path, tied=False, seed=3)
    frequent = max(range(320), key=[t for row in all_generated(folder, prompts, eos_token_id=None) for t in row].count)
    model = load_plain(folder).model
    model.generation_config.eos_token_id = [EOS_ID, frequent]
    model.generation_config.save_pretrained(folder)
    results = InlineEngine(folder).run(
        greedy(index, prompt, NUM_NEW, ignore_eos=False) for index, prompt in enumerate(prompts)
    )
    assert [result.token_ids for result in results] == all_generated(folder, prompts)
    ends = {result.finish_reason for result in results}
    assert ends == {FinishReason.STOP, FinishReason.LENGTH}
    for result in results:
        assert (result.finish_reason == FinishReason.STOP) == (result.token_ids[-1] in (EOS_ID, frequent))


def seeded(index, prompt):
    """Return a sampled request; every third cuts its nucleus, every fourth is greedy."""
    sampling = SamplingParams(
        max_tokens=NUM_NEW,
        temperature=0.0 if index % 4 == 3 else 0.9,
        top_p=0.8 if index % 3 == 0 else 1.0,
        seed=1000 + index,
        ignore_eos=True,
    )
    return GenerationRequest(request_id=f"seeded-{index}", prompt_token_ids=tuple(prompt), sampling=sampling)


def test_a_seed_gives_the_same_tokens_in_any_company(folder, prompts):
    """Seeded sampling in a batch, alone, in another order and under preemption draws the same tokens."""
    requests = [seeded(index, prompt) for index, prompt in enumerate(prompts)]
    engine = InlineEngine(folder)
    together = [result.token_ids for result in engine.run(requests)]
    alone = [engine.run([request])[0].token_ids for request in requests]
    crowded = InlineEngine(folder, **SMALL_POOL, max_batched_tokens=24)
    preempted = [result.token_ids for result in crowded.run(requests[::-1])][::-1]
    assert crowded.stats.num_preemptions > 0
    assert together == alone == preempted


def test_different_seeds_give_different_texts_and_no_seed_is_random(folder, prompts):
    """Equal requests differ by their seeds; without a seed they differ too."""

    def request(name, seed):
        sampling = SamplingParams(max_tokens=NUM_NEW, temperature=1.5, seed=seed, ignore_eos=True)
        return GenerationRequest(request_id=name, prompt_token_ids=tuple(prompts[3]), sampling=sampling)

    results = InlineEngine(folder).run([request("a", 1), request("b", 2), request("c", None), request("d", None)])
    assert len({tuple(result.token_ids) for result in results}) == 4


def test_text_is_the_decoding_of_the_tokens(folder, prompts):
    """The pieces of a completion, put together, are the decoding of all its tokens."""
    engine = InlineEngine(folder)
    whole = [prompt for prompt in prompts if prompt[-1] < 0x80]  # no character is left unfinished at their end
    for result in engine.run(greedy(index, prompt, 40) for index, prompt in enumerate(whole)):
        assert result.text == engine.tokenizer.decode(result.token_ids, skip_special_tokens=True)


def test_a_stop_string_ends_the_text_before_it(folder, prompts):
    """The completion ends where the stop string begins, and no piece holds any of it."""
    engine = InlineEngine(folder)
    whole = engine.run([greedy(0, prompts[12], 60)])[0].text
    stop = whole[len(whole) // 2 :][:3]
    result = engine.run([greedy(0, prompts[12], 60, stop=(stop,))])[0]
    assert result.finish_reason == FinishReason.STOP
    assert result.text == whole[: whole.index(stop)]


def test_the_context_ends_a_sequence(folder, prompts):
    """A completion that reaches max_model_len ends with LENGTH, however many tokens were asked for."""
    result = InlineEngine(folder, max_model_len=64).run([greedy(0, prompts[12], 500)])[0]
    assert (len(result.token_ids), result.finish_reason) == (64 - len(prompts[12]), FinishReason.LENGTH)


def test_bfloat16_serves_as_well(folder, prompts):
    """In bfloat16 every request ends with its tokens; which they are is up to rounding."""
    engine = InlineEngine(folder, dtype="bfloat16")
    results = engine.run(greedy(index, prompt, NUM_NEW) for index, prompt in enumerate(prompts))
    assert engine.info.dtype == "bfloat16"
    assert [len(result.token_ids) for result in results] == [NUM_NEW] * len(prompts)
