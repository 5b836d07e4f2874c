"""Whether a request can be meant: checked before it is queued, so that no request can disturb the engine."""

import math
from collections.abc import Container

from service.engine.types import EngineInfo, GenerationRequest, SamplingParams
from service.errors import BadRequest, ContextTooLong


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
    if len(prompt) >= info.max_model_len:
        raise ContextTooLong(
            f"the prompt has {len(prompt)} tokens and the context {info.max_model_len}; shorten the prompt to at most "
            f"{info.max_model_len - 1} tokens",
            param="prompt",
        )
    _check_sampling(request.sampling)


def _check_sampling(sampling: SamplingParams) -> None:
    if sampling.max_tokens < 1:
        raise BadRequest(f"max_tokens is {sampling.max_tokens}; it must be at least 1", param="max_tokens")
    if not (math.isfinite(sampling.temperature) and sampling.temperature >= 0):
        raise BadRequest(f"temperature is {sampling.temperature}; it must be at least 0", param="temperature")
    if not 0 <= sampling.top_p <= 1:
        raise BadRequest(f"top_p is {sampling.top_p}; it must lie between 0 and 1", param="top_p")
    if "" in sampling.stop:
        raise BadRequest("a stop string is empty", param="stop")
