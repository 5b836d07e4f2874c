"""Every Prometheus metric of the service, declared once (those of HTTP in `service.http_metrics`).

Names are `onebit_*` in base units, `_total` on counters only; buckets are vLLM's. `Metrics(vllm_names=True)` shows the
engine's figures once more under vLLM's own names (`service.vllm_names`), for its dashboards and autoscalers. Labels
hold names that an operator chose (models, layers, texts, jobs), never what a caller sent, so no request can make a new
series. Series of an artifact live while it is loaded. `promtool check metrics` accepts all of ours; it refuses a unit
called `bits`, so bits per weight are left to PromQL:

    8 * sum by (model) (onebit_artifact_weight_bytes) / on (model) onebit_artifact_parameters

Each Metrics owns its registry, so two servers in one process (tests) do not share figures.
"""

import math
import re
from collections.abc import Callable
from datetime import datetime
from statistics import fmean

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    PlatformCollector,
    ProcessCollector,
    disable_created_metrics,
    generate_latest,
)

from onebit_core.artifact.manifest import EvaluationResult, LayerReport, Manifest, Report
from service.http_metrics import HttpMetrics
from service.vllm_names import VllmNames

disable_created_metrics()  # type: ignore[no-untyped-call]  # a `_created` series beside each counter and histogram doubles the page and serves nobody

