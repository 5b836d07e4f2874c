"""A server as a process of its own: started, paused while others are measured, ended with all its children.

A server that is not measured is stopped (SIGSTOP) with its whole process group: one that polls while idle would
otherwise take time from the others. Processor time and memory are those of the group: all its processes together.
"""

import contextlib
import os
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from pathlib import Path
from types import TracebackType
from typing import Self

import psutil

from benchmarks.serving_bench.contestants import Contestant
from benchmarks.serving_bench.load import Target

READY_SECONDS = 900.0
STOP_SECONDS = 30.0
LAST_LINES = 15


class ServerFailed(Exception):
    """A server ended, or was not ready in time; the text says why."""


class RunningServer:
    """One contestant, running from `with` to its end.

    Args:
        contestant: who.
        log_file: of everything it says.
    """

    def __init__(self, contestant: Contestant, log_file: Path) -> None:
        self.contestant = contestant
        self.log_file = log_file
        self._port = free_port()
        self.url = f"http://127.0.0.1:{self._port}"

    def __enter__(self) -> Self:
        """Start it; `wait_until_ready` is for the caller."""
        self.log_file.parent.mkdir(parents=True, exist_ok=True)
        with self.log_file.open("wb") as log:
            self._process = subprocess.Popen(
                [*self.contestant.command, "--port", str(self._port)],
                env={**os.environ, **self.contestant.environment},
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End it and everything it started."""
        self.resume()
        self._signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(STOP_SECONDS)
        self._signal(signal.SIGKILL)
        self._process.wait()

    @property
    def target(self) -> Target:
        """Where and how to ask it."""
        return Target(url=f"{self.url}/v1/completions", model=self.contestant.model, extra=dict(self.contestant.extra))

    def wait_until_ready(self) -> None:
        """Wait for its model.

        Raises:
            ServerFailed: it ended, or takes too long.
        """
        deadline = time.monotonic() + READY_SECONDS
        while not self._is_ready():
            if self._process.poll() is not None:
                raise ServerFailed(f"it ended with {self._process.returncode}:\n{self._last_words()}")
            if time.monotonic() > deadline:
                raise ServerFailed(f"it was not ready after {READY_SECONDS:.0f} s:\n{self._last_words()}")
            time.sleep(0.5)

    def pause(self) -> None:
        """Let it do nothing at all until `resume`."""
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Let it go on."""
        self._signal(signal.SIGCONT)

    def cpu_seconds(self) -> float:
        """Return the processor time that its processes have used."""
        return sum(sum(process.cpu_times()[:2]) for process in self._processes())

    def memory_mib(self) -> float:
        """Return the memory of its processes; what they share counts once."""
        total = 0
        for process in self._processes():
            with contextlib.suppress(psutil.Error):
                total += process.memory_full_info().pss
        return total / (1 << 20)

    def _processes(self) -> list[psutil.Process]:
        main = psutil.Process(self._process.pid)
        return [main, *main.children(recursive=True)]

    def _is_ready(self) -> bool:
        try:
            with urllib.request.urlopen(self.url + self.contestant.ready, timeout=5) as answer:
                return bool(answer.status == 200)
        except (urllib.error.URLError, OSError):
            return False

    def _signal(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, number)

    def _last_words(self) -> str:
        return "\n".join(self.log_file.read_text(errors="replace").splitlines()[-LAST_LINES:])


def free_port() -> int:
    """Return a port of this machine that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
