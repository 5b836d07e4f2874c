"""Points 1 and 4: keys change without a restart, and are nowhere but with their owners."""

import http.client
import json
import time
import urllib.request
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path

import psutil
import pytest

from service.auth import Scope, add_key
from tests.support.raw_http import exchange, head, post
from tests.support.server_process import run_server_to_end, running_server

pytestmark = pytest.mark.acceptance

SHORT = {"model": "tiny", "prompt": "x", "max_tokens": 2, "temperature": 0}


def bearer(key):
    return f"authorization: Bearer {key}"


def listed(file):
    ended = run_server_to_end("keys", "list", "--file", str(file))
    assert ended.returncode == 0
    return ended.stdout.splitlines()


def made(*arguments):
    ended = run_server_to_end("keys", *arguments)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout.strip()


def test_a_key_is_rotated_under_a_running_server(tiny_artifact, tmp_path):
    """The new one works at once, the old one until the overlap is over; nobody restarts anything."""
    file = tmp_path / "keys.json"
    old = made("add", "--file", str(file), "--id", "alice", "--scope", "inference", "--requests-per-minute", "1000")
    file.chmod(0o640)
    with running_server(
        str(tiny_artifact), "--kv-cache-bytes", "8000000", "--keys-file", str(file), log_file=tmp_path / "log"
    ) as server:

        def status(key):
            return exchange(server.url, head("GET", "/v1/models", bearer(key))).status

        assert status(old) == 200
        new = made("rotate", "--file", str(file), "--id", "alice", "--overlap-seconds", "3600")
        assert (status(old), status(new)) == (200, 200)
        assert file.stat().st_mode & 0o777 == 0o640
        assert [line.split("\t")[:2] for line in listed(file)] == [["alice", "inference"]] * 2
        limits = [exchange(server.url, head("GET", "/v1/models", bearer(key))).headers for key in (old, new)]
        assert [told["x-ratelimit-limit-requests"] for told in limits] == ["1000", "1000"]
        left = [int(told["x-ratelimit-remaining-requests"]) for told in limits]
        assert left[1] < left[0], "the two keys of one id do not share their rate"
        document = json.loads(file.read_text())
        document["keys"][0]["expires"] = (datetime.now(UTC) - timedelta(seconds=1)).isoformat()
        file.write_text(json.dumps(document))  # the overlap is over
        assert (status(old), status(new)) == (401, 200)
        ended = exchange(server.url, head("GET", "/v1/models", bearer(old)))
        assert "expired" in ended.error["message"]
        made("remove", "--file", str(file), "--id", "alice")
        assert status(new) == 401


def words_of(process):
    """What `ps` and the environment tell of a process."""
    told = ""
    with suppress(psutil.Error, OSError):
        told += " ".join(process.cmdline()) + Path(f"/proc/{process.pid}/environ").read_text(errors="replace")
    return told


def test_keys_are_nowhere(tiny_artifact, tmp_path):
    """Not in the log, at its most talkative; not on /metrics, in answers, files, arguments or environments."""
    file, root = tmp_path / "keys.json", tmp_path / "root"
    root.mkdir()
    keys = [add_key(file, name, scopes) for name, scopes in (("a", frozenset(Scope)), ("b", {Scope.ADMIN}))]
    late = "ob-" + "L" * 43
    arguments = [str(tiny_artifact), "--kv-cache-bytes", "8000000", "--keys-file", str(file)]
    arguments += ["--artifact-root", str(root), "--log-level", "debug"]
    answers = []
    with running_server(*arguments, log_file=tmp_path / "log") as server:
        for key in (*keys, late):
            sends = [
                head("GET", "/v1/models", bearer(key)),
                head("GET", f"/v1/models?api_key={key}", bearer(key)),
                head("GET", "/admin/models", bearer(key), f"x-request-id: {key}"),
                head("GET", "/v1/models", f"authorization: Basic {key}", f"cookie: {key}"),
                post("/v1/completions", {**SHORT, "user": key}, bearer(key)),
                post("/v1/completions", {**SHORT, "max_tokens": key}, bearer(key)),
                post("/v1/completions", f'{{"{key}": '.encode(), bearer(key)),
                post("/admin/quantize", {"model": "none", "method": "rtn"}, bearer(key)),
                post("/admin/models/load", {"path": "none"}, bearer(key)),
                f"GET /v1/models HTTP/1.1\r\nhost: a\r\nauthorization: Bearer {key}\r\nbroken {key}\r\n\r\n".encode(),
            ]
            answers += [exchange(server.url, sent) for sent in sends]
        made("rotate", "--file", str(file), "--id", "a")
        file.write_text("{")
        answers.append(exchange(server.url, head("GET", "/v1/models", bearer(keys[0]))))
        processes = [psutil.Process(server.pid), *psutil.Process(server.pid).children(recursive=True)]
        places = {f"process {process.pid}": words_of(process) for process in processes}
        with urllib.request.urlopen(server.url + "/metrics") as page:
            places["metrics"] = page.read().decode()
    assert {answer.status for answer in answers} >= {200, 400, 401}
    assert all(answer.status < 500 for answer in answers), answers
    places |= {f"answer {number}": str(answer.headers) + answer.body.decode() for number, answer in enumerate(answers)}
    places |= {str(path): path.read_text(errors="replace") for path in tmp_path.rglob("*") if path.is_file()}
    assert str(tmp_path / "log") in places
    for key in keys:
        assert [place for place, text in places.items() if key in text] == []


def test_a_guess_takes_as_long_as_another(tiny_artifact, tmp_path):
    """A key that differs in its first character and one that differs in its last are refused equally fast."""
    file = tmp_path / "keys.json"
    key = add_key(file, "a", frozenset({Scope.INFERENCE}))
    near, far = key[:-1] + ("A" if key[-1] != "A" else "B"), "xx" + key[2:]
    with running_server(
        str(tiny_artifact), "--kv-cache-bytes", "8000000", "--keys-file", str(file), log_file=tmp_path / "log"
    ) as server:
        link = http.client.HTTPConnection(server.url.removeprefix("http://"))
        taken = {near: [], far: []}
        for _ in range(400):
            for guess, seconds in taken.items():
                started = time.perf_counter()
                link.request("GET", "/v1/models", headers={"authorization": f"Bearer {guess}"})
                answer = link.getresponse()
                assert json.loads(answer.read())["error"]["code"] == "invalid_api_key"
                seconds.append(time.perf_counter() - started)
        link.close()
    fastest = [sorted(seconds)[100] for seconds in taken.values()]  # a quartile, which neighbours disturb least
    assert max(fastest) / min(fastest) < 1.25, fastest
