"""/tokenize, /detokenize, /tokenizer_info: a model's tokenizer over HTTP, in vLLM's shapes.

Evaluation tools ask here instead of loading the tokenizer themselves; some name no model, which is fine where one is
served.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

from fastapi import APIRouter, Query, Security
from pydantic import Field, model_validator

from service.api.dependencies import RegistryDep
from service.api.errors import declared_errors
from service.api.guard import BEARER, InferenceRoute
from service.api.openai.answers import Detokenized, Tokenized, TokenizerInfo
from service.api.openai.conversation import ConversationFields, Message
from service.api.openai.fields import StrictBody, Text
from service.api.openai.prompts import check_token_ids, encode_chat
from service.errors import BadRequest
from service.registry.registry import ModelRegistry
from service.registry.served import ServedModel

T = TypeVar("T")

router = APIRouter(
    tags=["tokens"],
    route_class=InferenceRoute,
    dependencies=[Security(BEARER)],
    responses=declared_errors(400, 401, 403, 404, 413, 500, 503),
)


class TokenizeBody(ConversationFields):
    """POST /tokenize: a text, or a conversation."""

    model: str | None = Field(default=None, max_length=256, description="May be left out where one model is served.")
    prompt: Text | None = None
    messages: list[Message] | None = Field(default=None, min_length=1)
    add_special_tokens: bool | None = Field(
        default=None, description="Let the tokenizer add its special tokens; default true, for messages false."
    )
    return_token_strs: bool | None = Field(default=None, description="Add what each token writes.")

    @model_validator(mode="after")
    def _is_one_of_both(self) -> "TokenizeBody":
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("give either prompt or messages")
        return self


class DetokenizeBody(StrictBody):
    """POST /detokenize."""

    model: str | None = Field(default=None, max_length=256, description="May be left out where one model is served.")
    tokens: list[int]


@router.post("/tokenize", response_model=Tokenized)
async def tokenize(body: TokenizeBody, registry: RegistryDep) -> Tokenized:
    """Turn a text or a conversation into token ids."""
    return await _with_tokenizer(registry, body.model, partial(_tokenize, body))


@router.post("/detokenize", response_model=Detokenized)
async def detokenize(body: DetokenizeBody, registry: RegistryDep) -> Detokenized:
    """Turn token ids into text, special tokens included."""
    return await _with_tokenizer(registry, body.model, partial(_detokenize, body))


@router.get("/tokenizer_info", response_model=TokenizerInfo)
async def tokenizer_info(
    registry: RegistryDep, model: str | None = Query(default=None, max_length=256)
) -> TokenizerInfo:
    """Describe a model's tokenizer, its chat template included."""
    return await _with_tokenizer(registry, model, _describe)


async def _with_tokenizer(registry: ModelRegistry, name: str | None, work: Callable[[ServedModel], T]) -> T:
    """Run `work` in the tokenizer thread of the model that is meant.

    Raises:
        BadRequest: none is named, and not exactly one is served.
        UnknownModel: there is no such model.
    """
    if name is None:
        names = registry.names()
        if len(names) != 1:
            raise BadRequest(f"name a model; this server has {', '.join(names) or 'none loaded'}", param="model")
        name = names[0]
    with registry.lease(name) as model:
        return await model.in_tokenizer_thread(partial(work, model))


def _tokenize(body: TokenizeBody, model: ServedModel) -> Tokenized:
    if body.messages is not None:
        added = bool(body.add_special_tokens)
        token_ids = list(encode_chat(body.messages, body, model, add_special_tokens=added))
    else:
        added = body.add_special_tokens is not False
        token_ids = list(model.tokenizer(body.prompt, add_special_tokens=added)["input_ids"])
    strings = [model.vocabulary.text_of(token_id) for token_id in token_ids] if body.return_token_strs else None
    return Tokenized(
        count=len(token_ids),
        max_model_len=model.engine.info.max_model_len,
        tokens=token_ids,
        token_strs=strings,
    )


def _detokenize(body: DetokenizeBody, model: ServedModel) -> Detokenized:
    check_token_ids(body.tokens, model, "tokens")
    return Detokenized(prompt=str(model.tokenizer.decode(body.tokens)))


def _describe(model: ServedModel) -> TokenizerInfo:
    tokenizer: Any = model.tokenizer
    return TokenizerInfo(
        tokenizer_class=type(tokenizer).__name__,
        vocab_size=len(tokenizer),
        model_max_length=model.engine.info.max_model_len,
        bos_token=tokenizer.bos_token,
        eos_token=tokenizer.eos_token,
        pad_token=tokenizer.pad_token,
        unk_token=tokenizer.unk_token,
        special_tokens=list(map(str, tokenizer.all_special_tokens)),
        chat_template=getattr(tokenizer, "chat_template", None),
    )
