"""Points 24 and 25: a server that is told to stop under load, and one that runs out of files and disk."""

import json
import resource
import shutil
import signal
import subprocess
import threading
import time
from contextlib import suppress

import psutil
import pytest

from tests.support.raw_http import connect, exchange, head, post, read_answer
from tests.support.server_process import run_server_to_end, running_server

pytestmark = pytest.mark.acceptance

SMALL = ("--kv-cache-bytes", "8000000")
SHORT = {"model": "tiny", "prompt": "x", "max_tokens": 4, "temperature": 0}


def test_a_stop_under_load_cuts_nobody_off(tiny_artifact, tmp_path):
    """From SIGTERM on nobody is let in, whoever is in gets an answer to its end, and the server leaves with code 0."""
    ends = []
    body = {**SHORT, "max_tokens": 60, "ignore_eos": True, "stream": True}

    def ask_again_and_again(url, stopping):
        while not stopping.is_set():
            with suppress(OSError), connect(url) as link:
                link.sendall(post("/v1/completions", body))
                answer = read_answer(link)
                if answer.status:
                    ends.append((answer.status, answer.body[-14:]))

    with running_server(str(tiny_artifact), *SMALL, log_file=tmp_path / "log") as server:
        stopping = threading.Event()
        clients = [threading.Thread(target=ask_again_and_again, args=(server.url, stopping)) for _ in range(8)]
        for client in clients:
            client.start()
        while len(ends) < 16:
            time.sleep(0.05)
        children = psutil.Process(server.pid).children(recursive=True)
        started = time.monotonic()
        server.process.send_signal(signal.SIGTERM)
        time.sleep(0.3)
        assert server.status("/health/ready") in (0, 503)
        assert server.process.wait(40) == 0
        assert time.monotonic() - started < 30
        stopping.set()
        for client in clients:
            client.join()
        assert {status for status, _ in ends} <= {200, 503}
        assert all(end == b"data: [DONE]\n\n" for status, end in ends if status == 200)
        left = [child for child in psutil.wait_procs(children, timeout=5)[1] if child.is_running()]  # they follow it
        assert not [child for child in left if child.status() != psutil.STATUS_ZOMBIE]
        assert [line for line in server.log() if line["level"] == "error"] == []


def test_sixty_four_files_are_enough(tiny_artifact, tmp_path):
    """It says that it takes fewer connections then, and a hundred of them lock nobody out."""
    if shutil.which("prlimit") is None:
        pytest.skip("prlimit is not installed (util-linux)")
    under = ("prlimit", "--nofile=64:64", "--")
    with running_server(str(tiny_artifact), *SMALL, log_file=tmp_path / "log", under=under) as server:
        assert any("files may be open" in line["message"] for line in server.log())
        links = [connect(server.url) for _ in range(100)]
        for _ in range(5):
            assert exchange(server.url, post("/v1/completions", SHORT)).status == 200
        for link in links:
            link.close()
        assert exchange(server.url, head("GET", "/health/ready")).status == 200
        errors = [line["message"] for line in server.log() if line["level"] == "error"]
        assert all("socket.accept() out of system resource" in message for message in errors)  # many at once: it waits


def test_a_full_disk_stops_no_answer(tiny_artifact, tmp_path):
    """The server's files may not grow by a byte: inference goes on, job routes say so; with room again all is well."""
    root = tmp_path / "root"
    root.mkdir()
    arguments = (str(tiny_artifact), *SMALL, "--artifact-root", str(root))
    with running_server(*arguments, log_file=tmp_path / "log") as server:
        unlimited = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
        lines = len(server.log_file.read_text().splitlines())
        resource.prlimit(server.pid, resource.RLIMIT_FSIZE, (0, resource.RLIM_INFINITY))
        try:
            for _ in range(3):
                assert exchange(server.url, post("/v1/completions", SHORT)).status == 200
            job = exchange(server.url, post("/admin/quantize", {"model": str(root), "method": "rtn"}))
            assert 400 <= job.status <= 503
            assert job.error["message"]
            assert exchange(server.url, head("GET", "/health/ready")).status == 200
            assert len(server.log_file.read_text().splitlines()) == lines, "the disk was not full"
        finally:
            resource.prlimit(server.pid, resource.RLIMIT_FSIZE, unlimited)
        assert exchange(server.url, post("/v1/completions", SHORT)).status == 200
        assert exchange(server.url, head("GET", "/admin/jobs")).status == 200
        assert route_of_last_request(server) == "/admin/jobs"


def route_of_last_request(server, seconds=10.0):
    """What the last line of the log is about; a request's line may come a moment after its answer."""
    deadline = time.monotonic() + seconds
    while (last := json.loads(server.log_file.read_text().splitlines()[-1]))["message"] != "request":
        assert time.monotonic() < deadline, last
        time.sleep(0.05)
    return last["route"]


def test_a_read_only_disk_serves(tiny_artifact, tmp_path):
    """Without jobs nothing is written; with jobs the server says at start that there is no place for them."""
    root = tmp_path / "root"
    root.mkdir()
    mount = f"mount --bind {root} {root} && mount -o remount,bind,ro {root}"
    under = ("unshare", "-m", "sh", "-c", f'{mount} && exec "$@"', "sh")
    if shutil.which("unshare") is None or subprocess.run((*under, "true"), capture_output=True, check=False).returncode:
        pytest.skip("mounting is not permitted here")
    arguments = (str(tiny_artifact), *SMALL, "--artifact-root", str(root))
    with running_server(*arguments, "--no-jobs-enabled", log_file=tmp_path / "log", under=under) as server:
        assert exchange(server.url, post("/v1/completions", SHORT)).status == 200
    ended = run_server_to_end(*arguments, "--port", "0", under=under)
    assert ended.returncode == 2
    assert "jobs cannot be kept" in ended.stderr
