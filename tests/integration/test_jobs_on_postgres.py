"""Several workers on a real PostgreSQL: hand-over, zombies, clashes of ids, a database that goes away."""

import asyncio
import signal
import subprocess
import sys
import time
from contextlib import ExitStack, contextmanager

import psycopg
import pytest
from dbos import DBOSClient

from onebit_core.artifact.identity import read_manifest
from onebit_core.pipeline.run import quantize_model
from service.errors import JobsUnavailable
from service.jobs.client import JobClient
from service.jobs.database import APPLICATION, SERIALIZER
from service.jobs.idempotency import new_job_id
from service.jobs.presence import presence_of
from service.jobs.types import JobSpec, JobState
from tests.support.admin import Admin, children_named
from tests.support.postgres import running_postgres
from tests.support.quantized import tiny_config
from tests.support.server_process import ROOT, running_server, server_environment
from tests.support.tiny_model import save_tiny_model

pytestmark = pytest.mark.integration

SECONDS = 300.0
LAYERS = 16


@pytest.fixture(scope="module")
def postgres():
    with running_postgres() as server:
        yield server


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """A job of many blocks."""
    model = save_tiny_model(tmp_path_factory.mktemp("model") / "slow", num_layers=LAYERS)
    return tiny_config(model, "gptq")


@pytest.fixture(scope="module")
def undisturbed(config, tmp_path_factory):
    """What every job here must make."""
    return read_manifest(quantize_model(config, tmp_path_factory.mktemp("undisturbed") / "artifact")).sha256


class Cluster:
    """Workers on one database and one folder, and a client.

    Attributes:
        workers: by executor id.
    """

    def __init__(self, url, root, config) -> None:
        self.url, self.root, self.config = url, root, config
        self.workers = {}
        self.client = JobClient(url)
        self.database = None
        (root / ".jobs").mkdir(parents=True)

    def start_worker(self, executor_id: str) -> subprocess.Popen:
        arguments = ["--artifact-root", str(self.root), "--job-worker-id", executor_id]
        environment = server_environment() | {"ONEBIT_JOBS_DATABASE_URL": self.url}
        with (self.root / f"{executor_id}.log").open("ab") as log:
            worker = subprocess.Popen(
                [sys.executable, "-m", "service.jobs.worker", *arguments],
                cwd=ROOT,
                env=environment,
                stdout=subprocess.DEVNULL,
                stderr=log,
            )
        self.workers[executor_id] = worker
        return worker

    async def connect(self) -> None:
        await self.client.start()
        self.database = DBOSClient(system_database_url=self.url, serializer=SERIALIZER, application_name=APPLICATION)

    async def submit(self, name: str, **changes) -> str:
        job_id = new_job_id()
        spec = JobSpec(
            name=name,
            artifact=str(self.root / name),
            folder=str(self.root / ".jobs" / job_id),
            config=self.config.to_dict(),
            evaluation=None,
            load=False,
            **changes,
        )
        await self.client.submit(job_id, spec)
        return job_id

    def record(self, job_id: str):
        """DBOS' own words."""
        return self.database.list_workflows(workflow_ids=[job_id])[0]

    async def wait(self, what: str, is_done) -> None:
        deadline = time.monotonic() + SECONDS
        while not await is_done():
            logs = "".join((self.root / f"{name}.log").read_text()[-1500:] for name in self.workers)
            assert time.monotonic() < deadline, f"{what}: {logs}"
            await asyncio.sleep(0.1)

    async def wait_for_blocks(self, job_id: str, blocks: int) -> None:
        async def is_reached():
            return (await self.client.get(job_id)).progress.blocks_completed >= blocks

        await self.wait(f"{blocks} blocks", is_reached)

    async def wait_for_end(self, job_id: str):
        async def has_ended():
            return (await self.client.get(job_id)).state.is_final

        await self.wait("end", has_ended)
        return await self.client.get(job_id)


@contextmanager
def running_cluster(url, root, config, *executor_ids):
    """Workers for the length of a block."""
    cluster = Cluster(url, root, config)
    with ExitStack() as stack:
        for executor_id in executor_ids:
            worker = cluster.start_worker(executor_id)
            stack.callback(worker.wait)
            stack.callback(worker.kill)
        yield cluster


def test_a_dead_workers_job_is_taken_over(postgres, config, undisturbed, tmp_path):
    """Within seconds, at the block it was at, with its place in the queue and its count of starts."""

    async def story(cluster):
        await cluster.connect()
        job_id = await cluster.submit("handed", priority=3)
        await cluster.wait_for_blocks(job_id, 3)
        before = cluster.record(job_id)
        blocks = {
            file: file.stat().st_mtime_ns for file in (tmp_path / ".jobs" / job_id / "work").glob("block_*.safetensors")
        }
        cluster.workers[before.executor_id].kill()
        killed = time.monotonic()

        async def is_taken():
            return cluster.record(job_id).executor_id != before.executor_id

        await cluster.wait("hand-over", is_taken)
        seconds = time.monotonic() - killed
        taken = cluster.record(job_id)
        # The contract of DBOS' private recovery: queue, place and name are kept, and starts are counted.
        assert (taken.queue_name, taken.priority, taken.recovery_attempts) == (before.queue_name, before.priority, 2)
        assert taken.deduplication_id == before.deduplication_id == "handed"
        await cluster.wait_for_blocks(job_id, 4)
        assert blocks.items() <= {file: file.stat().st_mtime_ns for file in blocks if file.exists()}.items()
        job = await cluster.wait_for_end(job_id)
        assert job.state is JobState.SUCCEEDED, job.error
        assert read_manifest(tmp_path / "handed").sha256 == undisturbed
        return seconds

    with running_cluster(postgres.url, tmp_path, config, "first", "second") as cluster:
        seconds = asyncio.run(story(cluster))
    print(f"taken over after {seconds:.1f} s")
    assert seconds < 30


