"""The chart as tests use it: values worth rendering, and what `helm template` makes of them.

Tests that render are skipped where helm is missing (docs/operations.md, "Tools").
"""

import json
import subprocess
from pathlib import Path
from typing import Any

import yaml

from tests.support.external_tools import find_tool

ROOT = Path(__file__).parents[2]
CHART = ROOT / "helm" / "onebit"

WITH_KEYS = {"auth": {"existingSecret": "onebit-keys"}}
POSTGRES = {"jobs": {"database": {"kind": "postgres", "existingSecret": "onebit-database"}}}
WORKERS = {
    **POSTGRES,
    "server": {"replicaCount": 2},
    "worker": {"enabled": True, "replicaCount": 2, "gpu": {"enabled": True, "migProfile": "1g.10gb"}},
    "artifacts": {"accessModes": ["ReadWriteMany"]},
}
HPA = {**WORKERS, "server": {"autoscaling": {"kind": "hpa", "minReplicas": 2, "maxReplicas": 6}}}
KEDA = {
    "server": {"autoscaling": {"kind": "keda", "prometheusAddress": "http://prometheus.monitoring:9090"}},
    "jobs": {"enabled": False},
    "artifacts": {"accessModes": ["ReadOnlyMany"]},
}
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
    "httpRoute": {"enabled": True, "parentRefs": [{"name": "gateway"}], "hostnames": ["models.example.org"]},
    "extraObjects": [{"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "{{ .Release.Name }}-more"}}],
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
    "adminService": {"enabled": False},
}
SHAPES: dict[str, dict[str, Any]] = {
    "default": {},
    "several replicas": SEVERAL,
    "gpu": GPU,
    "everything": EVERYTHING,
    "bare": BARE,
    "postgres": POSTGRES,
    "workers": WORKERS,
    "hpa": HPA,
    "keda": KEDA,
}


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
    """What the chart renders, by kind, with what a name adds to the release's: `Service`, `Service-admin`, ..."""
    done = render(tmp_path, WITH_KEYS, *layers)
    assert done.returncode == 0, done.stderr
    found = {}
    for document in yaml.safe_load_all(done.stdout):
        if document:
            ending = document["metadata"]["name"].removeprefix("rel-onebit").removesuffix("-artifacts")
            assert document["kind"] + ending not in found
            found[document["kind"] + ending] = document
    return found


def pod(found: dict[str, dict[str, Any]], kind: str = "Deployment") -> dict[str, Any]:
    spec: dict[str, Any] = found[kind]["spec"]["template"]["spec"]
    return spec


def pods(found: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """The pods of the server and, if there are any, of the workers."""
    return [pod(found, kind) for kind in ("Deployment", "StatefulSet-worker") if kind in found]
