"""The models this server serves: name -> artifact, engine, tokenizer.

A name lives like this:

    (unknown) --load--> loading --> ready --unload--> draining --> (unknown)
                           '--failed--> (unknown)

A request holds a *lease* while it runs. Unloading takes the name away at once, so new requests get 404, and stops the
engine when the last lease is returned. Two loads of one name exclude each other: the second is a conflict.
"""

import asyncio
import logging
import re
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

from onebit_core.artifact.golden import read_golden
from onebit_core.artifact.manifest import Manifest, Report
from onebit_core.errors import CorruptArtifact
from service.accuracy.scorer import LiveScorer
from service.accuracy.types import ScorerConfig
from service.engine.client import EngineClient
from service.engine.types import ARTIFACT_LOADER, ORIGINAL_LOADER, EngineConfig
from service.errors import BadRequest, Conflict, ModelLoading, NotFound, ShuttingDown, UnknownModel
from service.metrics import Metrics
from service.registry.artifacts import Identity, read_identity, read_tokenizer
from service.registry.golden import replay_golden
from service.registry.served import ServedModel
from service.registry.watch import StatsCounter
from service.settings import Settings

logger = logging.getLogger(__name__)

EngineStarter = Callable[[EngineConfig], Awaitable[EngineClient]]

MODEL_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/-]{0,127}")
LOADING_RETRY_SECONDS = 5.0


class ModelState(StrEnum):
    """Where a name stands."""

    LOADING = "loading"
    READY = "ready"
    DRAINING = "draining"


@dataclass(kw_only=True)
class Slot:
    """One name and what it stands for."""

    name: str
    path: Path
    state: ModelState = ModelState.LOADING
    model: ServedModel | None = None
    num_leases: int = 0
    unused: asyncio.Event = field(default_factory=asyncio.Event)
    restarts_counted: int = 0


