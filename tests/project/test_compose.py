"""The compose file, the alerts and the dashboards speak of the server as it is.

Nothing here needs a container engine; `make test-deploy` starts the file. What needs promtool is skipped where it is
missing (docs/operations.md, "Tools").
"""

import importlib.util
import json
import re
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml
from prometheus_client.metrics import MetricWrapperBase

from service.auth import KeyRing, Scope
from service.metrics import Metrics
from service.settings import ENVIRONMENT_PREFIX, Settings, read_settings
from tests.support.external_tools import find_tool

ROOT = Path(__file__).parents[2]
COMPOSE = ROOT / "docker" / "compose.yaml"
PROMETHEUS = ROOT / "docker" / "prometheus"
DASHBOARDS = sorted((ROOT / "docker" / "grafana" / "dashboards").glob("*.json"))

SERVICES: dict[str, Any] = yaml.safe_load(COMPOSE.read_text())["services"]
SERVERS = ("server", "server-gpu")
PROJECT = ("first-start", "first-start-gpu", "database-secrets", "worker", *SERVERS)
TARGET_LABELS = {"instance", "job", "le"}
"""Labels that Prometheus adds to every series, or that a histogram's buckets carry."""


def substitute(text: str) -> str:
    """Fill in `${NAME:-default}` and `${NAME-default}` as compose does when NAME is not set."""
    return re.sub(r"\$\{\w+:?-([^}]*)\}", r"\1", text)


