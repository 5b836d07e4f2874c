"""Keys: hashed, scoped, re-read, and never readable again."""

import json
import os
from datetime import UTC, datetime, timedelta

import pytest

from service.auth import ANONYMOUS, Caller, KeyRing, Scope, add_key, read_keys, remove_key, rotate_key
from service.errors import Forbidden, Unauthorized
from service.rate_limits import Rates

INFERENCE = frozenset({Scope.INFERENCE})


def test_a_key_opens_what_it_was_made_for(tmp_path):
    """A new key is known at once, under its id and with its scopes."""
    file = tmp_path / "keys.json"
    key = add_key(file, "alice", INFERENCE)
    caller = KeyRing(file).authenticate(key)
    assert caller == Caller(id="alice", scopes=INFERENCE)
    with pytest.raises(Forbidden, match="admin"):
        caller.require(Scope.ADMIN)


def test_the_file_never_holds_a_key(tmp_path):
    """Only the digest is stored, and only its owner may read the file."""
    file = tmp_path / "keys.json"
    key = add_key(file, "alice", INFERENCE)
    assert key not in file.read_text()
    assert file.stat().st_mode & 0o077 == 0


@pytest.mark.parametrize("wrong", [None, "", "x", "ob-" + "a" * 43, "k" * 1_000_000, "\ud800"])
def test_other_keys_are_refused(tmp_path, wrong):
    """No key, a wrong one, a huge one and one that is not text are all the same: unknown."""
    file = tmp_path / "keys.json"
    add_key(file, "alice", INFERENCE)
    with pytest.raises(Unauthorized):
        KeyRing(file).authenticate(wrong)


def test_keys_change_without_a_restart(tmp_path):
    """An added key works and a removed one stops working on the next request."""
    file = tmp_path / "keys.json"
    alice = add_key(file, "alice", INFERENCE)
    ring = KeyRing(file)
    bob = add_key(file, "bob", frozenset({Scope.ADMIN}))
    assert ring.authenticate(bob).id == "bob"
    remove_key(file, "alice")
    with pytest.raises(Unauthorized):
        ring.authenticate(alice)


def test_a_broken_file_leaves_the_last_good_keys_in_force(tmp_path):
    """A slip of an editor locks nobody out and lets nobody in; mending it takes effect."""
    file = tmp_path / "keys.json"
    alice = add_key(file, "alice", INFERENCE)
    ring = KeyRing(file)
    good = file.read_text()
    file.write_text("{")
    assert ring.authenticate(alice).id == "alice"
    file.unlink()
    assert ring.authenticate(alice).id == "alice"
    file.write_text(json.dumps({"keys": []}))
    with pytest.raises(Unauthorized):
        ring.authenticate(alice)
    file.write_text(good)
    os.utime(file, ns=(1, 1))
    assert ring.authenticate(alice).id == "alice"


def test_without_a_file_everybody_is_anonymous():
    """Loopback without keys admits all callers to everything."""
    ring = KeyRing(None)
    assert ring.is_open
    assert ring.authenticate(None) == ANONYMOUS


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        '{"keys": 3}',
        '{"keys": [{"id": "a"}]}',
        '{"keys": [{"id": "a", "sha256": "00", "scopes": []}]}',
        '{"keys": [{"id": "a", "sha256": "' + "0" * 64 + '", "scopes": ["root"]}]}',
        '{"keys": [{"id": "", "sha256": "' + "0" * 64 + '", "scopes": []}]}',
        '{"keys": [{"id": "a", "sha256": "' + "0" * 64 + '", "scopes": [], "expire": "2030-01-01"}]}',
        '{"keys": [{"id": "a", "sha256": "' + "0" * 64 + '", "scopes": [], "expires": "soon"}]}',
        '{"keys": [{"id": "a", "sha256": "' + "0" * 64 + '", "scopes": [], "tokens_per_minute": 0}]}',
        '{"keys": [{"id": "a", "sha256": "' + "0" * 64 + '", "scopes": [], "requests_per_minute": true}]}',
        '{"keys": [{"id": "a", "sha256": "' + "0" * 64 + '", "scopes": [], "min_priority": "low"}]}',
    ],
)
def test_a_file_of_another_form_is_refused(tmp_path, content):
    """A key file that cannot be meant is an error at start, not an open door."""
    file = tmp_path / "keys.json"
    file.write_text(content)
    with pytest.raises(ValueError, match="key file"):
        KeyRing(file)


def test_an_id_is_taken_once(tmp_path):
    """Adding an id twice and removing one that is not there are refused."""
    file = tmp_path / "keys.json"
    add_key(file, "alice", INFERENCE)
    with pytest.raises(ValueError, match="taken"):
        add_key(file, "alice", INFERENCE)
    with pytest.raises(ValueError, match="known: alice"):
        remove_key(file, "bob")
    assert [key.id for key in read_keys(file)] == ["alice"]


def test_a_rotated_key_overlaps_with_the_old_one(tmp_path):
    """Both are one caller with the same rights; after the overlap only the new one is, and old rows are dropped."""
    file = tmp_path / "keys.json"
    first = add_key(file, "alice", INFERENCE, rates=Rates(requests_per_minute=7), min_priority=-3)
    second = rotate_key(file, "alice", timedelta(hours=1))
    ring = KeyRing(file)
    assert ring.authenticate(first) == ring.authenticate(second)
    assert ring.authenticate(second).rates.requests_per_minute == 7
    assert ring.authenticate(second).min_priority == -3
    third = rotate_key(file, "alice", timedelta(0))
    assert ring.authenticate(third).id == "alice"
    for old in (first, second):
        with pytest.raises(Unauthorized, match="expired"):
            ring.authenticate(old)
    rotate_key(file, "alice", timedelta(hours=1))
    assert len(read_keys(file)) == 2
    with pytest.raises(ValueError, match="known: alice"):
        rotate_key(file, "bob", timedelta(0))


def test_two_lasting_keys_of_one_id_are_refused(tmp_path):
    """One of them was forgotten."""
    file = tmp_path / "keys.json"
    add_key(file, "alice", INFERENCE)
    rows = json.loads(file.read_text())["keys"]
    file.write_text(json.dumps({"keys": rows * 2}))
    with pytest.raises(ValueError, match="two keys of id 'alice'"):
        read_keys(file)


def test_a_key_ends_when_it_was_said_to(tmp_path):
    """In UTC, where no zone is given."""
    file = tmp_path / "keys.json"
    key = add_key(file, "alice", INFERENCE, expires=datetime.now(UTC) + timedelta(hours=1))
    assert KeyRing(file).authenticate(key).id == "alice"
    rows = json.loads(file.read_text())["keys"]
    rows[0]["expires"] = "2020-01-01"
    file.write_text(json.dumps({"keys": rows}))
    with pytest.raises(Unauthorized, match="expired"):
        KeyRing(file).authenticate(key)
