"""/v1/embeddings: a text as one vector, from the model that is served for generation.

The vector is the hidden state that the head reads at the text's last token, after the final norm, with length 1. That
is what vLLM gives for a decoder model (pooling of the last token, normalized): in a causal model no other token has
seen the whole text. A model that was trained to write gives vectors that say something of a text, and ranks worse in
search than one that was trained to embed.
"""

import asyncio
import base64
from array import array
from collections.abc import Iterator
from contextlib import aclosing, nullcontext
from functools import partial
from typing import Annotated, Literal
from uuid import uuid4

from fastapi import APIRouter, Request, Security
from pydantic import BaseModel, Field, PlainValidator
from starlette.responses import JSONResponse, Response

from service.api.dependencies import RegistryDep, allowance_of, caller_of
from service.api.errors import declared_errors
from service.api.guard import BEARER, InferenceRoute
from service.api.openai.choices import run_choices
from service.api.openai.fields import Ignored, StrictBody, check_text
from service.api.openai.prompts import TokenIds, check_token_ids
from service.api.openai.routes import CLIENT_CLOSED_REQUEST, unless_disconnected
from service.engine.types import GenerationRequest, SamplingParams
from service.errors import BadRequest, ContextTooLong
from service.registry.served import ServedModel

MAX_INPUTS = 2048  # OpenAI's
AT_ONCE = 32  # inputs of one call in the engine together; its queue is for many callers

WHAT_INPUT_IS = "input must be a text, a list of texts, a list of token ids, or a list of those lists, none empty"

Input = str | list[int]
_Text = Annotated[str, Field(min_length=1)]
_Tokens = Annotated[list[int], Field(min_length=1)]


def _check_input(value: object) -> list[Input]:
    """Bring the four forms of `input` into one."""
    is_one = not isinstance(value, list) or all(type(item) is int for item in value)
    inputs = [value] if is_one else value
    assert isinstance(inputs, list)
    if len(inputs) > MAX_INPUTS:
        raise ValueError(f"input may have at most {MAX_INPUTS} texts")
    for item in inputs:
        if isinstance(item, str) and item:
            check_text(item)
        elif not (isinstance(item, list) and item and all(type(token) is int for token in item)):
            raise ValueError(WHAT_INPUT_IS)
    if len({type(item) for item in inputs}) > 1:
        raise ValueError("input must not mix texts and lists of token ids")
    return inputs


CheckedInput = Annotated[
    list[Input],
    PlainValidator(
        _check_input,
        json_schema_input_type=_Text
        | Annotated[list[_Text], Field(min_length=1, max_length=MAX_INPUTS)]
        | _Tokens
        | Annotated[list[_Tokens], Field(min_length=1, max_length=MAX_INPUTS)],
    ),
]


class EmbeddingsBody(StrictBody):
    """POST /v1/embeddings."""

    model: str = Field(min_length=1, max_length=256, description="Name of a served model.")
    input: CheckedInput = Field(description="What to embed; each text must fit the context.")
    encoding_format: Literal["float", "base64"] | None = Field(
        default=None, description="Numbers, or little-endian float32 in base64; default float."
    )
    dimensions: int | None = Field(
        default=None, ge=1, description="Refused unless it is the size of the model's embeddings."
    )
    user: Ignored = None


class Embedding(BaseModel):
    """The vector of one input."""

    object: Literal["embedding"] = "embedding"
    index: int
    embedding: list[float] | str


class EmbeddingsUsage(BaseModel):
    """What the call cost."""

    prompt_tokens: int
    total_tokens: int


class Embeddings(BaseModel):
    """Vectors, in the order of the inputs."""

    object: Literal["list"] = "list"
    data: list[Embedding]
    model: str
    usage: EmbeddingsUsage


router = APIRouter(
    prefix="/v1",
    tags=["openai"],
    route_class=InferenceRoute,
    dependencies=[Security(BEARER)],
    responses=declared_errors(400, 401, 403, 404, 413, 429, 500, 503),
)


@router.post("/embeddings", response_model=Embeddings)
async def create_embeddings(body: EmbeddingsBody, request: Request, registry: RegistryDep) -> Response:
    """Embed one or many texts."""
    with registry.lease(body.model) as model:
        _check_dimensions(body.dimensions, model.engine.info.embedding_size)
        inputs = await model.in_tokenizer_thread(partial(_encode_all, body.input, model))
        num_tokens = sum(map(len, inputs))
        allowance = allowance_of(request)
        with allowance.spend_tokens(num_tokens, lambda: num_tokens) if allowance is not None else nullcontext():
            vectors = await unless_disconnected(request, _embed_all(model, inputs, caller_of(request).id))
        if vectors is None:
            return Response(status_code=CLIENT_CLOSED_REQUEST)
        is_base64 = body.encoding_format == "base64"
        return JSONResponse(await asyncio.to_thread(_answer, model, inputs, vectors, is_base64=is_base64))


def _check_dimensions(asked: int | None, size: int) -> None:
    if asked is not None and asked != size:
        raise BadRequest(
            f"dimensions is {asked}, and this model's embeddings have {size}; it was not trained to be shortened, so "
            "leave dimensions out",
            param="dimensions",
        )


def _encode_all(inputs: list[Input], model: ServedModel) -> list[TokenIds]:
    """Turn every input into tokens that fit the context; takes long, so not for the event loop."""
    return [_encode(given, model) for given in inputs]


def _encode(given: Input, model: ServedModel) -> TokenIds:
    if isinstance(given, list):
        check_token_ids(given, model, "input")
        token_ids = tuple(given)
    else:
        token_ids = tuple(model.tokenizer(given)["input_ids"])
    longest = model.engine.info.max_model_len
    if not token_ids:
        raise BadRequest("an input has no tokens", param="input")
    if len(token_ids) > longest:
        raise ContextTooLong(
            f"an input has {len(token_ids)} tokens and the context {longest}; shorten it to at most {longest} tokens",
            param="input",
        )
    return token_ids


async def _embed_all(model: ServedModel, inputs: list[TokenIds], caller: str) -> list[bytes]:
    """Compute the vectors of all inputs, some at a time."""
    call_id = f"embd-{uuid4().hex}"
    vectors: list[bytes] = []
    for first in range(0, len(inputs), AT_ONCE):
        requests = [
            GenerationRequest(
                request_id=f"{call_id}-{first + place}",
                prompt_token_ids=token_ids,
                sampling=SamplingParams(max_tokens=0, temperature=0.0),
                embed=True,
                caller=caller,
            )
            for place, token_ids in enumerate(inputs[first : first + AT_ONCE])
        ]
        found: dict[int, bytes] = {}
        async with aclosing(run_choices(model, requests)) as events:
            async for choice in events:
                assert choice.event.embedding is not None, "a request to embed has one event, with its embedding"
                found[choice.index] = choice.event.embedding
        vectors.extend(found[place] for place in range(len(requests)))
    return vectors


def _answer(model: ServedModel, inputs: list[TokenIds], vectors: list[bytes], *, is_base64: bool) -> dict[str, object]:
    """Write the answer's body; many vectors take long."""
    num_tokens = sum(map(len, inputs))

    def data() -> Iterator[dict[str, object]]:
        for index, vector in enumerate(vectors):
            numbers = base64.b64encode(vector).decode() if is_base64 else array("f", vector).tolist()
            yield {"object": "embedding", "index": index, "embedding": numbers}

    return {
        "object": "list",
        "data": list(data()),
        "model": model.served_as,
        "usage": {"prompt_tokens": num_tokens, "total_tokens": num_tokens},
    }
