"""Load, swap, list and unload models, and give them further names."""

import asyncio

from fastapi import APIRouter, Security

from service.api.admin.model_bodies import (
    AliasAnswer,
    AliasAnswers,
    AliasBody,
    Deleted,
    GoldenAnswer,
    LoadBody,
    ModelAnswer,
    ModelAnswers,
    PlanAnswer,
    PlanBody,
    SwapBody,
)
from service.api.dependencies import RegistryDep, SettingsDep
from service.api.errors import declared_errors
from service.api.guard import BEARER, AdminRoute
from service.registry.memory import resident_bytes
from service.registry.registry import ModelRegistry
from service.registry.shelf import resolve_artifact
from service.registry.slots import Slot

router = APIRouter(
    prefix="/admin",
    tags=["models"],
    route_class=AdminRoute,
    dependencies=[Security(BEARER)],
    responses=declared_errors(401, 403, 500, 503),
)


@router.get("/models", response_model=ModelAnswers)
async def list_models(registry: RegistryDep) -> ModelAnswers:
    """List every model and its state."""
    return ModelAnswers(data=[_describe(slot, registry) for slot in registry.slots()])


@router.post("/models/load", response_model=ModelAnswer, responses=declared_errors(400, 404, 409, 413))
async def load_model(body: LoadBody, registry: RegistryDep, settings: SettingsDep) -> ModelAnswer:
    """Load an artifact and serve it; answers when it is ready."""
    path = await asyncio.to_thread(resolve_artifact, settings, body.path)
    model = await registry.load(path, body.name)
    return _named(registry, model.name)


@router.post("/models/swap", response_model=ModelAnswer, responses=declared_errors(400, 404, 409, 413))
async def swap_model(body: SwapBody, registry: RegistryDep, settings: SettingsDep) -> ModelAnswer:
    """Serve another artifact under a name that is served; no request fails. Answers when the other has the name."""
    path = await asyncio.to_thread(resolve_artifact, settings, body.path)
    model = await registry.swap(body.name, path, unload_first=body.unload_first)
    return _named(registry, model.name)


@router.post("/models/plan", response_model=PlanAnswer, responses=declared_errors(400, 404, 413))
async def plan_model(body: PlanBody, registry: RegistryDep, settings: SettingsDep) -> PlanAnswer:
    """Say what memory loading an artifact needs, and whether it is there; nothing is loaded."""
    path = await asyncio.to_thread(resolve_artifact, settings, body.path)
    name, plan = await registry.plan(path, body.name)
    needs = plan.needs
    return PlanAnswer(
        id=name,
        device=needs.device,
        needed_bytes=needs.peak,
        weights_bytes=needs.weights,
        loading_bytes=needs.loading,
        kv_cache_bytes=needs.kv_cache,
        process_bytes=needs.process,
        free_bytes=None if plan.free is None else max(0, plan.free),
        freed_bytes=plan.freed,
        fits=plan.fits,
        fits_after_unload=plan.fits_after_unload,
        remedy=plan.remedy,
    )


@router.delete("/models/{name:path}", response_model=Deleted, responses=declared_errors(404, 409))
async def unload_model(name: str, registry: RegistryDep) -> Deleted:
    """Stop serving a model; requests that use it are finished first."""
    registry.unload(name)
    return Deleted(id=name)


@router.get("/aliases", response_model=AliasAnswers)
async def list_aliases(registry: RegistryDep) -> AliasAnswers:
    """List the further names of models."""
    targets = registry.aliases.targets()
    return AliasAnswers(data=[AliasAnswer(id=alias, model=model) for alias, model in targets.items()])


@router.put("/aliases/{name:path}", response_model=AliasAnswer, responses=declared_errors(400, 404, 409, 413))
async def point_alias(name: str, body: AliasBody, registry: RegistryDep) -> AliasAnswer:
    """Give a served model a further name, or let that name lead to another model from now on."""
    registry.aliases.point(name, body.model)
    return AliasAnswer(id=name, model=body.model)


@router.delete("/aliases/{name:path}", response_model=Deleted, responses=declared_errors(404))
async def remove_alias(name: str, registry: RegistryDep) -> Deleted:
    """Forget a further name; the model goes on being served under its own."""
    registry.aliases.remove(name)
    return Deleted(id=name, object="alias")


def _named(registry: ModelRegistry, name: str) -> ModelAnswer:
    return next(_describe(slot, registry) for slot in registry.slots() if slot.name == name)


def _describe(slot: Slot, registry: ModelRegistry) -> ModelAnswer:
    """Describe one slot; what is not known while it loads is null."""
    model = slot.model
    info = model.engine.info if model else None
    golden = model.golden if model else None
    return ModelAnswer(
        id=slot.name,
        state=slot.state.value,
        path=str(slot.path),
        aliases=registry.aliases.of(slot.name),
        leases=slot.num_leases,
        method=model.manifest.method if model else None,
        bits_per_weight=model.manifest.bits.whole_model if model else None,
        artifact_sha256=model.manifest.sha256 if model else None,
        golden=GoldenAnswer(error_nats=golden.error, tokens=golden.tokens, timestamp=golden.timestamp)
        if golden
        else None,
        device=info.device if info else None,
        dtype=info.dtype if info else None,
        backend=info.backend if info else None,
        max_model_len=info.max_model_len if info else None,
        memory_bytes=info.memory_bytes if info else None,
        planned_bytes=slot.needs.peak if slot.needs else None,
        resident_bytes=resident_bytes(model.engine.pid) if model else None,
        alive=model.engine.is_alive if model else False,
        restarts=model.engine.restarts if model else 0,
    )