def check_with_promtool(*arguments: str) -> None:
    promtool = find_tool("promtool", "Debian package prometheus")
    done = subprocess.run([promtool, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


# ---- the compose file ----------------------------------------------------------------------------------------------


def test_compose_file_fits_the_compose_specification() -> None:
    """The published schema of the compose format accepts the file."""
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec", str(COMPOSE)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("path", ["docker", "helm", "docs/operations.md"])
def test_every_setting_named_in_packaging_exists(path: str) -> None:
    """A renamed setting cannot leave a dead ONEBIT_ variable behind."""
    folder = ROOT / path
    files = [folder] if folder.is_file() else [file for file in folder.rglob("*") if file.is_file()]
    named = {name for file in files for name in re.findall(r"\bONEBIT_[A-Z_]*[A-Z]\b", file.read_text(errors="ignore"))}
    known = {ENVIRONMENT_PREFIX + field.upper() for field in Settings.model_fields}
    assert named
    assert named <= known | {"ONEBIT_CPU_ISA"}  # of the core's C library, not a setting of the server


@pytest.mark.parametrize("service", SERVERS)
def test_server_accepts_the_environment_that_compose_gives_it(
    service: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The variables, taken together, are settings the server starts with: on all interfaces, with keys."""
    (tmp_path / "url").touch()
    for name, value in SERVICES[service]["environment"].items():
        monkeypatch.setenv(name, substitute(value).replace("/database-secrets", str(tmp_path)))
    settings = read_settings([])
    assert settings.host == "0.0.0.0"
    assert settings.keys_file is not None
    assert settings.artifact_root == Path("/artifacts")
    assert settings.job_sources == [Path("/sources")]


def mounts(service: str) -> dict[str, str]:
    """Where each volume of a service is mounted, and what stands behind that (`:ro`)."""
    split = [re.match(r"(.*?):(/[^:]*)(:ro)?$", substitute(volume)) for volume in SERVICES[service].get("volumes", [])]
    return {found[2]: found[1] + (found[3] or "") for found in split if found}


def read_first_start() -> ModuleType:
    """The script that runs before the server, as a module."""
    specification = importlib.util.spec_from_file_location("first_start", ROOT / "docker" / "first_start.py")
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


@pytest.mark.parametrize(("server", "first"), [("server", "first-start"), ("server-gpu", "first-start-gpu")])
def test_first_start_makes_what_the_server_reads_and_the_key_stays_away_from_it(server: str, first: str) -> None:
    """Keys and database URL are written where the server looks; the key itself is in no volume that it mounts."""
    script = read_first_start()
    environment = SERVICES[server]["environment"]
    assert environment["ONEBIT_KEYS_FILE"] == str(script.KEYS)
    assert environment["ONEBIT_JOBS_DATABASE_URL_FILE"] == str(script.DATABASE / "url")
    for folder in (script.KEYS.parent, script.DATABASE):
        assert mounts(server)[str(folder)] == mounts(first)[str(folder)] + ":ro"
    assert str(script.FIRST_KEY.parent) in mounts(first)
    holders = {name for name in SERVICES if any(source.startswith("first-key") for source in mounts(name).values())}
    assert holders == {"first-start", "first-start-gpu"}
    assert SERVICES[server]["depends_on"][first] == {"condition": "service_completed_successfully"}
    assert substitute(SERVICES["server"]["environment"]["ONEBIT_ARTIFACTS"]) == str(script.DEMO)


def test_no_secret_is_written_in_the_file_or_passed_in_a_variable() -> None:
    """Passwords and keys are in files; variables only say where."""
    for service in SERVICES.values():
        for name, value in service.get("environment", {}).items():
            if re.search("KEY|PASSWORD|DATABASE_URL", name):
                assert name.endswith("_FILE")
                assert value.startswith("/")


def test_first_start_keeps_what_is_there_and_shows_no_secret(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A second start makes no second key or password, and neither start prints one."""
    script = read_first_start()
    script.KEYS, script.FIRST_KEY, script.DATABASE = tmp_path / "keys.json", tmp_path / "key", tmp_path / "database"
    script.DATABASE.mkdir()
    script.make_key()
    script.choose_database()
    assert (script.DATABASE / "url").read_text() == ""
    script.make_database_secrets()
    key, url = script.FIRST_KEY.read_text(), (script.DATABASE / "url").read_text()
    before = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    script.make_key()
    script.choose_database()
    script.make_database_secrets()
    assert {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()} == before
    assert KeyRing(script.KEYS).authenticate(key).scopes == frozenset(Scope)
    assert (script.DATABASE / "password").read_text() in url
    printed = capsys.readouterr()
    for secret in (key, (script.DATABASE / "password").read_text()):
        assert secret not in printed.out + printed.err
    assert stat.S_IMODE(script.FIRST_KEY.stat().st_mode) == 0o400


def test_database_is_where_its_url_says_and_nowhere_else() -> None:
    """The URL that is made names the database's service, user and database; only the project reaches its network."""
    text = (ROOT / "docker" / "first_start.py").read_text()
    environment = SERVICES["database"]["environment"]
    assert f"postgresql://{environment['POSTGRES_USER']}:" in text
    assert f"@database:5432/{environment['POSTGRES_DB']}" in text
    assert SERVICES["database"]["networks"] == ["jobs"]
    assert yaml.safe_load(COMPOSE.read_text())["networks"]["jobs"]["internal"] is True
    assert "ports" not in SERVICES["database"]
    reaching = {name for name, service in SERVICES.items() if "jobs" in service.get("networks", [])}
    assert reaching == {"database", "worker", *SERVERS}


@pytest.mark.parametrize("service", SERVERS)
def test_stopping_gives_streams_their_grace(service: str) -> None:
    """Compose kills later than the server gives up."""
    grace = int(SERVICES[service]["stop_grace_period"].removesuffix("s"))
    assert grace > float(SERVICES[service]["environment"]["ONEBIT_SHUTDOWN_GRACE_SECONDS"])


@pytest.mark.parametrize("service", SERVICES)
def test_every_service_is_hardened(service: str) -> None:
    """No service runs as root, writes its root file system, or can gain privileges."""
    definition = SERVICES[service]
    assert definition["read_only"] is True
    assert definition["cap_drop"] == ["ALL"]
    assert definition["security_opt"] == ["no-new-privileges:true"]
    assert not definition["user"].startswith(("0", "root"))


@pytest.mark.parametrize("service", PROJECT)
def test_every_service_of_ours_can_be_built(service: str) -> None:
    """No image is looked for in a registry that does not have it."""
    assert SERVICES[service]["build"]["dockerfile"] == "docker/Dockerfile"
    assert SERVICES[service]["image"].endswith("-" + SERVICES[service]["build"]["target"])


@pytest.mark.parametrize("service", SERVICES)
def test_ports_are_published_on_loopback_only(service: str) -> None:
    """Nothing is reachable from another machine unless somebody puts a proxy in front."""
    assert all(port.startswith("127.0.0.1:") for port in SERVICES[service].get("ports", []))


@pytest.mark.parametrize("service", SERVICES)
def test_images_are_pinned_and_started_by_profile(service: str) -> None:
    """The same file starts the same versions tomorrow, and nothing that was not asked for."""
    tag = substitute(SERVICES[service]["image"]).rpartition(":")[2]
    assert re.search(r"\d+\.\d+", tag)
    assert SERVICES[service]["profiles"]


def test_prometheus_scrapes_the_server_on_a_network_without_exit() -> None:
    """Prometheus finds the server by its alias, and can reach nothing else."""
    document = yaml.safe_load(COMPOSE.read_text())
    config = yaml.safe_load((PROMETHEUS / "prometheus.yml").read_text())
    (target,) = config["scrape_configs"][0]["static_configs"][0]["targets"]
    host, port = target.split(":")
    (network,) = SERVICES["prometheus"]["networks"]
    assert document["networks"][network]["internal"] is True
    for server in SERVERS:
        assert host in SERVICES[server]["networks"][network]["aliases"]
        assert SERVICES[server]["environment"]["ONEBIT_PORT"] == port


# ---- alerts and dashboard ------------------------------------------------------------------------------------------


def known_series() -> dict[str, set[str]]:
    """Every sample name that /metrics can show, with its labels."""
    found: dict[str, set[str]] = {"up": set()}
    for group in vars(Metrics()).values():
        for metric in vars(group).values():
            if not isinstance(metric, MetricWrapperBase):
                continue
            (family,) = metric.describe()
            endings = {"counter": ["_total"], "histogram": ["_bucket", "_sum", "_count"]}.get(family.type, [""])
            for ending in endings:
                found[family.name + ending] = set(metric._labelnames) | TARGET_LABELS
    return found


def alerts() -> list[dict[str, Any]]:
    groups = yaml.safe_load((PROMETHEUS / "rules.yml").read_text())["groups"]
    return [rule for group in groups for rule in group["rules"]]


def panels(dashboard: Path) -> list[dict[str, Any]]:
    return [panel for panel in json.loads(dashboard.read_text())["panels"] if panel["type"] != "row"]


def expressions() -> Iterator[tuple[str, str]]:
    for rule in alerts():
        yield rule["alert"], rule["expr"]
    for dashboard in DASHBOARDS:
        for panel in panels(dashboard):
            for target in panel["targets"]:
                yield panel["title"], target["expr"]
        for variable in json.loads(dashboard.read_text())["templating"]["list"]:
            if variable["type"] == "query":
                yield variable["name"], variable["definition"]


@pytest.mark.parametrize(("title", "expression"), list(expressions()))
def test_every_metric_and_label_asked_for_is_exposed(title: str, expression: str) -> None:
    """An alert or panel that asks for a series nobody exposes would be silent for ever."""
    series = known_series()
    names = set(re.findall(r"\b(?:onebit_\w+|up\b)", expression))
    assert names, title
    assert names <= set(series), title
    for name, matchers in re.findall(r"\b(onebit_\w+|up)\{([^}]*)\}", expression):
        labels = set(re.findall(r"(\w+)\s*[=!]~?", matchers))
        assert labels <= series[name] | TARGET_LABELS, f"{title}: {name}"


def test_promtool_accepts_config_and_rules() -> None:
    """Prometheus would start with these files."""
    check_with_promtool("check", "config", "--syntax-only", str(PROMETHEUS / "prometheus.yml"))
    check_with_promtool("check", "rules", "--lint=all", "--lint-fatal", str(PROMETHEUS / "rules.yml"))


def test_alerts_fire_when_they_should_and_only_then() -> None:
    """The alerts' own unit tests, series in and alarms out."""
    check_with_promtool("test", "rules", str(PROMETHEUS / "rules_test.yml"))


def test_every_alert_is_tried_by_a_unit_test() -> None:
    """No alert goes out that was never seen to fire."""
    tests = yaml.safe_load((PROMETHEUS / "rules_test.yml").read_text())["tests"]
    fired = {case["alertname"] for test in tests for case in test["alert_rule_test"] if case["exp_alerts"]}
    assert fired == {rule["alert"] for rule in alerts()}


def test_every_alert_says_what_to_do() -> None:
    """The runbook link of each alert leads to a section that exists."""
    headings = re.findall(r"^#+ (\w+)$", (ROOT / "docs" / "operations.md").read_text(), flags=re.MULTILINE)
    for rule in alerts():
        assert rule["annotations"]["runbook"] == f"docs/operations.md#{rule['alert'].lower()}"
        assert rule["alert"] in headings


def test_dashboard_queries_are_promql(tmp_path: Path) -> None:
    """Every panel's query parses, once Grafana's own variables are filled in."""
    rules = []
    for dashboard in DASHBOARDS:
        for number, panel in enumerate(panels(dashboard)):
            for target in panel["targets"]:
                expression = target["expr"].replace("$__rate_interval", "1m").replace("$model", ".*")
                rules.append({"record": f"{dashboard.stem}:{number}:{target['refId']}", "expr": expression})
    (tmp_path / "rules.yml").write_text(yaml.safe_dump({"groups": [{"name": "dashboards", "rules": rules}]}))
    check_with_promtool("check", "rules", str(tmp_path / "rules.yml"))


def test_dashboards_are_the_three_that_are_promised_and_lead_to_each_other() -> None:
    """Serving, accuracy, jobs: each with an address of its own, and links to the others by their tag."""
    documents = {dashboard.stem: json.loads(dashboard.read_text()) for dashboard in DASHBOARDS}
    assert set(documents) == {"serving", "accuracy", "jobs"}
    for name, document in documents.items():
        assert document["uid"] == f"onebit-{name}"
        assert document["tags"] == ["onebit"]
        assert document["links"][0]["tags"] == ["onebit"]
    home = SERVICES["grafana"]["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"]
    assert Path(home).name in {dashboard.name for dashboard in DASHBOARDS}


@pytest.mark.parametrize("dashboard", DASHBOARDS, ids=lambda path: path.stem)
def test_dashboard_panels_do_not_overlap_and_take_their_data_from_the_chosen_source(dashboard: Path) -> None:
    """Panels stand beside each other, each with an id of its own and a sentence that says what it shows."""
    cells: set[tuple[int, int]] = set()
    for panel in panels(dashboard):
        place = panel["gridPos"]
        own = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not own & cells, panel["title"]
        assert max(x for x, _ in own) < 24
        assert panel["datasource"]["uid"] == "${datasource}"
        assert panel["description"]
        cells |= own
    identifiers = [panel["id"] for panel in json.loads(dashboard.read_text())["panels"]]
    assert len(set(identifiers)) == len(identifiers)
