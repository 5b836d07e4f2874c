"""What happens around every request, in plain ASGI: an id, a clock, a line in the log, a limit on the body.

Plain ASGI because Starlette's BaseHTTPMiddleware puts a queue between a stream and its reader, which hides that the
reader left.
"""

import json
import logging
import re
import time
import uuid
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.api.errors import FRAMEWORK_CODES, error_body
from service.auth import KEY_PREFIX
from service.http_metrics import HttpMetrics
from service.log import request_id_of_context

access_log = logging.getLogger("service.access")

REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
NO_ROUTE = "unmatched"
KNOWN_METHODS = frozenset({"GET", "POST", "DELETE", "PUT", "PATCH", "HEAD", "OPTIONS"})
QUIET_ROUTES = frozenset({"/health", "/health/live", "/health/ready", "/metrics"})
"""Probes and scrapes: counted, but not logged."""


class RequestContext:
    """Gives each request an id, and records how it ended.

    A caller's x-request-id is kept only if it is short and harmless, and no key in the wrong place; otherwise one is
    made. The answer carries it.
    """

    def __init__(self, app: ASGIApp, metrics: HttpMetrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = _request_id(Headers(scope=scope).get("x-request-id"))
        scope.setdefault("state", {})["request_id"] = request_id
        status = 500

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                headers["x-request-id"] = request_id
                allowance = scope["state"].get("allowance")
                if allowance is not None:
                    headers.update(allowance.headers())
            await send(message)

        token = request_id_of_context.set(request_id)
        started = time.perf_counter()
        try:
            await self._app(scope, receive, send_with_id)
        finally:
            self._record(scope, status, time.perf_counter() - started)
            request_id_of_context.reset(token)

    def _record(self, scope: Scope, status: int, seconds: float) -> None:
        """Count the request, and log it unless it was a probe."""
        route = getattr(scope.get("route"), "path", NO_ROUTE)
        method = scope["method"] if scope["method"] in KNOWN_METHODS else "OTHER"
        self._metrics.requests.labels(route, method, str(status)).inc()
        self._metrics.duration.labels(route, method).observe(seconds)
        if route in QUIET_ROUTES:
            return
        fields: dict[str, Any] = {"route": route, "method": method, "status": status, "seconds": round(seconds, 4)}
        caller = scope["state"].get("caller")
        if caller is not None:
            fields["key_id"] = caller.id
        access_log.info("request", extra=fields)


def _request_id(offered: str | None) -> str:
    is_harmless = offered and REQUEST_ID.fullmatch(offered) and not offered.startswith(KEY_PREFIX)
    return offered if offered and is_harmless else uuid.uuid4().hex


class BodyLimit:
    """Refuses a body over the limit: at once when its length is announced, else at the byte that is too many.

    And one that is compressed: a limit on what arrives says nothing about what comes out.
    """

    def __init__(self, app: ASGIApp, max_body_bytes: int) -> None:
        self._app = app
        self._max_body_bytes = max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one connection."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        if _announced_length(scope) > self._max_body_bytes:
            await self._refuse(send, 413, self._message())
            return
        if Headers(scope=scope).get("content-encoding", "identity").strip().lower() != "identity":
            await self._refuse(send, 415, "compressed bodies are not taken; send the body without content-encoding")
            return
        received = 0

        async def receive_counted() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > self._max_body_bytes:
                raise HTTPException(413, self._message())
            return message

        await self._app(scope, receive_counted, send)

    def _message(self) -> str:
        return f"the body is larger than {self._max_body_bytes} bytes"

    async def _refuse(self, send: Send, status: int, message: str) -> None:
        """Answer without reading; what still comes is dropped (service.api.connections)."""
        body = error_body(message, "invalid_request_error", param=None, code=FRAMEWORK_CODES[status])
        headers = [(b"content-type", b"application/json")]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": json.dumps(body).encode()})


def _announced_length(scope: Scope) -> int:
    text = Headers(scope=scope).get("content-length", "0")
    return int(text) if text.isascii() and text.isdigit() else 0
