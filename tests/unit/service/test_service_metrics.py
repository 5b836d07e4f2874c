"""Metrics: the promised names, series that come and go with their model, a page promtool accepts."""

import dataclasses
import math
import subprocess

import pytest
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

from service.metrics import Metrics
from tests.support.external_tools import find_tool
from tests.support.paper_artifact import paper_manifest, paper_report

PROMISED = [
    "onebit_requests_running",
    "onebit_requests_waiting",
    "onebit_kv_cache_usage_ratio",
    "onebit_prompt_tokens_total",
    "onebit_generation_tokens_total",
    "onebit_request_success_total",
    "onebit_preemptions_total",
    "onebit_admission_rejections_total",
    "onebit_engine_restarts_total",
    "onebit_time_to_first_token_seconds",
    "onebit_inter_token_latency_seconds",
    "onebit_e2e_request_latency_seconds",
    "onebit_request_queue_time_seconds",
    "onebit_iteration_tokens",
    "onebit_request_prompt_tokens",
    "onebit_request_generation_tokens",
    "onebit_prompt_tokens_cached_total",
    "onebit_prefix_cache_queries_total",
    "onebit_prefix_cache_hits_total",
    "onebit_corrupted_requests_total",
    "onebit_request_time_per_output_token_seconds",
    "onebit_request_prefill_time_seconds",
    "onebit_request_decode_time_seconds",
    "onebit_request_inference_time_seconds",
    "onebit_request_prefill_kv_computed_tokens",
    "onebit_request_max_num_generation_tokens",
    "onebit_request_params_n",
    "onebit_request_params_max_tokens",
    "onebit_cache_config_info",
    "onebit_golden_check_logprob_error_nats",
    "onebit_golden_check_timestamp_seconds",
    "onebit_live_kl_divergence_nats",
    "onebit_live_recent_kl_nats",
    "onebit_live_top1_agreement_total",
    "onebit_live_scored_sequences_total",
    "onebit_live_dropped_sequences_total",
    "onebit_live_failed_sequences_total",
    "onebit_live_scorer_up",
    "onebit_live_scorer_restarts_total",
    "onebit_http_requests_total",
    "onebit_http_request_duration_seconds",
    "onebit_artifact_info",
    "onebit_artifact_parameters",
    "onebit_artifact_weight_bytes",
    "onebit_artifact_layer_relative_error_ratio",
    "onebit_artifact_output_kl_nats",
    "onebit_artifact_output_kl_stderr_nats",
    "onebit_artifact_top1_agreement_ratio",
    "onebit_artifact_perplexity",
    "onebit_artifact_eval_tokens",
    "onebit_artifact_eval_timestamp_seconds",
    "onebit_jobs",
    "onebit_job_blocks",
    "onebit_job_blocks_completed",
    "onebit_job_last_progress_timestamp_seconds",
    "onebit_worker_last_heartbeat_timestamp_seconds",
]

# What the panels of vLLM's examples/observability/prometheus_grafana/grafana.json ask for (commit 4b5c627), all of it.
VLLM_DASHBOARD = [
    "vllm:e2e_request_latency_seconds_bucket",
    "vllm:e2e_request_latency_seconds_sum",
    "vllm:e2e_request_latency_seconds_count",
    "vllm:prompt_tokens_total",
    "vllm:generation_tokens_total",
    "vllm:inter_token_latency_seconds_bucket",
    "vllm:inter_token_latency_seconds_sum",
    "vllm:inter_token_latency_seconds_count",
    "vllm:num_requests_running",
    "vllm:num_requests_waiting",
    "vllm:time_to_first_token_seconds_bucket",
    "vllm:time_to_first_token_seconds_sum",
    "vllm:time_to_first_token_seconds_count",
    "vllm:kv_cache_usage_perc",
    "vllm:request_prompt_tokens_bucket",
    "vllm:request_generation_tokens_bucket",
    "vllm:request_success_total",
    "vllm:request_queue_time_seconds_sum",
    "vllm:request_prefill_time_seconds_sum",
    "vllm:request_decode_time_seconds_sum",
    "vllm:request_max_num_generation_tokens_sum",
]
# What its other boards, its autoscaling examples and gateways ask for besides.
VLLM_ELSEWHERE = [
    "vllm:num_preemptions_total",
    "vllm:prefix_cache_queries_total",
    "vllm:prefix_cache_hits_total",
    "vllm:prompt_tokens_cached_total",
    "vllm:corrupted_requests_total",
    "vllm:admission_rejections_total",
    "vllm:num_requests_waiting_by_reason",
    "vllm:cache_config_info",
    "vllm:iteration_tokens_total_bucket",
    "vllm:request_inference_time_seconds_bucket",
    "vllm:request_time_per_output_token_seconds_bucket",
    "vllm:request_params_n_bucket",
    "vllm:request_params_max_tokens_bucket",
    "vllm:request_prefill_kv_computed_tokens_bucket",
]
BREAKS_THE_RULES = ("should not contain ':'", 'should not have "_total" suffix')


@pytest.fixture
def loaded() -> Metrics:
    """Metrics of a server with one model, whose traffic is scored."""
    return show_one_model(Metrics())


def show_one_model(metrics: Metrics) -> Metrics:
    metrics.engine.start_series("paper")
    metrics.engine.cache_info.labels("paper", "16", "64", "float32", "512", "True").set(1)
    metrics.live.start_scoring("paper")
    metrics.artifact.start_series("paper", paper_manifest(), paper_report())
    return metrics


def test_every_promised_metric_is_on_the_page(loaded):
    """Dashboards and alerts find each name, even before the first request."""
    page = loaded.page().decode()
    missing = [name for name in PROMISED if f"# TYPE {name} " not in page]
    assert missing == []


