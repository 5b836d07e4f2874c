"""Prompts that begin alike share what was computed of them, and nobody's tokens change by it."""

import random

import pytest

from service.engine.types import FinishReason, GenerationRequest, SamplingParams
from tests.support.inline_engine import InlineEngine, greedy
from tests.support.plain_loader import NAN_TOKEN, TRAP_LOADER
from tests.support.tiny_model import save_tiny_model

pytestmark = pytest.mark.integration

NUM_NEW = 12
PAGE_SIZE = 16
SMALL_POOL = {"kv_cache_bytes": 1 << 17, "max_model_len": 128, "max_batched_tokens": 24}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("model"), tied=False)


@pytest.fixture(scope="module")
def family():
    """Prompts that begin alike for 0 to 80 tokens and go on differently."""
    numbers = random.Random(2)
    common = [numbers.randrange(256) for _ in range(80)]
    lengths = [(80, 1), (80, 17), (64, 5), (63, 9), (48, 0), (31, 30), (16, 1), (15, 3), (0, 40), (80, 9)]
    return [common[:shared] + [numbers.randrange(256) for _ in range(own)] for shared, own in lengths]


@pytest.fixture(scope="module")
def solo(folder, family):
    """What each prompt gives alone, in an engine that remembers nothing."""
    engine = InlineEngine(folder, prefix_caching=False)
    results = [engine.run([greedy(0, prompt, NUM_NEW)])[0].token_ids for prompt in family]
    assert engine.stats.prefix_cache_queries == 0
    return results


def run_counted(engine, requests):
    """Run requests; returns their tokens, how many tokens were computed, and how many each found cached."""
    first = len(engine.reports)
    results = engine.run(requests)
    reports = engine.reports[first:]
    cached = {}
    for event in (event for report in reports for event in report.events):
        cached.setdefault(event.request_id, event.num_cached_tokens)
    computed = sum(report.stats.iteration_tokens for report in reports)
    return [result.token_ids for result in results], computed, [cached[request.request_id] for request in requests]


def test_a_hit_computes_the_rest_and_draws_the_same(folder, family, solo):
    """The second time, only what lies after the last full page of the prompt is computed."""
    engine = InlineEngine(folder)
    for prompt, expected in zip(family, solo, strict=True):
        engine.run([greedy(0, prompt, NUM_NEW)])
        [tokens], computed, [cached] = run_counted(engine, [greedy(0, prompt, NUM_NEW)])
        assert tokens == expected
        assert cached == (len(prompt) - 1) // PAGE_SIZE * PAGE_SIZE
        assert computed == len(prompt) - cached + NUM_NEW - 1
    assert engine.stats.kv_cache_usage == 0


@pytest.mark.parametrize("config", [{}, {"page_size": 7}, {"max_batched_tokens": 8}, SMALL_POOL], ids=str)
def test_prompts_that_begin_alike_draw_what_they_draw_alone(folder, family, solo, config):
    """Whatever is shared by whom, in one step or over two rounds, in a pool that holds all or few of them."""
    engine = InlineEngine(folder, **config)
    for _ in range(2):
        tokens, _, cached = run_counted(engine, [greedy(index, prompt, NUM_NEW) for index, prompt in enumerate(family)])
        assert tokens == solo
    assert sum(cached) > 0
    assert engine.stats.prefix_cache_hits >= sum(cached)
    assert engine.stats.kv_cache_usage == 0


def test_the_next_turn_of_a_chat_is_mostly_a_hit(folder, family):
    """Question and answer of the turn before are found, and the next answer is what a fresh engine says."""
    engine, fresh = InlineEngine(folder), InlineEngine(folder, prefix_caching=False)
    chat = family[1]
    for _ in range(3):
        [answer], _, [cached] = run_counted(engine, [greedy(0, chat, 21)])
        assert answer == fresh.run([greedy(0, chat, 21)])[0].token_ids
        spoken = len(chat) + len(answer) - 1  # the last token was drawn and never computed
        chat = chat + answer + [7, 8, 9]
    [_], _, [cached] = run_counted(engine, [greedy(0, chat, 1)])
    assert cached == spoken // PAGE_SIZE * PAGE_SIZE


