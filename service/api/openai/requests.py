"""Bodies of completions and chat completions: what we read, what we refuse by name, what we ignore.

Types are strict (no "1" for 1, no true for 1), numbers finite, bounds OpenAI's. An unknown field is an error that names
it. `null` means the default, as everywhere in this API.
"""

from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, ValidationInfo, field_validator, model_validator

from service.api.openai.conversation import CheckedToolChoice, ConversationFields, Message, NamedTool
from service.api.openai.fields import (
    CheckedPrompt,
    Ignored,
    JsonObject,
    LogitBias,
    Only,
    Stop,
    StrictBody,
    Text,
    Unsupported,
)

MAX_CHOICES_OF_OPENAI = 128
MAX_BEST_OF = 20
MAX_LEGACY_LOGPROBS = 5
MAX_LOGPROBS = 20
MAX_STOP_TOKENS = 64
INT64 = 1 << 63
INT32 = 1 << 31


class StreamOptions(StrictBody):
    """What a stream carries besides text."""

    include_usage: bool | None = Field(
        default=None, description="End with a chunk that has usage and no choices; other chunks carry null."
    )
    continuous_usage_stats: bool | None = Field(
        default=None, description="Carry usage on every chunk (an extension, as in vLLM)."
    )
    include_obfuscation: Ignored = None


class JsonSchemaFormat(StrictBody):
    """A named JSON schema."""

    model_config = ConfigDict(serialize_by_alias=True)

    name: str = Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")
    description: Text | None = None
    schema_: JsonObject | None = Field(default=None, alias="schema", description="Any JSON object if left out.")
    strict: Ignored = None


