"""Admits models by memory: one at a time is measured, so that two loads never count on the same bytes."""

import asyncio
from collections.abc import Iterable

from service.errors import DoesNotFit
from service.registry.artifacts import Identity
from service.registry.gpu_memory import choose_device
from service.registry.memory import MemoryPlan, free_bytes, needs_of, resident_bytes
from service.registry.slots import Slot
from service.settings import Settings


class MemoryBudget:
    """What this server's devices still have room for."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._measuring = asyncio.Lock()

    async def plan(self, identity: Identity, slots: Iterable[Slot], replaced: Slot | None = None) -> MemoryPlan:
        """Say whether a model fits beside the loaded ones.

        Args:
            identity: of the model.
            slots: everything that is loaded or loading.
            replaced: the slot whose name it would take.
        """
        return await asyncio.to_thread(self._plan, identity, list(slots), replaced)

    async def admit(
        self,
        slot: Slot,
        identity: Identity,
        slots: Iterable[Slot],
        *,
        replaced: Slot | None = None,
        unload_first: bool = False,
    ) -> None:
        """Let a slot load, or refuse; what it needs is set aside from then on.

        Raises:
            DoesNotFit: there is too little memory; the message says what is needed, what is free, and what to do.
        """
        async with self._measuring:
            others = [other for other in slots if other is not slot]
            plan = await self.plan(identity, others, replaced)
            fits = plan.fits_after_unload if unload_first else plan.fits
            if self._settings.memory_check == "on" and not fits:
                raise DoesNotFit(plan.in_words(slot.name))
            slot.needs = plan.needs

    def _plan(self, identity: Identity, slots: list[Slot], replaced: Slot | None) -> MemoryPlan:
        device = choose_device(self._settings)
        return MemoryPlan(
            needs=needs_of(identity, self._settings, device),
            free=free_bytes(device, (_still_to_take(slot, device) for slot in slots)),
            freed=_held(replaced, device) if replaced is not None else 0,
        )


def _still_to_take(slot: Slot, device: str) -> int:
    """Return what a slot was promised and has not taken; a GPU's memory is taken at once."""
    if slot.needs is None:
        return 0
    if slot.model is None:
        return slot.needs.peak
    if device != "cpu":
        return 0
    return max(0, slot.needs.process + slot.model.engine.info.memory_bytes - resident_bytes(slot.model.engine.pid))


def _held(slot: Slot, device: str) -> int:
    """Return what comes free when a slot's engine ends."""
    if slot.model is None:
        return 0
    promised = slot.model.engine.info.memory_bytes
    if device != "cpu":
        return promised
    return max(resident_bytes(slot.model.engine.pid), promised + (slot.needs.process if slot.needs else 0))
