"""Launch, follow, cancel, resume and delete compression jobs."""

import asyncio
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, Header, Query, Request, Response, Security
from fastapi.responses import StreamingResponse

from service.api.admin.job_answers import JobAnswer, JobDeleted, JobList
from service.api.admin.job_events import NO_CACHE, job_events
from service.api.admin.schemas import QuantizeBody
from service.api.dependencies import JobsDep, SettingsDep
from service.api.errors import declared_errors
from service.api.guard import BEARER, AdminRoute
from service.api.openapi import event_stream
from service.errors import Conflict
from service.jobs.idempotency import HEADER, new_job_id, read_key
from service.jobs.log_file import MAX_BYTES, MAX_LINES, read_log
from service.jobs.submission import plan_job
from service.jobs.types import MAX_LISTED, Job, JobFilter, JobState

router = APIRouter(
    prefix="/admin",
    tags=["jobs"],
    route_class=AdminRoute,
    dependencies=[Security(BEARER)],
    responses=declared_errors(401, 403, 500, 503),
)

PLAIN_TEXT: dict[int | str, dict[str, Any]] = {200: {"content": {"text/plain": {"schema": {"type": "string"}}}}}


@router.post(
    "/quantize",
    response_model=JobAnswer,
    status_code=202,
    responses={**declared_errors(400, 409, 413), 200: {"model": JobAnswer, "description": "The job of this key."}},
)
async def quantize(
    body: QuantizeBody,
    request: Request,
    response: Response,
    jobs: JobsDep,
    settings: SettingsDep,
    idempotency_key: Annotated[str | None, Header(description="Your name for this submission.")] = None,
) -> JobAnswer:
    """Queue a job that makes an artifact; follow it at /admin/jobs/{id}.

    With the header Idempotency-Key the same body gives the same job, however often it is posted, with status 200 once
    it is there.
    """
    del idempotency_key  # read below, each time it was sent
    key = read_key(request.headers.getlist(HEADER), body.model_dump(mode="json"))
    job: Job | None = await jobs.find(key) if key is not None else None
    if job is None:
        job_id = key.job_id if key is not None else new_job_id()
        try:
            spec = await asyncio.to_thread(partial(plan_job, job_id, body.submission(), settings))
            job, is_new = await jobs.submit(job_id, spec, key)
        except Conflict:  # with the very artifact of this key's job, perhaps
            job, is_new = await jobs.find(key) if key is not None else None, False
            if job is None:
                raise
        if is_new:
            return JobAnswer.of(job)
    response.status_code = 200
    return JobAnswer.of(job)


@router.get("/jobs", response_model=JobList, responses=declared_errors(400, 404))
async def list_jobs(
    jobs: JobsDep,
    state: JobState | None = None,
    method: Annotated[str | None, Query(max_length=64)] = None,
    model: Annotated[str | None, Query(max_length=4096, description="Its path, or the last part of it.")] = None,
    limit: Annotated[int, Query(ge=1, le=MAX_LISTED)] = MAX_LISTED,
    after: Annotated[str | None, Query(max_length=64, description="Id of a job: list older ones.")] = None,
) -> JobList:
    """List jobs, newest first."""
    wanted = JobFilter(state=state, method=method, model=model, limit=limit, after=after)
    found, has_more = await jobs.select_jobs(wanted)
    return JobList(data=[JobAnswer.of(job) for job in found], has_more=has_more)


@router.get("/jobs/{job_id}", response_model=JobAnswer, responses=declared_errors(404))
async def read_job(job_id: str, jobs: JobsDep) -> JobAnswer:
    """Describe one job: its state, block i of n, the error so far, and what it made."""
    return JobAnswer.of(await jobs.get(job_id))


@router.get(
    "/jobs/{job_id}/events",
    response_class=StreamingResponse,
    responses={**declared_errors(400, 404), **event_stream(JobAnswer, is_openai=False)},
)
async def follow_job(
    job_id: str, jobs: JobsDep, last_event_id: Annotated[str | None, Header(max_length=64)] = None
) -> StreamingResponse:
    """Follow a job as server-sent events, until it has ended."""
    events: AsyncIterator[bytes] = job_events(jobs, await jobs.get(job_id), last_event_id)
    return StreamingResponse(events, media_type="text/event-stream", headers=NO_CACHE)


@router.get("/jobs/{job_id}/log", response_class=Response, responses={**declared_errors(400, 404), **PLAIN_TEXT})
async def read_job_log(
    job_id: str,
    jobs: JobsDep,
    tail: Annotated[int | None, Query(ge=1, le=MAX_LINES, description="The last so many lines.")] = None,
    offset: Annotated[int | None, Query(ge=0, lt=1 << 62, description="Bytes from this one on.")] = None,
    limit: Annotated[int, Query(ge=1, le=MAX_BYTES, description="Bytes at most.")] = 1 << 16,
) -> Response:
    """Read a job's log, by default its end; x-next-offset says where to read on."""
    job = await jobs.get(job_id)
    part = await asyncio.to_thread(partial(read_log, Path(job.folder), tail=tail, offset=offset, limit=limit))
    headers = {"x-next-offset": str(part.next_offset), "x-log-size": str(part.size)}
    text = part.content.decode("utf-8", errors="replace")
    return Response(text, media_type="text/plain", headers=headers)


@router.post("/jobs/{job_id}/cancel", response_model=JobAnswer, responses=declared_errors(404, 409))
async def cancel_job(job_id: str, jobs: JobsDep) -> JobAnswer:
    """Cancel a queued or running job."""
    return JobAnswer.of(await jobs.cancel(job_id))


@router.post("/jobs/{job_id}/resume", response_model=JobAnswer, status_code=202, responses=declared_errors(404, 409))
async def resume_job(job_id: str, jobs: JobsDep) -> JobAnswer:
    """Queue a cancelled or failed job again; it goes on after its last finished block."""
    return JobAnswer.of(await jobs.resume(job_id))


@router.delete("/jobs/{job_id}", response_model=JobDeleted, responses=declared_errors(404, 409))
async def delete_job(job_id: str, jobs: JobsDep) -> JobDeleted:
    """Forget a job that has ended, with its log and finished blocks; its artifact stays."""
    await jobs.delete(job_id)
    return JobDeleted(id=job_id)
