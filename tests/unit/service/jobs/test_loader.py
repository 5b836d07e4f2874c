"""What a job made is served once, and the record says how that went."""

import asyncio
from contextlib import suppress
from pathlib import Path

from service.errors import Conflict
from service.jobs.loader import load_finished_jobs
from service.jobs.types import JobSpec


class FinishedJobs:
    """Three finished jobs that wait to be served."""

    def __init__(self) -> None:
        config = {"model": "/m", "method": "rtn", "device": "cpu"}
        self.waiting = {
            name: JobSpec(name=name, artifact=f"/a/{name}", folder="/f", config=config, evaluation=None, load=True)
            for name in ("odd", "taken", "good")
        }
        self.noted = {}
        self.all_noted = asyncio.Event()

    async def awaiting_load(self):
        return dict(self.waiting)

    async def note_loaded(self, job_id, error):
        del self.waiting[job_id]
        self.noted[job_id] = error
        if not self.waiting:
            self.all_noted.set()


def test_an_artifact_that_cannot_be_served_fails_its_own_job_only():
    """A refusal is told as it is, a bug by its kind; the next job is served all the same."""

    async def load(path, name):
        assert path == Path("/a") / name
        if name == "odd":
            raise TypeError("not a tokenizer")
        if name == "taken":
            raise Conflict("a model named 'taken' is already served")

    async def story():
        jobs = FinishedJobs()
        watcher = asyncio.create_task(load_finished_jobs(jobs, load))
        async with asyncio.timeout(20):
            await jobs.all_noted.wait()
        watcher.cancel()
        with suppress(asyncio.CancelledError):
            await watcher
        assert jobs.noted == {
            "odd": "TypeError: not a tokenizer",
            "taken": "a model named 'taken' is already served",
            "good": None,
        }

    asyncio.run(story())
