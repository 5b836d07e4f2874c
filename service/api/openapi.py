"""/openapi.json, told truthfully.

FastAPI announces 422 for every body, but this server answers 400. And it knows nothing of events: a stream is declared
as text, and `x-event` beside it is the schema of each event's data.
"""

from collections.abc import Sequence
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

UNUSED_SCHEMAS = ("HTTPValidationError", "ValidationError")
REFERENCE = "#/components/schemas/{model}"


def event_stream(event: type[BaseModel]) -> dict[int | str, dict[str, Any]]:
    """Declare that an answer may also be a stream of `event`."""
    schema = {"type": "string", "description": f"Events `data: <{event.__name__}>`, then `data: [DONE]`."}
    media = {"schema": schema, "x-event": {"$ref": REFERENCE.format(model=event.__name__)}}
    return {200: {"content": {"text/event-stream": media}}}


def install_openapi(app: FastAPI, *events: type[BaseModel]) -> None:
    """Make the application describe itself with `describe`, once."""

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            app.openapi_schema = describe(app, events)
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]  # the way FastAPI documents


def describe(app: FastAPI, events: Sequence[type[BaseModel]]) -> dict[str, Any]:
    """Build the description; `events` are the models that only streams have."""
    document = get_openapi(title=app.title, version=app.version, summary=app.summary, routes=app.routes)
    for path in document["paths"].values():
        for operation in path.values():
            operation["responses"].pop("422", None)
    for name in UNUSED_SCHEMAS:
        document.get("components", {}).get("schemas", {}).pop(name, None)
    _, extra = models_json_schema([(event, "serialization") for event in events], ref_template=REFERENCE)
    schemas = document.setdefault("components", {}).setdefault("schemas", {})
    for name, schema in extra.get("$defs", {}).items():
        schemas.setdefault(name, schema)
    return document
