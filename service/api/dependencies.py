"""What routes ask for, by type: the application's parts as Annotated aliases."""

from typing import Annotated, cast

from fastapi import Depends, Request

from service.auth import Caller
from service.errors import JobsUnavailable
from service.jobs.client import JobClient
from service.metrics import Metrics
from service.rate_limits import Allowance
from service.registry.registry import ModelRegistry
from service.settings import Settings


def settings_of(request: Request) -> Settings:
    """The server's settings."""
    return cast("Settings", request.app.state.settings)


def registry_of(request: Request) -> ModelRegistry:
    """The models being served."""
    return cast("ModelRegistry", request.app.state.registry)


def metrics_of(request: Request) -> Metrics:
    """The server's metrics."""
    return cast("Metrics", request.app.state.metrics)


def optional_jobs_of(request: Request) -> JobClient | None:
    """The jobs' client, or None where there are no jobs."""
    return cast("JobClient | None", request.app.state.jobs)


def jobs_of(request: Request) -> JobClient:
    """The jobs' client.

    Raises:
        JobsUnavailable: this server runs no jobs.
    """
    jobs = optional_jobs_of(request)
    if jobs is None:
        raise JobsUnavailable("this server runs no jobs; start it with --artifact-root and --jobs-enabled")
    return jobs


def caller_of(request: Request) -> Caller:
    """Who asks; the guard has found out."""
    return cast("Caller", request.state.caller)


def allowance_of(request: Request) -> Allowance | None:
    """What the caller's key has left; None if it has no limit."""
    return cast("Allowance | None", request.state.allowance)


SettingsDep = Annotated[Settings, Depends(settings_of)]
RegistryDep = Annotated[ModelRegistry, Depends(registry_of)]
MetricsDep = Annotated[Metrics, Depends(metrics_of)]
OptionalJobsDep = Annotated[JobClient | None, Depends(optional_jobs_of)]
JobsDep = Annotated[JobClient, Depends(jobs_of)]
