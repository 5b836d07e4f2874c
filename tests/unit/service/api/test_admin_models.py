"""Models, aliases and artifacts over the admin API, on scripted engines."""

import hashlib
import json
import shutil
import struct
import threading
import time

import pytest

from tests.support.paper_artifact import paper_manifest, write_paper_artifact
from tests.support.scripted_engine import Script, ScriptedStarter
from tests.support.scripted_server import scripted_server


@pytest.fixture
def root(tmp_path):
    return tmp_path / "root"


@pytest.fixture
def server(tmp_path, root):
    """A server that serves `paper` from outside of its root, which holds the artifacts blue and green."""
    for name in ("blue", "green"):
        whole_artifact(root / name)
    with scripted_server(tmp_path, artifact_root=root) as (client, _):
        yield client


def whole_artifact(folder):
    """A paper artifact with a file of weights that its manifest describes."""
    write_paper_artifact(folder, folder.name)
    size = sum(paper_manifest().bytes_by_part.values())
    header = json.dumps({"codes": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}}).encode()
    weights = struct.pack("<Q", len(header)) + header + bytes(size)
    (folder / "model.safetensors").write_bytes(weights)
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**manifest, "sha256": hashlib.sha256(weights).hexdigest()}))
    return folder


def items(client, **query):
    return {item["id"]: item for item in client.get("/admin/artifacts", params=query).json()["data"]}


def test_a_plan_a_load_and_a_swap(server):
    """Each says what it did; what the list tells is what was planned."""
    plan = server.post("/admin/models/plan", json={"path": "blue"}).json()
    parts = [plan[f"{part}_bytes"] for part in ("weights", "loading", "kv_cache", "process")]
    assert (plan["id"], plan["fits"], plan["remedy"], plan["needed_bytes"]) == ("blue", True, None, sum(parts))
    assert len(server.get("/admin/models").json()["data"]) == 1
    loaded = server.post("/admin/models/load", json={"path": "blue", "name": "live"}).json()
    assert (loaded["id"], loaded["state"], loaded["planned_bytes"]) == ("live", "ready", plan["needed_bytes"])
    assert loaded["golden"] is None
    swapped = server.post("/admin/models/swap", json={"name": "live", "path": "green"})
    assert swapped.status_code == 200
    assert swapped.json()["path"].endswith("/green")
    assert server.post("/v1/completions", json={"model": "live", "prompt": "x"}).json()["model"] == "live"


@pytest.mark.parametrize(
    ("path", "body", "status", "code"),
    [
        ("swap", {"name": "nobody", "path": "blue"}, 404, "model_not_found"),
        ("swap", {"name": "paper", "path": "nothing"}, 404, "not_found"),
        ("swap", {"name": "paper", "path": "../x"}, 400, "invalid_value"),
        ("swap", {"name": "paper"}, 400, "missing_required_parameter"),
        ("swap", {"name": "paper", "path": "blue", "force": True}, 400, "unknown_parameter"),
        ("swap", {"name": "../x", "path": "blue"}, 404, "model_not_found"),
        ("load", {"path": "blue", "name": "paper"}, 409, "conflict"),
        ("load", {"path": "blue", "name": "\x00"}, 400, "invalid_value"),
        ("load", {"path": "/etc"}, 400, "invalid_value"),
        ("load", {"path": "%2e%2e/x"}, 404, "not_found"),
        ("load", {"path": "b\x00lue"}, 400, "invalid_value"),
        ("load", {"path": "x" * 4000}, 400, "invalid_value"),
        ("load", {"path": "http://169.254.169.254/x"}, 404, "not_found"),
        ("load", {"path": "file:///etc"}, 404, "not_found"),
        ("plan", {"path": "../x"}, 400, "invalid_value"),
        ("plan", {"path": "blue", "name": "a b"}, 400, "invalid_value"),
    ],
)
def test_what_cannot_be_meant_is_refused_by_name(server, path, body, status, code):
    """A 4xx with the thing and the remedy; the served model is as before."""
    answer = server.post(f"/admin/models/{path}", json=body)
    assert (answer.status_code, answer.json()["error"]["code"]) == (status, code), answer.text
    assert [model["id"] for model in server.get("/admin/models").json()["data"]] == ["paper"]


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "..%2f..%2fetc", "a\x00b", "x" * 10_000, "con", "", "Paper"])
def test_a_model_is_found_by_its_name_alone(server, name):
    """No name of a request is ever a path."""
    answer = server.post("/v1/completions", json={"model": name, "prompt": "x"})
    assert answer.status_code in (400, 404)
    assert len(answer.json()["error"]["message"]) < 400


