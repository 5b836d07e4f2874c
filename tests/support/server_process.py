"""The real `onebit-serve` in a process of its own, on a free port, with the environment of a small machine."""

import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
START_SECONDS = 120.0
STOP_SECONDS = 45.0
SMALL_MACHINE = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive", "TOKENIZERS_PARALLELISM": "false"}


def server_environment(**extra: str) -> dict[str, str]:
    """The environment a server process gets: ours, without any setting of a server, and with the project importable."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("ONEBIT_")}
    path = os.pathsep.join(part for part in (str(ROOT), kept.get("PYTHONPATH", "")) if part)
    return {**kept, **SMALL_MACHINE, "PYTHONPATH": path, **extra}


class ServerProcess:
    """One running server.

    Attributes:
        url: where it listens, such as http://127.0.0.1:43211.
        process: the server's own process; its engines and its job worker are children of it.
        log_file: its standard error, one JSON object a line.
    """

    def __init__(self, process: subprocess.Popen[bytes], log_file: Path) -> None:
        self.process = process
        self.log_file = log_file
        self.url = ""

    @property
    def pid(self) -> int:
        return self.process.pid

    def log(self) -> list[dict[str, Any]]:
        """The log lines so far; a line that is not JSON fails here."""
        return [json.loads(line) for line in self._whole_lines()]

    def wait_for_url(self) -> None:
        """Wait until the log says where the server listens."""
        self._wait("listen", lambda: self._listens())

    def wait_until_ready(self) -> None:
        """Wait until every model is loaded."""
        self._wait("become ready", lambda: self.status("/health/ready") == 200)

    def status(self, path: str) -> int:
        """GET a path and return the status, 0 if there is no answer."""
        try:
            with urllib.request.urlopen(self.url + path, timeout=10) as response:
                return int(response.status)
        except urllib.error.HTTPError as error:
            return error.code
        except OSError:
            return 0

    def stop(self, number: signal.Signals = signal.SIGTERM) -> int:
        """End the server and return its exit code; one that does not end is killed and fails the test."""
        if self.process.poll() is None:
            self.process.send_signal(number)
        try:
            return self.process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            raise

    def _whole_lines(self) -> list[str]:
        """The lines of the log but one that is still being written."""
        return self.log_file.read_text().rpartition("\n")[0].splitlines()

    def _listens(self) -> bool:
        for line in self._whole_lines():
            if '"listening"' in line:
                self.url = json.loads(line)["url"]
        return bool(self.url)

    def _wait(self, what: str, is_done: Any) -> None:
        deadline = time.monotonic() + START_SECONDS
        while not is_done():
            tail = self.log_file.read_text()[-2000:]
            assert self.process.poll() is None, f"the server ended with {self.process.returncode}: {tail}"
            assert time.monotonic() < deadline, f"the server did not {what}: {tail}"
            time.sleep(0.05)


@contextmanager
def running_server(
    *arguments: str, log_file: Path, ready: bool = True, under: Sequence[str] = (), **environment: str
) -> Iterator[ServerProcess]:
    """Run `onebit-serve ARGUMENTS` on a free port until the block ends.

    Args:
        arguments: artifacts and flags; --port is given already.
        log_file: where its standard error goes.
        ready: whether to wait for its models.
        under: a command that runs the server's with less than it is used to, such as prlimit.
        environment: more variables.
    """
    command = [*under, sys.executable, "-m", "service", *arguments, "--port", "0"]
    with log_file.open("wb") as log:
        process = subprocess.Popen(command, cwd=ROOT, env=server_environment(**environment), stderr=log)
    server = ServerProcess(process, log_file)
    try:
        server.wait_for_url()
        if ready:
            server.wait_until_ready()
        yield server
    finally:
        server.stop()


def run_server_to_end(
    *arguments: str, under: Sequence[str] = (), **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run `onebit-serve ARGUMENTS` that is expected to end by itself."""
    command = [*under, sys.executable, "-m", "service", *arguments]
    variables = server_environment(**environment)
    return subprocess.run(command, cwd=ROOT, env=variables, capture_output=True, text=True, timeout=120, check=False)
