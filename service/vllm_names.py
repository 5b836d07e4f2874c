"""The engine's metrics once more under vLLM's names, so that its dashboards and autoscalers work unchanged.

A KEDA trigger on `vllm:num_requests_waiting`, vLLM's Grafana boards or the router of a Kubernetes gateway ask for
names and labels that vLLM chose (vllm/v1/metrics/loggers.py and its published grafana.json). Nothing is counted twice:
at each scrape the samples of our own metrics are copied under the other name,

    onebit_kv_cache_usage_ratio{model="m"} 0.5   ->   vllm:kv_cache_usage_perc{model_name="m", engine="0"} 0.5

with the label `model` as `model_name`, and `engine`, of which each of our models has one. vLLM's names break
Prometheus' own rules (colons, `_total` on a histogram), so `promtool check metrics` complains of them, as it does of
vLLM's page.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from prometheus_client.metrics import MetricWrapperBase
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector
from prometheus_client.samples import Sample

ENGINE = "0"


@dataclass(frozen=True, kw_only=True)
class Alias:
    """What vLLM calls one metric of ours.

    Attributes:
        name: vLLM's, without the `_total` that counters get.
        labels: ours to theirs, where they differ; `model` is `model_name` everywhere.
        added: labels that only vLLM has, each with the one value it has here.
    """

    name: str
    labels: Mapping[str, str] = field(default_factory=dict)
    added: Mapping[str, str] = field(default_factory=dict)


# fmt: off
ALIASES: dict[str, tuple[Alias, ...]] = {
    "onebit_requests_running": (Alias(name="vllm:num_requests_running"),),
    "onebit_requests_waiting": (
        Alias(name="vllm:num_requests_waiting"),
        Alias(name="vllm:num_requests_waiting_by_reason", added={"reason": "capacity"}),
    ),
    "onebit_kv_cache_usage_ratio": (Alias(name="vllm:kv_cache_usage_perc"),),
    "onebit_cache_config_info": (
        Alias(
            name="vllm:cache_config_info",
            labels={
                "page_size": "block_size",
                "num_pages": "num_gpu_blocks",
                "dtype": "cache_dtype",
                "prefix_caching": "enable_prefix_caching",
            },
        ),
    ),
    "onebit_prompt_tokens": (Alias(name="vllm:prompt_tokens"),),
    "onebit_prompt_tokens_cached": (Alias(name="vllm:prompt_tokens_cached"),),
    "onebit_generation_tokens": (Alias(name="vllm:generation_tokens"),),
    "onebit_request_success": (Alias(name="vllm:request_success"),),
    "onebit_preemptions": (Alias(name="vllm:num_preemptions"),),
    "onebit_prefix_cache_queries": (Alias(name="vllm:prefix_cache_queries"),),
    "onebit_prefix_cache_hits": (Alias(name="vllm:prefix_cache_hits"),),
    "onebit_corrupted_requests": (Alias(name="vllm:corrupted_requests"),),
    "onebit_admission_rejections": (
        Alias(name="vllm:admission_rejections", added={"reason": "max_num_queued_reqs"}),
    ),
    "onebit_time_to_first_token_seconds": (Alias(name="vllm:time_to_first_token_seconds"),),
    "onebit_inter_token_latency_seconds": (Alias(name="vllm:inter_token_latency_seconds"),),
    "onebit_request_time_per_output_token_seconds": (Alias(name="vllm:request_time_per_output_token_seconds"),),
    "onebit_e2e_request_latency_seconds": (Alias(name="vllm:e2e_request_latency_seconds"),),
    "onebit_request_queue_time_seconds": (Alias(name="vllm:request_queue_time_seconds"),),
    "onebit_request_inference_time_seconds": (Alias(name="vllm:request_inference_time_seconds"),),
    "onebit_request_prefill_time_seconds": (Alias(name="vllm:request_prefill_time_seconds"),),
    "onebit_request_decode_time_seconds": (Alias(name="vllm:request_decode_time_seconds"),),
    "onebit_request_prompt_tokens": (Alias(name="vllm:request_prompt_tokens"),),
    "onebit_request_generation_tokens": (Alias(name="vllm:request_generation_tokens"),),
    "onebit_request_max_num_generation_tokens": (Alias(name="vllm:request_max_num_generation_tokens"),),
    "onebit_request_prefill_kv_computed_tokens": (Alias(name="vllm:request_prefill_kv_computed_tokens"),),
    "onebit_request_params_n": (Alias(name="vllm:request_params_n"),),
    "onebit_request_params_max_tokens": (Alias(name="vllm:request_params_max_tokens"),),
    "onebit_iteration_tokens": (Alias(name="vllm:iteration_tokens_total"),),
}
# fmt: on


class VllmNames(Collector):
    """Shows metrics under vLLM's names.

    Args:
        metrics: ours; those without a row in ALIASES are left out.
    """

    def __init__(self, metrics: Iterable[MetricWrapperBase]) -> None:
        self._metrics = tuple(metrics)

    def collect(self) -> Iterator[Metric]:
        """Copy every sample under its other names."""
        for metric in self._metrics:
            for family in metric.collect():
                for alias in ALIASES.get(family.name, ()):
                    yield _renamed(family, alias)

    def describe(self) -> Iterator[Metric]:
        """Name the families, which the registry wants to know before any of them has a sample."""
        return self.collect()


def _renamed(family: Metric, alias: Alias) -> Metric:
    """Return a metric with its samples under another name."""
    renamed = Metric(alias.name, family.documentation, family.type)
    for sample in family.samples:
        labels = {_label(name, alias): value for name, value in sample.labels.items()}
        labels |= {"engine": ENGINE, **alias.added}
        name = alias.name + sample.name.removeprefix(family.name)
        renamed.samples.append(Sample(name, labels, sample.value, sample.timestamp, sample.exemplar))
    return renamed


def _label(name: str, alias: Alias) -> str:
    return "model_name" if name == "model" else alias.labels.get(name, name)
