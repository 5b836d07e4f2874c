"""The admin API of a running server as tests use it, and the processes below that server."""

import json
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.support.server_process import ServerProcess, running_server
from tests.support.tiny_model import save_tiny_model

SECONDS = 300.0
SMALL = {"samples": 2, "tokens": 32, "text": ["text.txt"]}


def save_job_sources(folder: Path, slow_layers: int = 48) -> Path:
    """Fill a folder that jobs may read: a tiny model, a slow one (many blocks), two texts."""
    save_tiny_model(folder / "tiny")
    save_tiny_model(folder / "slow", num_layers=slow_layers)
    (folder / "text.txt").write_text("The quick brown fox jumps over the lazy dog. " * 200)
    (folder / "heldout.txt").write_text("Pack my box with five dozen liquor jugs. " * 200)
    return folder


@contextmanager
def job_server(folder: Path, sources: Path) -> Iterator[ServerProcess]:
    """Run a server that takes jobs on `sources` and has its artifacts in folder/root."""
    arguments = ("--artifact-root", str(folder / "root"), "--job-sources", str(sources), "--kv-cache-bytes", "8000000")
    with running_server(*arguments, log_file=folder / "log") as server:
        yield server


class Admin:
    """The admin API of a server."""

    def __init__(self, url: str) -> None:
        self.url = url

    def call(self, method: str, path: str, body=None, **headers: str):
        """Return (status, answer)."""
        data = None if body is None else json.dumps(body).encode()
        headers = {"content-type": "application/json"} | {
            key.replace("_", "-"): value for key, value in headers.items()
        }
        request = urllib.request.Request(self.url + path, data=data, method=method, headers=headers)
        try:
            with urllib.request.urlopen(request, timeout=60) as response:
                return response.status, json.load(response)
        except urllib.error.HTTPError as error:
            return error.code, json.load(error)

    def submit(self, **body):
        """Launch a job."""
        status, job = self.call("POST", "/admin/quantize", body)
        assert status == 202, job
        return job["id"]

    def job(self, job_id):
        """Look at a job."""
        return self.call("GET", f"/admin/jobs/{job_id}")[1]

    def text(self, path: str, **headers: str) -> tuple[str, dict[str, str]]:
        """GET what is not JSON: (text, headers)."""
        headers = {key.replace("_", "-"): value for key, value in headers.items()}
        with urllib.request.urlopen(
            urllib.request.Request(self.url + path, headers=headers), timeout=SECONDS
        ) as answer:
            return answer.read().decode(), dict(answer.headers)

    def wait(self, job_id, is_reached):
        """Follow a job until it is as wanted; returns everything seen on the way."""
        deadline = time.monotonic() + SECONDS
        seen = [self.job(job_id)]
        while not is_reached(seen[-1]):
            assert time.monotonic() < deadline, seen[-1]
            time.sleep(0.2)
            seen.append(self.job(job_id))
        return seen


def has_ended(job) -> bool:
    """Whether a job is in a final state."""
    return job["state"] not in ("queued", "running")


def children_named(word: str, ancestor: int) -> list[int]:
    """Processes below `ancestor` (or anywhere, for 1) whose command line has the word."""
    found = []
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit():
            continue
        try:
            command = (folder / "cmdline").read_bytes().decode(errors="replace")
        except OSError:
            continue
        if word in command and ancestor in (1, *ancestors(int(folder.name))):
            found.append(int(folder.name))
    return found


def ancestors(pid: int) -> list[int]:
    """The parents of a process, nearest first."""
    chain = []
    while pid > 1:
        try:
            pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            break
        chain.append(pid)
    return chain
