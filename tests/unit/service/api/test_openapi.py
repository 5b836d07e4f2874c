"""/openapi.json is truthful, and docs/http-api.md names what it names."""

from pathlib import Path

import pytest

from service.api.admin.schemas import QuantizeBody
from service.api.errors import FRAMEWORK_CODES
from service.api.openai.requests import ChatBody, CompletionBody
from service.errors import RESPONSES
from tests.support.scripted_server import scripted_server

PAGE = (Path(__file__).parents[4] / "docs" / "http-api.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def document(tmp_path_factory):
    with scripted_server(tmp_path_factory.mktemp("server")) as (client, _):
        yield client.get("/openapi.json").json()


def operations(document):
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            yield path, method, operation


def test_guarded_operations_declare_key_and_errors(document):
    """Whoever generates a client learns of 401, 403 and our envelope; nobody learns of a 422 that never comes."""
    for path, method, operation in operations(document):
        assert "422" not in operation["responses"], path
        if path not in ("/health", "/health/live", "/health/ready", "/metrics"):
            assert operation["security"] == [{"HTTPBearer": []}]
            for status in ("401", "403", "500"):
                schema = operation["responses"][status]["content"]["application/json"]["schema"]
                assert schema == {"$ref": "#/components/schemas/ErrorBody"}, (path, method, status)
    assert "HTTPValidationError" not in document["components"]["schemas"]


def test_bodies_forbid_what_they_do_not_name(document):
    """The schema itself says that unknown fields are refused."""
    for name in ("CompletionBody", "ChatBody", "QuantizeBody", "LoadBody"):
        assert document["components"]["schemas"][name]["additionalProperties"] is False


def test_unsupported_parameters_show_what_passes(document):
    """A field like suffix is there, and may only be null or empty."""
    suffix = document["components"]["schemas"]["CompletionBody"]["properties"]["suffix"]
    assert suffix["enum"] == [None, ""]


def test_streams_are_declared(document):
    """Both answer JSON or events."""
    for path in ("/v1/completions", "/v1/chat/completions"):
        content = document["paths"][path]["post"]["responses"]["200"]["content"]
        assert set(content) == {"application/json", "text/event-stream"}
        data = content["text/event-stream"]["itemSchema"]["properties"]["data"]["anyOf"]
        assert data[0]["const"] == "[DONE]"
        chunk, error = (
            document["components"]["schemas"][name.rpartition("/")[2]]["properties"] for name in references(data[1])
        )
        assert "choices" in chunk
        assert "error" in error


def test_a_job_is_followed_by_events(document):
    """Each is the job; there is no other answer and no word at the end."""
    content = document["paths"]["/admin/jobs/{job_id}/events"]["get"]["responses"]["200"]["content"]
    (media,) = content.values()
    assert list(references(media)) == ["#/components/schemas/JobAnswer"]


def references(node):
    """Every $ref inside a document."""
    if isinstance(node, dict):
        if isinstance(node.get("$ref"), str):
            yield node["$ref"]
        node = list(node.values())
    if isinstance(node, list):
        for item in node:
            yield from references(item)


def test_no_reference_leads_nowhere(document):
    """Whatever is referred to is there."""
    names = {reference.removeprefix("#/components/schemas/") for reference in references(document)}
    assert names <= set(document["components"]["schemas"])
    assert {"ChatDelta", "ToolCallDelta", "Usage", "ErrorBody"} <= names


@pytest.mark.parametrize("body", [CompletionBody, ChatBody, QuantizeBody])
def test_the_page_names_every_field(body):
    """A field that is read, ignored or refused is on the page."""
    missing = [name for name in body.model_fields if f"`{name}`" not in PAGE and f'"{name}"' not in PAGE]
    assert missing == []


def test_the_page_names_every_path_and_code(document):
    """No endpoint and no error code is undocumented."""
    for path in document["paths"]:
        plain = path.replace("{name:path}", "{name}").replace("{job_id}", "{id}")
        assert f"{plain}`" in PAGE or f"{plain}/" in PAGE, path
    codes = {row.code for row in RESPONSES.values()} | set(FRAMEWORK_CODES.values())
    for code in codes - {None, "unsupported_media_type"}:
        assert f"`{code}`" in PAGE, code
