"""Every error becomes OpenAI's envelope: {"error": {"message", "type", "param", "code"}}.

Statuses, types and codes of our own exceptions are the table in service/errors.py. A body that does not validate is
answered 400 with the first complaint; the offending value is never repeated, because it may be a secret, a megabyte, or
something JSON cannot write (NaN, a lone surrogate). Answers are ASCII-escaped for the same reason. A bug is a 500 that
tells the request id and nothing else; the log has the rest.
"""

import json
import logging
import math
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.responses import Response

from onebit_core.errors import OnebitError
from service.errors import ErrorResponse, ServiceError, response_for

logger = logging.getLogger(__name__)

MAX_FIELD_CHARACTERS = 64


class ErrorDetail(BaseModel):
    """What went wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """OpenAI's error envelope."""

    error: ErrorDetail


class ErrorAnswer(Response):
    """The envelope as an HTTP response."""

    media_type = "application/json"

    def __init__(self, row: ErrorResponse, message: str, *, param: str | None = None, **headers: str) -> None:
        body = error_body(message, row.type, param=param, code=row.code)
        names = {name.replace("_", "-"): value for name, value in headers.items()}
        super().__init__(json.dumps(body).encode(), row.status, headers=names)


def error_body(message: str, kind: str, *, param: str | None, code: str | None) -> dict[str, Any]:
    """Build the envelope."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def service_error_body(error: ServiceError) -> dict[str, Any]:
    """Build the envelope of one of our exceptions, for a stream whose status is already sent."""
    row = response_for(error)
    return error_body(error.message, row.type, param=error.param, code=row.code)


def declared_errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """What a router tells OpenAPI about its errors."""
    return {status: {"model": ErrorBody, "description": DESCRIPTIONS[status]} for status in statuses}


DESCRIPTIONS: Mapping[int, str] = {
    400: "The request cannot be meant; `param` names the field.",
    401: "No API key, or an unknown one.",
    403: "The key lacks the scope.",
    404: "No such model, job or path.",
    405: "The path has no such method.",
    409: "It exists already, or is in a state that does not allow this.",
    413: "The body is over the limit.",
    429: "The queue is full, or the key over its rate; Retry-After says when to try again.",
    431: "The head of the request, which holds its path and query, is over the limit.",
    500: "A fault of the server.",
    503: "The engine is loading, restarting or shutting down; Retry-After says when to try again.",
}

FRAMEWORK_MESSAGES: Mapping[str, str] = {
    "Not Found": "there is no such path; /openapi.json lists them",
    "Method Not Allowed": "this path does not take that method",
}

# Codes of statuses that the framework raises itself.
FRAMEWORK_CODES: Mapping[int, str] = {
    400: "invalid_json",
    404: "path_not_found",
    405: "method_not_allowed",
    413: "payload_too_large",
    415: "unsupported_media_type",
}


def install_error_handlers(app: FastAPI) -> None:
    """Give the application the four handlers below."""
    app.add_exception_handler(ServiceError, answer_service_error)
    app.add_exception_handler(OnebitError, answer_core_error)
    app.add_exception_handler(RequestValidationError, answer_validation_error)
    app.add_exception_handler(HTTPException, answer_framework_error)
    app.add_exception_handler(Exception, answer_bug)


async def answer_service_error(_request: Request, error: Exception) -> Response:
    """Answer one of our own exceptions by the table."""
    assert isinstance(error, ServiceError)
    row = response_for(error)
    headers: dict[str, str] = {}
    if error.retry_after_seconds is not None:
        headers["retry_after"] = str(max(1, math.ceil(error.retry_after_seconds)))
    elif row.status >= 500 or row.status == 409:
        headers["x_should_retry"] = "false"  # OpenAI's client would otherwise repeat what cannot succeed
    if row.status == 401:
        headers["www_authenticate"] = "Bearer"
    return ErrorAnswer(row, error.message, param=error.param, **headers)


async def answer_core_error(_request: Request, error: Exception) -> Response:
    """Answer an exception of the core: what the caller named cannot be used."""
    return ErrorAnswer(ErrorResponse(status=400, type="invalid_request_error", code="invalid_value"), str(error))


async def answer_validation_error(_request: Request, error: Exception) -> Response:
    """Answer a body that does not fit its schema."""
    assert isinstance(error, RequestValidationError)
    code, message, param = describe_complaint(error.errors())
    row = ErrorResponse(status=400, type="invalid_request_error", code=code)
    return ErrorAnswer(row, message, param=param)


async def answer_framework_error(_request: Request, error: Exception) -> Response:
    """Answer what FastAPI and Starlette raise: unknown path, wrong method, unreadable body."""
    assert isinstance(error, HTTPException)
    kind = "invalid_request_error" if error.status_code < 500 else "server_error"
    row = ErrorResponse(status=error.status_code, type=kind, code=FRAMEWORK_CODES.get(error.status_code))
    headers = {name.replace("-", "_"): value for name, value in (error.headers or {}).items()}
    return ErrorAnswer(row, FRAMEWORK_MESSAGES.get(error.detail, error.detail), **headers)


async def answer_bug(request: Request, error: Exception) -> Response:
    """Answer an exception nobody expected; the server's error log has its traceback."""
    request_id = request.scope.get("state", {}).get("request_id", "unknown")
    logger.error("request failed: %s", type(error).__name__, extra={"request_id": request_id})
    row = ErrorResponse(status=500, type="server_error", code="internal_error")
    message = f"the server made a mistake; its log has the details under request id {request_id}"
    return ErrorAnswer(row, message, x_request_id=request_id, x_should_retry="false")


def describe_complaint(errors: Sequence[Mapping[str, Any]]) -> tuple[str, str, str | None]:
    """Turn pydantic's complaints into (code, message, param), repeating nothing that was sent but a field's name."""
    first = errors[0]
    location = [part for part in first["loc"][1:] if isinstance(part, int) or not _is_type_name(part)]
    param = ".".join(str(part) for part in location)[:MAX_FIELD_CHARACTERS] or None
    message = str(first["msg"]).removeprefix("Value error, ")
    match first["type"]:
        case "json_invalid":
            return "invalid_json", "the body is not valid JSON", None
        case "missing" | "model_attributes_type" | "dict_type" if param is None:
            return "invalid_json", "the body must be a JSON object with content type application/json", None
        case "missing":
            return "missing_required_parameter", f"{param} is required", param
        case "extra_forbidden":  # its name is the caller's, and may look like one of pydantic's
            param = ".".join(str(part) for part in first["loc"][1:])[:MAX_FIELD_CHARACTERS]
            return "unknown_parameter", f"{param} is not a parameter of this endpoint", param
        case "unsupported_parameter":
            return "unsupported_parameter", message, param
        case "value_error":
            return "invalid_value", message, param
        case _:
            return "invalid_value", f"{param or 'body'}: {message[:1].lower()}{message[1:]}", param


def _is_type_name(part: str) -> bool:
    """Whether a part of a location is pydantic's name for a member of a union rather than a field."""
    return "[" in part or part in {"str", "int", "float", "bool", "dict", "none"}
