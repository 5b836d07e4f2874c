"""From what a caller sends to token ids: prompts in OpenAI's four forms, and conversations through the chat template.

Everything here may take long, so it runs in the model's tokenizer thread, never on the event loop.
"""

import inspect
import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from jinja2 import TemplateError

from service.api.openai.conversation import ConversationFields, MadeToolCall, Message
from service.api.openai.fields import check_text
from service.errors import BadRequest
from service.registry.served import ServedModel
from service.registry.vocabulary import TextRuler, Vocabulary

# Templates run code, on what the caller sent.
TEMPLATE_FAILURES = (
    TemplateError, TypeError, ValueError, ArithmeticError, LookupError, AttributeError, RecursionError
)  # fmt: skip

TokenIds = tuple[int, ...]
Json = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """One prompt, ready for the engine.

    Attributes:
        token_ids: at least one.
        text: as `echo` repeats it; for token ids what the tokens write, special ones included.
        offsets: where each token begins in the text; only measured for `echo`.
    """

    token_ids: TokenIds
    text: str = ""
    offsets: tuple[int, ...] = ()


def prompts_of(prompt: Any, model: ServedModel) -> list[str | list[int]]:
    """Bring the four forms of a prompt into one; none at all is the token that stands between texts.

    Raises:
        BadRequest: none was given, and the model has no such token.
    """
    if prompt is None:
        tokenizer = model.tokenizer
        begin = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
        if begin is None:
            raise BadRequest("this model has no token that begins a text; give a prompt", param="prompt")
        return [[begin]]
    if isinstance(prompt, str) or isinstance(prompt[0], int):
        return [prompt]
    return list(prompt)


def encode(
    prompt: str | list[int], model: ServedModel, *, add_special_tokens: bool, keep: int | None, echo: bool
) -> Prompt:
    """Turn one prompt into tokens.

    Args:
        prompt: text or token ids.
        model: whose tokenizer it goes through.
        add_special_tokens: let the tokenizer add its own to a text.
        keep: only so many tokens, from the end; None for all.
        echo: whether text and offsets are needed.

    Raises:
        BadRequest: a token id the model does not have, or an empty prompt.
    """
    if isinstance(prompt, list):
        check_token_ids(prompt, model, "prompt")
        return _written_by(tuple(prompt if keep is None else prompt[-keep:]), model, echo=echo)
    measured = echo and model.tokenizer.is_fast
    encoding = model.tokenizer(
        prompt,
        add_special_tokens=add_special_tokens,
        return_offsets_mapping=measured,
        return_special_tokens_mask=measured,
    )
    token_ids = tuple(encoding["input_ids"])
    if not token_ids:
        raise BadRequest("the prompt is empty", param="prompt")
    if not measured or (keep is not None and keep < len(token_ids)):
        return _written_by(token_ids if keep is None else token_ids[-keep:], model, echo=echo)
    return Prompt(token_ids=token_ids, text=prompt, offsets=_places(prompt, encoding, model.vocabulary))


def _places(prompt: str, encoding: Any, vocabulary: Vocabulary) -> tuple[int, ...]:
    """Return where each token begins in the text; one that the tokenizer added has no room in it.

    What the tokens write tells exactly, spaces included, unless the tokenizer changed the text; then its own account
    of offsets must do, which may leave a token's space to the token before.
    """
    tokens = zip(encoding["input_ids"], encoding["special_tokens_mask"], strict=True)
    written = [b"" if is_added else vocabulary.bytes_of(token_id) for token_id, is_added in tokens]
    if b"".join(written) == prompt.encode():
        ruler = TextRuler()
        return tuple(ruler.place(part) for part in written)
    return tuple(accumulate((begin for begin, _ in encoding["offset_mapping"]), max))


def _written_by(token_ids: TokenIds, model: ServedModel, *, echo: bool) -> Prompt:
    """Describe a prompt by what its tokens write."""
    if not echo:
        return Prompt(token_ids=token_ids)
    written = [model.vocabulary.bytes_of(token_id) for token_id in token_ids]
    ruler = TextRuler()
    text = b"".join(written).decode("utf-8", "replace")
    return Prompt(token_ids=token_ids, text=text, offsets=tuple(ruler.place(part) for part in written))


def check_token_ids(token_ids: Sequence[int], model: ServedModel, param: str) -> None:
    """Refuse ids that the model does not have.

    Raises:
        BadRequest: there is one.
    """
    vocab_size = model.engine.info.vocab_size
    if token_ids and not (min(token_ids) >= 0 and max(token_ids) < vocab_size):
        raise BadRequest(f"{param}: token ids of this model go from 0 to {vocab_size - 1}", param=param)


def encode_chat(
    messages: Sequence[Message],
    fields: ConversationFields,
    model: ServedModel,
    *,
    add_special_tokens: bool,
    shows_tools: bool = True,
) -> TokenIds:
    """Write the conversation as the model's chat template does, and return its token ids.

    Raises:
        BadRequest: the model has no chat template, the template refuses the conversation or cannot show tools.
    """
    template = getattr(model.tokenizer, "chat_template", None)
    if not template:
        raise BadRequest(f"model {model.name!r} has no chat template; use /v1/completions", param="messages")
    tools = [tool.model_dump(exclude_none=True) for tool in fields.tools or ()] if shows_tools else []
    if tools and "tools" not in (template if isinstance(template, str) else "".join(map(str, template.values()))):
        raise BadRequest(
            f"the chat template of model {model.name!r} cannot show tools to it; leave tools out", param="tools"
        )
    turns = [_turn(message) for message in messages]
    try:
        text = model.tokenizer.apply_chat_template(
            turns,
            tools=tools or None,
            tokenize=False,
            add_generation_prompt=fields.add_generation_prompt is not False,
            continue_final_message=bool(fields.continue_final_message),
            **_variables(fields.chat_template_kwargs or {}, model.tokenizer),
        )
        check_text(text)
    except TEMPLATE_FAILURES as error:
        raise BadRequest(f"the model's chat template refuses this conversation: {error}", param="messages") from None
    token_ids = tuple(model.tokenizer(text, add_special_tokens=add_special_tokens)["input_ids"])
    if not token_ids:
        raise BadRequest("the conversation is empty", param="messages")
    return token_ids


def _variables(given: Json, tokenizer: Any) -> Json:
    """Return the caller's variables of the template, none of which may be a parameter of the function around it."""
    taken = {*inspect.signature(tokenizer.apply_chat_template).parameters, "messages"}
    for name in given:
        if name in taken:
            raise BadRequest(
                "chat_template_kwargs has a name that is not a variable of templates", param="chat_template_kwargs"
            )
    return given


def _turn(message: Message) -> Json:
    """Return a message as templates read it: arguments as objects, developers as the system."""
    turn: Json = {"role": "system" if message.role == "developer" else message.role, "content": message.text}
    if message.tool_calls:
        turn["tool_calls"] = [_call(call) for call in message.tool_calls]
    if message.role == "tool":
        extras = {"tool_call_id": message.tool_call_id, "name": message.name}
        turn |= {name: value for name, value in extras.items() if value is not None}
    return turn


def _call(call: MadeToolCall) -> Json:
    try:
        arguments = json.loads(call.function.arguments or "{}")
    except (ValueError, RecursionError):
        arguments = None
    if not isinstance(arguments, dict):
        raise BadRequest("the arguments of a tool call must be a JSON object, as text", param="messages")
    return {"id": call.id, "type": "function", "function": {"name": call.function.name, "arguments": arguments}}
