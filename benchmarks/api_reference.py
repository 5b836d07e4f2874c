"""Prints docs/api-reference.md: every route with its fields, from the OpenAPI document that the server itself shows.

python -m benchmarks.api_reference > docs/api-reference.md
"""

from typing import Any

from service.app import create_app
from service.settings import Settings

METHODS = ("get", "post", "put", "patch", "delete")
HEAD = """# API reference

<!-- Printed by `python -m benchmarks.api_reference`; edit service/api instead. -->

Every route of the server with the fields of its body, as in the OpenAPI document at `/openapi.json`. Examples, and what
differs from OpenAI's API, are in [http-api.md](http-api.md).
"""


def document() -> dict[str, Any]:
    """The OpenAPI document of a server that has every route."""
    settings = Settings(artifact_root="/artifacts", jobs_enabled=False, audit_file=None)
    return create_app(settings).openapi()


def render() -> str:
    """Return the page."""
    api = document()
    parts = [HEAD]
    for path, item in api["paths"].items():
        for method in METHODS:
            if method in item:
                parts.append(_route(method, path, item[method], api["components"]["schemas"]))
    return "\n".join(parts)


def _route(method: str, path: str, route: dict[str, Any], schemas: dict[str, Any]) -> str:
    lines = [f"## {method.upper()} {path}", "", route.get("description") or route.get("summary", "")]
    lines += ["", "Answers: " + ", ".join(f"`{status}`" for status in sorted(route["responses"])) + "."]
    fields = [_parameter(parameter, schemas) for parameter in route.get("parameters", [])]
    body = route.get("requestBody", {}).get("content", {}).get("application/json", {}).get("schema", {})
    fields += _properties(_resolve(body, schemas), schemas)
    if fields:
        lines += ["", "| field | type | default | meaning |", "|---|---|---|---|", *fields]
    return "\n".join([*lines, ""])


def _parameter(parameter: dict[str, Any], schemas: dict[str, Any]) -> str:
    text = parameter.get("description") or parameter["schema"].get("description", "")
    return _row(f"{parameter['name']} ({parameter['in']})", parameter["schema"], text, schemas)


def _properties(schema: dict[str, Any], schemas: dict[str, Any]) -> list[str]:
    required = schema.get("required", [])
    rows = []
    for name, field in schema.get("properties", {}).items():
        shown = f"**{name}**" if name in required else name
        rows.append(_row(shown, field, field.get("description", ""), schemas))
    return rows


def _row(name: str, schema: dict[str, Any], text: str, schemas: dict[str, Any]) -> str:
    default = schema.get("default")
    shown = "" if default is None or default == {} else f"`{default}`"
    cells = (name, _type(schema, schemas), shown, " ".join(text.split()))
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _type(schema: dict[str, Any], schemas: dict[str, Any]) -> str:
    """A type in a word or two; what has fields of its own is called by its name."""
    if "$ref" in schema:
        return str(schema["$ref"].rpartition("/")[2])
    if "enum" in schema:
        return " or ".join(f"`{value}`" for value in schema["enum"])
    if "const" in schema:
        return f"`{schema['const']}`"
    for key in ("anyOf", "oneOf", "allOf"):
        if key in schema:
            kinds = [_type(kind, schemas) for kind in schema[key] if kind.get("type") != "null"]
            return " or ".join(dict.fromkeys(kinds))
    if schema.get("type") == "array":
        return f"list of {_type(schema.get('items', {}), schemas)}"
    return str(schema.get("type", "any"))


def _resolve(schema: dict[str, Any], schemas: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = schemas[schema["$ref"].rpartition("/")[2]] if "$ref" in schema else schema
    return found


if __name__ == "__main__":
    print(render(), end="")
