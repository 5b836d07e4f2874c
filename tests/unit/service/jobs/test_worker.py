"""Who is there to run jobs, whose jobs are abandoned, and how a worker is told what to do."""

import pytest

from service.jobs.database import connection_url
from service.jobs.measuring import Census, JobObserver
from service.jobs.presence import FilePresence
from service.jobs.recovery import Reaper, RunningJob
from service.jobs.worker_options import executor_id, worker_options
from service.metrics import Metrics


def test_a_lock_on_an_id_is_one_workers(tmp_path):
    """Held until it is left; others see who is there."""
    first, second = (FilePresence(tmp_path / "jobs.db", "local") for _ in range(2))
    assert first.take()
    assert first.take()
    assert not second.take()
    assert not second.is_gone("local")
    assert second.is_gone("other")
    first.leave()
    assert second.is_gone("local")
    assert second.take()


class Neighbours:
    """Presence of others as a test says."""

    def __init__(self, *gone: str) -> None:
        self.gone = set(gone)

    def take(self) -> bool:
        return True

    def keep(self) -> None:
        pass

    def is_gone(self, executor_id: str) -> bool:
        return executor_id in self.gone

    def leave(self) -> None:
        pass


def test_a_job_is_abandoned_at_the_second_look():
    """A worker that takes its lock again in time keeps its job."""
    neighbours = Neighbours("dead", "blinking")
    reaper = Reaper("us", neighbours, running_here={"ours"})
    running = [
        RunningJob(id="a", executor_id="dead"),
        RunningJob(id="b", executor_id="blinking"),
        RunningJob(id="c", executor_id="alive"),
        RunningJob(id="ours", executor_id="us"),
    ]
    assert reaper.abandoned(running) == set()
    neighbours.gone.remove("blinking")
    assert reaper.abandoned(running) == {"dead"}


def test_a_job_of_ours_that_nobody_runs_is_abandoned():
    """A record left by a run before this one; but never while we run something, for all our jobs would go back."""
    running_here = {"new"}
    reaper = Reaper("us", Neighbours(), running_here)
    running = [RunningJob(id="old", executor_id="us")]
    assert [reaper.abandoned(running) for _ in range(3)] == [set()] * 3
    running_here.clear()
    assert [reaper.abandoned(running) for _ in range(2)] == [set(), {"us"}]


def test_a_worker_is_configured_like_a_server(tmp_path, monkeypatch):
    """Flags, variables, a file for the URL; the id follows host and GPU, and a SQLite file has one worker."""
    for name in ("ARTIFACT_ROOT", "JOBS_DATABASE_URL", "JOBS_DATABASE_URL_FILE", "JOB_WORKER_ID", "GPU", "DEVICE"):
        monkeypatch.delenv(f"ONEBIT_{name}", raising=False)
    root = ["--artifact-root", str(tmp_path)]
    options = worker_options(root)
    assert options.database_url() == f"sqlite:///{tmp_path}/.jobs/jobs.db"
    assert executor_id(options, options.database_url(), "host") == "local"
    (tmp_path / "url").write_text("postgresql://db/onebit\n")
    monkeypatch.setenv("ONEBIT_JOBS_DATABASE_URL_FILE", str(tmp_path / "url"))
    monkeypatch.setenv("ONEBIT_GPU", "1")
    options = worker_options(root)
    assert options.database_url() == "postgresql://db/onebit"
    assert executor_id(options, options.database_url(), "host") == "host-gpu1"
    options = worker_options([*root, "--job-worker-id", "pod-3"])
    assert executor_id(options, options.database_url(), "host") == "pod-3"


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["--artifact-root", "/none/such"],
        ["--artifact-root", "/", "--job-worker-id", "a b"],
        ["--artifact-root", "/", "--gpu", "x"],
        ["--artifact-root", "/", "--jobs-database-url-file", "/none/such"],
    ],
)
def test_what_a_worker_cannot_do_is_refused(arguments, monkeypatch, capsys):
    """With a sentence that names the flag."""
    for name in ("ARTIFACT_ROOT", "JOBS_DATABASE_URL", "JOBS_DATABASE_URL_FILE", "JOB_WORKER_ID", "GPU"):
        monkeypatch.delenv(f"ONEBIT_{name}", raising=False)
    with pytest.raises(SystemExit) as ended:
        worker_options(arguments)
    assert ended.value.code == 2
    assert "--" in capsys.readouterr().err.splitlines()[-1]


def test_a_silent_database_is_given_up_on():
    """Settings for it go into the URL, unless they are there; a file needs none."""
    assert connection_url("sqlite:////a/jobs.db") == "sqlite:////a/jobs.db"
    url = connection_url("postgresql://me:p%40ss@db/onebit?connect_timeout=60&sslmode=require")
    assert url.startswith("postgresql://me:p%40ss@db/onebit?")
    assert "connect_timeout=60" in url
    assert "tcp_user_timeout=10000" in url
    assert "sslmode=require" in url


class Record:
    """What DBOS says of a job that ran."""

    workflow_id = "job-1"
    attributes = error = input = None
    dequeued_at, completed_at = 1_000, 61_000

    def __init__(self, status: str, starts: int) -> None:
        self.status, self.recovery_attempts = status, starts
        self.output = {"artifact": "/a", "rejected": "too large"} if status == "SUCCESS" else None


def test_ends_and_recoveries_are_counted_once():
    """Those seen to happen; not what was over before this server's first look, nor again at each look."""
    metrics = Metrics()
    value = metrics.registry.get_sample_value

    def look(observer, *records):
        observer.publish(Census(statuses=list(records), running=[]), metrics.jobs)
        seconds = value("onebit_job_duration_seconds_sum", {"state": "rejected"})
        return value("onebit_job_recoveries_total"), seconds

    observer = JobObserver()
    assert look(observer, Record("PENDING", 1)) == (0, 0)
    assert look(observer, Record("PENDING", 3)) == (2, 0)
    assert look(observer, Record("SUCCESS", 3)) == (2, 60)
    assert look(observer, Record("SUCCESS", 3)) == (2, 60)
    assert look(JobObserver(), Record("SUCCESS", 3)) == (2, 60)
