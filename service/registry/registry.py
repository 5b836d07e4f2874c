"""The models this server serves: name -> slot -> artifact, engine, tokenizer; and alias -> name.

    load      a free name: loading, then ready
    swap      a second slot loads beside the first and passes its golden prompts, then takes the name; the first drains
    unload    the name is free at once; the engine ends with the last request that uses it

A request looks its name up once and holds a *lease* on the slot it found until its answer is complete. So a name can
change hands between two requests, and never during one. Whatever is to be loaded is first asked for its memory, and two
changes of one name exclude each other: the second is a conflict.
"""

import asyncio
import logging
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from onebit_core.errors import OnebitError
from service.engine.client import EngineClient
from service.errors import BadRequest, Conflict, ModelLoading, NotFound, ServiceError, ShuttingDown, UnknownModel
from service.metrics import Metrics
from service.registry.adapters import read_adapters
from service.registry.aliases import Aliases
from service.registry.artifacts import Identity, read_identity
from service.registry.budget import MemoryBudget
from service.registry.loading import EngineStarter, ModelLoader
from service.registry.memory import MemoryPlan
from service.registry.record import RecordFile
from service.registry.served import ServedModel
from service.registry.shelf import resolve_artifact
from service.registry.slots import ModelState, Slot
from service.settings import Settings

logger = logging.getLogger(__name__)

ADAPTER_MARK = ":"  # no model's name has it
MODEL_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/-]{0,127}")
LOADING_RETRY_SECONDS = 5.0


