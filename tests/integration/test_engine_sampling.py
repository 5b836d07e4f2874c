"""Penalties, log probabilities and scored prompts of the engine are those of transformers' own code."""

import random

import pytest
import torch

from service.engine.types import FinishReason, GenerationRequest, SamplingParams
from tests.support.inline_engine import InlineEngine, greedy
from tests.support.plain_loader import load_plain
from tests.support.tiny_model import EOS_ID, save_tiny_model

pytestmark = pytest.mark.integration

PROMPT_LENGTHS = (1, 2, 5, 16, 17, 31, 33, 60)
NUM_NEW = 16


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def prompts():
    numbers = random.Random(0)
    return [[numbers.randrange(256) for _ in range(length)] for length in PROMPT_LENGTHS]


@pytest.fixture(scope="module")
def model(folder):
    return load_plain(folder).model


def log_softmax_of(model, tokens):
    """Return the plain model's log probabilities after every token."""
    with torch.inference_mode():
        return model(torch.tensor([tokens]), use_cache=False).logits[0].double().log_softmax(-1)


def check_report(report, expected_V, *, token, number):
    """Compare one reported position with the plain model's distribution."""
    assert report.token_id == token
    assert report.logprob == pytest.approx(expected_V[token].item(), abs=1e-3)
    assert len(report.top) == number
    values = expected_V.topk(number).values.tolist() if number else []
    assert [value for _, value in report.top] == pytest.approx(values, abs=1e-3)
    assert [expected_V[token].item() for token, _ in report.top] == pytest.approx(values, abs=1e-3)


def test_repetition_penalty_equals_generate(folder, model, prompts):
    """Greedy, token for token, whatever else is in the batch."""
    results = InlineEngine(folder).run(
        greedy(index, prompt, NUM_NEW, repetition_penalty=1.0 + index / 5) for index, prompt in enumerate(prompts)
    )
    for index, (prompt, result) in enumerate(zip(prompts, results, strict=True)):
        output = model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
            max_new_tokens=NUM_NEW,
            do_sample=False,
            repetition_penalty=1.0 + index / 5,
            eos_token_id=None,
            pad_token_id=0,
        )
        assert result.token_ids == output[0, len(prompt) :].tolist()


def test_logprobs_are_those_of_the_plain_model(folder, model, prompts):
    """Of the raw logits: neither temperature, nor penalties, nor bias move them."""
    requests = [
        GenerationRequest(
            request_id=str(index),
            prompt_token_ids=tuple(prompt),
            sampling=SamplingParams(
                max_tokens=NUM_NEW,
                temperature=1.5,
                top_k=50,
                presence_penalty=1.0,
                logit_bias=((40, 4.0),),
                seed=index,
                ignore_eos=True,
                logprobs=None if index == 2 else index,
            ),
        )
        for index, prompt in enumerate(prompts)
    ]
    for index, (prompt, result) in enumerate(zip(prompts, InlineEngine(folder).run(requests), strict=True)):
        if index == 2:
            assert result.logprobs == []
            continue
        expected = log_softmax_of(model, prompt + result.token_ids)[len(prompt) - 1 :]
        for report, expected_V, token in zip(result.logprobs, expected, result.token_ids, strict=False):
            check_report(report, expected_V, token=token, number=index)
        assert len(result.logprobs) == len(result.token_ids) == NUM_NEW


@pytest.mark.parametrize(
    "config", [{}, {"max_batched_tokens": 7}, {"kv_cache_bytes": 1 << 16, "max_model_len": 64}], ids=str
)
def test_prompt_logprobs_are_those_of_the_plain_model(folder, model, prompts, config):
    """Whole, in chunks and under preemption; a prompt that is only scored draws no token."""
    engine = InlineEngine(folder, **config)
    requests = [
        greedy(index, prompt, 0 if index % 2 else 4, prompt_logprobs=index % 5) for index, prompt in enumerate(prompts)
    ]
    for index, (prompt, result) in enumerate(zip(prompts, engine.run(requests), strict=True)):
        first, *others = result.prompt_logprobs
        assert first is None
        assert len(others) == len(prompt) - 1
        for report, expected_V, token in zip(others, log_softmax_of(model, prompt), prompt[1:], strict=False):
            check_report(report, expected_V, token=token, number=index % 5)
        assert result.finish_reason == FinishReason.LENGTH
        assert len(result.token_ids) == (0 if index % 2 else 4)
    assert engine.stats.kv_cache_usage == 0


def test_a_prompt_is_scored_although_its_pages_are_cached(folder, prompts):
    """A second request for the same prompt gets the same scores, to the last bit."""
    engine = InlineEngine(folder)
    engine.run([greedy(0, prompts[7], 2)])
    scored = [engine.run([greedy(1, prompts[7], 1, prompt_logprobs=2)])[0] for _ in range(2)]
    assert len(scored[0].prompt_logprobs) == len(prompts[7])
    assert scored[0] == scored[1]


def test_min_tokens_keeps_the_end_away(folder, prompts):
    """A model that wants to end at once is held until min_tokens, and then ends."""
    bias = {"logit_bias": ((EOS_ID, 100.0),), "ignore_eos": False}
    early, late = InlineEngine(folder).run(
        [greedy(0, prompts[3], NUM_NEW, **bias), greedy(1, prompts[3], NUM_NEW, **bias, min_tokens=6)]
    )
    assert early.token_ids == [EOS_ID]
    assert (late.token_ids[6:], late.finish_reason) == ([EOS_ID], FinishReason.STOP)
    assert EOS_ID not in late.token_ids[:6]


def test_a_stop_token_ends_a_sequence(folder, prompts):
    """At the first of them, which is the last token of the completion."""
    whole = InlineEngine(folder).run([greedy(0, prompts[5], NUM_NEW)])[0].token_ids
    stop = whole[NUM_NEW // 2]
    result = InlineEngine(folder).run([greedy(0, prompts[5], NUM_NEW, stop_token_ids=(stop,))])[0]
    assert result.finish_reason == FinishReason.STOP
    assert result.token_ids == whole[: whole.index(stop) + 1]
