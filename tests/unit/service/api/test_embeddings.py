"""POST /v1/embeddings over a scripted engine, whose vectors begin with the number of tokens."""

import base64
import json
from array import array

import pytest

from service.api.openai import embeddings
from service.errors import EngineBusy
from tests.support.scripted_engine import Script, ScriptedStarter
from tests.support.scripted_server import scripted_server


@pytest.fixture
def server(tmp_path):
    with scripted_server(tmp_path) as running:
        yield running


def embed(client, given, **body):
    return client.post("/v1/embeddings", json={"model": "paper", "input": given, **body})


@pytest.mark.parametrize(
    ("given", "lengths"),
    [("hello", [5]), (["a", "bcd"], [1, 3]), ([5, 6, 7], [3]), ([[5], [6, 7]], [1, 2])],
    ids=["text", "texts", "tokens", "lists of tokens"],
)
def test_every_form_of_input_is_embedded_in_order(server, given, lengths):
    """One vector for each, with its index; usage counts all tokens."""
    client, _ = server
    body = embed(client, given).json()
    assert (body["object"], body["model"]) == ("list", "paper")
    assert body["usage"] == {"prompt_tokens": sum(lengths), "total_tokens": sum(lengths)}
    assert body["data"] == [
        {"object": "embedding", "index": index, "embedding": [float(length), -0.5, 0.25]}
        for index, length in enumerate(lengths)
    ]


def test_base64_is_the_same_numbers(server):
    """Little-endian float32, which is what the openai package asks for by default."""
    client, _ = server
    (item,) = embed(client, "hello", encoding_format="base64").json()["data"]
    assert array("f", base64.b64decode(item["embedding"])).tolist() == [5.0, -0.5, 0.25]


def test_many_inputs_go_to_the_engine_some_at_a_time(server, monkeypatch):
    """The answer is in order, and one call does not fill the queue of all callers."""
    monkeypatch.setattr(embeddings, "AT_ONCE", 3)
    client, starter = server
    body = embed(client, ["x" * (1 + place) for place in range(10)]).json()
    assert [item["embedding"][0] for item in body["data"]] == list(range(1, 11))
    sent = starter.engines[0].requests
    assert len({request.request_id for request in sent}) == 10
    assert all(request.embed and request.sampling.max_tokens == 0 for request in sent)


@pytest.mark.parametrize(
    ("body", "param", "says"),
    [
        ({"input": ""}, "input", "none empty"),
        ({"input": []}, "input", "none empty"),
        ({"input": ["a", ""]}, "input", "none empty"),
        ({"input": [[1], []]}, "input", "none empty"),
        ({"input": None}, "input", "none empty"),
        ({"input": {"text": "a"}}, "input", "none empty"),
        ({"input": [1.5]}, "input", "none empty"),
        ({"input": ["a", [1]]}, "input", "must not mix"),
        ({"input": ["a"] * 2049}, "input", "at most 2048"),
        ({"input": "\ud800"}, "input", "lone surrogate"),
        ({"input": [320]}, "input", "go from 0 to 319"),
        ({"input": "x" * 65}, "input", "65 tokens and the context 64"),
        ({"input": "a", "encoding_format": "hex"}, "encoding_format", "float"),
        ({"input": "a", "dimensions": 2}, "dimensions", "this model's embeddings have 3"),
        ({"input": "a", "dimensions": 0}, "dimensions", "greater than or equal to 1"),
        ({"input": "a", "pooling": "mean"}, "pooling", "pooling"),
        ({}, "input", ""),
    ],
    ids=lambda value: str(value)[:40] if isinstance(value, dict) else "",
)
def test_what_cannot_be_meant_is_refused_by_name(server, body, param, says):
    """A 400 that names the field and says what is wrong with it."""
    client, starter = server
    content = json.dumps({"model": "paper", **body})
    response = client.post("/v1/embeddings", content=content, headers={"content-type": "application/json"})
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (400, param)
    assert says in error["message"]
    assert starter.engines[0].requests == []


def test_the_models_own_size_is_no_refusal(server):
    """Some clients always send dimensions."""
    client, _ = server
    assert embed(client, "a", dimensions=3, user="me").status_code == 200


def test_a_full_engine_and_an_unknown_model_have_their_statuses(tmp_path):
    """429 with Retry-After, and 404, as for completions."""
    refusal = EngineBusy("full", retry_after_seconds=1)
    with scripted_server(tmp_path, ScriptedStarter(Script(refusal=refusal))) as (client, _):
        response = embed(client, "a")
        assert (response.status_code, "retry-after" in response.headers) == (429, True)
        assert client.post("/v1/embeddings", json={"model": "other", "input": "a"}).status_code == 404
