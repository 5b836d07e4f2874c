"""A conversation as a caller writes it: messages, the tools the model may call, and how the template is to be used.

Chat completions and /tokenize read the same fields. A tool is a JSON function: what it is called, what it is for, and
the JSON schema of its arguments. We never call it; the caller does, and tells the result in a message of role `tool`.
"""

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, PlainValidator, Tag, ValidationError, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError

from service.api.openai.fields import Ignored, JsonObject, Only, StrictBody, Text, Unsupported

FUNCTION_NAME = r"^[a-zA-Z0-9_-]{1,64}$"
MAX_TOOLS = 128  # OpenAI's


class TextPart(StrictBody):
    """A piece of a message."""

    type: Literal["text"]
    text: Text


def _kind_of_content(value: object) -> str:
    """Names that an error's location leaves out, as it does pydantic's own for members of a union."""
    return "list[part]" if isinstance(value, list) else "str"


Content = Annotated[
    Annotated[Text, Tag("str")] | Annotated[list[TextPart], Tag("list[part]")], Discriminator(_kind_of_content)
]


class CalledFunction(StrictBody):
    """What an earlier answer called."""

    name: str = Field(pattern=FUNCTION_NAME)
    arguments: Text = Field(description="A JSON object, as text.")


class MadeToolCall(StrictBody):
    """A call in an earlier answer, sent back as it came."""

    id: Text
    type: Literal["function"]
    function: CalledFunction


class Message(StrictBody):
    """One turn of a conversation."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    tool_calls: list[MadeToolCall] | None = Field(default=None, description="Of an assistant's turn.")
    tool_call_id: Text | None = Field(default=None, description="Of a tool's turn: the call it answers.")
    content: Content | None = Field(
        default=None, validate_default=True, description="May be left out beside tool_calls."
    )
    name: Text | None = Field(default=None, description="Of a tool's turn; ignored in others.")
    refusal: Ignored = None
    function_call: Annotated[Unsupported, Only()] = None
    audio: Annotated[Unsupported, Only()] = None

    @field_validator("tool_calls")
    @classmethod
    def _only_assistants_call(cls, value: list[MadeToolCall] | None, info: ValidationInfo) -> list[MadeToolCall] | None:
        if value and info.data.get("role") != "assistant":
            raise ValueError("only a message of role assistant has tool_calls")
        return value

    @field_validator("content")
    @classmethod
    def _content_is_there(cls, value: Any, info: ValidationInfo) -> Any:
        """Only a turn that calls tools may say nothing."""
        if value is None and not info.data.get("tool_calls"):
            raise PydanticCustomError("missing", "content is required")
        return value

    @property
    def text(self) -> str:
        """The content as one text."""
        if isinstance(self.content, list):
            return "".join(part.text for part in self.content)
        return self.content or ""


class FunctionDefinition(StrictBody):
    """A function the model may call."""

    name: str = Field(pattern=FUNCTION_NAME)
    description: Text | None = None
    parameters: JsonObject | None = Field(default=None, description="JSON schema of the arguments; none if left out.")
    strict: Ignored = None


class Tool(StrictBody):
    """A tool the model may call; functions are the only kind."""

    type: Literal["function"]
    function: FunctionDefinition


class FunctionName(StrictBody):
    """Which function."""

    name: str


class NamedTool(StrictBody):
    """The one function that must be called."""

    type: Literal["function"]
    function: FunctionName


ToolChoice = Literal["none", "auto", "required"] | NamedTool


def _check_tool_choice(value: object) -> object:
    """Say in one sentence what is wrong with a choice."""
    if value is None or (isinstance(value, str) and value in ("none", "auto", "required")):
        return value
    try:
        return NamedTool.model_validate(value)
    except ValidationError:
        raise ValueError(
            'tool_choice must be "none", "auto", "required" or {"type": "function", "function": {"name": ...}}'
        ) from None


CheckedToolChoice = Annotated[
    ToolChoice | None, PlainValidator(_check_tool_choice, json_schema_input_type=ToolChoice | None)
]


class ConversationFields(StrictBody):
    """How a conversation is written for the model, whoever asks."""

    tools: list[Tool] | None = Field(default=None, max_length=MAX_TOOLS, description="Functions the model may call.")
    add_generation_prompt: bool | None = Field(
        default=None, description="Open the assistant's turn; default true (an extension, as in vLLM)."
    )
    continue_final_message: bool | None = Field(
        default=None, description="Leave the last turn open, to be continued (an extension, as in vLLM)."
    )
    chat_template_kwargs: JsonObject | None = Field(
        default=None, description="Variables for the model's chat template (an extension, as in vLLM)."
    )

    @field_validator("tools")
    @classmethod
    def _names_differ(cls, value: list[Tool] | None) -> list[Tool] | None:
        names = [tool.function.name for tool in value or ()]
        if len(set(names)) != len(names):
            raise ValueError("two tools have the same name")
        return value

    @field_validator("continue_final_message")
    @classmethod
    def _not_both(cls, value: bool | None, info: ValidationInfo) -> bool | None:  # noqa: FBT001  (pydantic's signature)
        """An open turn of the caller's and a new one exclude each other."""
        if value and info.data.get("add_generation_prompt") is not False:
            raise ValueError("continue_final_message needs add_generation_prompt to be false")
        return value
