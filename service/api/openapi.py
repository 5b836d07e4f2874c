"""/openapi.json, told truthfully: FastAPI announces 422 for every body, but this server answers 400."""

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi

UNUSED_SCHEMAS = ("HTTPValidationError", "ValidationError")


def install_openapi(app: FastAPI) -> None:
    """Make the application describe itself with `describe`, once."""

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            app.openapi_schema = describe(app)
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]  # the way FastAPI documents


def describe(app: FastAPI) -> dict[str, Any]:
    """Build the description."""
    document = get_openapi(title=app.title, version=app.version, summary=app.summary, routes=app.routes)
    for path in document["paths"].values():
        for operation in path.values():
            operation["responses"].pop("422", None)
    for name in UNUSED_SCHEMAS:
        document.get("components", {}).get("schemas", {}).pop(name, None)
    return document