def test_aliases_are_listed_and_answer(server):
    """As vLLM lists them; the answer and the metrics have the model's own name."""
    assert server.put("/admin/aliases/gpt-4o", json={"model": "paper"}).json() == {
        "id": "gpt-4o",
        "object": "alias",
        "model": "paper",
    }
    cards = {card["id"]: card for card in server.get("/v1/models").json()["data"]}
    assert [(card["root"], card["parent"]) for card in cards.values()] == [("paper", None), ("paper", "paper")]
    assert server.get("/v1/models/gpt-4o").json() == cards["gpt-4o"]
    assert server.post("/v1/completions", json={"model": "gpt-4o", "prompt": "x"}).json()["model"] == "paper"
    assert 'model="gpt-4o"' not in server.get("/metrics").text
    assert server.get("/admin/models").json()["data"][0]["aliases"] == ["gpt-4o"]
    assert server.delete("/admin/models/paper").status_code == 409
    server.post("/admin/models/load", json={"path": "green"})
    server.put("/admin/aliases/gpt-4o", json={"model": "green"})
    assert server.get("/admin/aliases").json()["data"][0]["model"] == "green"
    assert server.post("/v1/completions", json={"model": "gpt-4o", "prompt": "x"}).json()["model"] == "green"
    for name, model, status in (("green", "paper", 409), ("a b", "paper", 400), ("z", "nobody", 404)):
        assert server.put(f"/admin/aliases/{name}", json={"model": model}).status_code == status
    assert server.delete("/admin/aliases/gpt-4o").json() == {"id": "gpt-4o", "object": "alias", "deleted": True}
    assert server.delete("/admin/aliases/gpt-4o").status_code == 404


def test_artifacts_are_listed_with_what_is_wrong(server, root, tmp_path):
    """Served or not, damaged and why; links, hidden folders and foreign files are none."""
    server.post("/admin/models/load", json={"path": "green", "name": "served"})
    for name, damage in (
        ("cut", lambda folder: (folder / "model.safetensors").write_bytes(b"12345678")),
        ("short", lambda folder: (folder / "model.safetensors").open("r+b").truncate(500)),
        ("bare", lambda folder: (folder / "model.safetensors").unlink()),
        ("unreadable", lambda folder: (folder / "manifest.json").write_text("{")),
        ("newer", lambda folder: (folder / "manifest.json").write_text('{"format_version": 99}')),
        ("unmeasured", lambda folder: (folder / "report.json").unlink()),
    ):
        damage(whole_artifact(root / name))
    flipped = whole_artifact(root / "flipped") / "model.safetensors"
    flipped.write_bytes(flipped.read_bytes()[:-1] + b"\x01")
    (root / "link").symlink_to(tmp_path / "paper")
    (root / "notes.txt").write_text("x")
    (root / ".hidden").mkdir()
    shutil.copytree(root / "blue", root / ".blue.writing-1")
    found = items(server)
    assert {name for name, item in found.items() if item["state"] == "damaged"} == {
        "cut", "short", "bare", "unreadable", "newer", "unmeasured"
    }  # fmt: skip
    for name in ("cut", "short", "bare", "unreadable", "newer", "unmeasured"):
        assert name in found[name]["damage"]
    assert (found["green"]["state"], found["green"]["served_as"]) == ("served", ["served"])
    assert (found["blue"]["state"], found["blue"]["method"], found["blue"]["bits_per_weight"]) == (
        "available",
        "rtn",
        6.5,
    )
    files = [file for file in (root / "blue").rglob("*") if file.is_file()]
    assert found["blue"]["bytes"] == sum(file.stat().st_size for file in files)
    assert set(found) == {"blue", "green", "cut", "short", "bare", "unreadable", "newer", "unmeasured", "flipped"}
    assert "hash" in items(server, verify=True)["flipped"]["damage"]


