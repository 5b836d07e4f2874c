"""/v1/completions, /v1/chat/completions, /v1/models: validate, plan, generate, answer.

`_respond` is the story of one request. Nothing is sent before the first event of the engine, so whatever goes wrong up
to there is a proper HTTP status; after it, an error event in the stream.
"""

import asyncio
import uuid
from collections.abc import AsyncGenerator, Callable, Coroutine
from contextlib import AsyncExitStack, aclosing
from functools import partial
from typing import Any, TypeVar

from fastapi import APIRouter, Request, Security
from starlette.responses import JSONResponse, Response

from service.api.dependencies import RegistryDep, SettingsDep, allowance_of, caller_of
from service.api.errors import declared_errors
from service.api.guard import BEARER, InferenceRoute
from service.api.openai.answers import ChatCompletion, ChatCompletionChunk, Completion, ModelCard, ModelList
from service.api.openai.choices import ChoiceEvent, run_choices
from service.api.openai.planning import Plan, plan_chat, plan_completion
from service.api.openai.requests import ChatBody, CompletionBody, SamplingBody
from service.api.openai.responses import Answer, ChatShape, CompletionShape, Shape
from service.api.openai.sse import EventStream
from service.api.openapi import event_stream
from service.registry.registry import ModelRegistry
from service.registry.served import ServedModel

T = TypeVar("T")

CLIENT_CLOSED_REQUEST = 499

router = APIRouter(
    prefix="/v1",
    tags=["openai"],
    route_class=InferenceRoute,
    dependencies=[Security(BEARER)],
    responses=declared_errors(400, 401, 403, 404, 413, 429, 500, 503),
)


@router.post("/completions", response_model=Completion, responses=event_stream(Completion))
async def create_completion(
    body: CompletionBody, request: Request, registry: RegistryDep, settings: SettingsDep
) -> Response:
    """Continue one or many prompts."""
    return await _respond(
        request, registry, body, CompletionShape(), partial(plan_completion, body, settings.max_choices)
    )


@router.post("/chat/completions", response_model=ChatCompletion, responses=event_stream(ChatCompletionChunk))
async def create_chat_completion(
    body: ChatBody, request: Request, registry: RegistryDep, settings: SettingsDep
) -> Response:
    """Continue a conversation, written as the model's chat template says."""
    return await _respond(request, registry, body, ChatShape(), partial(plan_chat, body, settings.max_choices))


@router.get("/models", response_model=ModelList)
async def list_models(registry: RegistryDep) -> ModelList:
    """List the served models, then their aliases, then their adapters."""
    models = registry.models()
    cards = [_card(model, model.name) for model in models]
    cards += [_card(model, alias) for model in models for alias in registry.aliases.of(model.name)]
    views = [model.with_adapter(adapter) for model in models for adapter in model.adapters]
    return ModelList(data=cards + [_card(view, view.served_as) for view in views])


@router.get("/models/{name:path}", response_model=ModelCard)
async def read_model(name: str, registry: RegistryDep) -> ModelCard:
    """Describe one served model."""
    return _card(registry.get(name), name)


def _card(model: ServedModel, name: str) -> ModelCard:
    """Describe a model under one of its names."""
    return ModelCard(
        id=name,
        root=model.name,
        parent=model.name if name != model.name else None,
        created=model.created,
        max_model_len=model.engine.info.max_model_len,
        method=model.manifest.method,
        bits_per_weight=round(model.manifest.bits.whole_model, 4),
    )


Planner = Callable[[ServedModel, str], Plan]


async def _respond(
    request: Request, registry: ModelRegistry, body: SamplingBody, shape: Shape, planner: Planner
) -> Response:
    """Answer one request: lease, plan, generate, and write the answer or its stream."""
    answer_id = shape.id_prefix + uuid.uuid4().hex
    async with AsyncExitStack() as held:
        model = held.enter_context(registry.lease(body.model))
        caller, allowance = caller_of(request), allowance_of(request)
        plan = (await model.in_tokenizer_thread(partial(planner, model, answer_id))).on_behalf_of(caller)
        answer = Answer(shape=shape, model=model, plan=plan, id=answer_id)
        if allowance is not None:
            held.enter_context(allowance.spend_tokens(plan.most_tokens, lambda: answer.num_tokens))
        events = await held.enter_async_context(aclosing(run_choices(model, plan.requests)))
        if not body.stream:
            whole = await unless_disconnected(request, answer.whole(events))
            return JSONResponse(whole) if whole is not None else Response(status_code=CLIENT_CLOSED_REQUEST)
        primed = await unless_disconnected(request, _prime(events))
        if primed is None:
            return Response(status_code=CLIENT_CLOSED_REQUEST)
        chunks = answer.chunks(primed, includes_usage=body.includes_usage, repeats_usage=body.repeats_usage)
        return EventStream(chunks, held.pop_all())
    raise AssertionError  # the stack swallows nothing


async def _prime(events: AsyncGenerator[ChoiceEvent, None]) -> AsyncGenerator[ChoiceEvent, None]:
    """Wait for the first event, then return the whole stream, that one included."""
    first = await anext(events)

    async def whole() -> AsyncGenerator[ChoiceEvent, None]:
        yield first
        async for event in events:
            yield event

    return whole()


async def unless_disconnected(request: Request, work: Coroutine[Any, Any, T]) -> T | None:
    """Await `work`, but stop it and return None as soon as the client leaves."""
    working = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_disconnect(request))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        return working.result() if working.done() else None
    finally:
        for task in (working, leaving):
            task.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


async def _disconnect(request: Request) -> None:
    """Return when the client has closed the connection; the body is already read."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
