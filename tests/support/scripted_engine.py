"""A working double of the engine: it plays a script instead of a model, and remembers what it was asked."""

import asyncio
from array import array
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field

from service.engine.types import (
    EngineConfig,
    EngineInfo,
    EngineStats,
    FinishReason,
    GenerationRequest,
    TokenEvent,
    TokenLogprobs,
)
from service.errors import ServiceError


@dataclass
class Script:
    """What every sequence says.

    Attributes:
        pieces: texts, one a token; an empty one is text that is held back.
        token_ids: of the pieces; by default 0, 1, 2, ...
        scores: the log probability of each token, by which request it is and its place.
        num_cached: tokens of every prompt that were in the cache.
        finish: how it ends after the last piece.
        refusal: raised instead of accepting a request.
        failure: raised after the pieces, instead of an end.
        pause_seconds: before each piece.
    """

    pieces: tuple[str, ...] = ("Hel", "lo", " world")
    token_ids: tuple[int, ...] = ()
    scores: Callable[[int, int], float] = lambda _draw, place: -0.5 * (place + 1)
    num_cached: int = 0
    finish: FinishReason = FinishReason.STOP
    refusal: ServiceError | None = None
    failure: ServiceError | None = None
    pause_seconds: float = 0.0


@dataclass
class ScriptedEngine:
    """Has the attributes and methods of service.engine.client.EngineClient that the API uses."""

    config: EngineConfig
    script: Script
    max_model_len: int = 64
    vocab_size: int = 320
    requests: list[GenerationRequest] = field(default_factory=list)
    left: list[str] = field(default_factory=list)
    is_alive: bool = True
    restarts: int = 0
    pid: int | None = None
    stopped: bool = False
    stats: EngineStats = field(default_factory=EngineStats)
    on_stats: Callable[[EngineStats], None] | None = None

    @property
    def info(self) -> EngineInfo:
        return EngineInfo(
            max_model_len=self.max_model_len,
            vocab_size=self.vocab_size,
            num_pages=64,
            eos_token_ids=(256,),
            device="cpu",
            dtype="float32",
            backend="auto",
            memory_bytes=1 << 20,
            embedding_size=3,
        )

    def generate(self, request: GenerationRequest) -> AsyncIterator[TokenEvent]:
        if self.script.refusal is not None:
            raise self.script.refusal
        self.requests.append(request)
        return self._play(request, len(self.requests) - 1)

    async def _play(self, request: GenerationRequest, draw: int) -> AsyncIterator[TokenEvent]:
        pieces = self.script.pieces[: request.sampling.max_tokens]
        is_cut = len(pieces) < len(self.script.pieces)
        ended = False
        try:
            if not pieces and self.script.failure is None:
                ended = True
                yield self._event(request, draw, -1, "", FinishReason.LENGTH)
            for position, piece in enumerate(pieces):
                await asyncio.sleep(self.script.pause_seconds)
                is_last = position == len(pieces) - 1 and self.script.failure is None
                finish = (FinishReason.LENGTH if is_cut else self.script.finish) if is_last else None
                ended = is_last
                yield self._event(request, draw, position, piece, finish)
            if self.script.failure is not None:
                ended = True
                raise self.script.failure
        finally:
            if not ended:
                self.left.append(request.request_id)

    def _event(
        self, request: GenerationRequest, draw: int, position: int, piece: str, finish: FinishReason | None
    ) -> TokenEvent:
        """The event of one place; -1 if nothing is generated and only the prompt is scored."""
        is_first, sampling = position <= 0, request.sampling
        given = self.script.token_ids or range(len(self.script.pieces))
        token_ids = () if position < 0 else (given[position],)
        scored = None
        if is_first and sampling.prompt_logprobs is not None:
            scored = tuple(
                self._score(token_id, -float(place), sampling.prompt_logprobs) if place else None
                for place, token_id in enumerate(request.prompt_token_ids)
            )
        wanted = sampling.logprobs
        return TokenEvent(
            request_id=request.request_id,
            text=piece,
            token_ids=token_ids,
            finish_reason=finish,
            error="a layer gave NaN" if finish is FinishReason.ERROR else None,
            num_prompt_tokens=len(request.prompt_token_ids),
            num_generated_tokens=position + 1,
            queue_seconds=0.0 if is_first else None,
            logprobs=()
            if wanted is None
            else tuple(self._score(token_id, self.script.scores(draw, position), wanted) for token_id in token_ids),
            prompt_logprobs=scored,
            num_cached_tokens=self.script.num_cached if is_first else 0,
            embedding=array("f", [len(request.prompt_token_ids), -0.5, 0.25]).tobytes() if request.embed else None,
        )

    def _score(self, token_id: int, logprob: float, num_top: int) -> TokenLogprobs:
        """The token itself is the second most probable one, after capital letters."""
        others = [(ord("A") + place, logprob + 0.25 - place) for place in range(num_top)]
        top = sorted([(token_id, logprob), *others], key=lambda pair: -pair[1])[:num_top]
        return TokenLogprobs(token_id=token_id, logprob=logprob, top=tuple(top))

    async def stop(self) -> None:
        self.stopped = True


class ScriptedStarter:
    """Stands where EngineClient.start stands; keeps the engines it made."""

    def __init__(
        self, script: Script | None = None, refusal: ServiceError | None = None, max_model_len: int = 64
    ) -> None:
        self.script = script or Script()
        self.max_model_len = max_model_len
        self.refusal = refusal
        self.engines: list[ScriptedEngine] = []

    async def __call__(self, config: EngineConfig) -> ScriptedEngine:
        if self.refusal is not None:
            raise self.refusal
        engine = ScriptedEngine(config=config, script=self.script, max_model_len=self.max_model_len)
        self.engines.append(engine)
        return engine
