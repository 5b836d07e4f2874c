"""Every dashboard's queries, asked of a real Prometheus that scrapes a real server, return data; and a picture of each.

The server has a model that was evaluated, traffic of which all is scored against the original, and jobs; Prometheus is
Debian's, with the project's own configuration and rules, only its target is another port. Grafana itself is not here:
the pictures are drawn from the answers, a panel to a square, in build/deploy.
"""

import json
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.deploy.engine import ROOT
from tests.deploy.panels import Answer, draw_dashboard
from tests.support.admin import Admin, has_ended, save_job_sources
from tests.support.external_tools import find_tool
from tests.support.live_metrics import LiveMetrics
from tests.support.server_process import ServerProcess, running_server, server_environment

DASHBOARDS = sorted((ROOT / "docker" / "grafana" / "dashboards").glob("*.json"))
PICTURES = ROOT / "build" / "deploy"
SCRAPES = 20
START_SECONDS = 60
READY_SECONDS = 600
MAY_BE_EMPTY = {
    ("serving", "Errors"): "no request failed",
    ("serving", "Duration by route, p95"): "routes that nobody asked have no quantile",
}
"""Panels with a query that has nothing to show while all is well, and why."""


class Prometheus:
    """A running Prometheus."""

    def __init__(self, url: str) -> None:
        self.url = url

    def ask(self, path: str, **parameters: str) -> Any:
        """One question to its API."""
        query = urllib.parse.urlencode(parameters)
        with urllib.request.urlopen(f"{self.url}/api/v1/{path}?{query}", timeout=30) as answer:
            return json.load(answer)["data"]


@contextmanager
def running_prometheus(target: str, folder: Path, port: int = 18490) -> Iterator[Prometheus]:
    """Prometheus with the project's configuration, scraping one server, every second so that minutes are not needed."""
    configuration = yaml.safe_load((ROOT / "docker" / "prometheus" / "prometheus.yml").read_text())
    configuration["global"].update(scrape_interval="1s", scrape_timeout="1s", evaluation_interval="1s")
    configuration["rule_files"] = [str(ROOT / "docker" / "prometheus" / "rules.yml")]
    configuration["scrape_configs"][0]["static_configs"][0]["targets"] = [target]
    file = folder / "prometheus.yml"
    file.write_text(yaml.safe_dump(configuration))
    program = find_tool("prometheus", "Debian package of that name")
    address = f"127.0.0.1:{port}"
    command = [program, f"--config.file={file}", f"--storage.tsdb.path={folder / 'data'}"]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen([*command, f"--web.listen-address={address}"], stderr=log, stdout=log)
    try:
        deadline = time.monotonic() + START_SECONDS
        while True:
            if process.poll() is not None or time.monotonic() > deadline:
                raise AssertionError((folder / "log").read_text()[-3000:])
            try:
                with urllib.request.urlopen(f"http://{address}/-/ready", timeout=2):
                    break
            except OSError:
                time.sleep(0.2)
        yield Prometheus(f"http://{address}")
    finally:
        process.terminate()
        process.wait(30)


def command(*words: str) -> None:
    """Run onebit."""
    line = [sys.executable, "-m", "onebit_core.cli.main", *words]
    subprocess.run(line, cwd=ROOT, env=server_environment(), check=True, capture_output=True, timeout=600)


@pytest.fixture(scope="module")
def busy_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ServerProcess]:
    """A server with an evaluated model whose traffic is scored, and a folder for jobs."""
    folder = tmp_path_factory.mktemp("dashboards")
    sources = save_job_sources(folder / "sources")
    artifact = folder / "artifacts" / "tiny-4bit"
    command(
        "quantize",
        str(sources / "tiny"),
        "--method",
        "rtn",
        "--set",
        "bits=4",
        "--name",
        "tiny",
        "--out",
        str(artifact),
    )
    text = f"heldout={sources / 'heldout.txt'}"
    command("evaluate", str(artifact), "--text", text, "--windows", "4", "--window-tokens", "64")
    flags = ["--artifact-root", str(artifact.parent), "--job-sources", str(sources), "--kv-cache-bytes", "8000000"]
    scored = ["--score-share", "1", "--score-original", f"tiny={sources / 'tiny'}"]
    with running_server(str(artifact), *flags, *scored, log_file=folder / "log", ready=False) as server:
        deadline = time.monotonic() + READY_SECONDS
        while server.status("/health/ready") != 200:
            assert time.monotonic() < deadline, server.log_file.read_text()[-3000:]
            time.sleep(0.5)
        yield server


