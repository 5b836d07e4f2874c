"""The jobs' client over a real SQLite database, with nobody to run the jobs."""

import asyncio

import pytest

from service.errors import Conflict, JobNotFound, JobsUnavailable
from service.jobs.client import JobClient
from service.jobs.types import JobSpec, JobState
from service.metrics import Metrics


def spec(name: str = "small", *, load: bool = False) -> JobSpec:
    config = {"model": "/m", "method": "rtn", "device": "cpu"}
    return JobSpec(name=name, artifact=f"/a/{name}", folder="/f", config=config, evaluation=None, load=load)


def with_client(tmp_path, story):
    """Run a coroutine function with a connected client."""

    async def run():
        client = JobClient(f"sqlite:///{tmp_path / 'jobs' / 'jobs.db'}", lambda: 123.0)
        await client.start()
        try:
            await story(client)
        finally:
            await client.stop()

    asyncio.run(run())


def test_a_submitted_job_waits_in_the_queue(tmp_path):
    """It is found by its id and in the list, newest first."""

    async def story(client):
        first = await client.submit(spec("one"))
        second = await client.submit(spec("two"))
        assert first.state is JobState.QUEUED
        assert (first.name, first.method, first.model, first.artifact, first.error) == ("one", "rtn", "/m", None, None)
        assert await client.get(first.id) == first
        assert {job.id for job in await client.list_jobs()} == {first.id, second.id}

    with_client(tmp_path, story)


def test_one_job_at_a_time_makes_a_name(tmp_path):
    """A second job of a name conflicts until the first has ended."""

    async def story(client):
        job = await client.submit(spec())
        with pytest.raises(Conflict):
            await client.submit(spec())
        await client.cancel(job.id)
        await client.submit(spec())

    with_client(tmp_path, story)


def test_cancelling_twice_is_harmless(tmp_path):
    """A queued job is cancelled at once and stays so."""

    async def story(client):
        job = await client.submit(spec())
        assert (await client.cancel(job.id)).state is JobState.CANCELLED
        assert (await client.cancel(job.id)).state is JobState.CANCELLED

    with_client(tmp_path, story)


def test_an_unknown_job_is_not_found(tmp_path):
    """Reading or cancelling what is not there is a 404."""

    async def story(client):
        for act in (client.get, client.cancel):
            for job_id in ("job-none", "job-" + "0" * 32, "a\x00b", ""):
                with pytest.raises(JobNotFound):
                    await act(job_id)

    with_client(tmp_path, story)


def test_jobs_are_counted_by_state(tmp_path):
    """The gauges show every state, and the worker's last sign of life."""

    async def story(client):
        metrics = Metrics()
        await client.submit(spec("one"))
        await client.cancel((await client.submit(spec("two"))).id)
        await client.refresh_metrics(metrics.jobs)
        value = metrics.registry.get_sample_value
        assert value("onebit_jobs", {"state": "queued"}) == 1
        assert value("onebit_jobs", {"state": "cancelled"}) == 1
        assert value("onebit_jobs", {"state": "running"}) == 0
        assert value("onebit_worker_last_heartbeat_timestamp_seconds") == 123.0

    with_client(tmp_path, story)


def test_a_database_that_cannot_be_opened_is_unavailable(tmp_path):
    """The jobs are out of order, the server is not."""
    (tmp_path / "file").write_text("")

    async def story():
        with pytest.raises(JobsUnavailable):
            await JobClient(f"sqlite:////{tmp_path}/file/jobs.db").start()

    asyncio.run(story())
