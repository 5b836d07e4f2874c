"""The jobs' client over a real SQLite database, with nobody to run the jobs."""

import asyncio

import pytest

from service.errors import Conflict, JobNotFound, JobsUnavailable
from service.jobs.client import JobClient
from service.jobs.fence import fenced
from service.jobs.idempotency import IdempotencyKey, new_job_id
from service.jobs.types import JobFilter, JobSpec, JobState
from service.metrics import Metrics


def spec(name: str = "small", *, load: bool = False, folder: str = "/f", **changes) -> JobSpec:
    config = {"model": "/m", "method": "rtn", "device": "cpu"}
    return JobSpec(
        name=name, artifact=f"/a/{name}", folder=folder, config=config, evaluation=None, load=load, **changes
    )


async def submit(client, *arguments, **changes):
    """Queue a job and return it."""
    return (await client.submit(new_job_id(), spec(*arguments, **changes)))[0]


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
        first = await submit(client, "one")
        second = await submit(client, "two")
        assert first.state is JobState.QUEUED
        assert (first.name, first.method, first.model, first.artifact, first.error) == ("one", "rtn", "/m", None, None)
        assert await client.get(first.id) == first
        assert {job.id for job in await client.list_jobs()} == {first.id, second.id}

    with_client(tmp_path, story)


def test_one_job_at_a_time_makes_a_name(tmp_path):
    """A second job of a name conflicts until the first has ended."""

    async def story(client):
        job = await submit(client)
        with pytest.raises(Conflict):
            await submit(client)
        await client.cancel(job.id)
        await submit(client)

    with_client(tmp_path, story)


def test_cancelling_twice_is_harmless(tmp_path):
    """A queued job is cancelled at once and stays so."""

    async def story(client):
        job = await submit(client)
        assert (await client.cancel(job.id)).state is JobState.CANCELLED
        assert (await client.cancel(job.id)).state is JobState.CANCELLED

    with_client(tmp_path, story)


def test_an_unknown_job_is_not_found(tmp_path):
    """Reading or cancelling what is not there is a 404."""

    async def story(client):
        for act in (client.get, client.cancel, client.resume, client.delete):
            for job_id in ("job-none", "job-" + "0" * 32, "a\x00b", ""):
                with pytest.raises(JobNotFound):
                    await act(job_id)

    with_client(tmp_path, story)


def test_jobs_are_counted_by_state(tmp_path):
    """The gauges show every state, and the worker's last sign of life."""

    async def story(client):
        metrics = Metrics()
        await submit(client, "one")
        await client.cancel((await submit(client, "two")).id)
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


def test_a_key_makes_one_job(tmp_path):
    """However many post it at once; another body under it is refused, and says which key."""
    key = IdempotencyKey(key="order-7", request_sha256="a")

    async def story(client):
        made = await asyncio.gather(*(client.submit(key.job_id, spec(), key) for _ in range(50)))
        assert {job.id for job, _ in made} == {key.job_id}
        assert sum(is_new for _, is_new in made) == 1
        assert len(await client.list_jobs()) == 1
        other = IdempotencyKey(key="order-7", request_sha256="b")
        with pytest.raises(Conflict, match="order-7"):
            await client.submit(other.job_id, spec("other"), other)
        with pytest.raises(Conflict, match="order-7"):
            await client.find(other)
        second = IdempotencyKey(key="order-8", request_sha256="a")
        assert await client.find(second) is None
        with pytest.raises(Conflict, match="under way"):
            await client.submit(second.job_id, spec(), second)

    with_client(tmp_path, story)


def test_jobs_are_listed_in_pages(tmp_path):
    """By state, method, model and name of the one before; an unknown one to begin after is a 404."""

    async def story(client):
        jobs = [await submit(client, f"job{number}") for number in range(5)]
        await client.cancel(jobs[1].id)
        newest_first = [job.id for job in reversed(jobs)]
        first, has_more = await client.select_jobs(JobFilter(limit=2))
        assert ([job.id for job in first], has_more) == (newest_first[:2], True)
        rest, has_more = await client.select_jobs(JobFilter(limit=3, after=first[-1].id))
        assert ([job.id for job in rest], has_more) == (newest_first[2:], False)
        cancelled, _ = await client.select_jobs(JobFilter(state=JobState.CANCELLED))
        assert [job.id for job in cancelled] == [jobs[1].id]
        for wanted, count in (
            (JobFilter(method="rtn", model="m"), 5),
            (JobFilter(method="gptq"), 0),
            (JobFilter(model="/m"), 5),
            (JobFilter(model="x"), 0),
        ):
            assert len((await client.select_jobs(wanted))[0]) == count
        with pytest.raises(JobNotFound):
            await client.select_jobs(JobFilter(after="job-" + "0" * 32))

    with_client(tmp_path, story)


def test_a_cancelled_job_is_queued_again(tmp_path):
    """Unless another job took its name meanwhile; what has not ended cannot be resumed."""

    async def story(client):
        job = await submit(client)
        with pytest.raises(Conflict, match="queued"):
            await client.resume(job.id)
        await client.cancel(job.id)
        rival = await submit(client)
        with pytest.raises(Conflict, match="another job"):
            await client.resume(job.id)
        await client.cancel(rival.id)
        assert (await client.resume(job.id)).state is JobState.QUEUED

    with_client(tmp_path, story)


def test_a_job_that_ended_is_forgotten_with_its_folder(tmp_path):
    """Not before it ended, nor while its command still writes."""
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "log").write_text("x")

    async def story(client):
        job = await submit(client, folder=str(folder))
        with pytest.raises(Conflict, match="cancel it first"):
            await client.delete(job.id)
        await client.cancel(job.id)
        async with fenced(folder):
            with pytest.raises(Conflict, match="still ending"):
                await client.delete(job.id)
        await client.delete(job.id)
        assert not folder.exists()
        with pytest.raises(JobNotFound):
            await client.get(job.id)

    with_client(tmp_path, story)


def test_old_jobs_are_pruned(tmp_path):
    """Those that ended before the time, and no others."""

    async def story(client):
        ended, waiting = await submit(client, "one"), await submit(client, "two")
        ended = await client.cancel(ended.id)
        assert await client.prune(ended.updated - 1) == []
        assert await client.prune(ended.updated + 60) == [ended.id]
        assert [job.id for job in await client.list_jobs()] == [waiting.id]

    with_client(tmp_path, story)
