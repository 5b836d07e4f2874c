"""/openapi.json, told truthfully.

FastAPI announces 422 for every body, but this server answers 400. It knows no route that answers either JSON or events:
a stream's events are declared by `itemSchema`, as OpenAPI 3.2 has it and FastAPI itself does. A head that is too large
is refused before a route is known, so every route may answer 431.
"""

from collections.abc import Sequence
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from service.api.errors import DESCRIPTIONS, ErrorBody

UNUSED_SCHEMAS = ("HTTPValidationError", "ValidationError")
REFERENCE = "#/components/schemas/{model}"


def event_stream(event: type[BaseModel], *, is_openai: bool = True) -> dict[int | str, dict[str, Any]]:
    """Declare that an answer may be a stream of `event`.

    Args:
        event: what an event's data is.
        is_openai: whether an error may stand in its place, and the last one's data is the word [DONE].
    """
    may_be = (event, ErrorBody) if is_openai else (event,)
    content = [{"$ref": REFERENCE.format(model=model.__name__)} for model in may_be]
    data = [{"type": "string", "contentMediaType": "application/json", "contentSchema": {"anyOf": content}}]
    end = [{"type": "string", "const": "[DONE]"}] if is_openai else []
    text = {"type": "string"}
    properties = {"data": {"anyOf": [*end, *data]}, "event": text, "id": text}
    item = {"type": "object", "properties": properties, "required": ["data"]}
    return {200: {"content": {"text/event-stream": {"itemSchema": item}}}}


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
    error = {"application/json": {"schema": {"$ref": REFERENCE.format(model=ErrorBody.__name__)}}}
    head_too_large = {"description": DESCRIPTIONS[431], "content": error}
    for path in document["paths"].values():
        for operation in path.values():
            operation["responses"].pop("422", None)
            operation["responses"]["431"] = head_too_large
    for name in UNUSED_SCHEMAS:
        document.get("components", {}).get("schemas", {}).pop(name, None)
    _, extra = models_json_schema([(event, "serialization") for event in events], ref_template=REFERENCE)
    schemas = document.setdefault("components", {}).setdefault("schemas", {})
    for name, schema in extra.get("$defs", {}).items():
        schemas.setdefault(name, schema)
    return document
