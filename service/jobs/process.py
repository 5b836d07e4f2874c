"""Runs one `onebit` command as a child process group and reads its JSON lines.

The command is a process of its own so that a crash or the kernel's memory killer takes it and nobody else, and so that
its memory is free the moment it ends. Stopping it is SIGTERM, which it obeys after the block at hand, then SIGKILL to
the whole group. It inherits the lock on the job's folder (`service.jobs.fence`).
"""

import asyncio
import json
import logging
import os
import signal
import sys
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, ClassVar

from service.jobs import attempts
from service.jobs.fence import name_holder

logger = logging.getLogger(__name__)

LONGEST_LINE_BYTES = 1 << 20
STOP_SECONDS = 20.0
LOG_FILE = "log"

OnEvent = Callable[[dict[str, Any]], Awaitable[None]]


class JobFailed(Exception):
    """The command failed; the message is its one sentence."""


class CommandDied(JobFailed):
    """The command was killed from outside; the same command goes on where it was."""


class Command:
    """One run of `onebit`, at most one at a time in a worker.

    Attributes:
        running: the one that runs now.
        device: where the commands of this worker run; None for what their jobs say.
        worker_ends: set when the worker is about to exit; from then on a dead child is no failed job.
    """

    running: "ClassVar[Command | None]" = None
    device: ClassVar[str | None] = None
    worker_ends: ClassVar[bool] = False

    def __init__(self, arguments: list[str], folder: Path, job_id: str = "") -> None:
        self.job_id = job_id
        self._arguments = arguments
        self._folder = folder
        self._process: asyncio.subprocess.Process | None = None

    async def run(self, on_event: OnEvent, lock: int | None = None) -> dict[str, Any]:
        """Run the command to its end.

        Args:
            on_event: called with every progress event.
            lock: the lock on the job's folder, for the command to keep.

        Returns:
            The result event.

        Raises:
            JobFailed: it said why it failed, or ended without a word.
            CommandDied: it was killed.
            asyncio.CancelledError: the job was cancelled; the command is stopped first.
        """
        launcher = [sys.executable, "-m", "service.jobs.child", str(os.getpid())]
        with self.log_file.open("ab") as log:
            self._process = await asyncio.create_subprocess_exec(
                *launcher,
                *[sys.executable, "-m", "onebit_core.cli.main", *self._arguments],
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE,
                stderr=log,
                limit=LONGEST_LINE_BYTES,
                start_new_session=True,
                pass_fds=() if lock is None else (lock,),
            )
        if lock is not None:
            name_holder(lock, self._process.pid)
        Command.running = self
        try:
            last = await self._read(on_event)
            code = await self._process.wait()
        finally:
            await self.stop()
            Command.running = None
        if Command.worker_ends:
            await asyncio.Event().wait()  # the process ends first; the job stays on record as running
        if last.get("event") == "result":
            return last
        if "message" not in last and code < 0:
            raise CommandDied(self._death_in_words(code))
        raise JobFailed(last.get("message") or self._death_in_words(code))

    async def _read(self, on_event: OnEvent) -> dict[str, Any]:
        """Hand on progress events; return the last other event, or an empty one."""
        assert self._process is not None
        assert self._process.stdout is not None
        last: dict[str, Any] = {}
        async for line in self._process.stdout:
            with suppress(ValueError):  # a library may print to standard output; that is not for us
                event = json.loads(line)
                if not isinstance(event, dict):
                    continue
                if event.get("event") == "progress":
                    await on_event(event)
                else:
                    last = event
        return last

    async def stop(self) -> None:
        """Stop the process group, if it still runs: SIGTERM, then SIGKILL."""
        process = self._process
        if process is None or process.returncode is not None:
            return
        self._signal(signal.SIGTERM)
        try:
            async with asyncio.timeout(STOP_SECONDS):
                await process.wait()
        except TimeoutError:
            self._signal(signal.SIGKILL)
            await process.wait()

    @classmethod
    def kill_for_good(cls) -> None:
        """Kill what runs, at once, without failing its job; for a worker that ends now."""
        cls.worker_ends = True
        if cls.running is not None:
            with suppress(OSError):  # counted as a crash then
                attempts.end(cls.running._folder)
            cls.running.kill()

    def kill(self) -> None:
        """Kill the whole process group at once."""
        self._signal(signal.SIGKILL)

    @property
    def log_file(self) -> Path:
        """What the command writes to standard error, run after run."""
        return self._folder / LOG_FILE

    def _signal(self, number: signal.Signals) -> None:
        if self._process is not None and self._process.returncode is None:
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, number)

    def _death_in_words(self, code: int) -> str:
        command = f"onebit {self._arguments[0]}"
        if code == -signal.SIGKILL:
            return f"{command} was killed by signal 9, which is what the system does when memory runs out"
        how = f"was killed by signal {-code}" if code < 0 else f"ended with code {code}"
        return f"{command} {how}; the job's log may say why"
