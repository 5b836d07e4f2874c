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
    command += ["--header", f"Authorization: Bearer {key}", "--seed", "1", "--continue-on-failure"]
    command += ["--request-timeout", "120", "--warnings", "off", "--generation-database", "none"]
    if is_soak:
        command += ["--max-time", str(SOAK_SECONDS), "--workers", "4", "--max-examples", "200"]
        command += ["--report", "junit,html", "--report-dir", str(soak_folder / "schemathesis")]
    else:
        command += ["--max-examples", str(EXAMPLES), "--no-shrink"]
    done = subprocess.run(
        command, cwd=tmp_path, env=server_environment(), capture_output=True, text=True, timeout=3000, check=False
    )
    assert done.returncode == 0, done.stdout[-12000:] + done.stderr[-2000:]
    assert server.status("/health/ready") == 200
    metrics = LiveMetrics(server.url)
    assert metrics.total("onebit_request_success_total", finished_reason="length") > 0
    assert metrics.total("onebit_kv_cache_usage_ratio") == 0
    assert [line for line in server.log() if line["level"] == "error"] == []
