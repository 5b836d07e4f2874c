"""List and delete what lies in artifact_root."""

import asyncio
from functools import partial
from pathlib import Path

from fastapi import APIRouter, Security

from service.api.admin.model_bodies import ArtifactAnswer, ArtifactAnswers, Deleted
from service.api.dependencies import OptionalJobsDep, RegistryDep, SettingsDep
from service.api.errors import declared_errors
from service.api.guard import BEARER, AdminRoute
from service.errors import Conflict, NotFound
from service.registry.registry import ModelRegistry
from service.registry.shelf import Item, delete_item, find_item, is_being_written, list_items
from service.settings import Settings

router = APIRouter(
    prefix="/admin/artifacts",
    tags=["artifacts"],
    route_class=AdminRoute,
    dependencies=[Security(BEARER)],
    responses=declared_errors(401, 403, 500, 503),
)


@router.get("", response_model=ArtifactAnswers, responses=declared_errors(400, 404))
async def list_artifacts(registry: RegistryDep, settings: SettingsDep, *, verify: bool = False) -> ArtifactAnswers:
    """List what could be loaded, and what is damaged and why; `verify` reads the weights and compares their hashes."""
    items = await asyncio.to_thread(partial(list_items, _root(settings), verify=verify))
    return ArtifactAnswers(data=[_describe(item, registry) for item in items])


@router.delete("/{name:path}", response_model=Deleted, responses=declared_errors(400, 404, 409))
async def delete_artifact(name: str, registry: RegistryDep, settings: SettingsDep, jobs: OptionalJobsDep) -> Deleted:
    """Delete an artifact that nobody serves and no job is writing."""
    root = _root(settings)
    item = await asyncio.to_thread(find_item, root, name)
    writing = [job.id for job in await jobs.list_jobs() if job.name == name and not job.state.is_final] if jobs else []
    if writing or is_being_written(root, name):
        by = f" by job {writing[0]}" if writing else ""
        raise Conflict(f"artifact {name!r} is being written{by}; wait for the end, or cancel the job", param="name")
    if served := _served_as(item.path, registry):
        raise Conflict(f"artifact {name!r} is served as {', '.join(served)}; unload it first", param="name")
    await asyncio.to_thread(delete_item, root, item)
    return Deleted(id=name, object="artifact")


def _root(settings: Settings) -> Path:
    """Return the folder of artifacts.

    Raises:
        NotFound: this server has none.
    """
    if settings.artifact_root is None:
        raise NotFound("this server has no folder of artifacts; start it with --artifact-root")
    return settings.artifact_root.resolve()


def _served_as(path: Path, registry: ModelRegistry) -> list[str]:
    """Return the models that were loaded from a folder, draining ones too: their engine may be started again."""
    return list(dict.fromkeys(slot.name for slot in registry.slots() if slot.path.resolve().is_relative_to(path)))


def _describe(item: Item, registry: ModelRegistry) -> ArtifactAnswer:
    served_as, manifest = _served_as(item.path, registry), item.manifest
    return ArtifactAnswer(
        id=item.name,
        kind=item.kind.value,
        state="damaged" if item.damage else "served" if served_as else "available",
        served_as=served_as,
        model=manifest.name if manifest else None,
        method=manifest.method if manifest else None,
        bits_per_weight=manifest.bits.whole_model if manifest else None,
        bytes=item.num_bytes,
        sha256=manifest.sha256 if manifest else None,
        created=manifest.created if manifest else None,
        damage=item.damage,
    )
