"""What cannot be meant is refused before it is queued, naming the field."""

import pytest

from service.engine.admission import check_request
from service.engine.types import MOST_LOGPROBS, EngineInfo, GenerationRequest, Grammar, SamplingParams
from service.errors import BadRequest, ContextTooLong

INFO = EngineInfo(
    max_model_len=64,
    vocab_size=320,
    num_pages=8,
    eos_token_ids=(256,),
    device="cpu",
    dtype="float32",
    backend="auto",
    memory_bytes=1,
)
NAN = float("nan")


def check(prompt=(1, 2), **sampling):
    request = GenerationRequest(
        request_id="new", prompt_token_ids=tuple(prompt), sampling=SamplingParams(**{"max_tokens": 5, **sampling})
    )
    check_request(request, INFO, open_ids={"open"})


@pytest.mark.parametrize(
    "sampling",
    [
        {},
        {"max_tokens": 0, "prompt_logprobs": 0},
        {"logprobs": MOST_LOGPROBS, "prompt_logprobs": MOST_LOGPROBS},
        {"min_tokens": 5, "stop_token_ids": (0, 319), "include_stop": True},
        {"top_p": 0.0, "min_p": 1.0, "top_k": 100_000, "temperature": 0.0},
        {"frequency_penalty": 2, "presence_penalty": -2.0, "repetition_penalty": 0.1},
        {"logit_bias": ((0, -100), (319, 100.0))},
        {"grammar": Grammar(kind="json_object")},
        {"ignore_eos": True},
    ],
    ids=str,
)
def test_what_can_be_meant_is_taken(sampling):
    """The bounds themselves are allowed."""
    check(**sampling)


@pytest.mark.parametrize(
    ("param", "sampling"),
    [
        ("max_tokens", {"max_tokens": 0}),
        ("max_tokens", {"max_tokens": -1, "prompt_logprobs": 1}),
        ("min_tokens", {"min_tokens": 6}),
        ("min_tokens", {"min_tokens": -1}),
        ("logprobs", {"logprobs": -1}),
        ("logprobs", {"logprobs": MOST_LOGPROBS + 1}),
        ("prompt_logprobs", {"prompt_logprobs": MOST_LOGPROBS + 1}),
        ("temperature", {"temperature": -0.1}),
        ("temperature", {"temperature": NAN}),
        ("temperature", {"temperature": float("inf")}),
        ("top_p", {"top_p": 1.1}),
        ("top_p", {"top_p": NAN}),
        ("top_k", {"top_k": -1}),
        ("min_p", {"min_p": -0.1}),
        ("min_p", {"min_p": 1.1}),
        ("frequency_penalty", {"frequency_penalty": 2.1}),
        ("presence_penalty", {"presence_penalty": NAN}),
        ("repetition_penalty", {"repetition_penalty": 0.0}),
        ("repetition_penalty", {"repetition_penalty": float("inf")}),
        ("logit_bias", {"logit_bias": ((320, 1.0),)}),
        ("logit_bias", {"logit_bias": ((-1, 1.0),)}),
        ("logit_bias", {"logit_bias": ((5, 100.5),)}),
        ("logit_bias", {"logit_bias": ((5, 1.0), (5, 2.0))}),
        ("stop_token_ids", {"stop_token_ids": (5, 320)}),
        ("stop", {"stop": ("a", "")}),
        ("ignore_eos", {"grammar": Grammar(kind="json_object"), "ignore_eos": True}),
        ("prompt", {"prompt": ()}),
        ("prompt", {"prompt": (5, 320)}),
        ("prompt", {"prompt": (-1,)}),
    ],
    ids=str,
)
def test_what_cannot_be_meant_is_refused_by_name(param, sampling):
    """With the value in the sentence."""
    with pytest.raises(BadRequest) as refused:
        check(**sampling)
    assert refused.value.param == param


def test_the_prompt_leaves_room_for_a_token_if_one_is_asked_for():
    """A prompt that is only scored may fill the context."""
    check(prompt=[1] * 63)
    check(prompt=[1] * 64, max_tokens=0, prompt_logprobs=1)
    with pytest.raises(ContextTooLong, match="at most 63"):
        check(prompt=[1] * 64)
    with pytest.raises(ContextTooLong, match="at most 64"):
        check(prompt=[1] * 65, max_tokens=0, prompt_logprobs=1)
