"""Server-sent events as OpenAI frames them: `data: {json}` and a blank line, and `data: [DONE]` at the end.

A failure after the status was sent can only be told in the stream: as `data: {"error": ...}`, which OpenAI's clients
raise, then [DONE].
"""

import json
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import AsyncExitStack, aclosing
from typing import Any

from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from service.api.errors import service_error_body
from service.errors import ServiceError

DONE = b"data: [DONE]\n\n"
ENCODE = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode  # made once: a stream needs it every token
HEADERS = {"cache-control": "no-cache", "x-accel-buffering": "no"}


def frame(data: dict[str, Any]) -> bytes:
    """Write one event."""
    return b"data: " + ENCODE(data).encode() + b"\n\n"


class EventStream(StreamingResponse):
    """Answers with a stream of chunks, holding what they need until the stream ends or the client leaves."""

    def __init__(self, chunks: AsyncGenerator[dict[str, Any], None], held: AsyncExitStack) -> None:
        super().__init__(_frames(chunks), media_type="text/event-stream", headers=HEADERS)
        self._held = held

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the stream; what is held is let go even if nothing could be sent."""
        async with self._held:
            await super().__call__(scope, receive, send)


async def _frames(chunks: AsyncGenerator[dict[str, Any], None]) -> AsyncIterator[bytes]:
    async with aclosing(chunks):
        try:
            async for chunk in chunks:
                yield frame(chunk)
        except ServiceError as error:
            yield frame(service_error_body(error))
        yield DONE
