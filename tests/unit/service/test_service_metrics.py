"""Metrics: the promised names, series that come and go with their model, a page promtool accepts."""

import dataclasses
import math
import shutil
import subprocess

import pytest

from service.metrics import Metrics
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


@pytest.fixture
def loaded() -> Metrics:
    """Metrics of a server with one model."""
    metrics = Metrics()
    metrics.engine.start_series("paper")
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


def test_promtool_accepts_the_page(loaded):
    """Names, units and help texts keep Prometheus' own rules."""
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("promtool is not installed (Debian package prometheus)")
    checked = subprocess.run([promtool, "check", "metrics"], input=loaded.page(), capture_output=True, check=False)
    assert checked.returncode == 0, checked.stdout + checked.stderr
    assert checked.stdout + checked.stderr == b""
