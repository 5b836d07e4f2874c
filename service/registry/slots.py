"""A slot: one model under one name, from its loading to the end of the last request that uses it.

    loading --> ready --> draining --> (gone)
       '--failed--> (gone)

A swap is a second slot of the same name: it loads beside the first, takes the name when it is ready, and the first
drains.
"""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path

from service.registry.memory import Needs
from service.registry.served import ServedModel


class ModelState(StrEnum):
    """Where a slot stands."""

    LOADING = "loading"
    READY = "ready"
    DRAINING = "draining"


@dataclass(kw_only=True, eq=False)
class Slot:
    """One model, or what is to become one.

    Attributes:
        name: what it is served as.
        path: the artifact's folder.
        is_named_at_start: whether the settings name it, so that it comes back after a restart by itself.
        needs: the memory it was admitted with; None before it was, and where nobody checks.
        model: once it is loaded.
        num_leases: requests that use it now.
        unused: set when the last of them has ended.
        restarts_counted: restarts of its engine that are in the metrics already.
    """

    name: str
    path: Path
    is_named_at_start: bool = False
    state: ModelState = ModelState.LOADING
    needs: Needs | None = None
    model: ServedModel | None = None
    num_leases: int = 0
    unused: asyncio.Event = field(default_factory=asyncio.Event)
    restarts_counted: int = 0

    @contextmanager
    def lease(self, model: ServedModel) -> Iterator[ServedModel]:
        """Hold the model for the length of one request."""
        self.num_leases += 1
        self.unused.clear()
        try:
            yield model
        finally:
            self.num_leases -= 1
            if not self.num_leases:
                self.unused.set()

    async def drain(self) -> None:
        """Wait for the last request, then stop the engine; its traffic is scored no more, its name may be another's."""
        if self.model is not None and self.model.scorer is not None:
            await self.model.scorer.stop()
        if self.num_leases:
            await self.unused.wait()
        if self.model is not None:
            await self.model.stop()
