"""What crosses the border between the server and the engine process: plain, frozen, picklable data; no torch."""

from dataclasses import dataclass
from enum import StrEnum

GIBIBYTE = 1 << 30


class FinishReason(StrEnum):
    """Why a sequence ended."""

    STOP = "stop"  # an end-of-sequence token, or a stop string
    LENGTH = "length"  # max_tokens, or the end of the model's context
    ABORT = "abort"  # the caller left
    ERROR = "error"  # this sequence failed; its event carries the sentence


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingParams:
    """How one completion is drawn.

    Attributes:
        max_tokens: most tokens to generate, at least 1.
        temperature: 0 is greedy; otherwise logits are divided by it.
        top_p: draw from the fewest tokens whose probabilities reach this mass.
        seed: equal seeds give equal draws, whatever else is in the batch; None takes one from the system.
        stop: texts that end the completion and are not returned.
        ignore_eos: go on to max_tokens through end-of-sequence tokens (benchmarks).
    """

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class GenerationRequest:
    """One prompt to continue once; n completions of a prompt are n requests with n ids and n seeds."""

    request_id: str
    prompt_token_ids: tuple[int, ...]
    sampling: SamplingParams


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenEvent:
    """What one step added to one request.

    Attributes:
        request_id: of the request.
        text: increment; never cuts a character, never holds any of a stop string. Often empty while text is held.
        token_ids: the new tokens, an end-of-sequence token included.
        finish_reason: None until the last event.
        error: one sentence when finish_reason is ERROR.
        num_prompt_tokens: tokens of the prompt.
        num_generated_tokens: tokens generated so far, these included.
        queue_seconds: time from arrival in the engine to the first step, in the first event; None afterwards.
    """

    request_id: str
    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason | None
    error: str | None
    num_prompt_tokens: int
    num_generated_tokens: int
    queue_seconds: float | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineStats:
    """The engine after its latest step; counters count from the start of this engine process.

    Attributes:
        num_running: sequences that hold pages.
        num_waiting: sequences that wait for pages.
        kv_cache_usage: share of the pages in use, 0 to 1.
        num_preemptions: how often a sequence gave its pages back and was computed again.
        num_steps: steps run.
        num_failed_steps: steps that ended in an exception.
        iteration_tokens: tokens computed in the latest step; 0 when nothing was run.
    """

    num_running: int = 0
    num_waiting: int = 0
    kv_cache_usage: float = 0.0
    num_preemptions: int = 0
    num_steps: int = 0
    num_failed_steps: int = 0
    iteration_tokens: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineInfo:
    """What an engine that has loaded its model says of itself.

    Attributes:
        max_model_len: most tokens of prompt and completion together.
        vocab_size: prompt token ids are below it.
        num_pages: pages in the pool.
        eos_token_ids: tokens that end a completion.
        device: "cpu" or "cuda".
        dtype: of activations and KV cache, such as "float32".
        backend: who computes packed layers, and on what, such as "cpu avx512vbmi".
        memory_bytes: model and KV cache together.
        notes: what was decided on the way, such as a context shortened to fit the pool; one sentence each.
    """

    max_model_len: int
    vocab_size: int
    num_pages: int
    eos_token_ids: tuple[int, ...]
    device: str
    dtype: str
    backend: str
    memory_bytes: int
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineConfig:
    """What an engine process is started with.

    Attributes:
        artifact: folder of the model.
        device: "auto" (CUDA where there is one), "cpu" or "cuda".
        dtype: "auto", "float32", "bfloat16" or "float16".
        backend: who computes packed layers; see onebit_core.kernels.backends.
        page_size: tokens in a page of the KV cache.
        kv_cache_bytes: size of the KV cache.
        max_num_sequences: most sequences that run at once.
        max_batched_tokens: most tokens computed in one step; a longer prompt is computed in chunks.
        max_queued_requests: most requests that wait; one more is refused with EngineBusy.
        max_model_len: most tokens of prompt and completion; None takes what model and pool allow.
        loader: "module:function" that loads the artifact; called like `onebit_core.artifact.reader.load_model`.
        log_level: of the engine process's own log, on its standard error.
    """

    artifact: str
    device: str = "auto"
    dtype: str = "auto"
    backend: str = "auto"
    page_size: int = 16
    kv_cache_bytes: int = GIBIBYTE
    max_num_sequences: int = 64
    max_batched_tokens: int = 1024
    max_queued_requests: int = 256
    max_model_len: int | None = None
    loader: str = "onebit_core.artifact.reader:load_model"
    log_level: str = "info"
