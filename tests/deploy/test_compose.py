"""docker/compose.yaml, started: the first answer without another step, who may do what, and what outlives a restart."""

import json
import shlex
import subprocess
import urllib.error
import urllib.request
from typing import Any

import openai
import pytest

from tests.deploy.conftest import READY_SECONDS, Deployment
from tests.deploy.engine import Engine


def test_first_answer_through_openais_client(deployment: Deployment) -> None:
    """The demo model is there, and writes English with the key that the first start made."""
    client = deployment.client
    assert [model.id for model in client.models.list()] == ["demo"]
    answer = client.completions.create(model="demo", prompt="The capital of France is", max_tokens=8, temperature=0)
    assert "Paris" in answer.choices[0].text
    words = client.chat.completions.create(
        model="demo",
        messages=[{"role": "user", "content": "Tell a long story."}],
        max_tokens=12,
        temperature=0,
        stream=True,
    )
    assert sum(1 for chunk in words if chunk.choices and chunk.choices[0].delta.content) > 3


def test_nobody_gets_in_without_the_key(deployment: Deployment) -> None:
    """No key and a wrong one are refused; probes and metrics ask for none."""
    for key in ("", "ob-wrong"):
        client = openai.OpenAI(base_url=f"{deployment.url}/v1", api_key=key or "x", max_retries=0)
        with pytest.raises(openai.AuthenticationError):
            client.models.list()
    for path in ("/health/live", "/health/ready", "/metrics"):
        with urllib.request.urlopen(deployment.url + path, timeout=30) as answer:
            assert answer.status == 200


def test_key_is_in_no_log_and_where_no_server_sees_it(deployment: Deployment, engine: Engine) -> None:
    """Not in what any container wrote, not in its environment, not in a file of the server's."""
    for service in ("first-start", "server", "prometheus"):
        name = deployment.compose.container(service)
        assert deployment.key not in engine.logs(name)
        assert deployment.key not in engine.podman("inspect", name)
    found = engine.podman(
        "exec", deployment.compose.container("server"), "sh", "-c", "cat /keys/*; ls /first-key 2>&1", check=False
    )
    assert "sha256" in found
    assert deployment.key not in found


def test_server_is_confined(deployment: Deployment, engine: Engine) -> None:
    """User 10001, no capability, no new privileges, a root that cannot be written."""
    look = "id -u; grep -E '^(CapEff|NoNewPrivs)' /proc/1/status; touch /opt/x 2>&1"
    seen = engine.podman("exec", deployment.compose.container("server"), "sh", "-c", look, check=False)
    assert seen.split()[:5] == ["10001", "CapEff:", "0000000000000000", "NoNewPrivs:", "1"]
    assert "Read-only file system" in seen


def test_prometheus_reaches_the_server_and_nothing_outside(deployment: Deployment, engine: Engine) -> None:
    """It finds the server by its alias; its network has no route out."""
    name = deployment.compose.container("prometheus")
    assert engine.succeeds("exec", name, "promtool", "query", "instant", "http://127.0.0.1:9090", 'up{job="onebit"}')
    routes = engine.podman("exec", name, "cat", "/proc/net/route").splitlines()[1:]
    assert not [line for line in routes if line.split()[1] == "00000000"]


def test_live_metrics_are_as_promtool_wants_them(deployment: Deployment) -> None:
    """`promtool check metrics` has nothing to say against the page."""
    with urllib.request.urlopen(deployment.url + "/metrics", timeout=30) as answer:
        page = answer.read()
    done = subprocess.run(["promtool", "check", "metrics"], input=page, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr.decode() + done.stdout.decode()


def test_a_killed_server_comes_back_with_its_model_and_the_same_key(deployment: Deployment, engine: Engine) -> None:
    """What matters is in volumes: after a kill -9 and a new start, the old key gets the same answer."""
    prompt = {"model": "demo", "prompt": "Water boils at", "max_tokens": 6, "temperature": 0}
    before = deployment.client.completions.create(**prompt).choices[0].text
    engine.podman("kill", "--signal", "KILL", deployment.compose.container("server"))
    engine.podman("wait", deployment.compose.container("server"), check=False)
    deployment.compose.start("server", seconds=READY_SECONDS)
    assert deployment.client.completions.create(**prompt).choices[0].text == before


def test_a_job_in_postgres_is_done_by_the_workers_container(deployment: Deployment, engine: Engine) -> None:
    """Profile postgres: the same server, its jobs in the database, one job run to its end beside it, then served."""
    compose = deployment.compose.with_variables(ONEBIT_JOB_WORKER="false")
    compose.finish("database-secrets")
    compose.start("database", seconds=READY_SECONDS)
    engine.podman("rm", "--force", "--time", "60", compose.container("server"))
    compose.start("server", seconds=READY_SECONDS)
    compose.run("up", "--detach", "--no-build", "--no-deps", "worker")
    body = {"model": "/sources/llama", "method": "rtn", "settings": {"bits": 4}, "name": "by-worker", "load": True}
    worker = compose.container("worker")
    engine.wait_until("reaching the database", lambda: answers(deployment, "/admin/jobs"), READY_SECONDS, worker)
    job = ask(deployment, "/admin/quantize", body)
    engine.wait_until(
        "done with the job",
        lambda: ask(deployment, f"/admin/jobs/{job['id']}")["state"] not in ("queued", "running"),
        READY_SECONDS,
        worker,
    )
    ended = ask(deployment, f"/admin/jobs/{job['id']}")
    assert ended["state"] == "succeeded", f"{ended}\n{engine.logs(worker)}"
    count = "SELECT count(*) FROM dbos.workflow_status WHERE status = 'SUCCESS'"
    command = ["psql", "--host=127.0.0.1", "--username=onebit", "--tuples-only", "--command", count]
    password = "PGPASSWORD=$(cat /database-secrets/password) exec " + shlex.join(command)
    assert engine.podman("exec", compose.container("database"), "sh", "-c", password).strip() == "1"
    engine.wait_until("serving what was made", lambda: "by-worker" in names(deployment), READY_SECONDS, worker)


def asking(deployment: Deployment, path: str, content: bytes | None = None) -> urllib.request.Request:
    """A request to the admin API, with the key."""
    headers = {"Authorization": f"Bearer {deployment.key}", "Content-Type": "application/json"}
    return urllib.request.Request(deployment.url + path, content, headers)


def ask(deployment: Deployment, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
    """One request to the admin API."""
    content = None if body is None else json.dumps(body).encode()
    try:
        with urllib.request.urlopen(asking(deployment, path, content), timeout=60) as answer:
            found: dict[str, Any] = json.load(answer)
            return found
    except urllib.error.HTTPError as error:
        raise AssertionError(f"{path}: {error.code} {error.read().decode()}") from None


def answers(deployment: Deployment, path: str) -> bool:
    """Whether a route answers; those of jobs say 503 until the database is reached."""
    try:
        urllib.request.urlopen(asking(deployment, path), timeout=60).close()
    except urllib.error.HTTPError as error:
        if error.code != 503:
            raise
        return False
    return True


def names(deployment: Deployment) -> list[str]:
    """What the server serves."""
    return [model.id for model in deployment.client.models.list()]