def test_an_artifact_is_deleted_only_when_nobody_needs_it(server, root, tmp_path):
    """Not while it is served or written, never through a link, never outside; then it is gone as a whole."""
    server.post("/admin/models/load", json={"path": "green", "name": "served"})
    writing = root / ".blue.writing-1"
    writing.mkdir()
    (root / "link").symlink_to(tmp_path / "paper")
    (root / "notes.txt").write_text("x")
    for name, status in (
        ("green", 409),
        ("blue", 409),
        ("link", 400),
        ("nothing", 404),
        ("notes.txt", 404),
        (".blue.writing-1", 400),
        ("..%2Fpaper", 400),
        ("%2Fetc", 400),
        ("blue%2Fmodel.safetensors", 400),
        ("x" * 300, 400),
        ("%00", 400),
    ):
        answer = server.delete(f"/admin/artifacts/{name}")
        assert answer.status_code == status, (name, answer.text)
    writing.rmdir()
    assert server.delete("/admin/artifacts/blue").json() == {"id": "blue", "object": "artifact", "deleted": True}
    assert server.delete("/admin/models/served").status_code == 200
    deadline = time.monotonic() + 10
    while server.delete("/admin/artifacts/green").status_code != 200:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert sorted(path.name for path in root.iterdir()) == [".served.json", "link", "notes.txt"]
    assert (tmp_path / "paper" / "manifest.json").exists()


def test_a_deleted_folder_takes_no_linked_files_with_it(server, root, tmp_path):
    """Links inside of an artifact are removed, what they lead to is not; leftovers of a broken removal go too."""
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "file").write_text("x")
    (root / "blue" / "link").symlink_to(precious)
    (root / ".old.deleting-1").mkdir()
    assert server.delete("/admin/artifacts/blue").status_code == 200
    assert (precious / "file").read_text() == "x"
    assert not (root / ".old.deleting-1").exists()


def test_swaps_over_http_let_streams_end(tmp_path, root):
    """A stream of the old model goes on while the name is the new one's already."""
    whole_artifact(root / "green")
    starter = ScriptedStarter(Script(pieces=("a",) * 40, pause_seconds=0.02))
    with scripted_server(tmp_path, starter, artifact_root=root) as (client, _):
        texts = []

        def read():
            body = {"model": "paper", "prompt": "x", "max_tokens": 40, "stream": True}
            with client.stream("POST", "/v1/completions", json=body) as response:
                texts.extend(line for line in response.iter_lines() if '"text":"a"' in line.replace(" ", ""))

        reader = threading.Thread(target=read)
        reader.start()
        while not client.get("/admin/models").json()["data"][0]["leases"]:
            time.sleep(0.01)
        assert client.post("/admin/models/swap", json={"name": "paper", "path": "green"}).status_code == 200
        reader.join(20)
        assert len(texts) == 40
        assert [engine.stopped for engine in starter.engines] in ([True, False], [False, False])


def test_without_a_root_there_are_no_artifacts(tmp_path):
    """The answer says which setting is missing."""
    with scripted_server(tmp_path) as (client, _):
        for answer in (client.get("/admin/artifacts"), client.delete("/admin/artifacts/x")):
            assert answer.status_code == 404
            assert "--artifact-root" in answer.json()["error"]["message"]
