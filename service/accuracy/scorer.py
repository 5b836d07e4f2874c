"""The server's side of live accuracy: chooses sequences, hands them to the scorer process, counts what it says.

    offer --chosen by the hash of its id--> queue --one at a time--> process --> metrics
                                              '--full: dropped, counted

`offer` does nothing that can wait or fail. The process is started with the first sequence, and again after a growing
pause when it dies; the sequence it died under is counted as failed and not tried twice, for it may be what killed it.
"""

import asyncio
import contextlib
import json
import logging
import os
import sys
from collections.abc import Sequence
from contextvars import Context
from dataclasses import asdict
from hashlib import blake2b
from typing import Any

from service.accuracy.types import PositionScores, ScorerConfig
from service.metrics import SCORED_POSITIONS, LiveMetrics

logger = logging.getLogger(__name__)

QUEUE_LENGTH = 32
FIRST_PAUSE_SECONDS = 1.0
LONGEST_PAUSE_SECONDS = 300.0
LONGEST_LINE_BYTES = 1 << 24


def is_chosen(request_id: str, share: float) -> bool:
    """Whether a sequence is among the share that is scored; the same for the same id, on every server."""
    number = int.from_bytes(blake2b(request_id.encode(), digest_size=8).digest())
    return number < share * 2**64


class LiveScorer:
    """Scores a share of one model's traffic.

    Args:
        config: of the process.
        share: of the sequences, 0 to 1.
        metrics: where the figures go.
        model: the name it is served under.
        queue_length: most sequences that wait.
    """

    def __init__(
        self,
        config: ScorerConfig,
        *,
        share: float,
        metrics: LiveMetrics,
        model: str,
        queue_length: int = QUEUE_LENGTH,
    ) -> None:
        self.config = config
        self._share = share
        self._metrics = metrics
        self._model = model
        self._queue: asyncio.Queue[bytes] = asyncio.Queue(queue_length)
        self._process: asyncio.subprocess.Process | None = None
        self._task: asyncio.Task[None] | None = None
        self._stopped = False
        self._num_scored = 0
        metrics.start_scoring(model)

    @property
    def pid(self) -> int | None:
        """Process id of the scorer; None when there is none."""
        return self._process.pid if self._process is not None else None

    def wants(self, request_id: str) -> bool:
        """Whether `offer` would take the sequence of this id."""
        return not self._stopped and is_chosen(request_id, self._share)

    def offer(self, prompt: Sequence[int], completion: Sequence[int]) -> None:
        """Queue a finished sequence that is wanted; at once, and without a word if there is no room."""
        if self._stopped or not completion:
            return
        line = json.dumps({"tokens": [*prompt, *completion], "num_prompt": len(prompt)}).encode() + b"\n"
        try:
            self._queue.put_nowait(line)
        except asyncio.QueueFull:
            self._metrics.dropped.labels(self._model).inc()
        if self._task is None:
            # In a context of its own: its log lines are not of the request that happened to come first.
            self._task = asyncio.get_running_loop().create_task(
                self._keep_scoring(), name=f"scorer-{self._model}", context=Context()
            )

    async def stop(self) -> None:
        """End the process; what waits is forgotten."""
        self._stopped = True
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def _keep_scoring(self) -> None:
        """Run processes one after another; each that scored nothing doubles the pause before the next."""
        pause = FIRST_PAUSE_SECONDS
        while True:
            scored_before = self._num_scored
            try:
                reason = await self._run_process()
            except OSError as error:
                reason = f"could not be used ({error})"
            self._metrics.scorer_up.labels(self._model).set(0)
            pause = FIRST_PAUSE_SECONDS if self._num_scored > scored_before else min(2 * pause, LONGEST_PAUSE_SECONDS)
            logger.error("the scorer %s; another try in %.0f s", reason, pause, extra={"model": self._model})
            await asyncio.sleep(pause)
            self._metrics.scorer_restarts.labels(self._model).inc()

    async def _run_process(self) -> str:
        """Run one process to its end and say how it ended."""
        self._process = process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "service.accuracy.process",
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            limit=LONGEST_LINE_BYTES,
        )
        try:
            config = {**asdict(self.config), "parent_pid": os.getpid()}
            loaded = await self._exchange(process, json.dumps(config).encode() + b"\n")
            if loaded is None or loaded["event"] == "failed":
                return "could not load: " + (loaded["message"] if loaded else await _death(process))
            self._metrics.scorer_up.labels(self._model).set(1)
            logger.info("live accuracy is measured", extra={"model": self._model, "share": self._share})
            while (line := await self._next(process)) is not None:
                answer = await self._exchange(process, line)
                if answer is None:
                    self._metrics.scorer_up.labels(self._model).set(0)
                    self._metrics.failed.labels(self._model).inc()
                    break
                self._count(answer)
            return "ended: " + await _death(process)
        finally:
            self._process = None
            if process.returncode is None:
                with contextlib.suppress(ProcessLookupError):
                    process.kill()
                await process.wait()

    async def _next(self, process: asyncio.subprocess.Process) -> bytes | None:
        """Wait for a sequence; None when the process ends first."""
        waiting = asyncio.ensure_future(self._queue.get()), asyncio.ensure_future(process.wait())
        try:
            await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            return waiting[0].result() if waiting[0].done() else None
        finally:
            for task in waiting:
                task.cancel()

    @staticmethod
    async def _exchange(process: asyncio.subprocess.Process, line: bytes) -> dict[str, Any] | None:
        """Send one line and return the answer; None if the process dies over it."""
        assert process.stdin is not None
        assert process.stdout is not None
        with contextlib.suppress(ConnectionError):
            process.stdin.write(line)
            await process.stdin.drain()
        answer = await process.stdout.readline()
        return dict(json.loads(answer)) if answer.endswith(b"\n") else None

    def _count(self, answer: dict[str, Any]) -> None:
        """Put what was said of a sequence into the metrics."""
        if answer["event"] != "scored":
            self._metrics.failed.labels(self._model).inc()
            logger.warning("a sequence was not scored: %s", answer["message"], extra={"model": self._model})
            return
        self._num_scored += 1
        self._metrics.scored.labels(self._model).inc()
        for positions in SCORED_POSITIONS:
            self._count_positions(positions, PositionScores(**answer[positions]))

    def _count_positions(self, positions: str, scores: PositionScores) -> None:
        histogram = self._metrics.kl.labels(self._model, positions)
        for divergence in scores.divergence:
            histogram.observe(divergence)
        disagreeing = len(scores.divergence) - scores.agreeing
        self._metrics.top1.labels(self._model, positions, "yes").inc(scores.agreeing)
        self._metrics.top1.labels(self._model, positions, "no").inc(disagreeing)
        for statistic, value in scores.recent.items():
            self._metrics.recent_kl.labels(self._model, positions, statistic).set(value)


async def _death(process: asyncio.subprocess.Process) -> str:
    """Name how a process ended."""
    code = await process.wait()
    return f"killed by signal {-code}" if code < 0 else f"exit code {code}"