class ResponseFormat(StrictBody):
    """What form the answer has."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchemaFormat | None = Field(
        default=None, validate_default=True, description="With type json_schema."
    )

    @field_validator("json_schema")
    @classmethod
    def _goes_with_its_type(cls, value: JsonSchemaFormat | None, info: ValidationInfo) -> JsonSchemaFormat | None:
        kind = info.data.get("type")
        if kind == "json_schema" and value is None:
            raise ValueError("json_schema is required with type json_schema")
        if value is not None and kind not in (None, "json_schema"):
            raise ValueError("json_schema is only allowed with type json_schema")
        return value


class StructuredOutputs(StrictBody):
    """What the answer must match: exactly one of the four."""

    json_: JsonObject | Text | None = Field(default=None, alias="json", description="A JSON schema.")
    regex: Text | None = Field(default=None, min_length=1, description="A regular expression.")
    choice: list[Text] | None = Field(default=None, min_length=1, description="One of these texts.")
    grammar: Text | None = Field(default=None, min_length=1, description="A grammar in GBNF, with a rule `root`.")

    @field_validator("choice")
    @classmethod
    def _can_be_written(cls, value: list[str] | None) -> list[str] | None:
        if any("\0" in choice for choice in value or ()):
            raise ValueError("a choice must not have the character NUL")
        return value

    @model_validator(mode="after")
    def _is_exactly_one(self) -> "StructuredOutputs":
        given = [value for value in (self.json_, self.regex, self.choice, self.grammar) if value is not None]
        if len(given) != 1:
            raise ValueError("structured_outputs needs exactly one of json, regex, choice and grammar")
        return self


class SamplingBody(StrictBody):
    """What completions and chat completions share."""

    model: str = Field(min_length=1, max_length=256, description="Name of a served model.")
    temperature: float | None = Field(default=None, ge=0, le=2, description="0 is greedy; default 1.")
    top_p: float | None = Field(default=None, ge=0, le=1, description="Nucleus; 0 is greedy; default 1.")
    n: int | None = Field(default=None, ge=1, le=MAX_CHOICES_OF_OPENAI, description="Completions per prompt.")
    max_tokens: int | None = Field(
        default=None, ge=0, lt=INT64, description="Most tokens to generate; older name of max_completion_tokens."
    )
    max_completion_tokens: int | None = Field(default=None, ge=0, lt=INT64, description="Most tokens to generate.")
    stop: Stop = Field(default=[], description="Up to four texts that end the completion and are not returned.")
    seed: int | None = Field(default=None, ge=-INT64, lt=INT64, description="Choice j of a prompt draws with seed + j.")
    frequency_penalty: float | None = Field(
        default=None, ge=-2, le=2, description="Subtracted from a token's logit for each time it was generated."
    )
    presence_penalty: float | None = Field(
        default=None, ge=-2, le=2, description="Subtracted from a token's logit once it was generated."
    )
    logit_bias: LogitBias | None = Field(default=None, description="Added to the logits of tokens, -100 to 100.")
    response_format: ResponseFormat | None = Field(default=None, description="text, json_object or json_schema.")
    stream: bool | None = Field(default=None, description="Answer with server-sent events.")
    stream_options: StreamOptions | None = None

    # Extensions, named and meant as in vLLM.
    top_k: int | None = Field(default=None, ge=-1, lt=INT32, description="Draw from so many; 0 and -1 are all.")
    min_p: float | None = Field(
        default=None, ge=0, le=1, description="Draw from tokens at least this share as probable as the most probable."
    )
    repetition_penalty: float | None = Field(
        default=None, ge=0.01, le=100, description="Above 1 makes tokens of prompt and completion rarer."
    )
    min_tokens: int | None = Field(default=None, ge=0, lt=INT64, description="No end before so many tokens.")
    ignore_eos: bool | None = Field(default=None, description="Go on through end-of-sequence tokens.")
    stop_token_ids: list[int] | None = Field(
        default=None, max_length=MAX_STOP_TOKENS, description="Tokens that end the completion."
    )
    include_stop_str_in_output: bool | None = Field(default=None, description="Return the stop text that ended it.")
    structured_outputs: StructuredOutputs | None = Field(default=None, description="What the text must match.")
    prompt_logprobs: int | None = Field(
        default=None, ge=0, le=MAX_LOGPROBS, description="Log probabilities of the prompt's tokens; not with stream."
    )
    return_token_ids: bool | None = Field(default=None, description="Add the ids of prompt and completion.")
    truncate_prompt_tokens: int | None = Field(
        default=None, ge=-1, lt=INT64, description="Keep so many tokens from the prompt's end; -1: what fits."
    )
    add_special_tokens: bool | None = Field(
        default=None, description="Let the tokenizer add its special tokens; default true, in chat false."
    )
    priority: int | None = Field(default=None, ge=-INT32, lt=INT32, description="Lower ones are computed first.")
    cache_salt: Text | None = Field(
        default=None, min_length=1, max_length=256, description="Only equal salts share cached prompts."
    )
    skip_special_tokens: Annotated[Unsupported, Only(True)] = None  # noqa: FBT003  (the one value that passes)
    spaces_between_special_tokens: Annotated[Unsupported, Only(True)] = None  # noqa: FBT003  (the same)
    allowed_token_ids: Annotated[Unsupported, Only()] = None
    bad_words: Annotated[Unsupported, Only([])] = None
    use_beam_search: Annotated[Unsupported, Only(False)] = None  # noqa: FBT003  (the same)
    length_penalty: Annotated[Unsupported, Only(1, 1.0)] = None

    user: Ignored = None
    store: Ignored = None
    metadata: Ignored = None
    service_tier: Ignored = None
    safety_identifier: Ignored = None
    prompt_cache_key: Ignored = None
    prompt_cache_retention: Ignored = None
    prompt_cache_options: Ignored = None

    @field_validator("stream_options")
    @classmethod
    def _options_need_a_stream(cls, value: StreamOptions | None, info: ValidationInfo) -> StreamOptions | None:
        """Refuse stream_options without stream, as OpenAI does."""
        if value is not None and not info.data.get("stream"):
            raise ValueError("stream_options is only allowed when stream is true")
        return value

    @field_validator("structured_outputs")
    @classmethod
    def _one_form_is_enough(cls, value: StructuredOutputs | None, info: ValidationInfo) -> StructuredOutputs | None:
        asked = info.data.get("response_format")
        if value is not None and asked is not None and asked.type != "text":
            raise ValueError("structured_outputs and response_format exclude each other")
        return value

    @field_validator("prompt_logprobs")
    @classmethod
    def _no_stream_of_prompts(cls, value: int | None, info: ValidationInfo) -> int | None:
        if value is not None and info.data.get("stream"):
            raise ValueError("prompt_logprobs is not available with stream; use echo and logprobs")
        return value

    @field_validator("truncate_prompt_tokens")
    @classmethod
    def _leaves_something(cls, value: int | None) -> int | None:
        if value == 0:
            raise ValueError("truncate_prompt_tokens must be -1 or at least 1")
        return value

    @property
    def includes_usage(self) -> bool:
        """Whether a stream ends with usage."""
        return bool(self.stream_options and self.stream_options.include_usage)

    @property
    def repeats_usage(self) -> bool:
        """Whether every chunk of a stream carries usage."""
        return bool(self.stream_options and self.stream_options.continuous_usage_stats)

    @property
    def wished_tokens(self) -> int | None:
        """The explicit limit of generated tokens, under its newer name if both are given."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens


