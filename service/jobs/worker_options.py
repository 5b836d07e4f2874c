"""How a worker is started and stopped: flags, variables, signals.

The flags are those of the server, and so are the variables (ONEBIT_ARTIFACT_ROOT, ONEBIT_JOBS_DATABASE_URL, ...), so a
pod of workers is configured like a pod of servers.
"""

import os
import select
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Literal, Self

from pydantic import Field, ValidationError, model_validator
from pydantic_settings import BaseSettings, CliApp, CliSuppress, SettingsConfigDict

from service.jobs.database import is_sqlite
from service.settings import ENVIRONMENT_PREFIX, flag_of


class WorkerOptions(BaseSettings):
    """Run compression jobs that servers queue, one at a time, where artifacts and sources are seen as they see them."""

    model_config = SettingsConfigDict(
        env_prefix=ENVIRONMENT_PREFIX,
        cli_prog_name="onebit-worker",
        cli_kebab_case=True,
        cli_implicit_flags=True,
        cli_hide_none_type=True,
        extra="forbid",
        frozen=True,
    )

    artifact_root: Path | None = Field(
        default=None, description="The servers' artifact root, under the same path, on a volume that both see."
    )
    jobs_database_url: str | None = Field(
        default=None,
        description="postgresql://... of the servers. One with a password belongs into the variable or the file.",
    )
    jobs_database_url_file: Path | None = Field(default=None, description="File that holds the URL.")
    job_worker_id: str | None = Field(
        default=None,
        pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$",
        description="Name of this worker, the same after each restart and nobody else's; by default the host's name, "
        "with -gpuN if gpu is given.",
    )
    gpu: int | None = Field(default=None, ge=0, description="The only GPU to use; start one worker for each.")
    device: str | None = Field(
        default=None,
        pattern=r"^(auto|cpu|cuda(:\d+)?)$",
        description="Where jobs run: auto, cpu, cuda or cuda:N; by default what the server that queued a job was told.",
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field(default="info", description="Least level.")
    supervised: CliSuppress[bool] = Field(
        default=False, description="Started by a server: the URL is on standard input, and its end is ours."
    )

    @model_validator(mode="after")
    def _check_together(self) -> Self:
        """Refuse a worker that would find no jobs, or nothing to do them with."""
        if self.supervised:
            return self
        if self.artifact_root is None or not self.artifact_root.is_dir():
            raise ValueError("--artifact-root: name the servers' folder of artifacts, which must exist here, too")
        if self.jobs_database_url_file is not None:
            try:
                self.jobs_database_url_file.read_text(encoding="utf-8")
            except (OSError, ValueError) as error:
                raise ValueError(f"--jobs-database-url-file: cannot be read: {error}") from None
        return self

    def database_url(self) -> str:
        """Find the jobs' database as the server does; a supervised worker is told it, once."""
        if self.supervised:
            return sys.stdin.readline().strip()
        file = self.jobs_database_url_file
        url = self.jobs_database_url or (file.read_text(encoding="utf-8").strip() if file is not None else "")
        assert self.artifact_root is not None
        return url or f"sqlite:///{self.artifact_root.resolve() / '.jobs' / 'jobs.db'}"


def worker_options(arguments: list[str]) -> WorkerOptions:
    """Read flags and variables.

    Raises:
        SystemExit: something is missing or cannot be meant; code 2, with one sentence.
    """
    try:
        return CliApp.run(WorkerOptions, cli_args=arguments)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        where = f"{flag_of(str(first['loc'][0]))}: " if first["loc"] else ""
        sys.stderr.write(f"error: {where}{first['msg'].removeprefix('Value error, ')}\n")
        sys.exit(2)


def executor_id(options: WorkerOptions, database_url: str, host: str) -> str:
    """Whose jobs this worker takes up again after a crash.

    A SQLite file belongs to one server, whatever its host is called today (a container's name changes at every start);
    a PostgreSQL database may be shared, so there the host's name tells workers apart, and the GPU those of one host.
    """
    base = "local" if is_sqlite(database_url) else host
    return options.job_worker_id or (base if options.gpu is None else f"{base}-gpu{options.gpu}")


def wait_for_end(file: int) -> Callable[[float], bool]:
    """Return a function that waits, and tells whether standard input has ended: our server is gone.

    Signals are not for us: Ctrl-C reaches the whole group, and the server decides when we end.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def wait(seconds: float) -> bool:
        readable, _, _ = select.select([file], [], [], seconds)
        return bool(readable) and not os.read(file, 4096)

    return wait


def wait_for_signal() -> Callable[[float], bool]:
    """Return a function that waits, and tells whether SIGTERM or Ctrl-C came."""
    ended = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: ended.set())
    return ended.wait
