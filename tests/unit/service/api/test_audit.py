"""Every request of a known caller to an admin route leaves a line: who, what, how it ended, and never a key."""

import json
import re

import pytest
from fastapi.routing import APIRoute

from service.api.guard import AdminRoute
from service.auth import Scope, add_key
from tests.support.paper_artifact import write_paper_artifact
from tests.support.scripted_server import scripted_server


@pytest.fixture
def guarded(tmp_path):
    """A server with an admin key, an inference key and an audit file."""
    keys_file = tmp_path / "keys.json"
    keys = {scope: add_key(keys_file, f"the-{scope.value}", frozenset({scope})) for scope in Scope}
    file = tmp_path / "audit.jsonl"
    write_paper_artifact(tmp_path / "root" / "blue")
    settings = {"keys_file": keys_file, "audit_file": file, "artifact_root": tmp_path / "root"}
    with scripted_server(tmp_path, **settings) as (client, _):
        yield client, {scope: {"authorization": f"Bearer {key}"} for scope, key in keys.items()}, file


def lines(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


def admin_routes(router):
    """Every admin route, those of included routers too."""
    for route in router.routes:
        inner = getattr(route, "original_router", None)
        if inner is not None:
            yield from admin_routes(inner)
        elif isinstance(route, AdminRoute):
            yield route


def test_every_admin_route_writes_one_line(guarded):
    """Whatever comes of it; a route that is added later is found here."""
    client, headers, file = guarded
    routes = list(admin_routes(client.app))
    assert len(routes) >= 12
    for route in routes:
        assert isinstance(route, APIRoute)
        for method in route.methods:
            before = len(lines(file))
            path = re.sub(r"\{[^}]*\}", "thing", route.path)
            answer = client.request(method, path, headers=headers[Scope.ADMIN], json={"path": "blue"})
            written = lines(file)[before:]
            assert len(written) == 1, (method, path)
            entry = written[0]
            assert (entry["route"], entry["method"], entry["action"]) == (route.path, method, route.name)
            assert entry["status"] == answer.status_code
            assert (entry["key_id"], entry["source"]) == ("the-admin", "testclient")
            assert entry["request_id"] == answer.headers["x-request-id"]
            expected = "done" if answer.status_code < 400 else "refused" if answer.status_code < 500 else "failed"
            assert entry["outcome"] == expected
            assert (entry["error"] is None) == (entry["outcome"] == "done")


def test_a_line_says_what_it_was_about(guarded):
    """Names and paths of the body, parts of the path, what came of it; the code where it was refused."""
    client, headers, file = guarded
    admin = headers[Scope.ADMIN]
    client.post("/admin/models/load", headers=admin, json={"path": "blue", "name": "live"})
    client.put("/admin/aliases/gpt", headers=admin, json={"model": "nobody"})
    client.delete("/admin/models/live", headers=admin)
    loaded, refused, unloaded = lines(file)
    assert (loaded["target"], loaded["result"]) == ({"path": "blue", "name": "live"}, "live")
    assert (refused["target"], refused["error"]) == ({"model": "nobody", "name": "gpt"}, "model_not_found")
    assert (unloaded["action"], unloaded["target"], unloaded["outcome"]) == ("unload_model", {"name": "live"}, "done")


def test_a_key_without_the_scope_is_written_down_and_a_stranger_is_not(guarded):
    """A known key that tries is worth a line; unknown ones could fill the disk."""
    client, headers, file = guarded
    assert client.get("/admin/models", headers=headers[Scope.INFERENCE]).status_code == 403
    assert client.get("/admin/models", headers={"authorization": "Bearer no"}).status_code == 401
    assert client.get("/admin/models").status_code == 401
    (entry,) = lines(file)
    assert (entry["key_id"], entry["status"], entry["error"]) == ("the-inference", 403, "insufficient_permissions")


def test_no_key_is_ever_in_a_line(guarded, caplog):
    """Neither the one that was sent, nor one that was pasted where a name belongs."""
    client, headers, file = guarded
    admin = headers[Scope.ADMIN]
    key = admin["authorization"].removeprefix("Bearer ")
    client.delete(f"/admin/models/{key}", headers=admin)
    client.post("/admin/models/load", headers=admin, json={"path": key, "name": f"x{key}"})
    client.get("/admin/models", headers=admin, params={"verify": key})
    assert len(lines(file)) == 3
    for text in (file.read_text(), *(str(vars(record)) for record in caplog.records if record.name == "service.audit")):
        assert key not in text
    assert lines(file)[0]["target"] == {"name": "ob-..."}


def test_odd_texts_stay_on_their_line(guarded):
    """Line ends and colours are escaped, long names cut."""
    client, headers, file = guarded
    odd = '\n{"action": "forged"}\x1b[31m\u2028' + "x" * 4000
    client.post("/admin/models/load", headers=headers[Scope.ADMIN], json={"path": odd})
    (entry,) = lines(file)
    assert len(entry["target"]["path"]) == 256
    assert file.read_text().isascii()
    assert "\x1b" not in file.read_text()


def test_the_file_may_be_moved_away(guarded):
    """As logrotate does: the next line begins a new file; nobody but its owner may read either."""
    client, headers, file = guarded
    client.get("/admin/models", headers=headers[Scope.ADMIN])
    file.rename(file.with_suffix(".1"))
    client.get("/admin/models", headers=headers[Scope.ADMIN])
    assert (len(lines(file)), len(lines(file.with_suffix(".1")))) == (1, 1)
    assert file.stat().st_mode & 0o777 == 0o600


def test_a_file_that_cannot_be_written_is_told_and_nothing_else_fails(guarded, caplog):
    """The line is in the log all the same."""
    client, headers, file = guarded
    file.unlink()
    file.mkdir()
    assert client.get("/admin/models", headers=headers[Scope.ADMIN]).status_code == 200
    messages = [record.getMessage() for record in caplog.records if record.name == "service.audit"]
    assert any("cannot be written" in message for message in messages)


def test_a_link_is_not_followed(tmp_path):
    """Or whoever may write the folder could let the server append to another file."""
    (tmp_path / "audit").symlink_to(tmp_path / "other")
    with pytest.raises(OSError, match="symbolic"), scripted_server(tmp_path, audit_file=tmp_path / "audit"):
        pass
    assert not (tmp_path / "other").exists()
