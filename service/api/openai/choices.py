"""Runs the sequences of one request together and hands out their events as they come."""

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass

from service.engine.types import FinishReason, GenerationRequest, TokenEvent
from service.registry.served import ServedModel


@dataclass(frozen=True, kw_only=True)
class ChoiceEvent:
    """What a step added to choice `index` of the answer."""

    index: int
    event: TokenEvent


Inbox = asyncio.Queue[ChoiceEvent | asyncio.Task[None]]


async def run_choices(model: ServedModel, requests: Sequence[GenerationRequest]) -> AsyncGenerator[ChoiceEvent, None]:
    """Generate every request at once; each choice ends with an event that has a finish_reason.

    Leaving early aborts them all, and so does the failure of one.

    Raises:
        ServiceError: what the engine raised for any of them.
    """
    inbox: Inbox = asyncio.Queue()
    tasks = [asyncio.create_task(_pump(model, index, request, inbox)) for index, request in enumerate(requests)]
    for task in tasks:
        task.add_done_callback(inbox.put_nowait)
    try:
        num_open = len(tasks)
        while num_open:
            item = await inbox.get()
            if isinstance(item, asyncio.Task):
                item.result()  # raises what the pump raised
                num_open -= 1
            else:
                yield item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _pump(model: ServedModel, index: int, request: GenerationRequest, inbox: Inbox) -> None:
    """Move one sequence's events into the common inbox."""
    if request.sampling.max_tokens == 0 and request.sampling.prompt_logprobs is None and not request.embed:
        inbox.put_nowait(ChoiceEvent(index=index, event=_nothing(request)))
        return
    async with aclosing(model.generate(request)) as events:
        async for event in events:
            inbox.put_nowait(ChoiceEvent(index=index, event=event))


def _nothing(request: GenerationRequest) -> TokenEvent:
    """The answer to max_tokens = 0, which needs no engine unless the prompt is scored."""
    return TokenEvent(
        request_id=request.request_id,
        text="",
        token_ids=(),
        finish_reason=FinishReason.LENGTH,
        error=None,
        num_prompt_tokens=len(request.prompt_token_ids),
        num_generated_tokens=0,
    )
