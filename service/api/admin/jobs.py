"""Launch, follow and cancel compression jobs."""

import asyncio
from functools import partial

from fastapi import APIRouter, Security

from service.api.admin.schemas import JobAnswer, JobList, QuantizeBody
from service.api.dependencies import JobsDep, SettingsDep
from service.api.errors import declared_errors
from service.api.guard import BEARER, AdminRoute
from service.jobs.submission import plan_job

router = APIRouter(
    prefix="/admin",
    tags=["jobs"],
    route_class=AdminRoute,
    dependencies=[Security(BEARER)],
    responses=declared_errors(401, 403, 500, 503),
)


@router.post("/quantize", response_model=JobAnswer, status_code=202, responses=declared_errors(400, 409, 413))
async def quantize(body: QuantizeBody, jobs: JobsDep, settings: SettingsDep) -> JobAnswer:
    """Queue a job that makes an artifact; follow it at /admin/jobs/{id}."""
    spec = await asyncio.to_thread(partial(plan_job, body.submission(), settings))
    return JobAnswer.of(await jobs.submit(spec))


@router.get("/jobs", response_model=JobList)
async def list_jobs(jobs: JobsDep) -> JobList:
    """List all jobs, newest first."""
    return JobList(data=[JobAnswer.of(job) for job in await jobs.list_jobs()])


@router.get("/jobs/{job_id}", response_model=JobAnswer, responses=declared_errors(404))
async def read_job(job_id: str, jobs: JobsDep) -> JobAnswer:
    """Describe one job: its state, block i of n, the error so far."""
    return JobAnswer.of(await jobs.get(job_id))


@router.post("/jobs/{job_id}/cancel", response_model=JobAnswer, responses=declared_errors(404, 409))
async def cancel_job(job_id: str, jobs: JobsDep) -> JobAnswer:
    """Cancel a queued or running job."""
    return JobAnswer.of(await jobs.cancel(job_id))
