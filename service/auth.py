"""API keys: who is calling, and what they may do.

The key file holds SHA-256 digests, never keys:

    {"keys": [{"id": "alice", "sha256": "<64 hex digits>", "scopes": ["inference", "admin"]}]}

Keys are random and long, so a plain digest is enough: there is nothing to guess. A presented key is hashed and compared
with every stored digest in constant time, without leaving at the first match, so neither the time nor the answer tells
how near a guess was. The file is read again when it changes; a broken new version is reported and the last good one
stays in force, so that a slip of an editor locks nobody out and lets nobody in.

Without a key file everybody on this machine is an anonymous caller with every scope. Settings refuse that for any
address but loopback, and the Host header must then name loopback too, so that a web page cannot reach the server
through a name of its own (DNS rebinding).
"""

import hashlib
import hmac
import json
import logging
import os
import secrets
import tempfile
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from service.errors import Forbidden, Unauthorized

logger = logging.getLogger(__name__)

KEY_PREFIX = "ob-"
KEY_BYTES = 32
MAX_KEY_CHARACTERS = 512
MAX_FILE_BYTES = 1 << 20


class Scope(StrEnum):
    """What a key may do. The two are separate: admin does not include inference."""

    INFERENCE = "inference"
    ADMIN = "admin"


@dataclass(frozen=True, kw_only=True)
class Caller:
    """An authenticated key; `id` may be logged, the key itself is known to nobody."""

    id: str
    scopes: frozenset[Scope]

    def require(self, scope: Scope) -> None:
        """Refuse the caller if the key lacks a scope.

        Raises:
            Forbidden: it does.
        """
        if scope not in self.scopes:
            raise Forbidden(f"this key may not do that; it lacks the scope {scope.value!r}")


ANONYMOUS = Caller(id="anonymous", scopes=frozenset(Scope))


@dataclass(frozen=True, kw_only=True)
class StoredKey:
    """One row of the key file."""

    id: str
    digest: bytes
    scopes: frozenset[Scope]

    def to_dict(self) -> dict[str, Any]:
        """Return the row as it is written."""
        scopes = sorted(scope.value for scope in self.scopes)
        return {"id": self.id, "sha256": self.digest.hex(), "scopes": scopes}


class KeyRing:
    """The keys in force, following the file they came from."""

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._stamp: tuple[int, ...] = ()
        self._keys: tuple[StoredKey, ...] = ()
        if path is not None:
            self._stamp, self._keys = _stamp(path), read_keys(path)

    @property
    def is_open(self) -> bool:
        """Whether there is no key file and everybody is admitted."""
        return self._path is None

    def authenticate(self, presented: str | None) -> Caller:
        """Find out who presents a key.

        Args:
            presented: the key as sent, without `Bearer `; None if none was sent.

        Raises:
            Unauthorized: there is a key file and this key is not in it.
        """
        if self._path is None:
            return ANONYMOUS
        if not presented:
            raise Unauthorized("no API key; send the header `Authorization: Bearer KEY`")
        self._follow_file(self._path)
        digest = _digest(presented[:MAX_KEY_CHARACTERS])
        found: StoredKey | None = None
        for key in self._keys:
            if hmac.compare_digest(key.digest, digest):
                found = key
        if found is None:
            raise Unauthorized("this API key is not known here")
        return Caller(id=found.id, scopes=found.scopes)

    def _follow_file(self, path: Path) -> None:
        """Read the file again if it is not the one in force."""
        try:
            stamp = _stamp(path)
            if stamp == self._stamp:
                return
            self._stamp, self._keys = stamp, read_keys(path)
            logger.info("key file read again", extra={"keys": len(self._keys)})
        except (OSError, ValueError) as error:
            if self._stamp:
                logger.warning("key file is unusable, the last good one stays in force: %s", error)
            self._stamp = ()


def read_keys(path: Path) -> tuple[StoredKey, ...]:
    """Read a key file.

    Raises:
        OSError: it cannot be read.
        ValueError: it is not a key file; the message is one sentence.
    """
    with path.open("rb") as file:
        content = file.read(MAX_FILE_BYTES + 1)
    if len(content) > MAX_FILE_BYTES:
        raise ValueError(f"key file {path} is larger than {MAX_FILE_BYTES} bytes")
    try:
        document = json.loads(content)
        keys = tuple(_stored_key(row) for row in document["keys"])
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(
            f'key file {path} is not of the form {{"keys": [{{"id", "sha256", "scopes"}}]}}: {error}'
        ) from None
    if len({key.id for key in keys}) != len(keys):
        raise ValueError(f"key file {path} names an id twice")
    return keys


def add_key(path: Path, key_id: str, scopes: frozenset[Scope]) -> str:
    """Make a key, write its digest into the file, and return the key: the only time anybody sees it.

    Raises:
        ValueError: the id is empty or taken, no scope was given, or the file is not a key file.
    """
    keys = read_keys(path) if path.exists() else ()
    if not key_id or not scopes:
        raise ValueError("a key needs an id and at least one scope")
    if any(key.id == key_id for key in keys):
        raise ValueError(f"key id {key_id!r} is taken; remove it first")
    key = KEY_PREFIX + secrets.token_urlsafe(KEY_BYTES)
    _write_keys(path, (*keys, StoredKey(id=key_id, digest=_digest(key), scopes=scopes)))
    return key


def remove_key(path: Path, key_id: str) -> None:
    """Take a key out of the file.

    Raises:
        ValueError: there is no such id.
    """
    keys = read_keys(path)
    kept = tuple(key for key in keys if key.id != key_id)
    if len(kept) == len(keys):
        raise ValueError(f"no key with id {key_id!r} in {path}; known: {', '.join(key.id for key in keys) or 'none'}")
    _write_keys(path, kept)


def _stored_key(row: dict[str, Any]) -> StoredKey:
    """Check one row of the file."""
    digest = bytes.fromhex(row["sha256"])
    if len(digest) != hashlib.sha256().digest_size or not isinstance(row["id"], str) or not row["id"]:
        raise ValueError("every key needs an id and a sha256 of 64 hex digits")
    return StoredKey(id=row["id"], digest=digest, scopes=frozenset(Scope(scope) for scope in row["scopes"]))


def _write_keys(path: Path, keys: tuple[StoredKey, ...]) -> None:
    """Replace the file at once, readable by its owner only; a reader never sees half of it."""
    text = json.dumps({"keys": [key.to_dict() for key in keys]}, indent=2) + "\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name)
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    Path(temporary).replace(path)


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()


def _stamp(path: Path) -> tuple[int, ...]:
    """What changes when a file is edited or replaced."""
    status = path.stat()
    return (status.st_mtime_ns, status.st_size, status.st_ino)
