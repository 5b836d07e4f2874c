"""What sequences and steps contribute to the metrics, measured where their events pass by.

The times of a sequence, as vLLM cuts them:

    arrival --queue--> first step --prefill--> first token --decode--> last token
                           '------------- inference ----------------'
"""

import time

from service.engine.types import NOT_FINITE, EngineStats, FinishReason, GenerationRequest, TokenEvent
from service.metrics import EngineMetrics


class GroupCounter:
    """Counts each prompt of a call once, however many completions of it were asked for."""

    def __init__(self, metrics: EngineMetrics, model: str) -> None:
        self._metrics = metrics
        self._model = model
        self._open: dict[str, list[int]] = {}  # group to [completions still open, longest of the ended; -1 for none]

    def begin(self, request: GenerationRequest) -> None:
        """See a sequence start; its siblings start with it."""
        self._open.setdefault(_group(request), [0, -1])[0] += 1

    def end(self, request: GenerationRequest, num_generated: int) -> None:
        """See a sequence end, in whatever way, with -1 tokens if it was refused; the last of a group is counted."""
        group = self._open[_group(request)]
        group[0] -= 1
        group[1] = max(group[1], num_generated)
        if group[0]:
            return
        del self._open[_group(request)]
        if group[1] >= 0:
            self._metrics.params_n.labels(self._model).observe(request.group_size)
            self._metrics.longest_completion.labels(self._model).observe(group[1])


def _group(request: GenerationRequest) -> str:
    return request.group or request.request_id


class SequenceWatch:
    """Clock and counters of one sequence: see every event, then close, in every case."""

    def __init__(self, metrics: EngineMetrics, model: str, request: GenerationRequest, groups: GroupCounter) -> None:
        self._metrics = metrics
        self._model = model
        self._request = request
        self._groups = groups
        self._arrival = time.perf_counter()
        self._queued = 0.0
        self._first_token: float | None = None
        self._last_token = 0.0
        self._last: TokenEvent | None = None
        self._rejected = False
        self._failed = False
        groups.begin(request)

    def see(self, event: TokenEvent) -> None:
        """Record one event."""
        now = time.perf_counter()
        if self._last is None:
            self._see_prompt(event)
        if event.queue_seconds is not None:
            self._queued = event.queue_seconds
            self._metrics.queue_time.labels(self._model).observe(event.queue_seconds)
        if event.token_ids:
            self._see_tokens(len(event.token_ids), now)
        if event.error == NOT_FINITE:
            self._metrics.corrupted.labels(self._model).inc()
        self._last = event

    def _see_prompt(self, event: TokenEvent) -> None:
        self._metrics.prompt_tokens.labels(self._model).inc(event.num_prompt_tokens)
        self._metrics.cached_tokens.labels(self._model).inc(event.num_cached_tokens)
        self._metrics.request_prompt_tokens.labels(self._model).observe(event.num_prompt_tokens)
        computed = event.num_prompt_tokens - event.num_cached_tokens
        self._metrics.computed_tokens.labels(self._model).observe(computed)

    def _see_tokens(self, count: int, now: float) -> None:
        self._metrics.generation_tokens.labels(self._model).inc(count)
        if self._first_token is None:
            self._first_token = now
            self._metrics.first_token.labels(self._model).observe(now - self._arrival)
            prefill = max(0.0, now - self._arrival - self._queued)
            self._metrics.prefill_time.labels(self._model).observe(prefill)
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
        generated = self._last.num_generated_tokens if self._last else 0
        self._groups.end(self._request, -1 if self._rejected else generated)
        if self._rejected:
            return
        self._metrics.request_generation_tokens.labels(self._model).observe(generated)
        self._metrics.params_max_tokens.labels(self._model).observe(self._request.sampling.max_tokens)
        self._metrics.latency.labels(self._model).observe(time.perf_counter() - self._arrival)
        self._metrics.success.labels(self._model, self._reason().value).inc()
        if self._first_token is not None:
            self._see_whole(self._first_token, generated)

    def _see_whole(self, first_token: float, generated: int) -> None:
        """Record the times that are known once the last token is."""
        decode = self._last_token - first_token
        self._metrics.decode_time.labels(self._model).observe(decode)
        inference = max(decode, self._last_token - self._arrival - self._queued)
        self._metrics.inference_time.labels(self._model).observe(inference)
        if generated > 1:
            self._metrics.output_token.labels(self._model).observe(decode / (generated - 1))

    def _reason(self) -> FinishReason:
        if self._failed:
            return FinishReason.ERROR
        if self._last is None or self._last.finish_reason is None:
            return FinishReason.ABORT
        return self._last.finish_reason


class StatsCounter:
    """Counts what an engine reports after each step; set it as the client's `on_stats`.

    Args:
        counted: the engine's figures so far, which were not of requests and are left out.
    """

    def __init__(self, metrics: EngineMetrics, model: str, counted: EngineStats | None = None) -> None:
        self._metrics = metrics
        self._model = model
        self._counted = counted or EngineStats()

    def __call__(self, stats: EngineStats) -> None:
        """Take the figures after one step."""
        before, self._counted = self._counted, stats
        metrics, model = self._metrics, self._model
        if stats.num_steps > before.num_steps and stats.iteration_tokens:
            metrics.iteration_tokens.labels(model).observe(stats.iteration_tokens)
        metrics.preemptions.labels(model).inc(max(0, stats.num_preemptions - before.num_preemptions))
        metrics.prefix_queries.labels(model).inc(max(0, stats.prefix_cache_queries - before.prefix_cache_queries))
        metrics.prefix_hits.labels(model).inc(max(0, stats.prefix_cache_hits - before.prefix_cache_hits))
