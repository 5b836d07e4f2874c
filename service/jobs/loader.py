"""Serves what jobs have made: watches for finished jobs that asked for it, and loads their artifacts."""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from pathlib import Path

from onebit_core.errors import OnebitError
from service.errors import JobsUnavailable, ServiceError
from service.jobs.client import JobClient

logger = logging.getLogger(__name__)

POLL_SECONDS = 1.0

Load = Callable[[Path, str], Awaitable[object]]


async def load_finished_jobs(jobs: JobClient, load: Load) -> None:
    """Watch for ever; each finished job is loaded once, and its record says how that went.

    Args:
        jobs: where jobs are recorded.
        load: loads an artifact folder under a name; raises OnebitError or ServiceError if it cannot.
    """
    while True:
        try:
            for job_id, spec in (await jobs.awaiting_load()).items():
                await jobs.note_loaded(job_id, await _try(load, Path(spec.artifact), spec.name))
        except JobsUnavailable as error:
            logger.warning("finished jobs cannot be looked up: %s", error)
        await asyncio.sleep(POLL_SECONDS)


async def _try(load: Load, artifact: Path, name: str) -> str | None:
    """Load an artifact; return what went wrong, or None."""
    try:
        await load(artifact, name)
    except (OnebitError, ServiceError) as error:
        logger.error("the artifact of a finished job cannot be served: %s", error)  # noqa: TRY400  (a sentence is enough)
        return str(error)
    except Exception as error:  # whatever it is belongs to this job; others wait to be served
        logger.exception("the artifact of a finished job cannot be served")
        return f"{type(error).__name__}: {error}"
    return None
