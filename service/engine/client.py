"""The server's face of the engine: asyncio in front, a supervised process behind.

    start ---> alive --process ends--> restarting --loaded--> alive
                 |                         |
                 '--------- stop ----------'--> stopped

While alive, `generate` queues a request and gives back its stream of events. When the process ends, every open stream
raises EngineDead, and a new process is started: at once the first time, then after growing pauses, for as long as the
server runs. A request that comes while it starts is refused with EngineDead and a hint when to come back.

Admission is decided here, without asking the engine: the client knows how many requests are open, and refuses one more
than max_num_sequences + max_queued_requests with EngineBusy. But a caller who has more of them open than the newcomer's
gives one back, the youngest that has not begun: so nobody can keep others out by filling the queue.
"""

import asyncio
import logging
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from time import monotonic

from service.engine.admission import check_request
from service.engine.link import EngineLink
from service.engine.messages import Abort, FromEngine, Started, StartFailed, StepReport, Stop, Submit
from service.engine.stream import TokenStream
from service.engine.types import EngineConfig, EngineInfo, EngineStats, GenerationRequest
from service.errors import EngineBusy, EngineDead, EngineStartFailed, ShuttingDown

log = logging.getLogger(__name__)

LONGEST_PAUSE_SECONDS = 30.0
STABLE_SECONDS = 60.0  # an engine that lived this long was no crash loop
STOP_SECONDS = 10.0


