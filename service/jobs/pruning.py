"""Forgets jobs that ended long ago: their records, and their folders with log, finished blocks, rejected artifacts."""

import asyncio
import logging
import time

from service.errors import JobsUnavailable
from service.jobs.client import JobClient

logger = logging.getLogger(__name__)

SECONDS_BETWEEN_LOOKS = 3600.0
DAY_SECONDS = 86400.0


async def prune_jobs(jobs: JobClient, keep_days: float) -> None:
    """Look once an hour, for ever; several servers may.

    Args:
        jobs: where jobs are recorded.
        keep_days: how long after its end a job is kept.
    """
    while True:
        try:
            pruned = await jobs.prune(time.time() - keep_days * DAY_SECONDS)
            if pruned:
                logger.info("forgot %d jobs that ended more than %g days ago", len(pruned), keep_days)
        except JobsUnavailable as error:
            logger.warning("old jobs cannot be looked up: %s", error)
        await asyncio.sleep(SECONDS_BETWEEN_LOOKS)