class ModelRegistry:
    """Loads, lends, swaps and unloads models.

    Attributes:
        aliases: further names of served models.
    """

    def __init__(self, settings: Settings, metrics: Metrics, start_engine: EngineStarter = EngineClient.start) -> None:
        self.aliases = Aliases(
            is_served=lambda name: name in self._slots, check_name=check_name, on_change=self.remember
        )
        self._settings = settings
        self._metrics = metrics
        self._record = RecordFile(settings)
        self._loader = ModelLoader(settings, metrics, start_engine)
        self._budget = MemoryBudget(settings)
        self._slots: dict[str, Slot] = {}
        self._incoming: dict[str, Slot] = {}  # what loads in order to take a name that another has
        self._draining: dict[Slot, asyncio.Task[None]] = {}
        self._missed: dict[str, Path] = {}  # what was served before the restart, and could not be loaded after it
        self._closed = False
        self._loaded_initial = False
        self._is_starting = False

    @property
    def is_ready(self) -> bool:
        """Whether the models named at start are loaded, every serving engine lives, and the server does not drain."""
        return self._loaded_initial and not self._closed and all(model.engine.is_alive for model in self.models())

    async def load_initial(self, artifacts: Sequence[str]) -> None:
        """Load the models named at start, one after another, then those remembered; `is_ready` turns true afterwards.

        Raises:
            OnebitError: an artifact is missing or corrupt.
            ServiceError: two of one name, too little memory, or an engine that does not start.
        """
        self._is_starting = True  # until all names are known, none is unknown
        slots = [await self._reserve(Path(artifact), None) for artifact in artifacts]
        for slot, _ in slots:
            slot.is_named_at_start = True
        for slot, identity in slots:
            await self._fill(slot, identity)
        await self._load_remembered()
        for adapter in await asyncio.to_thread(read_adapters, self._settings.adapter):
            if not any(model.manifest.sha256 == adapter.info.base_sha256 for model in self.models()):
                message = "adapter %s is served by nobody: it was trained on %s, whose weights no loaded model has"
                logger.warning(message, adapter.folder, adapter.info.base_name)

    async def _load_remembered(self) -> None:
        """Load what the admin API had loaded before the restart; what cannot be is told and left out."""
        record = self._record.read()
        for name, place in record.models.items():
            try:
                path = await asyncio.to_thread(resolve_artifact, self._settings, place)
                if name not in self._slots:
                    await self.load(path, name)
                elif path != self._slots[name].path.resolve():
                    message = "%s: served from where the settings say, not from %s as before the restart"
                    logger.warning(message, name, place)
            except NotFound as error:
                logger.warning("%s was served before the restart and is gone: %s", name, error)
            except (OnebitError, ServiceError) as error:
                logger.error("%s was served before the restart and cannot be now: %s", name, error)  # noqa: TRY400
                self._missed[name] = Path(place)
        for alias, name in record.aliases.items():
            try:
                self.aliases.point(alias, name)
            except ServiceError as error:
                logger.error("the alias %s of before the restart is left out: %s", alias, error)  # noqa: TRY400
        self._loaded_initial = True
        self._is_starting = False
        self.remember()

    def remember(self) -> None:
        """Write down what is served, for the next start; not before the last start's is loaded."""
        if not self._loaded_initial:
            return
        models = {slot.name: slot.path for slot in self._slots.values() if slot.model and not slot.is_named_at_start}
        self._record.write({**self._missed, **models}, self.aliases.targets())

    async def load(self, path: Path, name: str | None = None) -> ServedModel:
        """Load one artifact and serve it.

        Args:
            path: the artifact's folder.
            name: to serve it under; by default its manifest's name.

        Raises:
            OnebitError: the artifact is missing or corrupt.
            Conflict: the name is taken.
            DoesNotFit: there is too little memory.
            EngineStartFailed: the engine could not load it, or computes something else than the artifact's golden
                prompts say.
        """
        return await self._fill(*await self._reserve(path, name))

    async def swap(self, name: str, path: Path, *, unload_first: bool = False) -> ServedModel:
        """Serve another artifact under a name, without a request that fails.

        Args:
            name: of a served model.
            path: the other artifact's folder; the same one if its files were replaced.
            unload_first: end the served model before the other is loaded, where memory does not hold both. Requests are
                told to come back meanwhile; if the other cannot be loaded, the first is loaded again.

        Raises:
            UnknownModel: no model of that name is served.
            Conflict: the name is being loaded or swapped.
            OnebitError, DoesNotFit, EngineStartFailed: as for `load`; the first goes on serving.
        """
        old = self._swappable(name)
        new = self._incoming[name] = Slot(name=name, path=path)
        try:
            identity = await read_identity(path)
            await self._budget.admit(new, identity, self.slots(), replaced=old, unload_first=unload_first)
            if unload_first:
                return await self._swap_unloaded(old, new, identity)
            model = await self._loader.load(name, path, identity)
            self._serve(new, model)
            self._drain(old)
        finally:
            del self._incoming[name]
        logger.info("model swapped", extra={"model": name, "artifact_sha256": model.manifest.sha256})
        return model

    async def plan(self, path: Path, name: str | None = None) -> tuple[str, MemoryPlan]:
        """Say what `load`, or `swap` where the name is served, would need; nothing is touched.

        Returns:
            The name it would be served under, and the plan.

        Raises:
            OnebitError: the artifact is missing or corrupt.
            BadRequest: the name cannot be one.
        """
        identity = await read_identity(path)
        name = name or identity.manifest.name
        check_name(name)
        return name, await self._budget.plan(identity, self.slots(), replaced=self._slots.get(name))

    async def _reserve(self, path: Path, name: str | None) -> tuple[Slot, Identity]:
        """Take the name, so that nobody else loads it meanwhile."""
        self._refuse_closed()
        identity = await read_identity(path)
        name = name or identity.manifest.name
        check_name(name)
        if name in self._slots:
            raise Conflict(f"a model named {name!r} is already served; unload it first, or swap it", param="name")
        if name in self.aliases:
            target = self.aliases.resolve(name)
            message = f"{name!r} is an alias of {target!r}; remove the alias first, or choose another name"
            raise Conflict(message, param="name")
        slot = self._slots[name] = Slot(name=name, path=path)
        return slot, identity

    async def _fill(self, slot: Slot, identity: Identity) -> ServedModel:
        """Load what a name was reserved for; give the name back if that fails."""
        try:
            await self._budget.admit(slot, identity, self.slots())
            model = await self._loader.load(slot.name, slot.path, identity)
        except BaseException:
            del self._slots[slot.name]
            raise
        self._serve(slot, model)
        return model

    async def _swap_unloaded(self, old: Slot, new: Slot, identity: Identity) -> ServedModel:
        """End the old model, then load the new one; if that fails, load the old one again."""
        self._slots[old.name] = new
        await self._drain(old)
        try:
            return await self._fill(new, identity)
        except Exception as error:
            logger.warning("the swap failed, the former model is loaded again: %s", error, extra={"model": old.name})
            await self._load_again(old)
            raise

    async def _load_again(self, old: Slot) -> None:
        """Bring a model back that made room for another."""
        back = self._slots[old.name] = Slot(name=old.name, path=old.path, is_named_at_start=old.is_named_at_start)
        try:
            identity = await read_identity(old.path)
        except OnebitError as error:
            del self._slots[old.name]
            logger.error("%s cannot be loaded again: %s", old.name, error)  # noqa: TRY400  (a sentence is enough)
            return
        try:
            await self._fill(back, identity)
        except (OnebitError, ServiceError) as error:
            logger.error("%s cannot be loaded again: %s", old.name, error)  # noqa: TRY400  (a sentence is enough)

    def _serve(self, slot: Slot, model: ServedModel) -> None:
        """Give a loaded model its name: from here on requests find it."""
        slot.model, slot.state = model, ModelState.READY
        self._loader.publish(model)
        self._slots[slot.name] = slot
        self._missed.pop(slot.name, None)
        self.remember()

    def unload(self, name: str) -> None:
        """Stop serving a name; its engine ends when the last request that uses it has.

        Raises:
            UnknownModel: there is no such name.
            Conflict: it is still loading or being swapped, or an alias leads to it.
        """
        slot = self._swappable(name)
        if names := self.aliases.of(name):
            raise Conflict(
                f"model {name!r} is also served as {', '.join(map(repr, names))}; repoint or remove the alias first",
                param="name",
            )
        del self._slots[name]
        self.remember()
        self._drain(slot)

    def _swappable(self, name: str) -> Slot:
        """Return the slot of a name that may be taken from it."""
        self._refuse_closed()
        if name in self.aliases:
            target = self.aliases.resolve(name)
            raise Conflict(f"{name!r} is an alias; name its model, {target!r}, or repoint the alias", param="name")
        slot = self._slots.get(name)
        if slot is None:
            raise UnknownModel(f"no model named {name[:128]!r} is loaded; known: {self._known()}", param="name")
        if name in self._incoming:
            raise Conflict(f"model {name!r} is being swapped; wait for the end of that", param="name")
        if slot.model is None:
            raise Conflict(f"model {name!r} is still loading", param="name")
        return slot

    def _drain(self, slot: Slot) -> asyncio.Task[None]:
        """End a slot that has no name any more when its last request has ended."""
        slot.state = ModelState.DRAINING
        task = asyncio.get_running_loop().create_task(self._finish(slot), name=f"drain-{slot.name}")
        self._draining[slot] = task
        return task

    async def _finish(self, slot: Slot) -> None:
        """Wait for the leases, stop the engine, and take the name's series away if nobody has it now."""
        try:
            await slot.drain()
        finally:
            del self._draining[slot]
        if all(other.model is None for other in self.slots() if other.name == slot.name):
            self._loader.withdraw(slot.name)
        logger.info("model unloaded", extra={"model": slot.name})

    @contextmanager
    def lease(self, name: str) -> Iterator[ServedModel]:
        """Hold a model for the length of one request.

        Args:
            name: of the model, or an alias; with an adapter's name behind it, as in `model:adapter`.

        Raises:
            UnknownModel: no model of that name is served, or it has no such adapter.
            ModelLoading: it is not ready yet.
            ShuttingDown: the server drains.
        """
        if self._closed:
            raise ShuttingDown("the server is shutting down; try another replica", retry_after_seconds=1.0)
        slot, adapter = self._slot_and_adapter(name)
        if slot is None and self._is_starting:
            raise ModelLoading("models are still being loaded", retry_after_seconds=LOADING_RETRY_SECONDS)
        if slot is None:
            raise self._unknown(name)
        if slot.model is None:
            raise ModelLoading(f"model {name!r} is still loading", retry_after_seconds=LOADING_RETRY_SECONDS)
        with slot.lease(slot.model) as model:
            yield model.with_adapter(adapter)

    def models(self) -> list[ServedModel]:
        """The models that answer requests, oldest name first."""
        return [slot.model for slot in self._slots.values() if slot.model is not None]

    def get(self, name: str) -> ServedModel:
        """Look up one of the models that answer requests, without holding it.

        Raises:
            UnknownModel: none of that name answers; it may still be loading.
        """
        slot, adapter = self._slot_and_adapter(name)
        if slot is None:
            raise self._unknown(name)
        if slot.model is None:
            raise UnknownModel(f"model {name[:128]!r} is still loading; ask again in a while", param="model")
        return slot.model.with_adapter(adapter)

    def slots(self) -> list[Slot]:
        """Everything that is loading, ready or draining; a name is there twice while it is swapped."""
        slots = (*self._slots.values(), *self._incoming.values(), *self._draining)
        return list(dict.fromkeys(slots))

    def names(self) -> list[str]:
        """Every model that is served or on the way, without aliases."""
        return list(self._slots)

    def _slot_and_adapter(self, name: str) -> tuple[Slot | None, str]:
        """Take `model:adapter` apart; no slot for a model that is not known, or a colon with nothing behind it."""
        base, mark, adapter = name.partition(ADAPTER_MARK)
        slot = None if mark and not adapter else self._slots.get(self.aliases.resolve(base))
        return slot, adapter

    def _unknown(self, name: str) -> UnknownModel:
        """Return the refusal of a name that nothing is served under."""
        return UnknownModel(f"no model named {name[:128]!r} is served here; known: {self._known()}", param="model")

    def _known(self) -> str:
        return ", ".join((*self._slots, *self.aliases)) or "none"

    def refresh_metrics(self) -> None:
        """Bring the gauges up to date; called before a scrape. Two slots of one name are one model to the reader."""
        metrics = self._metrics.engine
        sums: dict[str, list[int]] = {}
        for slot in self.slots():
            if slot.model is None:
                continue
            stats, name = slot.model.engine.stats, slot.name
            running, waiting = sums.get(name, (0, 0))
            sums[name] = [running + stats.num_running, waiting + stats.num_waiting]
            if slot.state is ModelState.READY or name not in self._slots:
                metrics.cache_usage.labels(name).set(stats.kv_cache_usage)
            missed = slot.model.engine.restarts - slot.restarts_counted
            metrics.restarts.labels(name).inc(missed)
            slot.restarts_counted += missed
        for name, (running, waiting) in sums.items():
            metrics.running.labels(name).set(running)
            metrics.waiting.labels(name).set(waiting)

    def close(self) -> None:
        """Refuse new work from now on; running requests go on."""
        self._closed = True

    def _refuse_closed(self) -> None:
        if self._closed:
            raise ShuttingDown("the server is shutting down and changes no models")

    async def stop(self) -> None:
        """Stop every engine; sequences that still run end with an error."""
        self.close()
        slots = self.slots()
        draining = list(self._draining.values())
        for task in draining:
            task.cancel()
        await asyncio.gather(*draining, return_exceptions=True)
        await asyncio.gather(*(slot.model.stop() for slot in slots if slot.model is not None))


def check_name(name: str) -> None:
    """Refuse a name that does not fit into labels, logs and paths of the API.

    Raises:
        BadRequest: it has other characters, or is too long.
    """
    if not MODEL_NAME.fullmatch(name):
        raise BadRequest(
            f"model name {name[:128]!r} may only have letters, digits and . _ / -, at most 128", param="name"
        )
