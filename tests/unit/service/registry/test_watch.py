"""What passing events add to the metrics: times that fit together, prompts counted once, NaN counted apart."""

import time

import pytest

from service.engine.types import (
    NOT_FINITE,
    EngineStats,
    FinishReason,
    GenerationRequest,
    SamplingParams,
    TokenEvent,
)
from service.metrics import Metrics
from service.registry.watch import GroupCounter, SequenceWatch, StatsCounter

MODEL = "paper"


class Figures:
    """Metrics of one model, with what a test asks of them."""

    def __init__(self) -> None:
        self.metrics = Metrics()
        self.groups = GroupCounter(self.metrics.engine, MODEL)

    def watch(self, name: str = "a", **request) -> SequenceWatch:
        sampling = SamplingParams(max_tokens=request.pop("max_tokens", 5))
        asked = GenerationRequest(request_id=name, prompt_token_ids=(1, 2, 3, 4), sampling=sampling, **request)
        return SequenceWatch(self.metrics.engine, MODEL, asked, self.groups)

    def __getitem__(self, name: str) -> float | None:
        return self.metrics.registry.get_sample_value(f"onebit_{name}", {"model": MODEL})

    def count(self, reason: str) -> float | None:
        labels = {"model": MODEL, "finished_reason": reason}
        return self.metrics.registry.get_sample_value("onebit_request_success_total", labels)


@pytest.fixture
def figures():
    return Figures()


def event(number: int, *, finish: FinishReason | None = None, error: str | None = None, cached: int = 0) -> TokenEvent:
    """The number-th token of a sequence."""
    return TokenEvent(
        request_id="a",
        text="x",
        token_ids=() if error else (number,),
        finish_reason=finish,
        error=error,
        num_prompt_tokens=4,
        num_generated_tokens=number,
        queue_seconds=0.002 if number == 1 else None,
        num_cached_tokens=cached,
    )


def test_the_times_of_a_sequence_fit_together(figures):
    """Queue, prefill and decode make up the whole; time per token is decode over the tokens after the first."""
    watch = figures.watch()
    for number, finish in ((1, None), (2, None), (3, FinishReason.STOP)):
        time.sleep(0.01)
        watch.see(event(number, finish=finish))
    watch.close()
    prefill, decode = figures["request_prefill_time_seconds_sum"], figures["request_decode_time_seconds_sum"]
    assert prefill >= 0.008
    assert decode >= 0.02
    assert figures["time_to_first_token_seconds_sum"] == pytest.approx(0.002 + prefill)
    assert figures["request_inference_time_seconds_sum"] == pytest.approx(prefill + decode)
    assert figures["request_time_per_output_token_seconds_sum"] == pytest.approx(decode / 2)
    assert figures["inter_token_latency_seconds_sum"] == pytest.approx(decode)
    assert figures["e2e_request_latency_seconds_sum"] >= 0.002 + prefill + decode
    assert figures.count("stop") == 1


def test_one_token_has_no_time_per_token(figures):
    """A single token says nothing of the time between two; a zero would pull the mean down."""
    watch = figures.watch()
    watch.see(event(1, finish=FinishReason.LENGTH))
    watch.close()
    assert figures["request_decode_time_seconds_count"] == 1
    assert not figures["request_time_per_output_token_seconds_count"]


def test_cached_tokens_are_not_computed(figures):
    """What the prefix cache held is counted, and left out of what was computed."""
    watch = figures.watch()
    watch.see(event(1, finish=FinishReason.STOP, cached=3))
    watch.close()
    assert (figures["prompt_tokens_total"], figures["prompt_tokens_cached_total"]) == (4, 3)
    assert figures["request_prefill_kv_computed_tokens_sum"] == 1


def test_the_completions_of_a_prompt_are_one_prompt(figures):
    """Their number is counted once with the longest completion, when the last sibling has ended."""
    watches = [figures.watch(name, group="call", group_size=2, max_tokens=9) for name in ("a", "b")]
    watches[0].see(event(1, finish=FinishReason.STOP))
    watches[0].close()
    assert not figures["request_params_n_count"]
    for number in (1, 2, 3):
        watches[1].see(event(number))
    watches[1].close()
    assert (figures["request_params_n_count"], figures["request_params_n_sum"]) == (1, 2)
    assert figures["request_max_num_generation_tokens_sum"] == 3
    assert (figures["request_params_max_tokens_count"], figures["request_params_max_tokens_sum"]) == (2, 18)
    assert (figures.count("stop"), figures.count("abort")) == (1, 1)


def test_a_refused_sequence_is_only_a_rejection(figures):
    """It asked for something but got nothing: no latency, no length, no reason."""
    watch = figures.watch()
    watch.reject()
    watch.close()
    assert figures["admission_rejections_total"] == 1
    for name in ("request_params_n", "request_params_max_tokens", "e2e_request_latency_seconds"):
        assert not figures[f"{name}_count"]


def test_nan_is_counted_apart_from_other_errors(figures):
    """A model that gives NaN is another fault than a step that raised."""
    for error in (NOT_FINITE, "the engine's step failed: no memory"):
        watch = figures.watch()
        watch.see(event(0, finish=FinishReason.ERROR, error=error))
        watch.close()
    assert figures["corrupted_requests_total"] == 1
    assert figures.count("error") == 2


def test_engine_figures_before_the_first_request_are_left_out(figures):
    """What the golden prompts looked up in the prefix cache is no traffic, and a step reported twice counts once."""
    counter = StatsCounter(figures.metrics.engine, MODEL, EngineStats(prefix_cache_queries=40, prefix_cache_hits=10))
    counter(EngineStats(prefix_cache_queries=100, prefix_cache_hits=30))
    counter(EngineStats(prefix_cache_queries=100, prefix_cache_hits=30))
    assert (figures["prefix_cache_queries_total"], figures["prefix_cache_hits_total"]) == (60, 20)
