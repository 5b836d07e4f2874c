"""The Helm chart renders what Kubernetes and the server accept, and refuses what cannot work.

What only reads the chart's files always runs. Rendering needs helm, on PATH or named in the variable HELM;
docs/operations.md, "Tools", says where to get it and kubernetes-validate.
"""

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from service.settings import read_settings
from tests.support.external_tools import find_tool

ROOT = Path(__file__).parents[2]
CHART = ROOT / "helm" / "onebit"
KUBERNETES = "1.37"

SCHEMA: dict[str, Any] = json.loads((CHART / "values.schema.json").read_text())
VALUES: dict[str, Any] = yaml.safe_load((CHART / "values.yaml").read_text())

WITH_KEYS = {"auth": {"existingSecret": "onebit-keys"}}
SEVERAL = {"server": {"replicaCount": 3}, "jobs": {"enabled": False}, "artifacts": {"accessModes": ["ReadOnlyMany"]}}
GPU = {"server": {"gpu": {"enabled": True}}}
EVERYTHING = {
    "commonLabels": {"team": "models"},
    "imagePullSecrets": [{"name": "pull"}],
    "image": {"digest": "sha256:" + "0" * 64},
    "server": {
        "args": ["--log-level", "debug"],
        "env": [{"name": "OMP_NUM_THREADS", "value": "4"}],
        "extraEnvFrom": [{"secretRef": {"name": "more"}}],
        "engine": {"kvCacheBytes": 8589934592, "maxModelLen": 4096},
        "limits": {"maxBodyBytes": 1048576},
        "gpu": {"enabled": True, "migProfile": "1g.10gb", "runtimeClassName": "nvidia"},
        "podAnnotations": {"note": "x"},
        "podLabels": {"tier": "models"},
        "nodeSelector": {"disk": "fast"},
        "tolerations": [{"key": "only", "operator": "Exists"}],
        "priorityClassName": "high",
        "pdb": {"maxUnavailable": "50%"},
    },
    "jobs": {"sourcesClaim": "originals", "allowHub": True},
    "artifacts": {"load": ["a", "group/b"], "storageClass": "fast", "keep": False},
    "service": {"type": "LoadBalancer", "port": 8080, "annotations": {"a": "b"}},
    "ingress": {"enabled": True, "className": "nginx", "host": "models.example.org", "tlsSecret": "tls"},
    "serviceAccount": {"name": "own", "annotations": {"a": "b"}},
    "networkPolicy": {
        "metricsFrom": [{"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "monitoring"}}}],
        "extraEgress": [{"ports": [{"port": 5432, "protocol": "TCP"}]}],
    },
    "metrics": {
        "serviceMonitor": {"enabled": True, "labels": {"release": "p"}},
        "prometheusRule": {"enabled": True, "labels": {"release": "p"}},
        "dashboards": {"enabled": True},
    },
}
BARE = {
    "serviceAccount": {"create": False},
    "networkPolicy": {"enabled": False},
    "server": {"pdb": {"enabled": False}, "preStopSeconds": 0},
    "artifacts": {"existingClaim": "mine", "readOnly": True},
    "jobs": {"enabled": False},
}
SHAPES: dict[str, dict[str, Any]] = {
    "default": {},
    "several replicas": SEVERAL,
    "gpu": GPU,
    "everything": EVERYTHING,
    "bare": BARE,
}


# ---- files ---------------------------------------------------------------------------------------------------------


def objects(schema: dict[str, Any], path: str = "values") -> Iterator[tuple[str, dict[str, Any]]]:
    """Every object of the schema that lists its properties."""
    if "properties" in schema:
        yield path, schema
        for name, inner in schema["properties"].items():
            yield from objects(inner, f"{path}.{name}")


def test_default_values_fit_their_schema() -> None:
    """The values that a user starts from are allowed."""
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    jsonschema.validate(VALUES, SCHEMA)


def test_schema_refuses_names_it_does_not_know() -> None:
    """A misspelt value is an error, not a setting that silently does nothing."""
    assert all(schema["additionalProperties"] is False for _, schema in objects(SCHEMA))


def test_schema_knows_exactly_the_values_that_exist() -> None:
    """A value added to values.yaml is in the schema, and the schema lists nothing else."""
    for path, schema in objects(SCHEMA):
        if path.startswith("values.imagePullSecrets"):
            continue
        at: Any = VALUES
        for part in path.split(".")[1:]:
            at = at[part]
        assert set(schema["properties"]) - {"global"} == set(at) or path.endswith(".resources"), path


@pytest.mark.parametrize(
    "wrong",
    [
        {"server": {"replicas": 2}},
        {"server": {"replicaCount": "2"}},
        {"server": {"engine": {"dtype": "int8"}}},
        {"server": {"logLevel": "verbose"}},
        {"service": {"port": 99999}},
        {"artifacts": {"load": ["../outside"]}},
        {"artifacts": {"accessModes": []}},
        {"image": {"digest": "latest"}},
        {"server": {"pdb": {"maxUnavailable": 0}}},
    ],
    ids=str,
)
def test_schema_refuses_values_that_cannot_be_meant(wrong: dict[str, Any]) -> None:
    """Wrong types, unknown choices and paths that leave the volume."""
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(wrong, SCHEMA)


@pytest.mark.parametrize(
    ("packed", "source"),
    [("rules.yml", "docker/prometheus/rules.yml"), ("onebit.json", "docker/grafana/dashboards/onebit.json")],
)
def test_chart_carries_the_same_alerts_and_dashboard_as_compose(packed: str, source: str) -> None:
    """There is one set of alerts and one dashboard; the chart links to them."""
    assert (CHART / "files" / packed).resolve() == ROOT / source


# ---- rendering -----------------------------------------------------------------------------------------------------


def run_helm(*arguments: str) -> "subprocess.CompletedProcess[str]":
    helm = find_tool("helm", "put it on PATH or name it in HELM")
    return subprocess.run([helm, *arguments], capture_output=True, text=True, check=False)


def render(tmp_path: Path, *layers: dict[str, Any]) -> "subprocess.CompletedProcess[str]":
    """Render the chart as release `rel` with layers of values, the later over the earlier."""
    files = []
    for number, layer in enumerate(layers):
        file = tmp_path / f"values-{number}.json"
        file.write_text(json.dumps(layer))
        files += ["--values", str(file)]
    return run_helm("template", "rel", str(CHART), *files)


def manifests(tmp_path: Path, *layers: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """What the chart renders, by kind; of two ConfigMaps the one with the settings."""
    done = render(tmp_path, WITH_KEYS, *layers)
    assert done.returncode == 0, done.stderr
    documents = [document for document in yaml.safe_load_all(done.stdout) if document]
    return {d["kind"]: d for d in documents if not d["metadata"]["name"].endswith("-dashboards")}


def pod(found: dict[str, dict[str, Any]]) -> dict[str, Any]:
    spec: dict[str, Any] = found["Deployment"]["spec"]["template"]["spec"]
    return spec


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
    known = [d for d in manifests(tmp_path, shape).values() if not d["apiVersion"].startswith("monitoring.")]
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
    for name, value in found["ConfigMap"]["data"].items():
        monkeypatch.setenv(name, value)
    settings = read_settings([])
    mounts = {mount["mountPath"] for mount in pod(found)["containers"][0]["volumeMounts"]}
    assert str(settings.artifact_root) in mounts
    assert settings.keys_file is not None
    assert str(settings.keys_file.parent) in mounts
    assert {str(folder) for folder in settings.job_sources} <= mounts
    assert settings.artifacts == [f"/artifacts/{name}" for name in shape.get("artifacts", {}).get("load", [])]
    assert pod(found)["terminationGracePeriodSeconds"] > settings.shutdown_grace_seconds


def test_large_numbers_are_not_rounded(tmp_path: Path) -> None:
    """A number of bytes arrives as it was written, not as 8.589934592e+09."""
    assert manifests(tmp_path, EVERYTHING)["ConfigMap"]["data"]["ONEBIT_KV_CACHE_BYTES"] == "8589934592"


def test_pod_is_hardened(tmp_path: Path, shape: dict[str, Any]) -> None:
    """Not root, nothing writable but its volumes, no privileges, no token of the cluster."""
    spec = pod(manifests(tmp_path, shape))
    (container,) = spec["containers"]
    assert spec["securityContext"]["runAsNonRoot"] is True
    assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    assert spec["automountServiceAccountToken"] is False


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
    """Service, Deployment, network policy and disruption budget mean the pods that are made."""
    found = manifests(tmp_path, shape)
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


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"auth": {"existingSecret": ""}}, "auth.existingSecret is empty"),
        ({"server": {"replicaCount": 2}}, "jobs are recorded in an SQLite file"),
        ({"server": {"replicaCount": 2}, "jobs": {"enabled": False}}, "which one node can mount"),
        ({"artifacts": {"readOnly": True}}, "jobs write their artifacts there"),
        ({"jobs": {"enabled": False, "allowHub": True}}, "nothing would use it"),
        ({"server": {"gpu": {"enabled": True}, "engine": {"device": "cpu"}}}, "the GPU would idle"),
        ({"server": {"engine": {"device": "cuda:0"}}}, "the pod would get no GPU"),
        ({"server": {"terminationGracePeriodSeconds": 35}}, "streams would be cut off"),
        ({"ingress": {"enabled": True}}, "ingress.host is empty"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_impossible_combinations_fail_with_a_sentence(tmp_path: Path, values: dict[str, Any], sentence: str) -> None:
    """What could only fail later, in a pod, fails at render and says what to change."""
    done = render(tmp_path, WITH_KEYS, values)
    assert done.returncode != 0
    assert sentence in done.stderr


def test_a_misspelt_value_fails_at_render(tmp_path: Path) -> None:
    """Helm enforces the schema."""
    done = render(tmp_path, WITH_KEYS, {"server": {"replica": 1}})
    assert done.returncode != 0
    assert "replica" in done.stderr
