"""OpenAI's published schemas, held against every body and every chunk of a stream that a client receives.

The file is OpenAI's API description cut down to its schemas; the environment variable OPENAI_SCHEMAS names it. Where it
is absent nothing is checked, and the test that reports so is skipped.
"""

import json
import os
from pathlib import Path
from typing import Any

import jsonschema

FALLBACK = Path(__file__).resolve().parents[3] / "shared" / "data" / "openai" / "schemas.json"

WHOLE = {
    "/v1/completions": "CreateCompletionResponse",
    "/v1/chat/completions": "CreateChatCompletionResponse",
    "/v1/models": "ListModelsResponse",
}
CHUNK = {"/v1/completions": "CreateCompletionResponse", "/v1/chat/completions": "CreateChatCompletionStreamResponse"}


def find_schemas() -> Path | None:
    """Where the schemas are; None if they are not there."""
    path = Path(os.environ.get("OPENAI_SCHEMAS", FALLBACK))
    return path if path.is_file() else None


class SchemaCheck:
    """Checks responses as they arrive: give it to a client as an event hook.

    Attributes:
        checked: how many bodies and chunks were held against each schema.
    """

    def __init__(self, path: Path | None) -> None:
        self.checked: dict[str, int] = {}
        self._document = None
        if path is not None:
            document = json.loads(path.read_text(encoding="utf-8"))
            self._document = {"components": {"schemas": _as_json_schema(document["components"]["schemas"])}}
            _allow_what_openai_sends(self._document["components"]["schemas"])

    def __call__(self, response: Any) -> None:
        """Read a response and check what it holds."""
        response.read()
        path = response.request.url.path
        if self._document is None or not path.startswith("/v1"):
            return
        if response.headers["content-type"].startswith("text/event-stream"):
            *frames, done, rest = response.text.split("\n\n")
            assert (done, rest) == ("data: [DONE]", "")
            for frame in frames:
                chunk = json.loads(frame.removeprefix("data: "))
                self.check("ErrorResponse" if "error" in chunk else CHUNK[path], chunk)
        elif response.status_code >= 400:
            self.check("ErrorResponse", response.json())
        else:
            self.check(WHOLE.get(path, "Model"), response.json())

    def check(self, name: str, body: Any) -> None:
        """Hold one body against a schema.

        Raises:
            jsonschema.ValidationError: it does not fit.
        """
        assert self._document is not None
        schema = {**self._document, "$ref": f"#/components/schemas/{name}"}
        jsonschema.Draft202012Validator(schema).validate(body)
        self.checked[name] = self.checked.get(name, 0) + 1


def _as_json_schema(node: Any) -> Any:
    """Write OpenAPI 3.0's `nullable` as JSON schema does."""
    if isinstance(node, list):
        return [_as_json_schema(item) for item in node]
    if not isinstance(node, dict):
        return node
    plain = {key: _as_json_schema(value) for key, value in node.items() if key != "nullable"}
    return {"anyOf": [plain, {"type": "null"}]} if node.get("nullable") is True else plain


def _allow_what_openai_sends(schemas: dict[str, Any]) -> None:
    """Mend where the published schema is stricter than OpenAI's own server and client.

    A chunk of completions has finish_reason null until the last and usage null until the end, and the first echoed
    token has null for its probability.
    """
    completion = schemas["CreateCompletionResponse"]["properties"]
    _or_null(completion, "usage")
    choice = completion["choices"]["items"]["properties"]
    _or_null(choice, "finish_reason")
    lists = choice["logprobs"]["anyOf"][0]["properties"]
    _or_null(lists["token_logprobs"], "items")
    _or_null(lists["top_logprobs"], "items")


def _or_null(holder: dict[str, Any], key: str) -> None:
    holder[key] = {"anyOf": [holder[key], {"type": "null"}]}
