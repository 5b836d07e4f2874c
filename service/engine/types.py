"""What crosses the border between the server and the engine process: plain, frozen, picklable data; no torch."""

from dataclasses import dataclass
from enum import StrEnum

GIBIBYTE = 1 << 30
ARTIFACT_LOADER = "onebit_core.artifact.reader:load_model"
ORIGINAL_LOADER = "service.engine.originals:load_dense"
MOST_LOGPROBS = 20  # most tokens that may be asked for at one position
NOT_FINITE = "the model's logits for this sequence are not finite (NaN or infinity)"
"""The error of a sequence that ended so; metrics count these apart."""


class FinishReason(StrEnum):
    """Why a sequence ended."""

    STOP = "stop"  # an end-of-sequence token, or a stop string
    LENGTH = "length"  # max_tokens, or the end of the model's context
    ABORT = "abort"  # the caller left
    ERROR = "error"  # this sequence failed; its event carries the sentence


@dataclass(frozen=True, kw_only=True, slots=True)
class Grammar:
    """What a completion's text must be, in a form that xgrammar compiles.

    Attributes:
        kind: "json_object" (any JSON object), "json_schema", "regex" or "ebnf" (GBNF's dialect).
        text: the schema as JSON, the expression, or the grammar; empty for json_object.
    """

    kind: str
    text: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingParams:
    """How one completion is drawn.

    Logits are changed in this order: grammar and min_tokens forbid tokens; repetition, frequency and presence
    penalties; logit_bias; then temperature, min_p, top_k and top_p. Log probabilities are those of the raw logits.

    Attributes:
        max_tokens: most tokens to generate; 0 only with prompt_logprobs, which then are all there is, or to embed.
        temperature: 0 is greedy; otherwise logits are divided by it.
        top_p: draw from the fewest tokens whose probabilities reach this mass.
        top_k: draw from this many most probable tokens; 0 for all.
        min_p: draw from tokens at least this share as probable as the most probable one.
        frequency_penalty: subtracted from a token's logit for every time it was generated.
        presence_penalty: subtracted once if it was generated at all.
        repetition_penalty: divides positive and multiplies negative logits of tokens in prompt or completion
            (arXiv:1909.05858, section 4.1); 1 changes nothing.
        logit_bias: (token id, what is added to its logit), each id once.
        min_tokens: before so many are generated, neither end-of-sequence tokens nor stop_token_ids are drawn, and no
            stop text ends the completion.
        seed: equal seeds give equal draws, whatever else is in the batch; None takes one from the system.
        stop: texts that end the completion and are not returned, unless include_stop.
        include_stop: return the stop text that ended it.
        stop_token_ids: tokens that end the completion like an end-of-sequence token; ignore_eos leaves them.
        ignore_eos: go on to max_tokens through end-of-sequence tokens (benchmarks).
        logprobs: report the log probability of every drawn token and of so many most probable ones; None for none.
        prompt_logprobs: the same for the prompt's tokens.
        grammar: what the text must be; None for anything.
    """

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    min_tokens: int = 0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    include_stop: bool = False
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    grammar: Grammar | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class GenerationRequest:
    """One prompt to continue once; n completions of a prompt are n requests with n ids and n seeds.

    Attributes:
        request_id: unique among the open ones.
        prompt_token_ids: at least one.
        sampling: how the completion is drawn.
        priority: lower ones are computed first; of equal ones, the one that came first.
        cache_salt: only requests with equal salts share cached prompt pages.
        group: equal for the completions of one prompt in one call, for the figures; "" for one alone.
        group_size: how many completions of the prompt the call asks for.
        embed: report the prompt's embedding in place of a completion; max_tokens is 0.
        adapter: name of the adapter that scales the model's layers for it; "" for none.
        caller: on whose behalf; waiting requests of different callers take turns (`service.engine.fair_queue`).
    """

    request_id: str
    prompt_token_ids: tuple[int, ...]
    sampling: SamplingParams
    priority: int = 0
    cache_salt: str = ""
    group: str = ""
    group_size: int = 1
    embed: bool = False
    adapter: str = ""
    caller: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenLogprobs:
    """Log probabilities at one position, in nats, of the model's raw logits.

    Attributes:
        token_id: the token that stands there.
        logprob: its log probability.
        top: the most probable tokens with theirs, the most probable first; as many as were asked for.
    """

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


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
        logprobs: one for each of token_ids, if they were asked for.
        prompt_logprobs: one for each token of the prompt, in the first event, if they were asked for; the first is
            None, for nothing comes before it.
        num_cached_tokens: tokens of the prompt whose keys and values were in the cache already, in the first event.
        embedding: what the head reads at the prompt's last token, of length 1, as little-endian float32; in the last
            event, if it was asked for.
    """

    request_id: str
    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason | None
    error: str | None
    num_prompt_tokens: int
    num_generated_tokens: int
    queue_seconds: float | None = None
    logprobs: tuple[TokenLogprobs, ...] = ()
    prompt_logprobs: tuple[TokenLogprobs | None, ...] | None = None
    num_cached_tokens: int = 0
    embedding: bytes | None = None


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
        prefix_cache_queries: prompt tokens looked up in the prefix cache.
        prefix_cache_hits: those found there.
        iteration_tokens: tokens computed in the latest step; 0 when nothing was run.
    """

    num_running: int = 0
    num_waiting: int = 0
    kv_cache_usage: float = 0.0
    num_preemptions: int = 0
    num_steps: int = 0
    num_failed_steps: int = 0
    prefix_cache_queries: int = 0
    prefix_cache_hits: int = 0
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
        embedding_size: numbers in an embedding.
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
    embedding_size: int = 0
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineConfig:
    """What an engine process is started with.

    Attributes:
        artifact: folder of the model.
        fingerprint: of its files (service.engine.steady); a process refuses other ones. Empty for any.
        device: "auto" (CUDA where there is one), "cpu" or "cuda".
        dtype: "auto", "float32", "bfloat16" or "float16".
        backend: who computes packed layers; see onebit_core.kernels.backends.
        page_size: tokens in a page of the KV cache.
        kv_cache_bytes: size of the KV cache.
        kv_cache_dtype: "auto" (the model's dtype) or "int8".
        max_num_sequences: most sequences that run at once.
        max_batched_tokens: most tokens computed in one step; a longer prompt is computed in chunks.
        prefix_caching: whether pages of finished sequences serve later ones with the same beginning.
        max_queued_requests: most requests that wait; one more is refused with EngineBusy.
        max_model_len: most tokens of prompt and completion; None takes what model and pool allow.
        fuse: compute the blocks of models of the Llama family in one call of the CPU kernels, where they allow it.
        decode_graphs: record the steps that give one token to each sequence as CUDA graphs, where they allow it.
        loader: "module:function" that loads the artifact; called like `onebit_core.artifact.reader.load_model`.
        adapters: (name, folder, sha256 of the scales) of every adapter that requests may name.
        log_level: of the engine process's own log, on its standard error.
    """

    artifact: str
    fingerprint: str = ""
    device: str = "auto"
    dtype: str = "auto"
    backend: str = "auto"
    page_size: int = 16
    kv_cache_bytes: int = GIBIBYTE
    kv_cache_dtype: str = "auto"
    max_num_sequences: int = 64
    max_batched_tokens: int = 1024
    prefix_caching: bool = True
    max_queued_requests: int = 256
    max_model_len: int | None = None
    fuse: bool = True
    decode_graphs: bool = True
    loader: str = ARTIFACT_LOADER
    adapters: tuple[tuple[str, str, str], ...] = ()
    log_level: str = "info"
