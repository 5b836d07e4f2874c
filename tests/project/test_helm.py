"""The chart renders what Kubernetes accepts and what the server starts with.

Tests that render are skipped where helm is missing (docs/operations.md, "Tools").
"""

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client import generate_latest

from service.metrics import Metrics
from service.settings import read_settings
from tests.support.chart import (
    CHART,
    EVERYTHING,
    GPU,
    HPA,
    KEDA,
    ROOT,
    SEVERAL,
    SHAPES,
    WORKERS,
    manifests,
    pod,
    pods,
    run_helm,
)
from tests.support.external_tools import find_tool

KUBERNETES = "1.37"
CUSTOM = ("monitoring.coreos.com/", "keda.sh/", "gateway.networking.k8s.io/")
"""Groups whose schemas do not come with Kubernetes."""


@pytest.fixture(params=list(SHAPES.values()), ids=list(SHAPES))
def shape(request: pytest.FixtureRequest) -> dict[str, Any]:
    found: dict[str, Any] = request.param
    return found


def test_lint_is_clean() -> None:
    """`helm lint --strict` finds nothing to say against the chart."""
    done = run_helm("lint", "--strict", str(CHART))
    assert done.returncode == 0, done.stdout + done.stderr


def test_manifests_fit_the_schemas_of_kubernetes(tmp_path: Path, shape: dict[str, Any]) -> None:
    """Every field that is rendered is one that Kubernetes knows, with a value of its type."""
    validate = find_tool("kubernetes-validate", "Python package of that name")
    known = [d for d in manifests(tmp_path, shape).values() if not d["apiVersion"].startswith(CUSTOM)]
    file = tmp_path / "manifests.yaml"
    file.write_text(yaml.safe_dump_all(known))
    command = [validate, "-k", KUBERNETES, "--strict", "--quiet", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_server_accepts_the_settings_that_the_chart_renders(
    tmp_path: Path, shape: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The ConfigMap, read as the server's environment, is a set of settings it starts with."""
    found = manifests(tmp_path, shape)
    (tmp_path / "url").write_text("postgresql://user:password@host/name")
    for name, value in found["ConfigMap"]["data"].items():
        monkeypatch.setenv(name, value.replace("/etc/onebit/database", str(tmp_path)))
    settings = read_settings([])
    mounts = {mount["mountPath"] for mount in pod(found)["containers"][0]["volumeMounts"]}
    assert str(settings.artifact_root) in mounts
    assert settings.keys_file is not None
    assert str(settings.keys_file.parent) in mounts
    assert {str(folder) for folder in settings.job_sources} <= mounts
    assert settings.artifacts == [f"/artifacts/{name}" for name in shape.get("artifacts", {}).get("load", [])]
    assert pod(found)["terminationGracePeriodSeconds"] > settings.shutdown_grace_seconds
    assert (settings.jobs_database_url_file is not None) is ("/etc/onebit/database" in mounts)
    assert settings.admin_port == (8001 if "Service-admin" in found else None)
    assert settings.job_worker is ("StatefulSet-worker" not in found)


def test_large_numbers_are_not_rounded(tmp_path: Path) -> None:
    """A number of bytes arrives as it was written, not as 8.589934592e+09."""
    assert manifests(tmp_path, EVERYTHING)["ConfigMap"]["data"]["ONEBIT_KV_CACHE_BYTES"] == "8589934592"


def test_pods_are_hardened(tmp_path: Path, shape: dict[str, Any]) -> None:
    """Not root, nothing writable but their volumes, no privileges, no token of the cluster."""
    for spec in pods(manifests(tmp_path, shape)):
        (container,) = spec["containers"]
        assert spec["securityContext"]["runAsNonRoot"] is True
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
        assert spec["automountServiceAccountToken"] is False


def test_secrets_are_files_and_never_variables(tmp_path: Path, shape: dict[str, Any]) -> None:
    """Nothing that the chart itself puts into an environment comes from a secret."""
    for spec in pods(manifests(tmp_path, {**shape, "server": {**shape.get("server", {}), "extraEnvFrom": []}})):
        (container,) = spec["containers"]
        assert "secretKeyRef" not in str(container.get("env", []))
        assert "secretRef" not in str(container["envFrom"])


def test_a_service_named_onebit_does_not_change_the_port(tmp_path: Path) -> None:
    """Kubernetes adds no ONEBIT_PORT=tcp://... of its own to the server's environment."""
    assert pod(manifests(tmp_path))["enableServiceLinks"] is False


def test_probes_ask_the_right_question(tmp_path: Path) -> None:
    """A model that loads slowly delays traffic; only an event loop that stands still restarts the pod."""
    (container,) = pod(manifests(tmp_path))["containers"]
    assert container["startupProbe"]["httpGet"]["path"] == "/health/ready"
    assert container["readinessProbe"]["httpGet"]["path"] == "/health/ready"
    assert container["livenessProbe"]["httpGet"]["path"] == "/health/live"


def test_selectors_find_the_pod(tmp_path: Path, shape: dict[str, Any]) -> None:
    """Service, Deployment, network policy and disruption budget mean the pods that are made, and not the workers."""
    found = manifests(tmp_path, shape)
    if "StatefulSet-worker" in found:
        own = found["StatefulSet-worker"]["spec"]["template"]["metadata"]["labels"].items()
        assert found["StatefulSet-worker"]["spec"]["selector"]["matchLabels"].items() <= own
        assert found["NetworkPolicy-worker"]["spec"]["podSelector"]["matchLabels"].items() <= own
        assert not found["Service"]["spec"]["selector"].items() <= own
    labels = found["Deployment"]["spec"]["template"]["metadata"]["labels"].items()
    selectors = [found["Service"]["spec"]["selector"], found["Deployment"]["spec"]["selector"]["matchLabels"]]
    if "NetworkPolicy" in found:
        selectors.append(found["NetworkPolicy"]["spec"]["podSelector"]["matchLabels"])
    if "PodDisruptionBudget" in found:
        selectors.append(found["PodDisruptionBudget"]["spec"]["selector"]["matchLabels"])
    assert all(selector and selector.items() <= labels for selector in selectors)


def test_gpu_is_asked_for_and_used(tmp_path: Path) -> None:
    """With a GPU the pod gets the CUDA image, a GPU, a node that has one, and a server told to use it."""
    found = manifests(tmp_path, GPU)
    (container,) = pod(found)["containers"]
    assert container["image"].endswith("-cuda")
    assert container["resources"]["limits"]["nvidia.com/gpu"] == 1
    assert container["resources"]["requests"]["nvidia.com/gpu"] == 1
    assert container["resources"]["limits"]["memory"]
    assert pod(found)["tolerations"][0]["key"] == "nvidia.com/gpu"
    assert found["ConfigMap"]["data"]["ONEBIT_DEVICE"] == "cuda"


def test_a_slice_of_a_gpu_takes_the_place_of_a_whole_one(tmp_path: Path) -> None:
    """A MIG profile is asked for by its own resource name."""
    limits = pod(manifests(tmp_path, EVERYTHING))["containers"][0]["resources"]["limits"]
    assert limits["nvidia.com/mig-1g.10gb"] == 1
    assert "nvidia.com/gpu" not in limits


def test_changed_settings_restart_the_pod(tmp_path: Path) -> None:
    """The pod carries a checksum of its settings."""
    before = manifests(tmp_path)
    after = manifests(tmp_path, {"server": {"logLevel": "debug"}})
    checksums = [
        found["Deployment"]["spec"]["template"]["metadata"]["annotations"]["checksum/config"]
        for found in (before, after)
    ]
    assert checksums[0] != checksums[1]


def test_two_pods_never_share_the_jobs_database(tmp_path: Path) -> None:
    """While jobs are recorded in SQLite the old pod ends before the new one starts."""
    assert manifests(tmp_path)["Deployment"]["spec"]["strategy"]["type"] == "Recreate"
    assert manifests(tmp_path, SEVERAL)["Deployment"]["spec"]["strategy"]["type"] == "RollingUpdate"


def test_workers_share_the_database_and_the_volume_and_keep_their_names(tmp_path: Path) -> None:
    """A worker that comes back is known as the one that went; it computes where its own pod says."""
    found = manifests(tmp_path, WORKERS)
    worker, server = (pod(found, kind)["containers"][0] for kind in ("StatefulSet-worker", "Deployment"))
    assert worker["command"] == ["onebit-worker"]
    assert worker["volumeMounts"] == server["volumeMounts"]
    variables = {variable["name"]: variable for variable in worker["env"]}
    assert variables["ONEBIT_JOB_WORKER_ID"]["valueFrom"]["fieldRef"]["fieldPath"] == "metadata.name"
    assert variables["ONEBIT_DEVICE"]["value"] == "cuda"
    assert worker["image"].endswith("-cuda")
    assert server["image"].endswith("-cpu")
    assert worker["resources"]["limits"]["nvidia.com/mig-1g.10gb"] == 1
    assert found["ConfigMap"]["data"]["ONEBIT_JOB_WORKER"] == "false"


@pytest.mark.parametrize("shape", [HPA, KEDA], ids=["hpa", "keda"])
def test_autoscaler_decides_how_many_and_asks_for_a_metric_that_exists(tmp_path: Path, shape: dict[str, Any]) -> None:
    """An autoscaled Deployment names no number of its own; the figure is the queue's gauge."""
    found = manifests(tmp_path, shape)
    assert "replicas" not in found["Deployment"]["spec"]
    if "HorizontalPodAutoscaler" in found:
        scaler = found["HorizontalPodAutoscaler"]["spec"]
        asked = scaler["metrics"][0]["pods"]["metric"]["name"]
        assert scaler["scaleTargetRef"]["name"] == found["Deployment"]["metadata"]["name"]
    else:
        trigger = found["ScaledObject"]["spec"]["triggers"][0]["metadata"]
        (asked,) = re.findall(r"onebit_\w+", trigger["query"])
        assert found["ScaledObject"]["spec"]["scaleTargetRef"]["name"] == found["Deployment"]["metadata"]["name"]
    assert f"\n{asked}{{" in "\n" + page_of_a_loaded_model()


def page_of_a_loaded_model() -> str:
    """What /metrics shows once a model is there."""
    metrics = Metrics()
    metrics.engine.start_series("m")
    return generate_latest(metrics.registry).decode()


def test_admin_has_a_port_that_a_network_policy_can_close(tmp_path: Path) -> None:
    """The public Service does not lead to /admin, and who may reach its port is a value of its own."""
    found = manifests(tmp_path, {"networkPolicy": {"adminFrom": []}})
    assert [port["targetPort"] for port in found["Service"]["spec"]["ports"]] == ["http"]
    assert [port["targetPort"] for port in found["Service-admin"]["spec"]["ports"]] == ["admin"]
    opened = [port["port"] for rule in found["NetworkPolicy"]["spec"]["ingress"] for port in rule["ports"]]
    assert opened == ["http"]
    containers = {port["name"]: port["containerPort"] for port in pod(found)["containers"][0]["ports"]}
    assert str(containers["admin"]) == found["ConfigMap"]["data"]["ONEBIT_ADMIN_PORT"]


def test_only_the_database_is_opened_for_jobs_in_postgres(tmp_path: Path) -> None:
    """Server and workers reach DNS and the database's port, and nothing else."""
    found = manifests(tmp_path, WORKERS, {"networkPolicy": {"databaseTo": [{"ipBlock": {"cidr": "10.0.0.7/32"}}]}})
    for kind in ("NetworkPolicy", "NetworkPolicy-worker"):
        rules = found[kind]["spec"]["egress"]
        assert [port["port"] for rule in rules for port in rule["ports"]] == [53, 53, 5432]
        assert rules[1]["to"] == [{"ipBlock": {"cidr": "10.0.0.7/32"}}]
    assert found["NetworkPolicy-worker"]["spec"]["ingress"] == []


def test_dashboards_are_packed_whole(tmp_path: Path) -> None:
    """The ConfigMap for Grafana's sidecar holds the three files as they are."""
    data = manifests(tmp_path, EVERYTHING)["ConfigMap-dashboards"]["data"]
    for name in ("serving", "accuracy", "jobs"):
        file = ROOT / "docker" / "grafana" / "dashboards" / f"{name}.json"
        assert json.loads(data[f"onebit-{name}.json"]) == json.loads(file.read_text())


def test_nothing_leaves_the_pod_but_dns(tmp_path: Path) -> None:
    """A server that downloads nothing is not let out."""
    egress = manifests(tmp_path)["NetworkPolicy"]["spec"]["egress"]
    assert [port["port"] for rule in egress for port in rule["ports"]] == [53, 53]


def test_ingress_opens_only_the_public_api(tmp_path: Path) -> None:
    """Admin and metrics are not reachable from outside the cluster unless somebody asks for it."""
    rule = manifests(tmp_path, EVERYTHING)["Ingress"]["spec"]["rules"][0]
    assert [path["path"] for path in rule["http"]["paths"]] == ["/v1"]


def test_alerts_are_packed_whole(tmp_path: Path) -> None:
    """The PrometheusRule holds the groups of the file that promtool tests."""
    groups = yaml.safe_load((ROOT / "docker" / "prometheus" / "rules.yml").read_text())["groups"]
    assert manifests(tmp_path, EVERYTHING)["PrometheusRule"]["spec"]["groups"] == groups