class ModelRegistry:
    """Loads, lends and unloads models."""

    def __init__(self, settings: Settings, metrics: Metrics, start_engine: EngineStarter = EngineClient.start) -> None:
        self._settings = settings
        self._metrics = metrics
        self._start_engine = start_engine
        self._slots: dict[str, Slot] = {}
        self._draining: set[asyncio.Task[None]] = set()
        self._closed = False
        self._loaded_initial = False

    @property
    def is_ready(self) -> bool:
        """Whether the models named at start are loaded, every serving engine lives, and the server does not drain."""
        return self._loaded_initial and not self._closed and all(model.engine.is_alive for model in self.models())

    async def load_initial(self, artifacts: Sequence[str]) -> None:
        """Load the models named at start, one after another; `is_ready` turns true afterwards.

        Raises:
            OnebitError: an artifact is missing or corrupt.
            ServiceError: two of one name, or an engine that does not start.
        """
        slots = [await self._reserve(Path(artifact), None) for artifact in artifacts]
        for slot, identity in slots:
            await self._fill(slot, identity)
        self._loaded_initial = True

    async def load(self, path: Path, name: str | None = None) -> ServedModel:
        """Load one artifact and serve it.

        Args:
            path: the artifact's folder.
            name: to serve it under; by default its manifest's name.

        Raises:
            OnebitError: the artifact is missing or corrupt.
            Conflict: the name is taken.
            EngineStartFailed: the engine could not load it.
        """
        return await self._fill(*await self._reserve(path, name))

    async def _reserve(self, path: Path, name: str | None) -> tuple[Slot, Identity]:
        """Take the name, so that nobody else loads it meanwhile."""
        if self._closed:
            raise ShuttingDown("the server is shutting down and loads nothing")
        identity = await read_identity(path)
        name = name or identity.manifest.name
        if not MODEL_NAME.fullmatch(name):
            raise BadRequest(f"model name {name!r} may only have letters, digits and . _ / -", param="name")
        if name in self._slots:
            raise Conflict(f"a model named {name!r} is already served; unload it first", param="name")
        slot = self._slots[name] = Slot(name=name, path=path)
        return slot, identity

    async def _fill(self, slot: Slot, identity: Identity) -> ServedModel:
        """Start engine and tokenizer for a reserved name; give the name back if that fails."""
        try:
            self._publish(slot, identity.manifest, identity.report)
            engine, tokenizer = await self._start(identity)
            if not identity.is_original:
                await self._check_golden(slot, identity.manifest, engine)
        except BaseException:
            self._forget(slot)
            raise
        slot.model = ServedModel(
            name=slot.name,
            path=slot.path,
            manifest=identity.manifest,
            report=identity.report,
            tokenizer=tokenizer,
            engine=engine,
            metrics=self._metrics.engine,
            scorer=None if identity.is_original else self._scorer(slot, identity.manifest),
        )
        slot.state = ModelState.READY
        engine.on_stats = StatsCounter(self._metrics.engine, slot.name, engine.stats)
        info = engine.info
        self._metrics.engine.info.labels(slot.name, info.backend, info.device, info.dtype).set(1)
        settings = self._settings
        dtype = info.dtype if settings.kv_cache_dtype == "auto" else settings.kv_cache_dtype
        cache = (settings.page_size, info.num_pages, dtype, info.max_model_len, settings.prefix_caching)
        self._metrics.engine.cache_info.labels(slot.name, *map(str, cache)).set(1)
        logger.info("model loaded", extra={"model": slot.name, "device": info.device, "backend": info.backend})
        return slot.model

    async def _start(self, identity: Identity) -> tuple[EngineClient, Any]:
        """Start the engine and read the tokenizer meanwhile; both import large packages first, each for itself."""
        starting = asyncio.ensure_future(self._start_engine(engine_config(self._settings, identity)))
        try:
            tokenizer = await asyncio.to_thread(read_tokenizer, identity.folder)
        except BaseException:
            starting.cancel()
            for engine in await asyncio.gather(starting, return_exceptions=True):
                if not isinstance(engine, BaseException):
                    await engine.stop()
            raise
        return await starting, tokenizer

    async def _check_golden(self, slot: Slot, manifest: Manifest, engine: EngineClient) -> None:
        """Replay the artifact's golden prompts; the engine is stopped if it fails them.

        Raises:
            EngineStartFailed: it computes something else than the reference.
            CorruptArtifact: the prompts are not those that were written.
        """
        if self._settings.golden_check == "off":
            return
        try:
            golden = await asyncio.to_thread(read_golden, slot.path, manifest)
            result = await replay_golden(engine, golden) if golden is not None else None
        except BaseException:
            await engine.stop()
            raise
        if result is None:
            why = "the artifact has none" if golden is None else "max_model_len leaves no room for them"
            logger.warning("served without a check of golden prompts: %s", why, extra={"model": slot.name})
            return
        self._metrics.live.golden_error.labels(slot.name).set(result.error)
        self._metrics.live.golden_timestamp.labels(slot.name).set(result.timestamp)
        checked = {"model": slot.name, "logprob_error": round(result.error, 5), "tokens": result.tokens}
        logger.info("golden prompts agree", extra=checked)

    def _scorer(self, slot: Slot, manifest: Manifest) -> LiveScorer | None:
        """Make the scorer of a model, where one is asked for and there is an original to compare with."""
        settings = self._settings
        original = settings.originals.get(slot.name)
        if not settings.score_share:
            return None
        if original is None and not Path(manifest.source.model).expanduser().exists():
            reason = f"its original {manifest.source.model} is not on this machine; name one with --score-original"
            logger.warning("no live accuracy: %s", reason, extra={"model": slot.name})
            return None
        config = ScorerConfig(
            artifact=str(slot.path),
            original=original,
            device=settings.score_device,
            num_threads=settings.score_threads,
            max_tokens=settings.score_max_tokens,
            log_level=settings.log_level,
        )
        return LiveScorer(config, share=settings.score_share, metrics=self._metrics.live, model=slot.name)

    def _publish(self, slot: Slot, manifest: Manifest, report: Report) -> None:
        """Show a name's series.

        Raises:
            CorruptArtifact: the report has a date or an error that cannot be one.
        """
        self._metrics.engine.start_series(slot.name)
        try:
            self._metrics.artifact.start_series(slot.name, manifest, report)
        except ValueError as error:
            raise CorruptArtifact(f"{slot.path}: its report cannot be shown: {error}") from None

    def _forget(self, slot: Slot) -> None:
        """Free a name and take its series away."""
        del self._slots[slot.name]
        self._metrics.engine.end_series(slot.name)
        self._metrics.artifact.end_series(slot.name)
        self._metrics.live.end_series(slot.name)

    def unload(self, name: str) -> None:
        """Stop serving a name; its engine ends when the last request that uses it has.

        Raises:
            UnknownModel: there is no such name.
            Conflict: it is still loading.
        """
        slot = self._slots.get(name)
        if slot is None or slot.state is ModelState.DRAINING:
            raise UnknownModel(f"no model named {name!r} is loaded")
        if slot.model is None:
            raise Conflict(f"model {name!r} is still loading")
        slot.state = ModelState.DRAINING
        task = asyncio.get_running_loop().create_task(self._finish_unload(slot, slot.model))
        self._draining.add(task)
        task.add_done_callback(self._draining.discard)

    async def _finish_unload(self, slot: Slot, model: ServedModel) -> None:
        """Wait for the leases, then stop the engine and free the name."""
        if slot.num_leases:
            await slot.unused.wait()
        await model.stop()
        self._forget(slot)
        logger.info("model unloaded", extra={"model": slot.name})

    @contextmanager
    def lease(self, name: str) -> Iterator[ServedModel]:
        """Hold a model for the length of one request.

        Raises:
            UnknownModel: no model of that name is served.
            ModelLoading: it is not ready yet.
            ShuttingDown: the server drains.
        """
        if self._closed:
            raise ShuttingDown("the server is shutting down; try another replica", retry_after_seconds=1.0)
        slot = self._slots.get(name)
        if slot is None or slot.state is ModelState.DRAINING:
            known = ", ".join(model.name for model in self.models()) or "none"
            raise UnknownModel(f"no model named {name[:128]!r} is served here; known: {known}", param="model")
        if slot.model is None:
            raise ModelLoading(f"model {name!r} is still loading", retry_after_seconds=LOADING_RETRY_SECONDS)
        slot.num_leases += 1
        slot.unused.clear()
        try:
            yield slot.model
        finally:
            slot.num_leases -= 1
            if not slot.num_leases:
                slot.unused.set()

    def models(self) -> list[ServedModel]:
        """The models that answer requests, oldest first."""
        return [slot.model for slot in self._slots.values() if slot.model and slot.state is ModelState.READY]

    def get(self, name: str) -> ServedModel:
        """Look one model up without holding it.

        Raises:
            UnknownModel: no model of that name is served.
        """
        with self.lease(name) as model:
            return model

    def slots(self) -> list[Slot]:
        """Every name with its state, for the admin API."""
        return list(self._slots.values())

    def refresh_metrics(self) -> None:
        """Bring the gauges up to date; called before a scrape."""
        metrics = self._metrics.engine
        for slot in self._slots.values():
            if slot.model is None:
                continue
            stats = slot.model.engine.stats
            metrics.running.labels(slot.name).set(stats.num_running)
            metrics.waiting.labels(slot.name).set(stats.num_waiting)
            metrics.cache_usage.labels(slot.name).set(stats.kv_cache_usage)
            missed = slot.model.engine.restarts - slot.restarts_counted
            metrics.restarts.labels(slot.name).inc(missed)
            slot.restarts_counted += missed

    def close(self) -> None:
        """Refuse new work from now on; running requests go on."""
        self._closed = True

    async def stop(self) -> None:
        """Stop every engine; sequences that still run end with an error."""
        self.close()
        for task in self._draining:
            task.cancel()
        await asyncio.gather(*self._draining, return_exceptions=True)
        await asyncio.gather(*(slot.model.stop() for slot in self._slots.values() if slot.model is not None))


