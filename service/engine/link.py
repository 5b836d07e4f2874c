"""The server's end of one engine process: the process, the pipe, and a thread for each direction.

    event loop --send--> sender thread --pipe--> engine
    event loop <--call_soon_threadsafe-- receiver thread <--pipe-- engine

The event loop never touches the pipe, so an engine that is stuck in a step, or stopped by a debugger, cannot stop the
server. The receiver sees the end of the pipe when the process ends, however it ends, and reports the exit code once.
"""

import asyncio
import atexit
import contextlib
import multiprocessing
import os
import threading
from collections.abc import Callable
from multiprocessing.connection import Connection
from queue import SimpleQueue
from typing import TypeVarTuple

from service.engine.entry import run_engine
from service.engine.messages import FromEngine, ToEngine
from service.engine.types import EngineConfig

Arguments = TypeVarTuple("Arguments")


class EngineLink:
    """One engine process, from its start to its end.

    Args:
        config: of the engine.
        on_message: called in the event loop with every message from the engine.
        on_exit: called in the event loop, once, after the last message; with the exit code (negative: a signal).
    """

    def __init__(
        self,
        config: EngineConfig,
        *,
        on_message: Callable[[FromEngine], None],
        on_exit: Callable[[int], None],
    ) -> None:
        self._events = asyncio.get_running_loop()
        self._on_message = on_message
        self._on_exit = on_exit
        self._outbox: SimpleQueue[ToEngine | None] = SimpleQueue()
        context = multiprocessing.get_context("spawn")
        self._connection: Connection[ToEngine, FromEngine]
        self._connection, child = context.Pipe(duplex=True)
        self._process = context.Process(
            target=run_engine, args=(child, config, os.getpid()), name="onebit-engine", daemon=True
        )
        # From the event loop's own thread: the engine dies with the thread that started it (PR_SET_PDEATHSIG).
        self._process.start()
        child.close()
        atexit.register(self._process.kill)  # it ignores the SIGTERM that multiprocessing would send at exit
        self._exited = asyncio.Event()
        for target in (self._send_all, self._receive_all):
            threading.Thread(target=target, name=f"engine-link-{target.__name__}", daemon=True).start()

    @property
    def pid(self) -> int:
        """Process id of the engine."""
        assert self._process.pid is not None
        return self._process.pid

    def send(self, message: ToEngine) -> None:
        """Queue a message; lost without a word if the engine is gone, which `on_exit` reports."""
        self._outbox.put(message)

    async def wait_exit(self, timeout_seconds: float) -> None:
        """Wait for the process to end; kill it when it takes too long."""
        try:
            async with asyncio.timeout(timeout_seconds):
                await self._exited.wait()
        except TimeoutError:
            self._process.kill()
            await self._exited.wait()

    def kill(self) -> None:
        """End the process now; harmless when it has ended."""
        if not self._exited.is_set():
            self._process.kill()

    def _send_all(self) -> None:
        """Write what is queued until the pipe or the process ends."""
        with contextlib.suppress(OSError):
            while (message := self._outbox.get()) is not None:
                self._connection.send(message)

    def _receive_all(self) -> None:
        """Hand every message to the event loop, then the exit code."""
        with contextlib.suppress(EOFError, OSError):
            while True:
                self._in_loop(self._on_message, self._connection.recv())
        self._process.join()
        atexit.unregister(self._process.kill)
        self._outbox.put(None)
        self._in_loop(self._ended)

    def _ended(self) -> None:
        code = self._process.exitcode
        self._connection.close()
        self._process.close()
        self._exited.set()
        self._on_exit(-1 if code is None else code)

    def _in_loop(self, call: Callable[[*Arguments], None], *arguments: *Arguments) -> None:
        """Call in the event loop; nothing is left to tell once that is closed."""
        with contextlib.suppress(RuntimeError):
            self._events.call_soon_threadsafe(call, *arguments)
