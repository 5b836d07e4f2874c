"""Who may do what: every route is guarded or on the public list, and the guard comes before the body."""

import pytest
from fastapi.routing import APIRoute

from service.api.guard import AdminRoute, GuardedRoute, InferenceRoute
from service.auth import Scope, add_key
from tests.support.scripted_server import scripted_server

PUBLIC = {"/health", "/health/live", "/health/ready", "/metrics", "/openapi.json"}


@pytest.fixture
def guarded(tmp_path):
    """A server with keys: one for inference, one for admin."""
    file = tmp_path / "keys.json"
    keys = {scope: add_key(file, scope.value, frozenset({scope})) for scope in Scope}
    with scripted_server(tmp_path, keys_file=file) as (client, _):
        yield client, keys


def all_routes(router, prefix=""):
    """Every route, those of included routers too."""
    for route in router.routes:
        inner = getattr(route, "original_router", None)
        if inner is not None:
            yield from all_routes(inner)
        else:
            yield route


def bearer(key):
    return {"authorization": f"Bearer {key}"}


def test_every_route_is_public_by_name_or_guarded(guarded):
    """A new route cannot be forgotten: it is on the public list, or asks for a scope."""
    routes = list(all_routes(guarded[0].app))
    assert len(routes) >= 13
    for route in routes:
        if route.path in PUBLIC:
            continue
        expected = AdminRoute if route.path.startswith("/admin") else InferenceRoute
        assert isinstance(route, expected), route.path
        assert isinstance(route, GuardedRoute)


def test_without_a_key_only_public_paths_answer(guarded):
    """Every other route and method is 401 in OpenAI's envelope."""
    client, _ = guarded
    for route in all_routes(client.app):
        for method in route.methods - {"HEAD"}:
            path = route.path.replace("{name:path}", "paper").replace("{job_id}", "j")
            response = client.request(method, path)
            if route.path in PUBLIC:
                assert response.status_code == 200
            else:
                assert response.status_code == 401, path
                assert response.json()["error"]["code"] == "invalid_api_key"
                assert response.headers["www-authenticate"] == "Bearer"
    assert isinstance(route, APIRoute)


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"authorization": ""},
        {"authorization": "Bearer"},
        {"authorization": "Bearer wrong"},
        {"authorization": "Bearer " + "k" * 50_000},
        {"authorization": "Basic YTpi"},
        {"x-api-key": "KEY"},
    ],
)
def test_a_wrong_key_is_a_401(guarded, headers):
    """No key, a wrong one, a huge one, or one in another place."""
    client, keys = guarded
    values = {name: value.replace("KEY", keys[Scope.INFERENCE]) for name, value in headers.items()}
    assert client.get("/v1/models", headers=values).status_code == 401
    assert client.get("/v1/models", params={"api_key": keys[Scope.INFERENCE]}).status_code == 401


def test_scopes_are_separate(guarded):
    """An inference key opens no admin route, an admin key generates nothing."""
    client, keys = guarded
    for path, scope in (("/v1/models", Scope.INFERENCE), ("/admin/models", Scope.ADMIN)):
        for key_scope, key in keys.items():
            status = client.get(path, headers=bearer(key)).status_code
            assert status == (200 if key_scope == scope else 403)


@pytest.mark.parametrize(
    "path",
    ["//admin/models", "/admin/models/", "/ADMIN/models", "/admin%2Fmodels", "/v1/../admin/models", "/admin/models?x"],
)
def test_no_spelling_leads_around_the_guard(guarded, path):
    """Whatever the router makes of a path, the guard is on what it finds."""
    client, keys = guarded
    headers = {**bearer(keys[Scope.INFERENCE]), "x-forwarded-prefix": "/admin", "x-original-url": "/health/live"}
    assert client.get(path, headers=headers).status_code in (403, 404, 405)


def test_the_key_is_checked_before_the_body(guarded):
    """A stranger cannot make the server parse anything."""
    client, _ = guarded
    response = client.post("/v1/completions", content=b"{", headers={"content-type": "application/json"})
    assert response.status_code == 401


@pytest.mark.parametrize(
    ("host", "status"),
    [("127.0.0.1:8000", 200), ("localhost", 200), ("[::1]:80", 200), ("evil.example", 403), ("", 403)],
)
def test_without_keys_only_this_machines_names_are_answered(tmp_path, host, status):
    """A web page cannot reach the open server through a name of its own."""
    with scripted_server(tmp_path) as (client, _):
        assert client.get("/v1/models", headers={"host": host}).status_code == status
        assert client.get("/health/live", headers={"host": host}).status_code == 200


def test_an_open_server_lets_loopback_do_everything(tmp_path):
    """Without a key file, admin is open on loopback."""
    with scripted_server(tmp_path) as (client, _):
        assert client.get("/admin/models").status_code == 200