def test_equal_seeds_draw_equal_tokens_from_a_hit(folder, family):
    """Sampled tokens depend on the seed and not on where the prompt's keys came from."""

    def sampled(index, prompt):
        sampling = SamplingParams(max_tokens=NUM_NEW, temperature=0.9, seed=index, ignore_eos=True)
        return GenerationRequest(request_id=str(index), prompt_token_ids=tuple(prompt), sampling=sampling)

    requests = [sampled(index, prompt) for index, prompt in enumerate(family)]
    engine = InlineEngine(folder)
    miss, _, _ = run_counted(engine, requests)
    hit, _, cached = run_counted(engine, requests)
    assert hit == miss
    assert cached == [(len(prompt) - 1) // PAGE_SIZE * PAGE_SIZE for prompt in family]


def test_another_salt_computes_everything(folder, family):
    """Nothing tells a tenant what another has asked."""
    engine = InlineEngine(folder)

    def salted(salt):
        sampling = SamplingParams(max_tokens=2, temperature=0.0, ignore_eos=True)
        return GenerationRequest(request_id="r", prompt_token_ids=tuple(family[0]), sampling=sampling, cache_salt=salt)

    cached = [run_counted(engine, [salted(salt)])[2][0] for salt in ("a", "b", "a", "")]
    assert cached == [0, 0, 80, 0]


def test_what_a_poisoned_prompt_computed_serves_nobody(folder, family, solo):
    """Pages of a sequence that ended in NaN are not found again; its good beginning, shared before, does no harm."""
    engine = InlineEngine(folder, loader=TRAP_LOADER, max_batched_tokens=32)
    expected = engine.run([greedy(0, family[0], NUM_NEW)])[0].token_ids
    poisoned = greedy(9, [*family[0][:40], NAN_TOKEN, *family[0][:40]], NUM_NEW)
    for _ in range(2):
        [result] = engine.run([poisoned])
        assert result.finish_reason == FinishReason.ERROR
    [tokens], _, [cached] = run_counted(engine, [greedy(0, family[0], NUM_NEW)])
    assert tokens == expected
    assert cached == 0


@pytest.mark.parametrize("seed", range(6))
def test_any_mix_draws_what_each_draws_alone(folder, family, solo, seed):
    """Random companies, priorities, aborts and a tiny pool: who ends draws its solo tokens, and the pool is full."""
    numbers = random.Random(seed)
    engine = InlineEngine(folder, **SMALL_POOL)
    for _ in range(3):
        chosen = [numbers.randrange(len(family)) for _ in range(numbers.randrange(2, 14))]
        requests = [
            GenerationRequest(
                request_id=str(index),
                prompt_token_ids=tuple(family[which]),
                sampling=SamplingParams(max_tokens=NUM_NEW, temperature=0.0, ignore_eos=True),
                priority=numbers.randrange(-1, 2),
                cache_salt=numbers.choice(["", "", "s"]),
            )
            for index, which in enumerate(chosen)
        ]
        engine.abort_after = {str(index): numbers.randrange(1, NUM_NEW) for index in range(0, len(chosen), 4)}
        for index, (which, result) in enumerate(zip(chosen, engine.run(requests), strict=True)):
            assert result.token_ids == solo[which][: len(result.token_ids)]
            whole = result.finish_reason == FinishReason.LENGTH and len(result.token_ids) == NUM_NEW
            assert whole or (result.finish_reason == FinishReason.ABORT and index % 4 == 0)
        assert engine.stats.kv_cache_usage == 0
        engine.loop._scheduler.check_integrity()


def test_priority_decides_who_goes_first(folder, family):
    """With one place, the most important request starts first though it came last."""
    engine = InlineEngine(folder, max_num_sequences=1)
    sampling = SamplingParams(max_tokens=2, temperature=0.0, ignore_eos=True)
    requests = [
        GenerationRequest(request_id=name, prompt_token_ids=tuple(family[7]), sampling=sampling, priority=priority)
        for name, priority in [("late", 5), ("middle", 0), ("first", -5)]
    ]
    engine.run(requests)
    started = [event.request_id for report in engine.reports for event in report.events if event.queue_seconds]
    assert started == ["first", "middle", "late"]