def test_the_experts_of_a_block_are_one_series(loaded):
    """A mixture has thousands of linears; their mean squared error is what one line can say."""
    report = paper_report()
    layer = report.layers[0]
    experts = tuple(
        dataclasses.replace(
            layer, name=f"model.layers.0.mlp.experts.{number}.up_proj", projection="up_proj", weight_error=error
        )
        for number, error in enumerate((0.02, 0.06))
    )
    loaded.artifact.start_series("mixture", paper_manifest(), dataclasses.replace(report, layers=experts))
    labels = {"model": "mixture", "layer": "model.layers.0.mlp.experts.*.up_proj", "projection": "up_proj"}
    found = loaded.registry.get_sample_value(
        "onebit_artifact_layer_relative_error_ratio", {**labels, "space": "weight"}
    )
    assert found == pytest.approx(math.sqrt(0.04))
    assert "experts.0" not in loaded.page().decode()


def test_counters_start_at_zero(loaded):
    """A rate exists from the first scrape on."""
    page = loaded.page().decode()
    for reason in ("stop", "length", "abort", "error"):
        assert f'onebit_request_success_total{{finished_reason="{reason}",model="paper"}} 0.0' in page


def test_an_artifact_shows_what_it_lost(loaded):
    """The figures are those of manifest and report; errors are roots of the squared ones stored."""

    def value(name: str, **labels: str) -> float | None:
        return loaded.registry.get_sample_value(name, {"model": "paper", **labels})

    layer = {"layer": "model.layers.0.self_attn.q_proj", "projection": "q_proj"}
    assert value("onebit_artifact_layer_relative_error_ratio", space="weight", **layer) == pytest.approx(
        math.sqrt(0.04)
    )
    assert value("onebit_artifact_layer_relative_error_ratio", space="output", **layer) == pytest.approx(
        math.sqrt(0.09)
    )
    assert value("onebit_artifact_perplexity", dataset="news", variant="compressed") == 25.0
    assert value("onebit_artifact_output_kl_nats", dataset="news", statistic="p99") == 1.5
    assert value("onebit_artifact_eval_timestamp_seconds", dataset="news") == 1767225600.0  # date -d 2026-01-01Z +%s
    assert value("onebit_artifact_weight_bytes", part="codes") == 500


def test_unloading_takes_the_artifact_away(loaded):
    """No series of a model that is gone, but its counters, which must not jump back."""
    loaded.artifact.end_series("paper")
    loaded.engine.end_series("paper")
    lines = [line for line in loaded.page().decode().splitlines() if 'model="paper"' in line]
    assert not [line for line in lines if line.startswith(("onebit_artifact_", "onebit_requests_", "onebit_kv_"))]
    assert [line for line in lines if line.startswith("onebit_prompt_tokens_total")]


def promtool_on(page: bytes) -> subprocess.CompletedProcess[str]:
    promtool = find_tool("promtool", "Debian package prometheus")
    return subprocess.run(
        [promtool, "check", "metrics"], input=page.decode(), capture_output=True, text=True, check=False
    )


def test_promtool_accepts_the_page(loaded):
    """Names, units and help texts keep Prometheus' own rules."""
    checked = promtool_on(loaded.page())
    assert checked.returncode == 0, checked.stdout + checked.stderr
    assert checked.stdout + checked.stderr == ""


def test_promtool_reads_the_page_with_vllm_names():
    """It is well formed; what promtool dislikes is how vLLM named things, and nothing of ours."""
    checked = promtool_on(show_one_model(Metrics(vllm_names=True)).page())
    complaints = [line for line in (checked.stdout + checked.stderr).splitlines() if line]
    assert complaints
    assert not [line for line in complaints if not (line.startswith("vllm:") and line.endswith(BREAKS_THE_RULES))]


def samples(page: bytes) -> dict[str, list[Sample]]:
    """Every sample of a page, by name, as Prometheus reads it."""
    found: dict[str, list[Sample]] = {}
    for family in text_string_to_metric_families(page.decode()):
        for sample in family.samples:
            found.setdefault(sample.name, []).append(sample)
    return found


def test_every_series_of_vllms_dashboard_is_there():
    """With the labels that its panels and its autoscalers filter by."""
    found = samples(show_one_model(Metrics(vllm_names=True)).page())
    for name in VLLM_DASHBOARD + VLLM_ELSEWHERE:
        assert name in found, name
        assert all(sample.labels["model_name"] == "paper" and sample.labels["engine"] == "0" for sample in found[name])
    reasons = {sample.labels["finished_reason"] for sample in found["vllm:request_success_total"]}
    assert reasons == {"stop", "length", "abort", "error"}
    assert found["vllm:cache_config_info"][0].labels["block_size"] == "16"


def test_vllm_names_are_shown_only_when_asked_for(loaded):
    """Twice the series cost twice the storage."""
    assert "vllm:" not in loaded.page().decode()


def test_vllm_names_show_the_same_figures():
    """One observation is one observation under both names, in the same buckets, and nothing is counted twice."""
    metrics = show_one_model(Metrics(vllm_names=True))
    metrics.engine.first_token.labels("paper").observe(0.03)
    metrics.engine.generation_tokens.labels("paper").inc(7)
    found = samples(metrics.page())
    ours, theirs = (
        [(sample.labels["le"], sample.value) for sample in found[f"{prefix}time_to_first_token_seconds_bucket"]]
        for prefix in ("onebit_", "vllm:")
    )
    assert ours == theirs
    assert dict(ours)["0.02"] == 0.0
    assert dict(ours)["0.04"] == 1.0
    assert found["vllm:generation_tokens_total"][0].value == found["onebit_generation_tokens_total"][0].value == 7
