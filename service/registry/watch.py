"""What sequences and steps contribute to the metrics, measured where their events pass by."""

import time

from service.engine.types import EngineStats, FinishReason, TokenEvent
from service.metrics import EngineMetrics


class SequenceWatch:
    """Clock and counters of one sequence: see every event, then close, in every case."""

    def __init__(self, metrics: EngineMetrics, model: str) -> None:
        self._metrics = metrics
        self._model = model
        self._arrival = time.perf_counter()
        self._last_token: float | None = None
        self._last: TokenEvent | None = None
        self._rejected = False
        self._failed = False

    def see(self, event: TokenEvent) -> None:
        """Record one event."""
        now = time.perf_counter()
        if self._last is None:
            self._metrics.prompt_tokens.labels(self._model).inc(event.num_prompt_tokens)
            self._metrics.request_prompt_tokens.labels(self._model).observe(event.num_prompt_tokens)
        if event.queue_seconds is not None:
            self._metrics.queue_time.labels(self._model).observe(event.queue_seconds)
        if event.token_ids:
            self._see_tokens(len(event.token_ids), now)
        self._last = event

    def _see_tokens(self, count: int, now: float) -> None:
        self._metrics.generation_tokens.labels(self._model).inc(count)
        if self._last_token is None:
            self._metrics.first_token.labels(self._model).observe(now - self._arrival)
        else:
            for _ in range(count):
                self._metrics.inter_token.labels(self._model).observe((now - self._last_token) / count)
        self._last_token = now

    def reject(self) -> None:
        """The engine refused the sequence: it counts as a rejection, not as one that ended."""
        self._rejected = True
        self._metrics.rejections.labels(self._model).inc()

    def fail(self) -> None:
        """The engine died under the sequence."""
        self._failed = True

    def close(self) -> None:
        """Record the end; a sequence left before its last event was aborted."""
        if self._rejected:
            return
        generated = self._last.num_generated_tokens if self._last else 0
        self._metrics.request_generation_tokens.labels(self._model).observe(generated)
        self._metrics.latency.labels(self._model).observe(time.perf_counter() - self._arrival)
        self._metrics.success.labels(self._model, self._reason().value).inc()

    def _reason(self) -> FinishReason:
        if self._failed:
            return FinishReason.ERROR
        if self._last is None or self._last.finish_reason is None:
            return FinishReason.ABORT
        return self._last.finish_reason


class StatsCounter:
    """Counts what an engine reports after each step; set it as the client's `on_stats`."""

    def __init__(self, metrics: EngineMetrics, model: str) -> None:
        self._metrics = metrics
        self._model = model
        self._counted = EngineStats()

    def __call__(self, stats: EngineStats) -> None:
        """Take the figures after one step."""
        before, self._counted = self._counted, stats
        if stats.num_steps > before.num_steps and stats.iteration_tokens:
            self._metrics.iteration_tokens.labels(self._model).observe(stats.iteration_tokens)
        self._metrics.preemptions.labels(self._model).inc(max(0, stats.num_preemptions - before.num_preemptions))
