"""What the OpenAI endpoints answer, as models: /openapi.json shows them, and tests hold every answer against them.

Answers themselves are plain dictionaries (responses.py). Fields marked as extensions are only there when asked for.
"""

from typing import Any, Literal

from pydantic import BaseModel, Field

FinishReasonName = Literal["stop", "length"]
ChatFinishReasonName = Literal["stop", "length", "tool_calls"]


class PromptTokensDetails(BaseModel):
    """Where the prompt's tokens came from."""

    cached_tokens: int = Field(description="Tokens whose keys and values were in the prefix cache.")


class Usage(BaseModel):
    """Tokens a request cost: each prompt counted once, and everything generated, best_of's losers too."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class PromptLogprob(BaseModel):
    """One token that could stand at a place of the prompt."""

    logprob: float
    rank: int | None = Field(description="1 for the most probable; null if it is not among those asked for.")
    decoded_token: str


PromptLogprobs = list[dict[str, PromptLogprob] | None]
"""For each token of the prompt, by token id; null for the first."""


class CompletionLogprobs(BaseModel):
    """Four lists, one entry for each token."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int] = Field(description="Where the token begins in the choice's text, in characters.")


class CompletionChoice(BaseModel):
    """One completion."""

    text: str
    index: int
    logprobs: CompletionLogprobs | None = None
    finish_reason: FinishReasonName | None
    prompt_logprobs: PromptLogprobs | None = Field(default=None, description="Extension.")
    prompt_token_ids: list[int] | None = Field(default=None, description="Extension.")
    token_ids: list[int] | None = Field(default=None, description="Extension.")


class Completion(BaseModel):
    """The answer to POST /v1/completions, and every chunk of its stream."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    system_fingerprint: str
    choices: list[CompletionChoice]
    usage: Usage | None = None


class ScoredToken(BaseModel):
    """A token and its log probability."""

    token: str
    logprob: float
    bytes: list[int] | None


class TokenLogprob(ScoredToken):
    """A token that was drawn, and the most probable ones in its place."""

    top_logprobs: list[ScoredToken]


class ChatLogprobs(BaseModel):
    """One entry for each token."""

    content: list[TokenLogprob] | None
    refusal: None = None


class FunctionCall(BaseModel):
    """What the model wants called."""

    name: str
    arguments: str = Field(description="A JSON object, as text.")


class ToolCall(BaseModel):
    """A call the model asks for."""

    id: str
    type: Literal["function"] = "function"
    function: FunctionCall


class ToolCallDelta(ToolCall):
    """A call in a stream, delivered when it is complete."""

    index: int


class ChatMessage(BaseModel):
    """What the model said."""

    role: Literal["assistant"] = "assistant"
    content: str | None
    refusal: None = None
    tool_calls: list[ToolCall] | None = None


class ChatChoice(BaseModel):
    """One completion of a conversation."""

    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None = None
    finish_reason: ChatFinishReasonName
    token_ids: list[int] | None = Field(default=None, description="Extension.")


class ChatCompletion(BaseModel):
    """The answer to POST /v1/chat/completions."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChoice]
    usage: Usage
    prompt_logprobs: PromptLogprobs | None = Field(default=None, description="Extension.")
    prompt_token_ids: list[int] | None = Field(default=None, description="Extension.")


class ChatDelta(BaseModel):
    """What a chunk adds to a message."""

    role: Literal["assistant"] | None = None
    content: str | None = None
    tool_calls: list[ToolCallDelta] | None = None


class ChatChunkChoice(BaseModel):
    """A piece of one completion of a conversation."""

    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None = None
    finish_reason: ChatFinishReasonName | None
    token_ids: list[int] | None = Field(default=None, description="Extension.")


class ChatCompletionChunk(BaseModel):
    """One event of a chat stream."""

    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChunkChoice]
    usage: Usage | None = None
    prompt_token_ids: list[int] | None = Field(default=None, description="Extension; on a choice's first chunk.")


class ModelCard(BaseModel):
    """A served model."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "onebit"
    root: str = Field(
        description="Extension, as vLLM's: the model that answers; `id` unless that is an alias or names an adapter."
    )
    parent: str | None = Field(
        description="Extension, as vLLM's: the model that an alias leads to, or that an adapter is for."
    )
    max_model_len: int
    method: str = Field(description="Extension: how it was quantized; `original` if it was not.")
    bits_per_weight: float = Field(description="Extension: of the whole model as stored.")


class ModelList(BaseModel):
    """The served models."""

    object: Literal["list"] = "list"
    data: list[ModelCard]


class Tokenized(BaseModel):
    """The answer to POST /tokenize."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None = None


class Detokenized(BaseModel):
    """The answer to POST /detokenize."""

    prompt: str


class TokenizerInfo(BaseModel):
    """The answer to GET /tokenizer_info."""

    tokenizer_class: str
    vocab_size: int
    model_max_length: int
    bos_token: str | None
    eos_token: str | None
    pad_token: str | None
    unk_token: str | None
    special_tokens: list[str]
    chat_template: Any = Field(description="Text, or texts by name; null if the model has none.")


class Version(BaseModel):
    """The answer to GET /version."""

    version: str


class Load(BaseModel):
    """The answer to GET /load."""

    server_load: int = Field(description="Sequences running and waiting in all engines.")