@pytest.fixture(scope="module")
def prometheus(busy_server: ServerProcess, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    """Prometheus after it has seen traffic, a job that ended and one that runs."""
    admin = Admin(busy_server.url)
    with running_prometheus(busy_server.url.removeprefix("http://"), tmp_path_factory.mktemp("prometheus")) as found:
        time.sleep(3)
        done = admin.submit(model="tiny", method="rtn", settings={"bits": 4}, name="done")
        for _ in range(SCRAPES):
            ask_for_text(busy_server.url)
            time.sleep(0.5)
        admin.wait(done, has_ended)
        admin.submit(model="slow", method="gptq", name="running", calibration={"samples": 64, "tokens": 64})
        for _ in range(SCRAPES):
            ask_for_text(busy_server.url)
            time.sleep(0.5)
        scored = LiveMetrics(
            busy_server.url
        )  # the scorer has the lowest priority, so it may need time on a busy machine
        deadline = time.monotonic() + READY_SECONDS
        while scored.total("onebit_live_scored_sequences_total") < SCRAPES and time.monotonic() < deadline:
            ask_for_text(busy_server.url)
            time.sleep(1)
        yield found


def ask_for_text(url: str) -> None:
    """A few tokens of two sequences."""
    body = {"model": "tiny", "prompt": "The quick brown fox jumps over the lazy dog", "max_tokens": 24, "n": 2}
    request = urllib.request.Request(
        f"{url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as answer:
        answer.read()


def answers(prometheus: Prometheus, dashboard: Path) -> list[Answer]:
    """What each query of a dashboard's panels returns, over the last minute or now, as the panel asks."""
    now = time.time()
    found = []
    for panel in json.loads(dashboard.read_text())["panels"]:
        for target in panel.get("targets", []):
            expression = target["expr"].replace("$__rate_interval", "15s").replace("$model", ".*")
            times = {"start": str(now - 60), "end": str(now), "step": "2"}
            data = prometheus.ask("query_range", query=expression, **times)
            found.append(Answer(panel=panel, legend=target.get("legendFormat", ""), series=data["result"]))
    return found


@pytest.mark.parametrize("dashboard", DASHBOARDS, ids=lambda path: path.stem)
def test_every_query_of_a_dashboard_returns_data(prometheus: Prometheus, dashboard: Path) -> None:
    """No panel is empty for a server that does what the panel is about; the picture shows what came."""
    found = answers(prometheus, dashboard)
    PICTURES.mkdir(parents=True, exist_ok=True)
    draw_dashboard(json.loads(dashboard.read_text()), found, PICTURES / f"dashboard-{dashboard.stem}.png")
    empty = {(dashboard.stem, answer.panel["title"]) for answer in found if not answer.series}
    assert empty <= set(MAY_BE_EMPTY)


def test_no_alert_fires_and_every_rule_is_evaluated(prometheus: Prometheus) -> None:
    """Prometheus evaluates all rules without an error, and a healthy server sets off none of the loud ones."""
    rules = [rule for group in prometheus.ask("rules")["groups"] for rule in group["rules"]]
    wanted = yaml.safe_load((ROOT / "docker" / "prometheus" / "rules.yml").read_text())["groups"]
    assert {rule["name"] for rule in rules} == {rule["alert"] for group in wanted for rule in group["rules"]}
    assert [rule["name"] for rule in rules if rule["health"] == "err"] == []
    assert [rule["name"] for rule in rules if rule["state"] == "firing" and rule["labels"]["severity"] != "info"] == []


def test_the_autoscalers_query_returns_the_queue(prometheus: Prometheus) -> None:
    """What KEDA and the HPA ask for is there, with the label of the server it came from."""
    (sample,) = prometheus.ask("query", query="onebit_requests_waiting")["result"]
    assert float(sample["value"][1]) >= 0
    assert sample["metric"]["instance"]
