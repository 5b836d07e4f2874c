"""One request's misfortune is its own: its neighbours' tokens do not change, and its pages come back."""

import random

import pytest

from service.engine.types import FinishReason
from tests.support.inline_engine import InlineEngine, greedy
from tests.support.plain_loader import FAILING_TOKEN, NAN_TOKEN, TRAP_LOADER
from tests.support.tiny_model import save_tiny_model

pytestmark = pytest.mark.integration

NUM_NEW = 24


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("model"), tied=False)


@pytest.fixture
def engine(folder):
    return InlineEngine(folder, loader=TRAP_LOADER, max_batched_tokens=32)


@pytest.fixture(scope="module")
def healthy():
    """Requests that avoid the trapped tokens; what the model draws of them ends them like any other end."""
    numbers = random.Random(1)
    prompts = [[numbers.randrange(256) for _ in range(length)] for length in (3, 17, 40, 9)]
    return [greedy(index, prompt, NUM_NEW) for index, prompt in enumerate(prompts)]


@pytest.mark.parametrize("position", [0, 20, 49], ids=lambda position: f"poison at {position}")
def test_nan_fails_its_own_request_only(engine, healthy, position):
    """A prompt with a poisoned token ends with ERROR; the others get exactly what they get alone."""
    alone = [engine.run([request])[0] for request in healthy]
    assert {result.finish_reason for result in alone} == {FinishReason.LENGTH}
    prompt = [5] * 50
    prompt[position] = NAN_TOKEN
    *together, poisoned = engine.run([*healthy, greedy(9, prompt, NUM_NEW)])
    assert poisoned.finish_reason == FinishReason.ERROR
    assert "not finite" in poisoned.error
    assert (poisoned.text, poisoned.token_ids) == ("", [])
    assert together == alone
    assert engine.stats.kv_cache_usage == 0


def test_the_next_owner_of_a_poisoned_page_is_not_harmed(folder, healthy):
    """Pages that held NaN are handed on clean, even when their request was aborted before the NaN was seen."""
    engine = InlineEngine(folder, loader=TRAP_LOADER, max_batched_tokens=32, kv_cache_bytes=1 << 16, max_model_len=64)
    alone = [engine.run([request])[0] for request in healthy]
    poisoned = [greedy(20 + index, [NAN_TOKEN] * 50, 4) for index in range(4)]
    for _ in range(2):
        assert all(result.finish_reason == FinishReason.ERROR for result in engine.run(poisoned))
        assert engine.run(healthy) == alone


def test_a_step_that_raises_fails_its_sequences_and_the_engine_goes_on(engine, healthy):
    """The failing request takes along what was computed in the same step, and nothing after it."""
    alone = [engine.run([request])[0] for request in healthy]
    failed = engine.run([greedy(9, [1, FAILING_TOKEN], NUM_NEW), healthy[0]])
    assert [result.finish_reason for result in failed] == [FinishReason.ERROR] * 2
    assert "the failing token was computed" in failed[0].error
    assert engine.stats.num_failed_steps == 1
    assert engine.stats.kv_cache_usage == 0
    assert engine.run(healthy) == alone


def test_a_token_without_text_fails_its_own_request_only(engine, healthy):
    """A tokenizer that cannot decode one sequence's prompt, or what it draws, goes on for the others."""
    alone = [engine.run([request])[0] for request in healthy]
    elsewhere = {token for request in healthy for token in request.prompt_token_ids}
    elsewhere |= {token for result in alone[1:] for token in result.token_ids}
    textless = next(token for token in alone[0].token_ids if token not in elsewhere)
    decode = engine.loop._decode

    def picky(ids):
        if textless in ids:
            raise IndexError("piece id is out of range")
        return decode(ids)

    engine.loop._decode = picky
    drawn, *others, given = engine.run([*healthy, greedy(9, [5, textless], NUM_NEW)])
    assert (drawn.finish_reason, given.finish_reason) == (FinishReason.ERROR, FinishReason.ERROR)
    assert "tokenizer" in drawn.error
    assert others == alone[1:]
    assert engine.stats.num_failed_steps == 0
    assert engine.stats.kv_cache_usage == 0


def test_an_aborted_request_frees_its_pages_and_disturbs_nobody(engine, healthy):
    """After an abort in the middle the pages are free and the others finish as if it had never been there."""
    alone = [engine.run([request])[0] for request in healthy]
    engine.abort_after = {"request-9": 5}
    *together, aborted = engine.run([*healthy, greedy(9, [7] * 30, 400)])
    assert aborted.finish_reason == FinishReason.ABORT
    assert 5 <= len(aborted.token_ids) < 400
    assert together == alone
    assert engine.stats.kv_cache_usage == 0
