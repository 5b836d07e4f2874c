"""The processes: a database, servers behind nginx, workers; each can be killed and started again."""

import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil

from benchmarks.serving_bench.process import free_port
from tests.support.postgres import Postgres, find_postgres
from tests.support.server_process import ROOT, server_environment

STOP_SECONDS = 60.0
NGINX = """
worker_processes 1;
daemon off;
pid {folder}/nginx.pid;
error_log {folder}/nginx.log;
events {{ worker_connections 512; }}
http {{
  access_log off;
  client_body_temp_path {folder}/body; proxy_temp_path {folder}/proxy; fastcgi_temp_path {folder}/fastcgi;
  uwsgi_temp_path {folder}/uwsgi; scgi_temp_path {folder}/scgi;
  upstream onebit {{ {upstreams} }}
  server {{
    listen 127.0.0.1:{port};
    location / {{
      proxy_pass http://onebit;
      proxy_http_version 1.1;
      proxy_set_header Host 127.0.0.1;
      proxy_buffering off;
      proxy_connect_timeout 2s;
      proxy_read_timeout 120s;
      proxy_next_upstream error timeout http_503;
    }}
  }}
}}
"""


class Kept:
    """A process that is started again when it is dead, with its output in a file."""

    def __init__(self, name: str, command: list[str], folder: Path, **environment: str) -> None:
        self.name = name
        self.num_starts = 0
        self._command = command
        self._log = folder / f"{name}.log"
        self._environment = server_environment(**environment)
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def process(self) -> psutil.Process | None:
        """The live process, or None."""
        if self._process is None or self._process.poll() is not None:
            return None
        return psutil.Process(self._process.pid)

    def start(self) -> None:
        """Start it, unless it runs."""
        if self.process is None:
            with self._log.open("ab") as log:
                self._process = subprocess.Popen(
                    self._command, cwd=ROOT, env=self._environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log
                )
            self.num_starts += 1

    def kill(self, number: signal.Signals = signal.SIGKILL) -> None:
        """Send a signal, if it lives."""
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(number)

    def stop(self) -> None:
        """End it in order, or not."""
        self.kill(signal.SIGCONT)
        self.kill(signal.SIGTERM)
        if self._process is not None:
            try:
                self._process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()

    def children(self, word: str) -> list[psutil.Process]:
        """Return descendants whose command has a word in it."""
        found = []
        with suppress(psutil.Error):
            for child in self.process.children(recursive=True) if self.process is not None else []:
                with suppress(psutil.Error):
                    if word in " ".join(child.cmdline()):
                        found.append(child)
        return found


def _keep(kept: list[Kept], ended: threading.Event) -> None:
    """Look every second or two, and start what is not there: what a cluster does with pods that have ended."""
    while not ended.wait(random.uniform(0.5, 2.0)):
        for each in kept:
            each.start()


class Cluster:
    """All of it, under one folder.

    Attributes:
        url: where clients go.
        servers: behind nginx.
        workers: of jobs.
        database: PostgreSQL.
    """

    def __init__(self, folder: Path, artifact: Path, sources: Path, *, servers: int, workers: int) -> None:
        programs, nginx = find_postgres(), shutil.which("nginx", path=f"{os.environ['PATH']}:/usr/sbin")
        if programs is None or nginx is None:
            raise SystemExit("chaos needs PostgreSQL and nginx (Debian: apt-get install postgresql nginx-light)")
        self.root = folder / "artifacts"
        self.root.mkdir()
        files = folder / "database"
        files.mkdir()
        folder.chmod(0o755)
        self.database = Postgres(programs, files)
        self.database.create()
        database = {"ONEBIT_JOBS_DATABASE_URL": self.database.url, "ONEBIT_ARTIFACT_ROOT": str(self.root)}
        ports = [free_port() for _ in range(servers)]
        flags = ["--job-sources", str(sources), "--no-job-worker", "--job-max-crashes", "100000"]
        flags += ["--kv-cache-bytes", "8000000", "--max-model-len", "256", "--memory-check", "off"]
        self.servers = [
            Kept(
                f"server-{index}",
                [sys.executable, "-m", "service", str(artifact), "--port", str(port), *flags],
                folder,
                **database,
            )
            for index, port in enumerate(ports)
        ]
        worker = [sys.executable, "-m", "service.jobs.worker"]
        self.workers = [
            Kept(f"worker-{index}", [*worker, "--job-worker-id", f"worker-{index}"], folder, **database)
            for index in range(workers)
        ]
        port = free_port()
        self.url = f"http://127.0.0.1:{port}"
        (folder / "nginx.conf").write_text(
            NGINX.format(
                folder=folder,
                port=port,
                upstreams=" ".join(f"server 127.0.0.1:{each} max_fails=1 fail_timeout=1s;" for each in ports),
            )
        )
        self._nginx = Kept("nginx", [nginx, "-c", str(folder / "nginx.conf"), "-p", str(folder)], folder)

    @contextmanager
    def running(self) -> Iterator[None]:
        """Start everything, start again what ends, and end it all with the block."""
        self.database.start()
        kept = [self._nginx, *self.servers, *self.workers]
        ended = threading.Event()
        keeper = threading.Thread(target=_keep, args=(kept, ended))
        try:
            keeper.start()
            yield
        finally:
            ended.set()
            keeper.join()
            for each in reversed(kept):
                each.stop()
            with suppress(subprocess.CalledProcessError):
                self.database.stop("fast")

    def crash_database(self, seconds: float) -> None:
        """Kill the database and start it again after a while."""
        self.database.stop("immediate")
        time.sleep(seconds)
        self.database.start()
