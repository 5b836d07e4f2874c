"""From a request body to engine requests: text to token ids, limits, seeds.

Order of choices: prompt i, completion j is index i * n + j and draws with seed + j. So equal requests give equal
answers whatever else is in the batch, and the n completions of a prompt differ.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import TemplateError

from service.api.openai.schemas import INT64, ChatBody, CompletionBody, Message, SamplingBody
from service.engine.types import GenerationRequest, SamplingParams
from service.errors import BadRequest, ContextTooLong
from service.registry.served import ServedModel

DEFAULT_COMPLETION_TOKENS = 16
TokenIds = tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a body asks for, ready for the engine.

    Attributes:
        requests: one per choice, in the order of their indices.
        prompt_tokens: over all prompts, each counted once, as OpenAI counts.
    """

    requests: tuple[GenerationRequest, ...]
    prompt_tokens: int


def plan_completion(body: CompletionBody, model: ServedModel, request_id: str, max_choices: int) -> Plan:
    """Read a completion body; may take long, so not for the event loop.

    Raises:
        BadRequest: a token id the model does not have, an empty prompt, or too many choices.
        ContextTooLong: a prompt, with what it asks for, does not fit.
    """
    prompts = _prompts_of(body.prompt)
    _check_choices(len(prompts) * (body.n or 1), max_choices)
    token_ids = [_encode(prompt, model) for prompt in prompts]
    wanted = [_room(ids, body.max_tokens, DEFAULT_COMPLETION_TOKENS, model, "prompt") for ids in token_ids]
    return _plan(body, request_id, token_ids, wanted)


def plan_chat(body: ChatBody, model: ServedModel, request_id: str, max_choices: int) -> Plan:
    """Read a chat body; may take long, so not for the event loop.

    Raises:
        BadRequest: the model has no chat template, or the template refuses the conversation.
        ContextTooLong: the conversation, with what it asks for, does not fit.
    """
    _check_choices(body.n or 1, max_choices)
    token_ids = _encode_chat(body.messages, model)
    explicit = body.max_completion_tokens if body.max_completion_tokens is not None else body.max_tokens
    wanted = _room(token_ids, explicit, model.engine.info.max_model_len, model, "messages")
    return _plan(body, request_id, [token_ids], [wanted])


def _prompts_of(prompt: Any) -> list[str | list[int]]:
    """Bring the four forms of a prompt into one."""
    if isinstance(prompt, str) or isinstance(prompt[0], int):
        return [prompt]
    return list(prompt)


def _encode(prompt: str | list[int], model: ServedModel) -> TokenIds:
    """Return a prompt's token ids, those of the caller checked."""
    if isinstance(prompt, str):
        token_ids = tuple(model.tokenizer(prompt, add_special_tokens=True)["input_ids"])
    else:
        token_ids = tuple(prompt)
        vocab_size = model.engine.info.vocab_size
        if min(token_ids) < 0 or max(token_ids) >= vocab_size:
            raise BadRequest(f"token ids must be 0 to {vocab_size - 1}", param="prompt")
    if not token_ids:
        raise BadRequest("the prompt is empty", param="prompt")
    return token_ids


def _encode_chat(messages: Sequence[Message], model: ServedModel) -> TokenIds:
    """Write the conversation as the model's chat template does, and return its token ids."""
    if not getattr(model.tokenizer, "chat_template", None):
        raise BadRequest(f"model {model.name!r} has no chat template; use /v1/completions", param="messages")
    roles = {"developer": "system"}
    turns = [{"role": roles.get(message.role, message.role), "content": message.text} for message in messages]
    try:
        text = model.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    except (TemplateError, TypeError, ValueError, ArithmeticError, LookupError) as error:  # templates run code
        raise BadRequest(f"the model's chat template refuses this conversation: {error}", param="messages") from None
    token_ids = tuple(model.tokenizer(text, add_special_tokens=False)["input_ids"])
    if not token_ids:
        raise BadRequest("the conversation is empty", param="messages")
    return token_ids


def _room(token_ids: TokenIds, explicit: int | None, default: int, model: ServedModel, param: str) -> int:
    """Return how many tokens to generate. An explicit wish must fit; a default is cut to what fits.

    Raises:
        ContextTooLong: it does not fit.
    """
    limit = model.engine.info.max_model_len
    room = limit - len(token_ids)
    if room < 1 or (explicit is not None and explicit > room):
        wish = f" and {explicit} were asked for" if explicit is not None else ""
        raise ContextTooLong(
            f"this model's maximum context length is {limit} tokens; {param} has {len(token_ids)}{wish}", param=param
        )
    return min(default, room) if explicit is None else explicit


def _check_choices(num_choices: int, max_choices: int) -> None:
    if num_choices > max_choices:
        raise BadRequest(
            f"{num_choices} completions in one request are too many; this server allows {max_choices}", param="n"
        )


def _plan(body: SamplingBody, request_id: str, prompts: list[TokenIds], wanted: list[int]) -> Plan:
    """Make one engine request per choice."""
    n = body.n or 1
    requests = tuple(
        GenerationRequest(
            request_id=f"{request_id}-{prompt_index * n + choice}",
            prompt_token_ids=token_ids,
            sampling=_sampling(body, wanted[prompt_index], choice),
        )
        for prompt_index, token_ids in enumerate(prompts)
        for choice in range(n)
    )
    return Plan(requests=requests, prompt_tokens=sum(map(len, prompts)))


def _sampling(body: SamplingBody, max_tokens: int, choice: int) -> SamplingParams:
    """The sampling parameters of one choice."""
    temperature = 1.0 if body.temperature is None else body.temperature
    top_p = 1.0 if body.top_p is None else body.top_p
    if top_p == 0:  # a nucleus without mass holds the likeliest token alone
        temperature, top_p = 0.0, 1.0
    return SamplingParams(
        max_tokens=max_tokens,
        temperature=temperature,
        top_p=top_p,
        seed=None if body.seed is None else (body.seed + choice) % INT64,
        stop=tuple(body.stop),
        ignore_eos=bool(body.ignore_eos),
    )
