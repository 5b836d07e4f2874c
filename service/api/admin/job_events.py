"""A job's progress as server-sent events.

    id: 9f86d081884c7d65
    event: progress            `end` for the last one: the job is in a final state
    data: {the job, as GET /admin/jobs/{id} answers it}

An event says where the job stands, not what changed, so nothing is lost by missing some. Its id is a hash of what it
says: a client that comes back with Last-Event-ID gets an event when there is something it has not seen. While nothing
changes a comment goes out now and then, so that proxies keep the connection and a client that has gone is noticed. The
stream stays open while the database does not answer, and says so in comments.
"""

import asyncio
import hashlib
from collections.abc import AsyncIterator

from service.api.admin.job_answers import JobAnswer
from service.errors import JobNotFound, JobsUnavailable
from service.jobs.client import JobClient
from service.jobs.types import Job

POLL_SECONDS = 0.5
KEEP_ALIVE_SECONDS = 10.0
NO_CACHE = {"cache-control": "no-cache", "x-accel-buffering": "no"}


async def job_events(jobs: JobClient, job: Job, last_seen: str | None) -> AsyncIterator[bytes]:
    """Yield an event for each change of a job, until it has ended or the server does.

    Args:
        jobs: where jobs are recorded.
        job: as it was found at the request.
        last_seen: id of the last event the client saw.
    """
    loop = asyncio.get_running_loop()
    quiet_since = loop.time()
    while not jobs.is_ending:
        text = JobAnswer.of(job).model_dump_json()
        mark = hashlib.sha256(text.encode()).hexdigest()[:16]
        if mark != last_seen or job.state.is_final:
            kind = "end" if job.state.is_final else "progress"
            yield f"id: {mark}\nevent: {kind}\ndata: {text}\n\n".encode()
            last_seen, quiet_since = mark, loop.time()
        if job.state.is_final:
            return
        await asyncio.sleep(POLL_SECONDS)
        try:
            job = await jobs.get(job.id)
        except JobNotFound:  # ended and deleted between two looks
            yield b": the job is on record no more\n\n"
            return
        except JobsUnavailable as error:
            yield f": {error.message}\n\n".encode()
            await asyncio.sleep(error.retry_after_seconds or POLL_SECONDS)
        if loop.time() - quiet_since > KEEP_ALIVE_SECONDS:
            yield b": still there\n\n"
            quiet_since = loop.time()
