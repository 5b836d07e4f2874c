"""The events of one request, as an asynchronous iterator that aborts the request when it is left early."""

import asyncio
from collections.abc import AsyncIterator, Callable

from service.engine.types import TokenEvent
from service.errors import EngineBusy, EngineDead


class TokenStream(AsyncIterator[TokenEvent]):
    """Ends after the event with a finish_reason; raises EngineDead when the engine ends first.

    Leaving it early, by `aclose()` or by dropping the last reference, aborts the request.

    Attributes:
        request_id: whose events these are.
        caller: on whose behalf.
        has_begun: whether an event has come.
    """

    def __init__(self, request_id: str, caller: str = "", *, on_leave: Callable[[str], None]) -> None:
        self.request_id = request_id
        self.caller = caller
        self.has_begun = False
        self._on_leave = on_leave
        self._arrived: asyncio.Queue[TokenEvent | EngineDead | EngineBusy] = asyncio.Queue()
        self._ended = False

    async def __anext__(self) -> TokenEvent:
        """Wait for the next event."""
        if self._ended:
            raise StopAsyncIteration
        item = await self._arrived.get()
        if isinstance(item, EngineDead | EngineBusy):
            self._ended = True
            raise item
        self._ended = item.finish_reason is not None
        return item

    async def aclose(self) -> None:
        """End the stream, aborting the request if it still runs; closing twice is harmless."""
        self._close()

    def put(self, event: TokenEvent) -> None:
        """Add an event (the client's side)."""
        self.has_begun = True
        self._arrived.put_nowait(event)

    def fail(self, error: EngineDead | EngineBusy) -> None:
        """End with an error after the events that are there (the client's side)."""
        self._arrived.put_nowait(error)

    def _close(self) -> None:
        if not self._ended:
            self._ended = True
            self._on_leave(self.request_id)

    def __del__(self) -> None:
        self._close()