class CompletionBody(SamplingBody):
    """POST /v1/completions."""

    prompt: CheckedPrompt = Field(description="One or many prompts, as text or as token ids; null: a text begins.")
    best_of: int | None = Field(
        default=None, ge=0, le=MAX_BEST_OF, description="Draw so many, return the n most probable per token."
    )
    echo: bool | None = Field(default=None, description="Begin the text with the prompt.")
    logprobs: int | None = Field(
        default=None,
        ge=0,
        le=MAX_LEGACY_LOGPROBS,
        description="Log probabilities of each token and of so many most probable ones.",
    )
    suffix: Annotated[Unsupported, Only("")] = None

    @field_validator("best_of")
    @classmethod
    def _is_best_of_enough(cls, value: int | None, info: ValidationInfo) -> int | None:
        n = info.data.get("n") or 1
        if value is not None and value < n:
            raise ValueError(f"best_of is {value}; it must be at least n, which is {n}")
        if value is not None and value > n and info.data.get("stream"):
            raise ValueError("best_of cannot be streamed: the best are known at the end")
        return value


class ChatBody(ConversationFields, SamplingBody):
    """POST /v1/chat/completions."""

    messages: list[Message] = Field(min_length=1, description="The conversation so far.")
    logprobs: bool | None = Field(default=None, description="Return the log probability of every token.")
    top_logprobs: int | None = Field(
        default=None, ge=0, le=MAX_LOGPROBS, description="And of so many most probable ones; with logprobs only."
    )
    tool_choice: CheckedToolChoice = Field(
        default=None, description="none, auto (the default with tools), required, or the one function to call."
    )
    parallel_tool_calls: bool | None = Field(
        default=None, description="With tool_choice required: false forces exactly one call."
    )

    echo: Annotated[Unsupported, Only(False)] = None  # noqa: FBT003  (the one value of `echo` that passes)
    functions: Annotated[Unsupported, Only([])] = None
    function_call: Annotated[Unsupported, Only("none", "auto")] = None
    modalities: Annotated[Unsupported, Only(["text"])] = None
    audio: Annotated[Unsupported, Only()] = None
    prediction: Annotated[Unsupported, Only()] = None
    moderation: Annotated[Unsupported, Only()] = None
    web_search_options: Annotated[Unsupported, Only()] = None
    reasoning_effort: Annotated[Unsupported, Only("none")] = None
    verbosity: Annotated[Unsupported, Only("medium")] = None
    chat_template: Annotated[Unsupported, Only()] = None
    documents: Annotated[Unsupported, Only([])] = None

    @field_validator("top_logprobs")
    @classmethod
    def _top_needs_logprobs(cls, value: int | None, info: ValidationInfo) -> int | None:
        if value and not info.data.get("logprobs"):
            raise ValueError("top_logprobs is only allowed when logprobs is true")
        return value

    @field_validator("tool_choice")
    @classmethod
    def _choice_needs_its_tool(cls, value: Any, info: ValidationInfo) -> Any:
        names = [tool.function.name for tool in info.data.get("tools") or ()]
        if value == "required" and not names:
            raise ValueError("tool_choice required needs tools")
        if isinstance(value, NamedTool) and value.function.name not in names:
            raise ValueError("tool_choice names a function that is not among the tools")
        return value
