"""Replays an artifact's golden prompts through its engine before anybody is served.

`golden.json` holds what the model says when it is computed plainly in float32 (`onebit_core.artifact.golden`). The
engine that was just loaded - its kernels, its attention, its cache, on this processor or card - is asked for the same,
one prompt alone and the others together, twice: to write the completions token by token, which is how it serves, and to
read the reference's completions at once. It passes if

    mean |log p_reference - log p_engine|, over tokens and ranks, is within the tolerance of its dtype both times, and
    the tokens it writes are the reference's, up to the first near-tie: a token that the reference ranks less than
    NEAR_TIES tolerances below its own; behind it the two texts differ, and nothing is compared

Rounding moves log probabilities by less than the tolerances, a wrong scale, lost bits or a broken kernel by far more:
docs/operations.md, "Golden prompts", has what was measured.
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from statistics import fmean

from onebit_core.artifact.golden import GoldenPrompt, GoldenPrompts
from service.engine.client import EngineClient
from service.engine.types import (
    MOST_LOGPROBS,
    FinishReason,
    GenerationRequest,
    SamplingParams,
    TokenEvent,
    TokenLogprobs,
)
from service.errors import EngineStartFailed, ServiceError

TOLERANCE_NATS = {"float32": 0.03, "float16": 0.06, "bfloat16": 0.25}
"""Mean absolute errors of log probabilities that the rounding of a dtype does not explain."""

INT8_CACHE_NATS = 0.1
"""What keys and values of 8 bits may add."""

NEAR_TIES = 4.0
SALT = "golden prompts"
REMEDY = (
    "so it computes something else than what was quantized. Try another --backend or --device; if all of them fail, "
    "the artifact is damaged: make it again. --golden-check off serves it as it is"
)


@dataclass(frozen=True, kw_only=True)
class GoldenResult:
    """How an engine did.

    Attributes:
        error: mean absolute error of log probabilities in nats, the worse of writing and reading.
        tokens: how many were compared, written and read.
        timestamp: when, Unix seconds.
    """

    error: float
    tokens: int
    timestamp: float


async def replay_golden(engine: EngineClient, golden: GoldenPrompts) -> GoldenResult | None:
    """Ask an engine for the golden prompts, and compare.

    Returns:
        The result; None if its context, as configured, has no room for any of the prompts.

    Raises:
        EngineStartFailed: it computes something else than the reference, or fails.
    """
    room = engine.info.max_model_len
    prompts = [one for one in golden.prompts if len(one.prompt) + len(one.completion) <= room]
    if not prompts:
        return None
    written = await _ask(engine, [_to_write(prompt, number) for number, prompt in enumerate(prompts)])
    read = await _ask(engine, [_to_read(prompt, number) for number, prompt in enumerate(prompts)])
    tolerance = tolerance_of(engine)
    errors = [
        [
            error
            for prompt, events in zip(prompts, written, strict=True)
            for error in _written(prompt, events, tolerance)
        ],
        [error for prompt, events in zip(prompts, read, strict=True) for error in _read(prompt, events)],
    ]
    worst = max(map(fmean, errors))
    if not worst <= tolerance:
        raise EngineStartFailed(
            f"its log probabilities for the golden prompts of {engine.config.artifact} are off by {worst:.3g} nats on "
            f"average, more than {tolerance:.3g}, {REMEDY}"
        )
    return GoldenResult(error=worst, tokens=sum(map(len, errors)), timestamp=time.time())


def tolerance_of(engine: EngineClient) -> float:
    """Return the mean error that an engine's own rounding explains."""
    cache = INT8_CACHE_NATS if engine.config.kv_cache_dtype == "int8" else 0.0
    return TOLERANCE_NATS[engine.info.dtype] + cache


def _to_write(prompt: GoldenPrompt, number: int) -> GenerationRequest:
    """Ask for a completion: prompts in chunks, then one token a step."""
    sampling = SamplingParams(
        max_tokens=len(prompt.completion), temperature=0.0, ignore_eos=True, logprobs=MOST_LOGPROBS
    )
    return GenerationRequest(
        request_id=f"golden-{number}", prompt_token_ids=prompt.prompt, sampling=sampling, cache_salt=SALT
    )


def _to_read(prompt: GoldenPrompt, number: int) -> GenerationRequest:
    """Ask how probable the reference's completion is, all of it at once."""
    return GenerationRequest(
        request_id=f"golden-{number}",
        prompt_token_ids=(*prompt.prompt, *prompt.completion),
        sampling=SamplingParams(max_tokens=0, prompt_logprobs=MOST_LOGPROBS),
        cache_salt=SALT,
    )


async def _ask(engine: EngineClient, requests: Sequence[GenerationRequest]) -> list[list[TokenEvent]]:
    """Run the first request alone, and the others as many at once as the engine takes."""
    at_once = engine.config.max_num_sequences + engine.config.max_queued_requests
    groups = [requests[:1], *(requests[start : start + at_once] for start in range(1, len(requests), at_once))]
    answers: list[list[TokenEvent]] = []
    try:
        for group in groups:
            for stream in [engine.generate(request) for request in group]:
                async with aclosing(stream) as events:
                    answers.append([event async for event in events])
    except ServiceError as error:
        raise EngineStartFailed(f"the golden prompts of {engine.config.artifact} failed: {error}") from None
    failed = [event.error for events in answers for event in events if event.finish_reason is FinishReason.ERROR]
    if failed:
        raise EngineStartFailed(f"the golden prompts of {engine.config.artifact} failed: {failed[0]}")
    return answers


def _written(prompt: GoldenPrompt, events: list[TokenEvent], tolerance: float) -> Iterator[float]:
    """Yield the error at each token, up to the first that is another than the reference's.

    Raises:
        EngineStartFailed: a token differs where the reference was sure.
    """
    tokens = [token for event in events for token in event.token_ids]
    logprobs = [logprob for event in events for logprob in event.logprobs]
    for position, (token, expected) in enumerate(zip(tokens, prompt.completion, strict=True)):
        reference = _reference(prompt, position)
        yield _error(reference, logprobs[position])
        if token != expected:
            behind = reference[expected] - reference.get(token, min(reference.values()))
            if behind > NEAR_TIES * tolerance:
                raise EngineStartFailed(
                    f"it continues a golden prompt with token {token} where the reference is sure of {expected} "
                    f"(by {behind:.2f} nats), {REMEDY}"
                )
            return


def _read(prompt: GoldenPrompt, events: list[TokenEvent]) -> Iterator[float]:
    """Yield the error at each token of the reference's completion."""
    logprobs = events[0].prompt_logprobs or ()
    for position, found in enumerate(logprobs[len(prompt.prompt) :]):
        assert found is not None, "only the first token of a prompt has nothing before it"
        yield _error(_reference(prompt, position), found)


def _reference(prompt: GoldenPrompt, position: int) -> dict[int, float]:
    """Return what the reference thinks is probable at one token of its completion."""
    return dict(zip(prompt.top_ids[position], prompt.top_logprobs[position], strict=True))


def _error(reference: dict[int, float], found: TokenLogprobs) -> float:
    """Return the mean absolute error over the reference's tokens; one that the engine ranks lower is at its last."""
    seen = {**dict(found.top), found.token_id: found.logprob}
    last = min(value for _, value in found.top)
    return fmean(
        abs(value - seen[token]) if token in seen else max(0.0, value - last) for token, value in reference.items()
    )
