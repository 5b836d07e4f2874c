"""The chart's pod, booted: `helm template` into `podman play kube`, with its security context, volumes and probes.

Only a cluster can show the rest: the Service, the network policy, the autoscaler, the disruption budget.
"""

import json
import os
import subprocess
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
import yaml

from service.auth import Scope, add_key
from tests.deploy.conftest import READY_SECONDS
from tests.deploy.engine import ROOT, VERSION, Engine
from tests.support.external_tools import find_tool
from tests.support.tiny_model import save_tiny_model

PORT = 18401
VALUES = {
    "image": {"repository": "localhost/onebit", "tag": f"{VERSION}-cpu", "pullPolicy": "Never"},
    "auth": {"existingSecret": "onebit-keys"},
    "artifacts": {"load": ["tiny"]},
    "server": {"preStopSeconds": 0},
}


def rendered(folder: Path) -> list[dict[str, Any]]:
    """The manifests of a release with the values above."""
    values = folder / "values.json"
    values.write_text(json.dumps(VALUES))
    helm = find_tool("helm", "put it on PATH or name it in HELM")
    command = [helm, "template", "rel", str(ROOT / "helm" / "onebit"), "--values", str(values)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return [document for document in yaml.safe_load_all(done.stdout) if document]


def playable(documents: list[dict[str, Any]], keys: Path) -> str:
    """What podman can play: the Deployment without limits, and settings; claim and secret are a volume and a folder."""
    kinds = {document["kind"]: document for document in documents}
    container = kinds["Deployment"]["spec"]["template"]["spec"]["containers"][0]
    container["resources"] = {}  # there may be no cgroups here
    container["ports"][0]["hostPort"] = PORT
    container.pop("startupProbe")  # podman of Debian 12 knows liveness only; the others are asked below
    container.pop("readinessProbe")
    container.pop("livenessProbe")
    spec = kinds["Deployment"]["spec"]["template"]["spec"]
    for volume in spec["volumes"]:
        if "emptyDir" in volume:
            volume["emptyDir"] = {}
    (volume,) = [volume for volume in spec["volumes"] if volume["name"] == "keys"]
    assert volume.pop("secret")["items"] == [{"key": "keys.json", "path": keys.name}]
    volume["hostPath"] = {"path": str(keys.parent)}  # podman of Debian 12 mounts secrets without decoding them
    return yaml.safe_dump_all([kinds["ConfigMap"], kinds["Deployment"]])


@pytest.fixture(scope="module")
def pod(engine: Engine, images: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The chart's pod with a tiny model on its claim; yields a key."""
    folder = tmp_path_factory.mktemp("chart")
    keys = folder / "keys" / "keys.json"
    key = add_key(keys, "me", frozenset(Scope))
    os.chown(keys, 10001, 10001)
    for parent in (keys.parent, folder, folder.parent, folder.parent.parent):
        parent.chmod(0o755)
    manifest = folder / "pod.yaml"
    manifest.write_text(playable(rendered(folder), keys))
    down = ("play", "kube", "--down", str(manifest))
    engine.podman(*down, check=False)
    engine.podman("volume", "rm", "--force", "rel-onebit-artifacts", check=False)
    engine.podman("volume", "create", "rel-onebit-artifacts")
    mount = engine.podman("volume", "inspect", "rel-onebit-artifacts", "--format", "{{.Mountpoint}}").strip()
    save_tiny_model(Path(mount) / "tiny")
    subprocess.run(["chown", "-R", "10001:10001", mount], check=True)
    engine.podman("play", "kube", str(manifest))
    yield key
    engine.podman(*down, check=False)
    engine.podman("volume", "rm", "--force", "rel-onebit-artifacts", check=False)


def container_of(engine: Engine) -> str:
    """The server's container in the pod that was played."""
    names = engine.podman("ps", "--all", "--format", "{{.Names}}").split()
    return next(name for name in names if name.endswith("-server") and "rel-onebit" in name)


def test_pod_boots_and_answers(engine: Engine, pod: str) -> None:
    """The probes' routes answer, and the model on the claim is served to the key in the secret."""
    ready = f"http://127.0.0.1:{PORT}/health/ready"
    name = container_of(engine)
    engine.wait_until("ready", lambda: status_of(ready) == 200, READY_SECONDS, name)
    assert status_of(f"http://127.0.0.1:{PORT}/health/live") == 200
    client = openai.OpenAI(base_url=f"http://127.0.0.1:{PORT}/v1", api_key=pod, max_retries=0)
    answer = client.completions.create(model="tiny", prompt="a", max_tokens=4)
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 4
    assert status_of(f"http://127.0.0.1:{PORT}/admin/models") == 404  # it has a port of its own


def test_pod_is_confined_as_the_chart_says(engine: Engine, pod: str) -> None:
    """The security context reaches the process: user, capabilities, read-only root; its volumes can be written."""
    look = (
        "id -u; grep -E '^(CapEff|NoNewPrivs)' /proc/1/status; touch /opt/x 2>&1; touch /tmp/x /artifacts/x && echo ok"
    )
    seen = engine.podman("exec", container_of(engine), "sh", "-c", look)
    assert seen.split()[:5] == ["10001", "CapEff:", "0000000000000000", "NoNewPrivs:", "1"]
    assert "Read-only file system" in seen
    assert seen.endswith("ok\n")


def status_of(url: str) -> int:
    """What a route answers; 0 when nobody does."""
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code
    except OSError:
        return 0
