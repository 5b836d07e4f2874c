"""The server as a process: refusals at start, readiness, clients that leave, signals, a loaded /metrics."""

import http.client
import json
import shutil
import signal
import socket
import subprocess
import threading
import time
import urllib.request

import openai
import pytest

from service.auth import Scope, add_key
from tests.support.server_process import run_server_to_end, running_server

pytestmark = pytest.mark.acceptance

SMALL = ("--kv-cache-bytes", "8000000")
LONG = {"model": "tiny", "prompt": "x", "max_tokens": 500, "ignore_eos": True, "temperature": 0}


@pytest.fixture(scope="module")
def server(tiny_artifact, tmp_path_factory):
    with running_server(str(tiny_artifact), *SMALL, log_file=tmp_path_factory.mktemp("server") / "log") as server:
        yield server


def refused(*arguments, **environment):
    """Run the server, which must end with code 2 and one line; returns the line."""
    ended = run_server_to_end(*arguments, **environment)
    assert ended.returncode == 2, ended.stderr
    lines = [line for line in ended.stderr.splitlines() if not line.startswith("{")]
    assert len(lines) == 1, ended.stderr
    assert lines[0].startswith("error: ")
    return lines[0]


def test_settings_that_cannot_be_meant_end_the_server_with_code_2(tmp_path):
    """Nothing to serve, an open address without keys, no such artifact, no such key file: one sentence each."""
    assert "nothing to serve" in refused()
    assert "keys_file" in refused("a", "--host", "0.0.0.0")
    assert "artifact" in refused(str(tmp_path / "none"))
    assert "keys.json" in refused("--artifact-root", str(tmp_path), "--keys-file", str(tmp_path / "keys.json"))
    assert run_server_to_end("a", "--nonsense").returncode == 2


def test_a_damaged_artifact_ends_the_server_with_code_2(tiny_artifact, tmp_path):
    """Weights that are not what the manifest says are found when the engine loads them."""
    damaged = tmp_path / "damaged"
    shutil.copytree(tiny_artifact, damaged)
    weights = bytearray((damaged / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (damaged / "model.safetensors").write_bytes(weights)
    assert "hash" in refused(str(damaged), *SMALL, "--port", "0")


def test_a_taken_port_ends_the_server_with_code_2(tiny_artifact):
    """The sentence names the port."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        assert port in refused(str(tiny_artifact), "--port", port)


def test_keys_are_made_listed_and_removed(tmp_path):
    """The key is printed once, alone on standard output."""
    file = str(tmp_path / "keys.json")
    made = run_server_to_end("keys", "add", "--file", file, "--id", "alice", "--scope", "inference", "--scope", "admin")
    assert made.returncode == 0
    assert made.stdout.startswith("ob-")
    assert made.stdout.strip() not in (tmp_path / "keys.json").read_text()
    assert run_server_to_end("keys", "list", "--file", file).stdout == "alice\tadmin,inference\n"
    assert run_server_to_end("keys", "remove", "--file", file, "--id", "alice").returncode == 0
    assert run_server_to_end("keys", "list", "--file", file).stdout == ""
    assert "no key with id" in refused("keys", "remove", "--file", file, "--id", "alice")


def test_a_server_with_keys_asks_for_them(tiny_artifact, tmp_path):
    """Scopes hold over real HTTP; a new key works and a removed one stops working without a restart."""
    file = tmp_path / "keys.json"
    keys = {scope: add_key(file, scope.value, frozenset({scope})) for scope in Scope}
    arguments = (str(tiny_artifact), *SMALL, "--keys-file", str(file))
    with running_server(*arguments, log_file=tmp_path / "log") as server:

        def client(key):
            return openai.OpenAI(base_url=server.url + "/v1", api_key=key, max_retries=0)

        assert client(keys[Scope.INFERENCE]).models.list().data
        with pytest.raises(openai.PermissionDeniedError):
            client(keys[Scope.ADMIN]).models.list()
        with pytest.raises(openai.AuthenticationError):
            client("ob-wrong").models.list()
        late = add_key(file, "late", frozenset({Scope.INFERENCE}))
        assert client(late).models.list().data
        log = (tmp_path / "log").read_text()
        page = urllib.request.urlopen(server.url + "/metrics").read().decode()
    for key in (*keys.values(), late):
        assert key not in log
        assert key not in page


def metric(server, name):
    """One sample of a live /metrics."""
    page = urllib.request.urlopen(server.url + "/metrics").read().decode()
    return next(float(line.split()[-1]) for line in page.splitlines() if line.startswith(name))


def wait_for(is_true, seconds=20.0):
    deadline = time.monotonic() + seconds
    while not is_true():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_ends_its_sequence(server, stream):
    """Closing the connection, in a stream or while waiting for a whole answer, frees the engine."""
    aborted = 'onebit_request_success_total{finished_reason="abort",model="tiny"}'
    before = metric(server, aborted)
    connection = http.client.HTTPConnection(server.url.removeprefix("http://"))
    body = json.dumps({**LONG, "n": 4, "stream": stream})
    connection.request("POST", "/v1/completions", body, {"content-type": "application/json"})
    wait_for(lambda: metric(server, "onebit_requests_running") == 4)
    if stream:
        assert connection.getresponse().read(10)
    connection.sock.close()
    connection.close()
    wait_for(lambda: metric(server, "onebit_requests_running") == 0)
    wait_for(lambda: metric(server, aborted) == before + 4)
    assert metric(server, "onebit_kv_cache_usage_ratio") == 0


def test_promtool_accepts_the_metrics_of_a_loaded_server(server):
    """Prometheus' own checker has nothing to say about a page with traffic on it."""
    promtool = shutil.which("promtool")
    if promtool is None:
        pytest.skip("promtool is not installed (Debian package prometheus)")
    client = openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0)
    client.completions.create(model="tiny", prompt="x", max_tokens=4)
    page = urllib.request.urlopen(server.url + "/metrics").read()
    assert b"onebit_artifact_info{" in page
    assert b'onebit_iteration_tokens_count{model="tiny"}' in page
    checked = subprocess.run([promtool, "check", "metrics"], input=page, capture_output=True, check=False)
    assert (checked.returncode, checked.stdout, checked.stderr) == (0, b"", b"")


def test_sigterm_ends_streams_with_an_event_and_the_server_with_code_0(tiny_artifact, tmp_path):
    """Within the grace period running streams get an error event and [DONE], and nothing is left running."""
    arguments = (str(tiny_artifact), *SMALL, "--shutdown-grace-seconds", "3", "--max-num-sequences", "2")
    received = []
    with running_server(*arguments, log_file=tmp_path / "log") as server:
        connection = http.client.HTTPConnection(server.url.removeprefix("http://"), timeout=30)
        body = json.dumps({**LONG, "n": 100, "stream": True})
        connection.request("POST", "/v1/completions", body, {"content-type": "application/json"})
        response = connection.getresponse()
        reader = threading.Thread(target=lambda: received.append(response.read()))
        reader.start()
        time.sleep(0.2)
        started = time.monotonic()
        assert server.stop(signal.SIGTERM) == 0
        assert time.monotonic() - started < 8
        reader.join(10)
    frames = received[0].decode().strip().split("\n\n")
    assert frames[-1] == "data: [DONE]"
    last = json.loads(frames[-2].removeprefix("data: "))
    assert last.get("error", {}).get("code") == "shutting_down" or len(frames) > 100