def engine_config(settings: Settings, identity: Identity) -> EngineConfig:
    """Say how the engine of a model is to run."""
    return EngineConfig(
        artifact=str(identity.folder),
        loader=ORIGINAL_LOADER if identity.is_original else ARTIFACT_LOADER,
        device=settings.device,
        dtype=settings.dtype,
        backend=settings.backend,
        page_size=settings.page_size,
        kv_cache_bytes=settings.kv_cache_bytes,
        kv_cache_dtype=settings.kv_cache_dtype,
        fuse=settings.fuse,
        max_num_sequences=settings.max_num_sequences,
        max_batched_tokens=settings.max_batched_tokens,
        prefix_caching=settings.prefix_caching,
        max_queued_requests=settings.max_queued_requests,
        max_model_len=settings.max_model_len,
        log_level=settings.log_level,
    )


def resolve_artifact(settings: Settings, path: str) -> Path:
    """Turn a path sent by an admin into a folder or GGUF file that may be loaded.

    Raises:
        BadRequest: it is not inside artifact_root, nor one of the artifacts named at start.
        NotFound: it is, but there is no such folder or file.
    """
    named_at_start = {Path(artifact).resolve() for artifact in settings.artifacts}
    root = settings.artifact_root.resolve() if settings.artifact_root else None
    try:
        resolved = (root / path if root else Path(path)).resolve()
        is_there = resolved.is_dir() or (resolved.suffix == ".gguf" and resolved.is_file())
    except (OSError, ValueError, RuntimeError):  # a name too long, a NUL, or links in a circle
        raise BadRequest("path is not one this machine can have", param="path") from None
    if resolved not in named_at_start and not (root and resolved.is_relative_to(root) and resolved != root):
        raise BadRequest("path must lie inside artifact_root, or be an artifact named at start", param="path")
    if not is_there:
        raise NotFound(f"there is no artifact folder and no GGUF file {path!r}", param="path")
    return resolved
