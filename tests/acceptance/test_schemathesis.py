"""Requests nobody would think of: schemathesis makes them from /openapi.json, against the real server process.

Its four phases - the schema's examples, every boundary of every field (coverage), random valid and invalid data
(fuzzing), chains of calls (stateful) - must meet no 5xx, no body or status that the schema does not announce, and no
invalid request that is accepted. Random model names would all be 404, so the description it reads names ours.
"""

import json
import shutil
import subprocess
import sys
import urllib.request

import pytest

from service.auth import Scope, add_key
from tests.support.live_metrics import LiveMetrics
from tests.support.server_process import running_server, server_environment

pytestmark = [pytest.mark.acceptance, pytest.mark.soak]

CHECKS = (
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_schema_conformance",
    "negative_data_rejection",
    "missing_required_header",
    "ignored_auth",
)
"""Not `positive_data_acceptance`: whether a prompt fits into the context is no matter of a schema. Not
`unsupported_method`: DELETE /admin/models/load means a model named `load`, so the answer is a 404."""
SETTINGS = """
[checks.negative_data_rejection]
expected-statuses = [400, 401, 403, 404, 405, 406, 409, 413, 415, 422, 428, 429, 431, "5xx"]

# What the run itself has loaded under another name may be unloaded by it.
[[operations]]
include-path = "/admin/models/{name}"
include-method = "DELETE"
[operations.checks.negative_data_rejection]
expected-statuses = [200, 400, 401, 404, 409, 431]
"""
"""A path that is too long for the head is refused, too."""
EXAMPLES = 6
SOAK_SECONDS = 1200
AT_ONCE = 3
"""Runs side by side, with a seed each. Not threads of one run: where two of them parse source, as hypothesis does to
describe a strategy, Python 3.11 ends in a SystemError."""


@pytest.fixture
def server(tiny_artifact, tmp_path):
    """A server with keys, jobs and admin API, so that nothing announced is out of reach, and a model to unload."""
    key = add_key(tmp_path / "keys.json", "fuzz", frozenset(Scope))
    shutil.copytree(tiny_artifact, tmp_path / "root" / "spare")
    arguments = [str(tiny_artifact), "--kv-cache-bytes", "8000000", "--max-choices", "4"]
    arguments += ["--artifact-root", str(tmp_path / "root"), "--keys-file", str(tmp_path / "keys.json")]
    with running_server(*arguments, log_file=tmp_path / "log") as server:
        load = urllib.request.Request(server.url + "/admin/models/load", b'{"path": "spare", "name": "spare"}')
        load.add_header("authorization", f"Bearer {key}")
        load.add_header("content-type", "application/json")
        urllib.request.urlopen(load, timeout=120).close()
        yield server, key


def described(url):
    """Fetch /openapi.json, name the served model wherever inference wants one, and let only the spare be unloaded."""
    with urllib.request.urlopen(url + "/openapi.json") as answer:
        document = json.load(answer)
    ours, spare = ({"type": "string", "enum": [name]} for name in ("tiny", "spare"))
    document["paths"]["/admin/models/{name}"]["delete"]["parameters"][0]["schema"] = spare
    # Any name may be asked for: what the run itself makes an alias is served under it, be it "0".
    bodies = [name for name in document["components"]["schemas"] if name.endswith("Body") and "Quantize" not in name]
    for name in bodies:
        schema = document["components"]["schemas"][name]
        if "model" in schema["properties"]:
            is_required = "model" in schema.get("required", ())
            schema["properties"]["model"] = ours if is_required else {"anyOf": [ours, {"type": "null"}]}
    assert {"CompletionBody", "ChatBody"} <= set(bodies)
    return document


def run_at_once(commands, folder):
    """Run commands side by side; whatever happens, none is left over."""
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "cwd": folder, "env": server_environment()}
    runs = [subprocess.Popen(command, text=True, **options) for command in commands]
    try:
        return [(run, *run.communicate(timeout=3000)) for run in runs]
    finally:
        for run in runs:
            run.kill()
            run.wait()


def test_no_request_makes_the_server_fail(server, is_soak, soak_folder, tmp_path):
    """All phases, valid and invalid data; afterwards the engine has worked, is alive, and logged no error."""
    server, key = server
    schema = tmp_path / "openapi.json"
    schema.write_text(json.dumps(described(server.url)))
    settings = tmp_path / "schemathesis.toml"
    settings.write_text(SETTINGS)
    command = [sys.executable, "-m", "schemathesis.cli", "--config-file", str(settings)]
    command += ["run", str(schema), "--url", server.url]
    command += ["--phases", "examples,coverage,fuzzing,stateful", "--mode", "all", "--checks", ",".join(CHECKS)]
    command += ["--header", f"Authorization: Bearer {key}", "--continue-on-failure"]
    command += ["--request-timeout", "120", "--warnings", "off", "--generation-database", "none"]
    if is_soak:
        command += ["--max-time", str(SOAK_SECONDS), "--max-examples", "200", "--report", "junit,html"]
        folder = soak_folder / "schemathesis"
        commands = [[*command, "--seed", f"{n}", "--report-dir", str(folder / f"{n}")] for n in range(AT_ONCE)]
    else:
        commands = [[*command, "--seed", "1", "--max-examples", str(EXAMPLES), "--no-shrink"]]
    for run, out, err in run_at_once(commands, tmp_path):
        assert run.returncode == 0, out[-12000:] + err[-2000:]
    assert server.status("/health/ready") == 200
    metrics = LiveMetrics(server.url)
    assert metrics.total("onebit_request_success_total", finished_reason="length") > 0
    assert metrics.total("onebit_kv_cache_usage_ratio") == 0
    assert [line for line in server.log() if line["level"] == "error"] == []
