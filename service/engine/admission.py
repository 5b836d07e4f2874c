"""Whether a request can be meant: checked before it is queued, so that no request can disturb the engine."""

import math
from collections.abc import Container

from service.engine.types import MOST_LOGPROBS, EngineInfo, GenerationRequest, SamplingParams
from service.errors import BadRequest, ContextTooLong

STRONGEST_BIAS = 100  # OpenAI's


def check_request(request: GenerationRequest, info: EngineInfo, *, open_ids: Container[str]) -> None:
    """Refuse a request the engine could not serve.

    Raises:
        BadRequest: an empty prompt, a token id outside the vocabulary, an id that is open already, or a sampling
            value out of range.
        ContextTooLong: the prompt leaves no room for a token.
    """
    prompt = request.prompt_token_ids
    if request.request_id in open_ids:
        raise BadRequest(f"request id {request.request_id!r} is in use")
    if not prompt:
        raise BadRequest("the prompt is empty; give at least one token", param="prompt")
    if min(prompt) < 0 or max(prompt) >= info.vocab_size:
        stranger = next(token for token in prompt if not 0 <= token < info.vocab_size)
        raise BadRequest(
            f"token id {stranger} is not in the vocabulary: ids go from 0 to {info.vocab_size - 1}", param="prompt"
        )
    longest = info.max_model_len - (request.sampling.max_tokens > 0)
    if len(prompt) > longest:
        raise ContextTooLong(
            f"the prompt has {len(prompt)} tokens and the context {info.max_model_len}; shorten the prompt to at most "
            f"{longest} tokens",
            param="prompt",
        )
    _check_lengths(request.sampling, embed=request.embed)
    _check_numbers(request.sampling)
    _check_tokens(request.sampling, info.vocab_size)
    _check_grammar(request.sampling)


def _check_lengths(sampling: SamplingParams, *, embed: bool) -> None:
    most, least = sampling.max_tokens, sampling.min_tokens
    if embed and most != 0:
        raise BadRequest(f"max_tokens is {most}; a request to embed generates none", param="max_tokens")
    if most < 0 or (most == 0 and sampling.prompt_logprobs is None and not embed):
        raise BadRequest(f"max_tokens is {most}; it must be at least 1, or 0 with prompt_logprobs", param="max_tokens")
    if not 0 <= least <= most:
        raise BadRequest(
            f"min_tokens is {least}; it must lie between 0 and max_tokens, which is {most}", param="min_tokens"
        )
    for param, number in (("logprobs", sampling.logprobs), ("prompt_logprobs", sampling.prompt_logprobs)):
        if number is not None and not 0 <= number <= MOST_LOGPROBS:
            raise BadRequest(f"{param} is {number}; it must lie between 0 and {MOST_LOGPROBS}", param=param)
    if "" in sampling.stop:
        raise BadRequest("a stop string is empty", param="stop")


def _check_numbers(sampling: SamplingParams) -> None:
    if not (math.isfinite(sampling.temperature) and sampling.temperature >= 0):
        raise BadRequest(f"temperature is {sampling.temperature}; it must be at least 0", param="temperature")
    if sampling.top_k < 0:
        raise BadRequest(f"top_k is {sampling.top_k}; it must be at least 1, or 0 for all tokens", param="top_k")
    bounds = {"top_p": (0, 1), "min_p": (0, 1), "frequency_penalty": (-2, 2), "presence_penalty": (-2, 2)}
    for param, (least, most) in bounds.items():
        number = getattr(sampling, param)
        if not least <= number <= most:  # neither is a NaN
            raise BadRequest(f"{param} is {number}; it must lie between {least} and {most}", param=param)
    if not (math.isfinite(sampling.repetition_penalty) and sampling.repetition_penalty > 0):
        raise BadRequest(
            f"repetition_penalty is {sampling.repetition_penalty}; it must be over 0", param="repetition_penalty"
        )


def _check_tokens(sampling: SamplingParams, vocab_size: int) -> None:
    """Check the fields that name tokens."""
    biased = [token_id for token_id, _ in sampling.logit_bias]
    for param, token_ids in (("logit_bias", biased), ("stop_token_ids", sampling.stop_token_ids)):
        for token_id in token_ids:
            if not 0 <= token_id < vocab_size:
                raise BadRequest(
                    f"{param} names token id {token_id}, which is not in the vocabulary: ids go from 0 to "
                    f"{vocab_size - 1}",
                    param=param,
                )
    if len(set(biased)) < len(biased):
        raise BadRequest("logit_bias names a token twice", param="logit_bias")
    for token_id, bias in sampling.logit_bias:
        if not -STRONGEST_BIAS <= bias <= STRONGEST_BIAS:
            raise BadRequest(
                f"logit_bias of token id {token_id} is {bias}; it must lie between -{STRONGEST_BIAS} and "
                f"{STRONGEST_BIAS}",
                param="logit_bias",
            )


def _check_grammar(sampling: SamplingParams) -> None:
    if sampling.grammar is not None and sampling.ignore_eos:
        raise BadRequest(
            "ignore_eos cannot be met together with a grammar: when the text is complete, only an end-of-sequence "
            "token is left; drop one of the two",
            param="ignore_eos",
        )
