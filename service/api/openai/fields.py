"""Base and fields of request bodies: text that can be encoded, and parameters we only know the name of.

OpenAI's API is larger than ours. A parameter we do not serve is refused by name, because a caller who asks for audio
and gets an answer without it is worse off than one who gets an error. It passes when it is set to the
value it has when left out, so clients that always send everything work. The few that change nothing about the text
(`user`, `metadata`, ...) are accepted and ignored, and listed in docs/http-api.md.
"""

import json
import re
from typing import Annotated, Any

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    JsonValue,
    PlainValidator,
)
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, PydanticCustomError, core_schema


class StrictBody(BaseModel):
    """Base of every request body."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False, frozen=True)


class Only:
    """Marks a parameter that is not served: it may be left out, null, or one of `harmless`."""

    def __init__(self, *harmless: JsonValue) -> None:
        self._harmless = harmless

    def __get_pydantic_core_schema__(self, _source: Any, _handler: GetCoreSchemaHandler) -> CoreSchema:
        """Validate with `_check`."""
        return core_schema.with_info_plain_validator_function(self._check)

    def __get_pydantic_json_schema__(self, _schema: CoreSchema, _handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        """Tell OpenAPI the values that pass."""
        return {"enum": [None, *self._harmless], "description": "Not served; refused unless it asks for nothing."}

    def _check(self, value: Any, info: core_schema.ValidationInfo) -> Any:
        if value is None or any(type(value) is type(ok) and value == ok for ok in self._harmless):
            return value
        if isinstance(value, float) and value == 0 and 0 in self._harmless:
            return value
        name = info.field_name or "this parameter"
        raise PydanticCustomError("unsupported_parameter", f"{name} is not supported by this server; leave it out")


Unsupported = Any
"""Annotate `Annotated[Unsupported, Only(...)]`."""

Ignored = Annotated[Any, Field(description="Accepted and ignored.")]


def check_text(text: str) -> str:
    """Refuse text that UTF-8 cannot carry.

    Raises:
        ValueError: it has a lone surrogate, which JSON can write but no tokenizer can read.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError("the text has a lone surrogate and is not valid Unicode") from None
    return text


Text = Annotated[str, AfterValidator(check_text)]


def _check_json(value: dict[str, Any]) -> dict[str, Any]:
    """Refuse an object that cannot be written again: as UTF-8, and without running out of stack."""
    try:
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        raise ValueError("the object has a text with a lone surrogate, which is not valid Unicode") from None
    except RecursionError:
        raise ValueError("the object is nested too deeply") from None
    return value


JsonObject = Annotated[dict[str, Any], AfterValidator(_check_json)]

MAX_STOPS = 4
MAX_STOP_CHARACTERS = 256


def _check_stop(value: object) -> list[str]:
    """Bring `stop` into list form."""
    stops = [value] if isinstance(value, str) else value
    if stops is None:
        return []
    if not isinstance(stops, list) or not all(isinstance(stop, str) for stop in stops):
        raise ValueError("stop must be a string or a list of strings")
    if len(stops) > MAX_STOPS:
        raise ValueError(f"stop may have at most {MAX_STOPS} texts")
    for stop in stops:
        check_text(stop)
        if not 0 < len(stop) <= MAX_STOP_CHARACTERS:
            raise ValueError(f"every stop text must have 1 to {MAX_STOP_CHARACTERS} characters")
    return stops


Stop = Annotated[
    list[str],
    BeforeValidator(_check_stop, json_schema_input_type=str | list[str] | None),
]

Prompt = str | list[str] | list[int] | list[list[int]] | None


def _check_prompt(value: object) -> object:
    """Say in one sentence what is wrong with a prompt; a union would say it four times, and once for every token."""
    if value is None:
        return value
    if isinstance(value, str):
        check_text(value)
    elif not isinstance(value, list) or not value:
        raise ValueError("prompt must be a string, a list of strings, a list of token ids, or a list of those lists")
    elif all(isinstance(item, str) for item in value):
        for item in value:
            check_text(item)
    elif all(isinstance(item, list) for item in value):
        if not all(item and all(type(token) is int for token in item) for item in value):
            raise ValueError("every prompt in the list must be a non-empty list of token ids")
    elif not all(type(item) is int for item in value):
        raise ValueError("prompt must not mix strings, token ids and lists")
    return value


CheckedPrompt = Annotated[Prompt, PlainValidator(_check_prompt, json_schema_input_type=Prompt)]


MAX_BIAS = 100
TOKEN_ID = re.compile(r"0|[1-9][0-9]{0,9}")  # one spelling for each id, so none comes twice


def _check_logit_bias(value: object) -> object:
    """Say in one sentence what is wrong with a map of biases; pydantic would repeat the caller's keys."""
    if not isinstance(value, dict):
        raise ValueError("logit_bias must be an object of token ids and numbers")  # noqa: TRY004  (a validator's way)
    for key, bias in value.items():
        if not TOKEN_ID.fullmatch(key):
            raise ValueError('every key of logit_bias must be a token id in decimal digits, such as "50256"')
        if type(bias) not in (int, float) or not -MAX_BIAS <= bias <= MAX_BIAS:
            raise ValueError(f"every value of logit_bias must be a number from {-MAX_BIAS} to {MAX_BIAS}")
    return {int(key): float(bias) for key, bias in value.items()}


LogitBias = Annotated[
    dict[int, float],
    PlainValidator(
        _check_logit_bias,
        json_schema_input_type=dict[
            Annotated[str, Field(pattern=f"^({TOKEN_ID.pattern})$")], Annotated[float, Field(ge=-MAX_BIAS, le=MAX_BIAS)]
        ],
    ),
]
