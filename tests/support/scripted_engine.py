"""A working double of the engine: it plays a script instead of a model, and remembers what it was asked."""

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field

from service.engine.types import EngineConfig, EngineInfo, EngineStats, FinishReason, GenerationRequest, TokenEvent
from service.errors import ServiceError


@dataclass
class Script:
    """What every sequence says.

    Attributes:
        pieces: texts, one a token.
        finish: how it ends after the last piece.
        refusal: raised instead of accepting a request.
        failure: raised after the pieces, instead of an end.
        pause_seconds: before each piece.
    """

    pieces: tuple[str, ...] = ("Hel", "lo", " world")
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
        )

    def generate(self, request: GenerationRequest) -> AsyncIterator[TokenEvent]:
        if self.script.refusal is not None:
            raise self.script.refusal
        self.requests.append(request)
        return self._play(request)

    async def _play(self, request: GenerationRequest) -> AsyncIterator[TokenEvent]:
        pieces = self.script.pieces[: request.sampling.max_tokens]
        is_cut = len(pieces) < len(self.script.pieces)
        ended = False
        try:
            for position, piece in enumerate(pieces):
                await asyncio.sleep(self.script.pause_seconds)
                is_last = position == len(pieces) - 1 and self.script.failure is None
                finish = (FinishReason.LENGTH if is_cut else self.script.finish) if is_last else None
                ended = is_last
                yield TokenEvent(
                    request_id=request.request_id,
                    text=piece,
                    token_ids=(position,),
                    finish_reason=finish,
                    error="a layer gave NaN" if finish is FinishReason.ERROR else None,
                    num_prompt_tokens=len(request.prompt_token_ids),
                    num_generated_tokens=position + 1,
                    queue_seconds=0.0 if position == 0 else None,
                )
            if self.script.failure is not None:
                ended = True
                raise self.script.failure
        finally:
            if not ended:
                self.left.append(request.request_id)

    async def stop(self) -> None:
        self.stopped = True


class ScriptedStarter:
    """Stands where EngineClient.start stands; keeps the engines it made."""

    def __init__(self, script: Script | None = None, refusal: ServiceError | None = None) -> None:
        self.script = script or Script()
        self.refusal = refusal
        self.engines: list[ScriptedEngine] = []

    async def __call__(self, config: EngineConfig) -> ScriptedEngine:
        if self.refusal is not None:
            raise self.refusal
        engine = ScriptedEngine(config=config, script=self.script)
        self.engines.append(engine)
        return engine
