"""For probes and scrapers, without a key: am I alive, am I ready, how am I doing."""

from typing import Literal

from fastapi import APIRouter, Response
from pydantic import BaseModel
from starlette.responses import JSONResponse

from service.api.dependencies import MetricsDep, OptionalJobsDep, RegistryDep

router = APIRouter(tags=["health"])

METRICS_CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class Health(BaseModel):
    """The answer of a probe."""

    status: Literal["ok", "unavailable"]


@router.get("/health/live", response_model=Health)
async def live() -> Health:
    """Answer 200 while the event loop turns; a server that does not should be restarted."""
    return Health(status="ok")


@router.get("/health", response_model=Health, responses={503: {"model": Health}})
@router.get("/health/ready", response_model=Health, responses={503: {"model": Health}})
async def ready(registry: RegistryDep) -> JSONResponse:
    """Answer 200 when every model is loaded and its engine lives, 503 while loading, restarting or draining.

    Tools made for vLLM and llama.cpp ask /health.
    """
    if registry.is_ready:
        return JSONResponse({"status": "ok"})
    return JSONResponse({"status": "unavailable"}, status_code=503)


@router.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
async def metrics_page(metrics: MetricsDep, registry: RegistryDep, jobs: OptionalJobsDep) -> Response:
    """Show every metric in Prometheus' text format."""
    registry.refresh_metrics()
    if jobs is not None:
        await jobs.refresh_metrics(metrics.jobs)
    return Response(metrics.page(), media_type=METRICS_CONTENT_TYPE)
