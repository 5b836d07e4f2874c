"""The messages on the pipe between server and engine process, in both directions.

    server -> engine    Submit | Abort | Stop
    engine -> server    Started | StartFailed, then StepReport after every step

The end of the pipe is a message too: the engine takes it as the death of its server and exits, the server as the death
of its engine.
"""

from dataclasses import dataclass

from service.engine.types import EngineInfo, EngineStats, GenerationRequest, TokenEvent


@dataclass(frozen=True, kw_only=True, slots=True)
class Submit:
    """Queue this request."""

    request: GenerationRequest


@dataclass(frozen=True, kw_only=True, slots=True)
class Abort:
    """End this request, if it still runs."""

    request_id: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Stop:
    """End every request with ABORT, then exit with code 0."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Started:
    """The model is loaded."""

    info: EngineInfo


@dataclass(frozen=True, kw_only=True, slots=True)
class StartFailed:
    """The model could not be loaded; the process exits."""

    message: str


@dataclass(frozen=True, kw_only=True, slots=True)
class StepReport:
    """What happened since the last report."""

    events: tuple[TokenEvent, ...]
    stats: EngineStats


ToEngine = Submit | Abort | Stop
FromEngine = Started | StartFailed | StepReport
