"""Requests of the OpenAI endpoints: what we read, what we refuse by name, what we ignore.

Types are strict (no "1" for 1, no true for 1), numbers finite, bounds OpenAI's. An unknown field is an error that names
it. `null` means the default, as everywhere in this API.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator

from service.api.openai.fields import CheckedPrompt, Ignored, Only, Stop, Text, Unsupported

MAX_CHOICES_OF_OPENAI = 128
INT64 = 1 << 63


class StrictBody(BaseModel):
    """Base of every request body."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False, frozen=True)


class StreamOptions(StrictBody):
    """What a stream carries besides text."""

    include_usage: bool | None = Field(
        default=None, description="End with a chunk that has usage and no choices; other chunks carry null."
    )
    continuous_usage_stats: bool | None = Field(
        default=None, description="Carry usage on every chunk (an extension, as in vLLM)."
    )
    include_obfuscation: Ignored = None


class SamplingBody(StrictBody):
    """What completions and chat completions share."""

    model: str = Field(min_length=1, max_length=256, description="Name of a served model.")
    temperature: float | None = Field(default=None, ge=0, le=2, description="0 is greedy; default 1.")
    top_p: float | None = Field(default=None, ge=0, le=1, description="Nucleus; 0 is greedy; default 1.")
    n: int | None = Field(default=None, ge=1, le=MAX_CHOICES_OF_OPENAI, description="Completions per prompt.")
    stop: Stop = Field(default=[], description="Up to four texts that end the completion and are not returned.")
    seed: int | None = Field(default=None, ge=-INT64, lt=INT64, description="Choice j of a prompt draws with seed + j.")
    stream: bool | None = Field(default=None, description="Answer with server-sent events.")
    stream_options: StreamOptions | None = None
    ignore_eos: bool | None = Field(
        default=None, description="Go on through end-of-sequence tokens (an extension, for benchmarks)."
    )

    presence_penalty: Annotated[Unsupported, Only(0)] = None
    frequency_penalty: Annotated[Unsupported, Only(0)] = None
    logit_bias: Annotated[Unsupported, Only({})] = None

    user: Ignored = None
    store: Ignored = None
    metadata: Ignored = None
    service_tier: Ignored = None
    safety_identifier: Ignored = None
    prompt_cache_key: Ignored = None
    prompt_cache_retention: Ignored = None

    @field_validator("stream_options")
    @classmethod
    def _options_need_a_stream(cls, value: StreamOptions | None, info: ValidationInfo) -> StreamOptions | None:
        """Refuse stream_options without stream, as OpenAI does."""
        if value is not None and not info.data.get("stream"):
            raise ValueError("stream_options is only allowed when stream is true")
        return value

    @property
    def includes_usage(self) -> bool:
        """Whether a stream ends with usage."""
        return bool(self.stream_options and self.stream_options.include_usage)

    @property
    def repeats_usage(self) -> bool:
        """Whether every chunk of a stream carries usage."""
        return bool(self.stream_options and self.stream_options.continuous_usage_stats)


class CompletionBody(SamplingBody):
    """POST /v1/completions."""

    prompt: CheckedPrompt = Field(description="One or many prompts, as text or as token ids.")
    max_tokens: int | None = Field(default=None, ge=0, lt=INT64, description="Most tokens to generate; default 16.")

    best_of: Annotated[Unsupported, Only(1)] = None
    echo: Annotated[Unsupported, Only(False)] = None  # noqa: FBT003  (the one value of `echo` that passes)
    logprobs: Annotated[Unsupported, Only()] = None
    suffix: Annotated[Unsupported, Only("")] = None


class TextPart(StrictBody):
    """A piece of a message."""

    type: Literal["text"]
    text: Text


class Message(StrictBody):
    """One turn of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Text | list[TextPart]
    name: Ignored = None
    refusal: Ignored = None

    @property
    def text(self) -> str:
        """The content as one text."""
        if isinstance(self.content, str):
            return self.content
        return "".join(part.text for part in self.content)


class ChatBody(SamplingBody):
    """POST /v1/chat/completions."""

    messages: list[Message] = Field(min_length=1, description="The conversation so far.")
    max_completion_tokens: int | None = Field(
        default=None, ge=0, lt=INT64, description="Most tokens to generate; by default what the context leaves."
    )
    max_tokens: int | None = Field(default=None, ge=0, lt=INT64, description="Older name of max_completion_tokens.")

    tools: Annotated[Unsupported, Only([])] = None
    tool_choice: Annotated[Unsupported, Only("none", "auto")] = None
    functions: Annotated[Unsupported, Only([])] = None
    function_call: Annotated[Unsupported, Only("none", "auto")] = None
    response_format: Annotated[Unsupported, Only({"type": "text"})] = None
    logprobs: Annotated[Unsupported, Only(False)] = None  # noqa: FBT003  (the one value of `logprobs` that passes)
    top_logprobs: Annotated[Unsupported, Only(0)] = None
    modalities: Annotated[Unsupported, Only(["text"])] = None
    audio: Annotated[Unsupported, Only()] = None
    prediction: Annotated[Unsupported, Only()] = None
    web_search_options: Annotated[Unsupported, Only()] = None
    reasoning_effort: Annotated[Unsupported, Only("none")] = None
    verbosity: Annotated[Unsupported, Only("medium")] = None
    chat_template: Annotated[Unsupported, Only()] = None
    chat_template_kwargs: Annotated[Unsupported, Only({})] = None

    parallel_tool_calls: Ignored = None


class Usage(BaseModel):
    """Tokens a request cost."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class CompletionChoice(BaseModel):
    """One completion."""

    text: str
    index: int
    logprobs: None = None
    finish_reason: Literal["stop", "length"] | None


class Completion(BaseModel):
    """The answer to POST /v1/completions, and every chunk of its stream."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    system_fingerprint: str
    choices: list[CompletionChoice]
    usage: Usage | None = None


class ChatMessage(BaseModel):
    """What the model said."""

    role: Literal["assistant"] = "assistant"
    content: str
    refusal: None = None


class ChatChoice(BaseModel):
    """One completion of a conversation."""

    index: int
    message: ChatMessage
    logprobs: None = None
    finish_reason: Literal["stop", "length"]


class ChatCompletion(BaseModel):
    """The answer to POST /v1/chat/completions."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChoice]
    usage: Usage


class ChatChunkChoice(BaseModel):
    """A piece of one completion of a conversation."""

    index: int
    delta: dict[str, Any]
    logprobs: None = None
    finish_reason: Literal["stop", "length"] | None


class ChatCompletionChunk(BaseModel):
    """One event of a chat stream."""

    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChunkChoice]
    usage: Usage | None = None


class ModelCard(BaseModel):
    """A served model."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "onebit"
    max_model_len: int


class ModelList(BaseModel):
    """The served models."""

    object: Literal["list"] = "list"
    data: list[ModelCard]
