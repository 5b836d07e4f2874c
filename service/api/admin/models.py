"""Load, list and unload models."""

import asyncio

from fastapi import APIRouter, Security

from service.api.admin.schemas import Deleted, LoadBody, ModelAnswer, ModelAnswers
from service.api.dependencies import RegistryDep, SettingsDep
from service.api.errors import declared_errors
from service.api.guard import BEARER, AdminRoute
from service.registry.registry import ModelRegistry, Slot, resolve_artifact

router = APIRouter(
    prefix="/admin/models",
    tags=["models"],
    route_class=AdminRoute,
    dependencies=[Security(BEARER)],
    responses=declared_errors(401, 403, 500, 503),
)


@router.get("", response_model=ModelAnswers)
async def list_models(registry: RegistryDep) -> ModelAnswers:
    """List every model and its state."""
    return ModelAnswers(data=[_describe(slot) for slot in registry.slots()])


@router.post("/load", response_model=ModelAnswer, responses=declared_errors(400, 404, 409, 413))
async def load_model(body: LoadBody, registry: RegistryDep, settings: SettingsDep) -> ModelAnswer:
    """Load an artifact and serve it; answers when it is ready."""
    path = await asyncio.to_thread(resolve_artifact, settings, body.path)
    model = await registry.load(path, body.name)
    return _named(registry, model.name)


@router.delete("/{name:path}", response_model=Deleted, responses=declared_errors(404, 409))
async def unload_model(name: str, registry: RegistryDep) -> Deleted:
    """Stop serving a model; requests that use it are finished first."""
    registry.unload(name)
    return Deleted(id=name)


def _named(registry: ModelRegistry, name: str) -> ModelAnswer:
    return next(_describe(slot) for slot in registry.slots() if slot.name == name)


def _describe(slot: Slot) -> ModelAnswer:
    """Describe one slot; what is not known while it loads is null."""
    model = slot.model
    info = model.engine.info if model else None
    return ModelAnswer(
        id=slot.name,
        state=slot.state.value,
        path=str(slot.path),
        leases=slot.num_leases,
        method=model.manifest.method if model else None,
        bits_per_weight=model.manifest.bits.whole_model if model else None,
        device=info.device if info else None,
        dtype=info.dtype if info else None,
        backend=info.backend if info else None,
        max_model_len=info.max_model_len if info else None,
        memory_bytes=info.memory_bytes if info else None,
        alive=model.engine.is_alive if model else False,
        restarts=model.engine.restarts if model else 0,
    )
