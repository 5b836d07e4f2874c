"""API keys: who is calling, and what they may do.

The key file holds SHA-256 digests, never keys:

    {"keys": [{"id": "alice", "sha256": "<64 hex digits>", "scopes": ["inference", "admin"]}]}

A row may also have `expires` (a time in UTC, from which on the key is refused), `requests_per_minute` and
`tokens_per_minute` (service.rate_limits), and `min_priority`, the lowest priority its requests may ask for. An id may
stand in several rows if all but one expire: that is how a key is rotated. The new one works at once, the old one until
its time, and both are one caller with one rate.

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
from collections import Counter
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from pathlib import Path
from typing import Any

from service.errors import Forbidden, Unauthorized
from service.rate_limits import Rates

logger = logging.getLogger(__name__)

KEY_PREFIX = "ob-"
KEY_BYTES = 32
MAX_KEY_CHARACTERS = 512
MAX_FILE_BYTES = 1 << 20
NO_RATES = Rates()
RATE_NAMES = ("requests_per_minute", "tokens_per_minute")
ROW_NAMES = frozenset({"id", "sha256", "scopes", "expires", "min_priority", *RATE_NAMES})


class Scope(StrEnum):
    """What a key may do. The two are separate: admin does not include inference."""

    INFERENCE = "inference"
    ADMIN = "admin"


@dataclass(frozen=True, kw_only=True)
class Caller:
    """An authenticated key; `id` may be logged, the key itself is known to nobody.

    Attributes:
        id: whose key it is.
        scopes: what it may do.
        rates: its own limits.
        min_priority: the lowest, and so most urgent, priority its requests may have; None for any.
    """

    id: str
    scopes: frozenset[Scope]
    rates: Rates = NO_RATES
    min_priority: int | None = 0

    def require(self, scope: Scope) -> None:
        """Refuse the caller if the key lacks a scope.

        Raises:
            Forbidden: it does.
        """
        if scope not in self.scopes:
            raise Forbidden(f"this key may not do that; it lacks the scope {scope.value!r}")


ANONYMOUS = Caller(id="anonymous", scopes=frozenset(Scope), min_priority=None)


@dataclass(frozen=True, kw_only=True)
class StoredKey:
    """One row of the key file."""

    id: str
    digest: bytes
    scopes: frozenset[Scope]
    expires: datetime | None = None
    rates: Rates = NO_RATES
    min_priority: int = 0

    def to_dict(self) -> dict[str, Any]:
        """Return the row as it is written."""
        row: dict[str, Any] = {"id": self.id, "sha256": self.digest.hex()}
        row["scopes"] = sorted(scope.value for scope in self.scopes)
        if self.expires is not None:
            row["expires"] = self.expires.isoformat()
        for name in RATE_NAMES:
            if getattr(self.rates, name) is not None:
                row[name] = getattr(self.rates, name)
        if self.min_priority:
            row["min_priority"] = self.min_priority
        return row

    def is_expired(self, now: datetime) -> bool:
        """Whether its time is over."""
        return self.expires is not None and self.expires <= now


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
        if found.is_expired(datetime.now(UTC)):
            raise Unauthorized("this API key has expired")
        return Caller(id=found.id, scopes=found.scopes, rates=found.rates, min_priority=found.min_priority)

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
    lasting = Counter(key.id for key in keys if key.expires is None)
    doubled = [key_id for key_id, count in lasting.items() if count > 1]
    if doubled:
        raise ValueError(f"key file {path} has two keys of id {doubled[0]!r} that do not expire")
    return keys


def add_key(
    path: Path,
    key_id: str,
    scopes: frozenset[Scope],
    *,
    expires: datetime | None = None,
    rates: Rates = NO_RATES,
    min_priority: int = 0,
) -> str:
    """Make a key, write its digest into the file, and return the key: the only time anybody sees it.

    Args:
        path: of the key file; it is made if there is none.
        key_id: whose key it is.
        scopes: what it may do.
        expires: when it ends; None for never.
        rates: its own limits.
        min_priority: the lowest priority its requests may ask for.

    Raises:
        ValueError: the id is empty or taken, no scope was given, or the file is not a key file.
    """
    keys = read_keys(path) if path.exists() else ()
    if not key_id or not scopes:
        raise ValueError("a key needs an id and at least one scope")
    if any(key.id == key_id for key in keys):
        raise ValueError(f"key id {key_id!r} is taken; rotate it, or remove it first")
    key = _new_key()
    made = StoredKey(
        id=key_id, digest=_digest(key), scopes=scopes, expires=expires, rates=rates, min_priority=min_priority
    )
    _write_keys(path, (*keys, made))
    return key


def rotate_key(path: Path, key_id: str, overlap: timedelta) -> str:
    """Make another key for an id, with the same rights, and let those it has end after `overlap`; returns the new one.

    Rows whose time is over are dropped.

    Raises:
        ValueError: there is no such id, or the file is not a key file.
    """
    keys, now = read_keys(path), datetime.now(UTC)
    old = [key for key in keys if key.id == key_id]
    if not old:
        raise ValueError(_unknown_id(path, key_id, keys))
    end = (now + overlap).replace(microsecond=0)
    key = _new_key()
    ending = [
        replace(stored, expires=min(end, stored.expires or end)) if stored.id == key_id else stored
        for stored in keys
        if not stored.is_expired(now)
    ]
    _write_keys(path, (*ending, replace(old[-1], digest=_digest(key), expires=None)))
    return key


def remove_key(path: Path, key_id: str) -> None:
    """Take a key out of the file.

    Raises:
        ValueError: there is no such id.
    """
    keys = read_keys(path)
    kept = tuple(key for key in keys if key.id != key_id)
    if len(kept) == len(keys):
        raise ValueError(_unknown_id(path, key_id, keys))
    _write_keys(path, kept)


def _unknown_id(path: Path, key_id: str, keys: tuple[StoredKey, ...]) -> str:
    known = ", ".join(dict.fromkeys(key.id for key in keys)) or "none"
    return f"no key with id {key_id!r} in {path}; known: {known}"


def _new_key() -> str:
    return KEY_PREFIX + secrets.token_urlsafe(KEY_BYTES)


def _stored_key(row: dict[str, Any]) -> StoredKey:
    """Check one row of the file."""
    digest = bytes.fromhex(row["sha256"])
    if len(digest) != hashlib.sha256().digest_size or not isinstance(row["id"], str) or not row["id"]:
        raise ValueError("every key needs an id and a sha256 of 64 hex digits")
    unknown = sorted(set(row) - ROW_NAMES)
    if unknown:
        raise ValueError(f"a key has no {unknown[0]!r}; known: {', '.join(sorted(ROW_NAMES))}")
    rates = {name: row[name] for name in RATE_NAMES if row.get(name) is not None}
    if any(type(number) is not int or number < 1 for number in rates.values()):
        raise ValueError("requests_per_minute and tokens_per_minute are whole numbers from 1")
    min_priority = row.get("min_priority", 0)
    if type(min_priority) is not int:
        raise ValueError("min_priority is a whole number")
    return StoredKey(
        id=row["id"],
        digest=digest,
        scopes=frozenset(Scope(scope) for scope in row["scopes"]),
        expires=_time(row["expires"]) if row.get("expires") is not None else None,
        rates=Rates(**rates),
        min_priority=min_priority,
    )


def _time(text: str) -> datetime:
    """Read a time; one without a zone is UTC."""
    time = datetime.fromisoformat(text)
    return time if time.tzinfo is not None else time.replace(tzinfo=UTC)


def _write_keys(path: Path, keys: tuple[StoredKey, ...]) -> None:
    """Replace the file at once, so that a reader never sees half of it; a new one is readable by its owner only."""
    text = json.dumps({"keys": [key.to_dict() for key in keys]}, indent=2) + "\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.name)
    with os.fdopen(descriptor, "w", encoding="utf-8") as file:
        if path.exists():
            os.fchmod(descriptor, path.stat().st_mode & 0o777)  # who may read it was somebody's decision
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