def test_an_id_that_is_taken_is_refused(postgres, config, tmp_path):
    """The second worker of a name ends with a sentence; the first goes on."""

    async def story(cluster):
        await cluster.connect()
        await cluster.wait_for_end(await cluster.submit("before"))
        first = cluster.workers["only"]
        second = cluster.start_worker("only")
        assert await asyncio.to_thread(second.wait, 120) == 3
        assert "a worker with the id only runs already on this database" in (tmp_path / "only.log").read_text()
        assert first.poll() is None
        assert (await cluster.wait_for_end(await cluster.submit("after"))).state is JobState.SUCCEEDED

    with running_cluster(postgres.url, tmp_path, config, "only") as cluster:
        asyncio.run(story(cluster))


def test_a_zombie_overwrites_nothing(postgres, config, undisturbed, tmp_path):
    """A worker that sleeps, loses its session and its job, and wakes up again: its command is ended."""

    async def story(cluster):
        await cluster.connect()
        job_id = await cluster.submit("fenced")
        await cluster.wait_for_blocks(job_id, 2)
        owner = cluster.record(job_id).executor_id
        zombie = cluster.workers[owner]
        (command,) = [pid for pid in children_named(job_id, zombie.pid) if pid != zombie.pid]
        zombie.send_signal(signal.SIGSTOP)
        with psycopg.connect(postgres.url, autocommit=True) as database:  # what half a minute of silence does
            database.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
                "WHERE application_name LIKE 'onebit-worker %' AND pid <> pg_backend_pid()"
            )

        async def is_taken():
            record = cluster.record(job_id)
            return record.executor_id != owner and record.status == "PENDING" and children_named(job_id, 1) != [command]

        await cluster.wait("hand-over", is_taken)
        zombie.send_signal(signal.SIGCONT)
        job = await cluster.wait_for_end(job_id)
        assert job.state is JobState.SUCCEEDED, job.error
        assert read_manifest(tmp_path / "fenced").sha256 == undisturbed
        assert cluster.record(job_id).executor_id != owner
        assert command not in children_named(job_id, 1)
        assert (await cluster.wait_for_end(await cluster.submit("next"))).state is JobState.SUCCEEDED

    with running_cluster(postgres.url, tmp_path, config, "asleep", "awake") as cluster:
        asyncio.run(story(cluster))


def test_a_database_that_goes_away_loses_nothing(postgres, config, undisturbed, tmp_path):
    """A job goes on behind it; who asks meanwhile is told at once; nothing is to be done when it is back."""

    async def story(cluster):
        await cluster.connect()
        job_id = await cluster.submit("patient")
        await cluster.wait_for_blocks(job_id, 2)
        await asyncio.to_thread(postgres.stop)
        for _ in range(3):
            began = time.monotonic()
            with pytest.raises(JobsUnavailable) as refused:
                await cluster.client.get(job_id)
            assert refused.value.retry_after_seconds
            assert time.monotonic() - began < 20
            await asyncio.sleep(1)
        await asyncio.to_thread(postgres.start)
        job = await cluster.wait_for_end(job_id)
        assert job.state is JobState.SUCCEEDED, job.error
        assert read_manifest(tmp_path / "patient").sha256 == undisturbed
        assert cluster.record(job_id).recovery_attempts == 1

    with running_cluster(postgres.url, tmp_path, config, "alone") as cluster:
        asyncio.run(story(cluster))


def test_only_job_routes_miss_the_database(postgres, tmp_path):
    """503 with a time to come back; everything else answers; a server may even be started without it."""
    arguments = ("--artifact-root", str(tmp_path), "--no-job-worker", "--jobs-database-url", postgres.url)
    postgres.stop()
    with running_server(*arguments, log_file=tmp_path / "log") as server:
        admin = Admin(server.url)
        status, answer = admin.call("GET", "/admin/jobs")
        assert (status, answer["error"]["code"]) == (503, "jobs_unavailable")
        assert admin.call("GET", "/v1/models")[0] == 200
        assert server.status("/health/ready") == 200
        assert server.status("/metrics") == 200
        postgres.start()
        deadline = time.monotonic() + 60
        while admin.call("GET", "/admin/jobs")[0] != 200:
            assert time.monotonic() < deadline
            time.sleep(0.5)
        postgres.stop()
        assert admin.call("GET", "/admin/jobs")[0] == 503
        assert server.status("/health/ready") == 200
        postgres.start()
        assert admin.call("GET", "/admin/jobs")[0] == 200


def test_a_database_that_knows_no_encoding_serves(postgres):
    """What initdb makes where no locale is set; psycopg would return its text as bytes."""
    name = "plain"
    with psycopg.connect(postgres.url, autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name} ENCODING 'SQL_ASCII' LOCALE 'C' TEMPLATE template0")
    url = f"{postgres.url.rpartition('/')[0]}/{name}"
    presence = presence_of(url, "one")
    assert presence.take()
    presence.leave()

    async def submitted():
        client = JobClient(url)
        await client.start()
        job_id = new_job_id()
        config = tiny_config("größe", "gptq").to_dict()
        spec = JobSpec(name="größe", artifact="größe", folder=job_id, config=config, evaluation=None, load=False)
        await client.submit(job_id, spec)
        job = await client.get(job_id)
        await client.stop()
        return job

    assert asyncio.run(submitted()).name == "größe"
