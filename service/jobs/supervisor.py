"""Keeps one job worker alive for as long as the server runs.

The worker's standard input is a pipe of ours: it names the database, and when we end, in whatever way, it ends too. The
worker's standard output carries signs of life. A worker that is refused, because another one has its id, is a mistake
in the setup: another server on the same database. At start that ends the server.
"""

import asyncio
import logging
import sys
from collections.abc import Callable
from contextlib import suppress

logger = logging.getLogger(__name__)

FIRST_PAUSE_SECONDS = 1.0
LONGEST_PAUSE_SECONDS = 15.0
STABLE_SECONDS = 60.0
REFUSED = 3
"""Exit code of a worker whose id is taken."""


class WorkerSupervisor:
    """Starts the worker, starts it again when it ends, stops it with the server.

    Attributes:
        last_heartbeat: when the worker last gave a sign of life, Unix seconds; 0 before the first.
        on_refused: called with one sentence when the first worker is refused.
    """

    def __init__(self, database_url: str, executor_id: str | None, device: str, log_level: str) -> None:
        self.last_heartbeat = 0.0
        self.on_refused: Callable[[str], None] = logger.error
        self._arguments = ["--supervised", "--device", device, "--log-level", log_level]
        if executor_id is not None:
            self._arguments += ["--job-worker-id", executor_id]
        # The URL may hold a password, and everybody may read arguments.
        self._first_line = f"{database_url}\n".encode()
        self._process: asyncio.subprocess.Process | None = None
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Begin to keep a worker alive."""
        self._task = asyncio.create_task(self._keep_alive(), name="job-worker-supervisor")

    async def stop(self, timeout_seconds: float) -> None:
        """End the worker; the job at hand goes on at the next start."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        process = self._process
        if process is None or process.returncode is not None:
            return
        assert process.stdin is not None
        process.stdin.close()
        try:
            async with asyncio.timeout(timeout_seconds):
                await process.wait()
        except TimeoutError:
            with suppress(ProcessLookupError):
                process.kill()
            await process.wait()

    async def _keep_alive(self) -> None:
        """Run workers one after another, with growing pauses while they die young."""
        pause = FIRST_PAUSE_SECONDS
        while True:
            started = asyncio.get_running_loop().time()
            try:
                code = await self._run_worker()
                how = f"ended with code {code}"
                if code == REFUSED and not self.last_heartbeat:
                    self.on_refused(
                        "another server or worker with this one's worker id uses the jobs' database; stop it, or give "
                        "this server a database, a --job-worker-id or --no-job-worker"
                    )
                    return
            except OSError as error:
                how = f"could not be started ({error})"
            lived = asyncio.get_running_loop().time() - started
            logger.error("the job worker %s after %.0f s; starting another", how, lived)
            pause = FIRST_PAUSE_SECONDS if lived > STABLE_SECONDS else min(2 * pause, LONGEST_PAUSE_SECONDS)
            await asyncio.sleep(pause)

    async def _run_worker(self) -> int:
        """Run one worker to its end, noting its signs of life."""
        self._process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "service.jobs.worker",
            *self._arguments,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
        )
        assert self._process.stdin is not None
        self._process.stdin.write(self._first_line)
        assert self._process.stdout is not None
        async for line in self._process.stdout:
            with suppress(ValueError):
                self.last_heartbeat = float(line)
        return await self._process.wait()