class EngineClient:
    """One engine, kept alive.

    Attributes:
        info: what the loaded engine says of itself.
        stats: after the latest step; counters go on counting over restarts.
        restarts: how often the process was started again.
        on_stats: called in the event loop with every new `stats`; set it to feed metrics.
    """

    info: EngineInfo

    def __init__(self, config: EngineConfig) -> None:
        self.config = config
        self.stats = EngineStats()
        self.restarts = 0
        self.on_stats: Callable[[EngineStats], None] | None = None
        self._link: EngineLink | None = None
        self._streams: dict[str, TokenStream] = {}
        self._counted = EngineStats()  # counters of the processes that are gone
        self._alive = asyncio.Event()
        self._stopping = False
        self._supervisor: asyncio.Task[None] | None = None

    @classmethod
    async def start(cls, config: EngineConfig) -> "EngineClient":
        """Spawn the engine process and wait until its model is loaded.

        Raises:
            EngineStartFailed: it could not be loaded; the message says why.
        """
        client = cls(config)
        await client._spawn()
        return client

    @property
    def is_alive(self) -> bool:
        """Whether the engine process runs with its model loaded."""
        return self._alive.is_set()

    @property
    def num_in_flight(self) -> int:
        """Requests that are open."""
        return len(self._streams)

    @property
    def pid(self) -> int | None:
        """Process id of the engine; None when there is none."""
        return self._link.pid if self._link is not None else None

    async def wait_until_alive(self, timeout_seconds: float) -> None:
        """Wait for a restart to end; raises TimeoutError."""
        async with asyncio.timeout(timeout_seconds):
            await self._alive.wait()

    def generate(self, request: GenerationRequest) -> TokenStream:
        """Queue a request, at once, and return the stream of its events.

        The stream ends after the event with a finish_reason. Closing or dropping it early aborts the request; it raises
        EngineDead when the process ends under it.

        Raises:
            BadRequest: the request cannot be meant.
            ContextTooLong: the prompt leaves no room for a token.
            EngineBusy: too many requests are open.
            EngineDead: the engine is being restarted.
            ShuttingDown: the engine was stopped.
        """
        if self._stopping:
            raise ShuttingDown("the engine is stopped and takes no new requests")
        if self._link is None or not self.is_alive:
            raise EngineDead("the engine is being restarted; try again in a moment", retry_after_seconds=2)
        check_request(request, self.info, open_ids=self._streams.keys())
        limit = self.config.max_num_sequences + self.config.max_queued_requests
        if len(self._streams) >= limit and not self._make_room(request.caller):
            raise EngineBusy(
                f"the engine has {limit} open requests, which is its limit; try again later", retry_after_seconds=1
            )
        stream = TokenStream(request.request_id, request.caller, on_leave=self._leave)
        self._streams[request.request_id] = stream
        self._link.send(Submit(request=request))
        return stream

    def _make_room(self, caller: str) -> bool:
        """End the youngest waiting request of who has most open, if that is more than `caller` will have."""
        num_open = Counter(stream.caller for stream in self._streams.values())
        greedy, most = num_open.most_common(1)[0]
        if most <= num_open[caller] + 1:
            return False
        for stream in reversed(self._streams.values()):
            if stream.caller == greedy and not stream.has_begun:
                stream.fail(
                    EngineBusy("the engine's queue is full, and others wait for their turn", retry_after_seconds=1)
                )
                self._leave(stream.request_id)
                return True
        return False

    async def abort(self, request_id: str) -> None:
        """End a request, if it is open; its stream ends with an ABORT event."""
        if self._link is not None and request_id in self._streams:
            self._link.send(Abort(request_id=request_id))

    async def stop(self) -> None:
        """End open requests with ABORT, and the process; stopping twice is harmless."""
        self._stopping = True
        if self._supervisor is not None:
            self._supervisor.cancel()
        link = self._link
        if link is not None:
            link.send(Stop())
            await link.wait_exit(STOP_SECONDS)
        self._alive.clear()

    async def _spawn(self) -> None:
        """Start a process and wait until it has loaded the model."""
        started: asyncio.Future[EngineInfo] = asyncio.get_running_loop().create_future()

        def on_message(message: FromEngine) -> None:
            if isinstance(message, StepReport):
                self._take(message)
            elif not started.done():
                _resolve(started, message)

        def on_exit(code: int) -> None:
            self._link = None
            if not started.done():
                started.set_exception(EngineStartFailed(_died_loading(self.config.artifact, code)))
            elif self.is_alive:
                self._engine_ended(code)

        self._link = link = _open_link(self.config, on_message, on_exit)
        try:
            info = await started
        except BaseException:
            link.kill()
            await link.wait_exit(STOP_SECONDS)
            raise
        if self._link is not link:
            raise EngineStartFailed(f"the engine process ended as soon as it had loaded {self.config.artifact}")
        self.info = info
        self._alive.set()
        for note in self.info.notes:
            log.warning("%s: %s", self.config.artifact, note)

    def _take(self, report: StepReport) -> None:
        """Hand the events of a step to their streams."""
        gone = self._counted
        self.stats = replace(
            report.stats,
            num_preemptions=gone.num_preemptions + report.stats.num_preemptions,
            num_steps=gone.num_steps + report.stats.num_steps,
            num_failed_steps=gone.num_failed_steps + report.stats.num_failed_steps,
            prefix_cache_queries=gone.prefix_cache_queries + report.stats.prefix_cache_queries,
            prefix_cache_hits=gone.prefix_cache_hits + report.stats.prefix_cache_hits,
        )
        for event in report.events:
            stream = self._streams.get(event.request_id)
            if stream is not None:
                stream.put(event)
                if event.finish_reason is not None:
                    del self._streams[event.request_id]
        if self.on_stats is not None:
            self.on_stats(self.stats)

    def _leave(self, request_id: str) -> None:
        """Abort a request whose stream was closed or dropped before its end."""
        if self._streams.pop(request_id, None) is not None and self._link is not None:
            self._link.send(Abort(request_id=request_id))

    def _engine_ended(self, code: int) -> None:
        """Fail every open stream, and start again unless we are stopping."""
        self._alive.clear()
        self._counted = self.stats
        self.stats = replace(self.stats, num_running=0, num_waiting=0, kv_cache_usage=0.0, iteration_tokens=0)
        streams, self._streams = self._streams, {}
        for stream in streams.values():
            stream.fail(EngineDead(f"the engine process ended ({_exit_in_words(code)}) during the request"))
        if self.on_stats is not None:
            self.on_stats(self.stats)
        if self._stopping:
            return
        log.error("the engine process ended: %s; starting another", _exit_in_words(code))
        if self._supervisor is None or self._supervisor.done():
            self._supervisor = asyncio.create_task(self._keep_alive(), name="engine-supervisor")

    async def _keep_alive(self) -> None:
        """Start processes until one has lived for a while; each failure doubles the pause before the next."""
        failures = 0
        while failures == 0 or not await self._lives_on():
            await asyncio.sleep(min(2.0**failures - 1, LONGEST_PAUSE_SECONDS))
            failures += 1
            self.restarts += 1
            try:
                await self._spawn()
            except EngineStartFailed as error:
                log.error("the engine could not be started again: %s", error)  # noqa: TRY400  (a sentence is enough)

    async def _lives_on(self) -> bool:
        """Watch a started engine for STABLE_SECONDS; False as soon as it is dead."""
        born = monotonic()
        while self.is_alive and monotonic() - born < STABLE_SECONDS:
            await asyncio.sleep(0.1)
        return self.is_alive


def _open_link(
    config: EngineConfig, on_message: Callable[[FromEngine], None], on_exit: Callable[[int], None]
) -> EngineLink:
    """Start a process; too little memory, or too many processes and files, is a failed start like any other."""
    try:
        return EngineLink(config, on_message=on_message, on_exit=on_exit)
    except OSError as error:
        raise EngineStartFailed(f"no process for the engine can be started: {error}") from None


def _resolve(started: "asyncio.Future[EngineInfo]", message: Started | StartFailed) -> None:
    """Settle how a start went."""
    if isinstance(message, Started):
        started.set_result(message.info)
    else:
        started.set_exception(EngineStartFailed(message.message))


def _died_loading(artifact: str, code: int) -> str:
    return f"the engine process ended while it loaded {artifact}: {_exit_in_words(code)}; its log has the reason"


def _exit_in_words(code: int) -> str:
    """Name an exit code; a kill that nobody owns up to is usually the kernel's, for want of memory."""
    if code == -9:
        return "killed by signal 9, which is what the system does when memory runs out"
    return f"killed by signal {-code}" if code < 0 else f"exit code {code}"