# fmt: off
TIME_TO_FIRST_TOKEN_BUCKETS = (
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0,
    160.0, 640.0, 2560.0,
)
INTER_TOKEN_BUCKETS = (
    0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0,
)
REQUEST_SECONDS_BUCKETS = (
    0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0, 960.0,
    1920.0, 7680.0,
)
ITERATION_TOKENS_BUCKETS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
TOKEN_LENGTH_BUCKETS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000, 50000, 100000)
CHOICES_BUCKETS = (1, 2, 5, 10, 20)
JOB_SECONDS_BUCKETS = (10.0, 60.0, 300.0, 900.0, 1800.0, 3600.0, 7200.0, 14400.0, 28800.0, 86400.0, 259200.0)
DIVERGENCE_BUCKETS = (1e-4, 3e-4, 1e-3, 3e-3, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
# fmt: on

FINISHED_REASONS = ("stop", "length", "abort", "error")
JOB_STATES = ("queued", "running", "succeeded", "rejected", "failed", "cancelled")
TIMED_ENDS = ("succeeded", "rejected", "failed")
SCORED_POSITIONS = ("prompt", "completion")


def _histograms(registry: CollectorRegistry) -> Callable[[str, str, tuple[float, ...]], Histogram]:
    """Return what declares a histogram of each model from its name, its text and its buckets."""

    def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(name, text, ["model"], buckets=buckets, registry=registry)

    return histogram


class EngineMetrics:
    """What the engine of each loaded model does. Label: model."""

    def __init__(self, registry: CollectorRegistry) -> None:
        def gauge(name: str, text: str) -> Gauge:
            return Gauge(name, text, ["model"], registry=registry)

        def counter(name: str, text: str) -> Counter:
            return Counter(name, text, ["model"], registry=registry)

        self.running = gauge("onebit_requests_running", "Sequences in the engine's current batch.")
        self.waiting = gauge("onebit_requests_waiting", "Sequences waiting in the engine's queue.")
        self.cache_usage = gauge("onebit_kv_cache_usage_ratio", "Share of the KV cache's pages in use, 0 to 1.")
        self.prompt_tokens = counter("onebit_prompt_tokens_total", "Prompt tokens of started sequences.")
        self.cached_tokens = counter(
            "onebit_prompt_tokens_cached_total", "Prompt tokens of started sequences that were in the prefix cache."
        )
        self.generation_tokens = counter("onebit_generation_tokens_total", "Tokens generated.")
        self.success = Counter(
            "onebit_request_success_total",
            "Sequences that ended, by reason.",
            ["model", "finished_reason"],
            registry=registry,
        )
        self.preemptions = counter(
            "onebit_preemptions_total", "Sequences set back to free cache pages, to be computed again."
        )
        self.prefix_queries = counter(
            "onebit_prefix_cache_queries_total", "Prompt tokens looked up in the prefix cache."
        )
        self.prefix_hits = counter("onebit_prefix_cache_hits_total", "Prompt tokens found in the prefix cache.")
        self.corrupted = counter("onebit_corrupted_requests_total", "Sequences that ended because of NaN or infinity.")
        self.rejections = counter("onebit_admission_rejections_total", "Sequences refused: the queue was full.")
        self.restarts = counter("onebit_engine_restarts_total", "Times the engine process died and was replaced.")
        self.info = Gauge(
            "onebit_engine_info",
            "What computes, always 1: backend of the packed layers with its instruction set, device, activation dtype.",
            ["model", "backend", "device", "dtype"],
            registry=registry,
        )
        self.cache_info = Gauge(
            "onebit_cache_config_info",
            "The KV cache, always 1: tokens in a page, pages, dtype, longest prompt plus completion, shared prefixes.",
            ["model", "page_size", "num_pages", "dtype", "max_model_len", "prefix_caching"],
            registry=registry,
        )
        self._declare_times(registry)
        self._declare_sizes(registry)

    def _declare_times(self, registry: CollectorRegistry) -> None:
        histogram = _histograms(registry)
        self.first_token = histogram(
            "onebit_time_to_first_token_seconds", "From arrival to the first token.", TIME_TO_FIRST_TOKEN_BUCKETS
        )
        self.inter_token = histogram(
            "onebit_inter_token_latency_seconds", "Between two tokens of a sequence.", INTER_TOKEN_BUCKETS
        )
        self.output_token = histogram(
            "onebit_request_time_per_output_token_seconds",
            "Mean of a sequence between two tokens.",
            INTER_TOKEN_BUCKETS,
        )
        self.latency = histogram(
            "onebit_e2e_request_latency_seconds", "From arrival to the last token.", REQUEST_SECONDS_BUCKETS
        )
        self.queue_time = histogram(
            "onebit_request_queue_time_seconds", "From arrival to the first step.", REQUEST_SECONDS_BUCKETS
        )
        self.prefill_time = histogram(
            "onebit_request_prefill_time_seconds", "From the first step to the first token.", REQUEST_SECONDS_BUCKETS
        )
        self.decode_time = histogram(
            "onebit_request_decode_time_seconds", "From the first token to the last.", REQUEST_SECONDS_BUCKETS
        )
        self.inference_time = histogram(
            "onebit_request_inference_time_seconds", "From the first step to the last token.", REQUEST_SECONDS_BUCKETS
        )

    def _declare_sizes(self, registry: CollectorRegistry) -> None:
        histogram = _histograms(registry)
        self.iteration_tokens = histogram(
            "onebit_iteration_tokens", "Tokens computed in one step of the engine.", ITERATION_TOKENS_BUCKETS
        )
        self.request_prompt_tokens = histogram(
            "onebit_request_prompt_tokens", "Prompt length of a sequence.", TOKEN_LENGTH_BUCKETS
        )
        self.request_generation_tokens = histogram(
            "onebit_request_generation_tokens", "Completion length of a sequence.", TOKEN_LENGTH_BUCKETS
        )
        self.computed_tokens = histogram(
            "onebit_request_prefill_kv_computed_tokens", "Prompt tokens not found in the cache.", TOKEN_LENGTH_BUCKETS
        )
        self.longest_completion = histogram(
            "onebit_request_max_num_generation_tokens", "Longest completion of a prompt.", TOKEN_LENGTH_BUCKETS
        )
        self.params_n = histogram("onebit_request_params_n", "Completions asked for of a prompt.", CHOICES_BUCKETS)
        self.params_max_tokens = histogram(
            "onebit_request_params_max_tokens", "Most tokens asked for of a sequence.", TOKEN_LENGTH_BUCKETS
        )

    def start_series(self, model: str) -> None:
        """Show every series of a model at zero, so that rates exist before the first request."""
        for metric in vars(self).values():
            if metric not in (self.success, self.info, self.cache_info):
                metric.labels(model)
        for reason in FINISHED_REASONS:
            self.success.labels(model, reason)

    def end_series(self, model: str) -> None:
        """Take the gauges of an unloaded model away; its counters stay, as Prometheus expects of counters."""
        for gauge in (self.running, self.waiting, self.cache_usage, self.info, self.cache_info):
            gauge.remove_by_labels({"model": model})


class LiveMetrics:
    """What served models do on this machine: golden prompts at load, and a share of real traffic, both scored.

    Labels: model; positions is "prompt" for predictions of prompt tokens and "completion" for generated ones.
    """

    def __init__(self, registry: CollectorRegistry) -> None:
        def gauge(name: str, text: str, *labels: str) -> Gauge:
            return Gauge(name, text, ["model", *labels], registry=registry)

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(name, text, ["model", *labels], registry=registry)

        self.golden_error = gauge(
            "onebit_golden_check_logprob_error_nats",
            "Mean absolute error of log probabilities over the golden prompts at load, against the reference.",
        )
        self.golden_timestamp = gauge(
            "onebit_golden_check_timestamp_seconds", "When the golden prompts were replayed, Unix time."
        )
        self.kl = Histogram(
            "onebit_live_kl_divergence_nats",
            "KL(original || served) of each scored token of real traffic.",
            ["model", "positions"],
            buckets=DIVERGENCE_BUCKETS,
            registry=registry,
        )
        self.recent_kl = gauge(
            "onebit_live_recent_kl_nats", "KL over the latest scored tokens.", "positions", "statistic"
        )
        self.top1 = counter(
            "onebit_live_top1_agreement_total",
            "Scored tokens, by whether original and served model rank the same first.",
            "positions",
            "agrees",
        )
        self.scored = counter("onebit_live_scored_sequences_total", "Sequences scored against the original.")
        self.dropped = counter("onebit_live_dropped_sequences_total", "Sequences not scored: the scorer was behind.")
        self.failed = counter("onebit_live_failed_sequences_total", "Sequences that the scorer could not score.")
        self.scorer_up = gauge("onebit_live_scorer_up", "Whether the scorer has both models loaded, 1 or 0.")
        self.scorer_restarts = counter("onebit_live_scorer_restarts_total", "Times the scorer died and was replaced.")

    def start_scoring(self, model: str) -> None:
        """Show a scored model's series at zero; models that are not scored have none."""
        for metric in (self.scored, self.dropped, self.failed, self.scorer_up, self.scorer_restarts):
            metric.labels(model)
        for positions in SCORED_POSITIONS:
            self.kl.labels(model, positions)
            for agrees in ("yes", "no"):
                self.top1.labels(model, positions, agrees)

    def end_series(self, model: str) -> None:
        """Take the gauges of an unloaded model away."""
        for gauge in (self.golden_error, self.golden_timestamp, self.recent_kl, self.scorer_up):
            gauge.remove_by_labels({"model": model})


class ArtifactMetrics:
    """What each loaded artifact is and what compression cost it, from its manifest and report."""

    def __init__(self, registry: CollectorRegistry) -> None:
        def gauge(name: str, text: str, *labels: str) -> Gauge:
            return Gauge(name, text, ["model", *labels], registry=registry)

        self.info = gauge(
            "onebit_artifact_info", "Identity, always 1.", "artifact_sha256", "source_sha256", "method", "version"
        )
        self.parameters = gauge("onebit_artifact_parameters", "Weights of the original, tied ones counted once.")
        self.weight_bytes = gauge("onebit_artifact_weight_bytes", "Bytes stored, by what they hold.", "part")
        self.layer_error = gauge(
            "onebit_artifact_layer_relative_error_ratio",
            "Relative Frobenius error of a layer's weight, or of its output in calibration; the mean over experts.",
            "layer",
            "projection",
            "space",
        )
        self.kl = gauge(
            "onebit_artifact_output_kl_nats", "KL(original || compressed) per token.", "dataset", "statistic"
        )
        self.kl_error = gauge(
            "onebit_artifact_output_kl_stderr_nats", "Standard error of the mean KL over windows.", "dataset"
        )
        self.top1 = gauge(
            "onebit_artifact_top1_agreement_ratio", "Share of tokens where both rank the same first.", "dataset"
        )
        self.perplexity = gauge("onebit_artifact_perplexity", "Perplexity on a text.", "dataset", "variant")
        self.eval_tokens = gauge("onebit_artifact_eval_tokens", "Tokens the evaluation predicted.", "dataset")
        self.eval_timestamp = gauge(
            "onebit_artifact_eval_timestamp_seconds", "When the evaluation ran, Unix time.", "dataset"
        )

    def start_series(self, model: str, manifest: Manifest, report: Report) -> None:
        """Publish an artifact under the name it is served as."""
        version = manifest.versions.get("onebit", "unknown")
        self.info.labels(model, manifest.sha256, manifest.source.sha256, manifest.method, version).set(1)
        self.parameters.labels(model).set(manifest.source.parameters)
        for part, size in manifest.bytes_by_part.items():
            self.weight_bytes.labels(model, part).set(size)
        for (name, projection), layers in _layers_by_series(report).items():  # reports hold squared errors
            weight = fmean(layer.weight_error for layer in layers)
            self.layer_error.labels(model, name, projection, "weight").set(math.sqrt(weight))
            outputs = [layer.output_error for layer in layers if layer.output_error is not None]
            if outputs:
                self.layer_error.labels(model, name, projection, "output").set(math.sqrt(fmean(outputs)))
        for result in report.evaluation:
            self._publish_evaluation(model, result)

    def _publish_evaluation(self, model: str, result: EvaluationResult) -> None:
        dataset = result.dataset
        statistics = {
            "mean": result.kl_mean,
            "median": result.kl_median,
            "p99": result.kl_p99,
            "max": result.kl_max,
        }
        for statistic, value in statistics.items():
            self.kl.labels(model, dataset, statistic).set(value)
        self.kl_error.labels(model, dataset).set(result.kl_standard_error)
        self.top1.labels(model, dataset).set(result.top1_agreement)
        self.perplexity.labels(model, dataset, "original").set(result.original.value)
        self.perplexity.labels(model, dataset, "compressed").set(result.compressed.value)
        self.eval_tokens.labels(model, dataset).set(result.tokens)
        self.eval_timestamp.labels(model, dataset).set(datetime.fromisoformat(result.date).timestamp())

    def end_series(self, model: str) -> None:
        """Take every series of an unloaded artifact away."""
        for gauge in vars(self).values():
            gauge.remove_by_labels({"model": model})


class JobMetrics:
    """Compression jobs and the worker that runs them."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.jobs = Gauge("onebit_jobs", "Jobs on record, by state.", ["state"], registry=registry)
        self.blocks = Gauge("onebit_job_blocks", "Decoder blocks of a running job.", ["job"], registry=registry)
        self.blocks_completed = Gauge(
            "onebit_job_blocks_completed", "Decoder blocks a running job has finished.", ["job"], registry=registry
        )
        self.last_progress = Gauge(
            "onebit_job_last_progress_timestamp_seconds",
            "When a running job last moved, Unix time.",
            ["job"],
            registry=registry,
        )
        self.heartbeat = Gauge(
            "onebit_worker_last_heartbeat_timestamp_seconds",
            "When the job worker last gave a sign of life, Unix time; 0 before the first.",
            registry=registry,
        )
        self.duration = Histogram(
            "onebit_job_duration_seconds",
            "From the last start of a job that ran to its end, by how it ended.",
            ["state"],
            buckets=JOB_SECONDS_BUCKETS,
            registry=registry,
        )
        self.recoveries = Counter(
            "onebit_job_recoveries_total",
            "Times a job was taken up again after its worker had ended or died.",
            registry=registry,
        )
        for state in JOB_STATES:
            self.jobs.labels(state)
        for state in TIMED_ENDS:
            self.duration.labels(state)


def _layers_by_series(report: Report) -> dict[tuple[str, str], list[LayerReport]]:
    """Group layers by name and projection; the experts of a block are one series, for they may be thousands."""
    series: dict[tuple[str, str], list[LayerReport]] = {}
    for layer in report.layers:
        name = re.sub(r"\.experts\.\d+\.", ".experts.*.", layer.name)
        series.setdefault((name, layer.projection), []).append(layer)
    return series


class Metrics:
    """All metrics of one server.

    Args:
        vllm_names: whether the engine's figures are shown under vLLM's names too.
    """

    def __init__(self, *, vllm_names: bool = False) -> None:
        self.registry = CollectorRegistry()
        self.engine = EngineMetrics(self.registry)
        self.live = LiveMetrics(self.registry)
        self.artifact = ArtifactMetrics(self.registry)
        self.jobs = JobMetrics(self.registry)
        self.http = HttpMetrics(self.registry)
        ProcessCollector(registry=self.registry)
        PlatformCollector(registry=self.registry)
        if vllm_names:
            self.registry.register(VllmNames(vars(self.engine).values()))

    def page(self) -> bytes:
        """Return the text exposition of every metric."""
        return generate_latest(self.registry)
