"""/version, /ping, /load: small questions that tools made for vLLM ask; with a key, unlike /health and /metrics."""

from fastapi import APIRouter, Security
from starlette.responses import JSONResponse

import onebit_core
from service.api.dependencies import RegistryDep
from service.api.errors import declared_errors
from service.api.guard import BEARER, InferenceRoute
from service.api.health import Health
from service.api.health import ready as answer_ready
from service.api.openai.answers import Load, Version

router = APIRouter(
    tags=["probes"],
    route_class=InferenceRoute,
    dependencies=[Security(BEARER)],
    responses=declared_errors(401, 403, 500),
)


@router.get("/version", response_model=Version)
async def version() -> Version:
    """Tell the server's version."""
    return Version(version=onebit_core.__version__)


@router.get("/ping", response_model=Health, responses={503: {"model": Health}})
async def ping(registry: RegistryDep) -> JSONResponse:
    """Answer as /health/ready does."""
    return await answer_ready(registry)


@router.get("/load", response_model=Load)
async def load(registry: RegistryDep) -> Load:
    """Count the sequences that run and wait."""
    stats = [model.engine.stats for model in registry.models()]
    return Load(server_load=sum(each.num_running + each.num_waiting for each in stats))
