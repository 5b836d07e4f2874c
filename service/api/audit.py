"""Wraps a route's handler so that each request of a known caller leaves a line in the audit log, however it ends.

A request without a known key did nothing and gets no line: strangers could fill the disk with them. The access log has
it.
"""

import json
import time
from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import HTTPException, Request, Response
from fastapi.exceptions import RequestValidationError

from onebit_core.errors import OnebitError
from service.api.errors import FRAMEWORK_CODES
from service.audit import AuditEntry, AuditLog
from service.errors import ServiceError, response_for

Handler = Callable[[Request], Coroutine[Any, Any, Response]]

TARGET_FIELDS = ("name", "path", "model", "alias", "method", "unload_first")
"""Fields of bodies that say what a request is about."""

TARGET_QUERIES = ("dry_run", "verify")
LONGEST_ANSWER_BYTES = 1 << 16


def audited(handle: Handler) -> Handler:
    """Return a handler that does the same and writes down that it did."""

    async def handle_and_write(request: Request) -> Response:
        started = time.perf_counter()
        try:
            response = await handle(request)
        except BaseException as error:
            status, code = _outcome(error)
            _write(request, status=status, error=code, seconds=time.perf_counter() - started)
            raise
        result = _id_in(response) if request.method in ("POST", "PUT") else None
        seconds = time.perf_counter() - started
        _write(request, status=response.status_code, error=None, seconds=seconds, result=result)
        return response

    return handle_and_write


def _write(request: Request, *, status: int, error: str | None, seconds: float, result: str | None = None) -> None:
    """Write one entry, if it is known who asked."""
    state = request.scope.get("state", {})
    if state.get("caller") is None:
        return
    log: AuditLog = request.app.state.audit
    log.write(
        AuditEntry(
            action=getattr(request.scope.get("route"), "name", "unknown"),
            method=request.method,
            route=getattr(request.scope.get("route"), "path", "unknown"),
            key_id=state["caller"].id,
            source=request.client.host if request.client is not None else None,
            request_id=state.get("request_id"),
            target=_target(request, state.get("sent")),
            result=result,
            status=status,
            outcome="done" if status < 400 else "refused" if status < 500 else "failed",
            error=error,
            seconds=round(seconds, 4),
        )
    )


def _target(request: Request, sent: object) -> dict[str, str]:
    """Say what a request is about: its path's parts, and the fields of its body that name something."""
    fields = {name: sent[name] for name in TARGET_FIELDS if name in sent} if isinstance(sent, dict) else {}
    queries = {name: request.query_params[name] for name in TARGET_QUERIES if name in request.query_params}
    parts = {**fields, **queries, **request.path_params}
    return {name: str(value) for name, value in parts.items() if isinstance(value, str | int | float)}


def _id_in(response: Response) -> str | None:
    """Return the id that an answer names."""
    body = getattr(response, "body", b"")
    if not body or len(body) > LONGEST_ANSWER_BYTES:
        return None
    try:
        answer = json.loads(body)
    except ValueError:
        return None
    found = answer.get("id") if isinstance(answer, dict) else None
    return found if isinstance(found, str) else None


def _outcome(error: BaseException) -> tuple[int, str | None]:
    """Return the status and code that an exception will be answered with."""
    match error:
        case ServiceError():
            row = response_for(error)
            return row.status, row.code
        case OnebitError() | RequestValidationError():
            return 400, "invalid_value"
        case HTTPException():
            return error.status_code, FRAMEWORK_CODES.get(error.status_code)
        case _:
            return 500, type(error).__name__
