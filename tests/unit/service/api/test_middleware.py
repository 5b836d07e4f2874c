"""Around every request: its id, its count, and what a bug looks like from outside."""

import json
import logging

import pytest

from tests.support.scripted_server import scripted_server


@pytest.fixture
def client(tmp_path):
    with scripted_server(tmp_path) as (client, _):
        yield client


def test_a_harmless_request_id_is_kept(client):
    """The caller's id comes back."""
    response = client.get("/health/live", headers={"x-request-id": "Trace-1.2_3"})
    assert response.headers["x-request-id"] == "Trace-1.2_3"


@pytest.mark.parametrize("bad", ["", "a b", "a" * 65, "x;y", "é", '"'])
def test_any_other_request_id_is_replaced(client, bad):
    """Spaces, quotes and long ids never reach a log line."""
    given = client.get("/health/live", headers={"x-request-id": bad.encode()}).headers["x-request-id"]
    assert given != bad
    assert len(given) == 32


def test_requests_are_logged_without_content(client, caplog):
    """A line has route, status, duration and the key's id; probes have none."""
    caplog.set_level(logging.INFO)
    client.post("/v1/completions", json={"model": "paper", "prompt": "a secret prompt"})
    client.get("/health/ready")
    lines = [record for record in caplog.records if record.name == "service.access"]
    assert [line.route for line in lines] == ["/v1/completions"]
    assert (lines[0].status, lines[0].method, lines[0].key_id) == (200, "POST", "anonymous")
    assert "secret prompt" not in json.dumps([vars(record) for record in caplog.records], default=str)


def test_a_bug_is_a_500_with_the_request_id(client, caplog):
    """An exception nobody expected tells its id and nothing else, and the server goes on."""
    client.app.state.registry.get("paper").manifest = None
    response = client.post("/v1/completions", json={"model": "paper", "prompt": "x"}, headers={"x-request-id": "bug-1"})
    assert response.status_code == 500
    error = response.json()["error"]
    assert (error["code"], error["type"]) == ("internal_error", "server_error")
    assert "bug-1" in error["message"]
    assert "NoneType" not in error["message"]
    assert response.headers["x-request-id"] == "bug-1"
    assert response.headers["x-should-retry"] == "false"
    assert client.get("/health/live").status_code == 200
    assert 'route="/v1/completions",status="500"' in client.get("/metrics").text
