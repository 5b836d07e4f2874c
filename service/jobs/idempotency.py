"""A caller's own name for a submission: the header Idempotency-Key.

A submission with a key makes the job of that key: the job's id is a hash of the key, and the record keeps a hash of the
body, so a repeated post finds the first one's job, and another body under the same key is refused. DBOS alone would
attach to the old job whatever the new body says.
"""

import hashlib
import json
import re
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from service.errors import BadRequest

HEADER = "Idempotency-Key"
NAMESPACE = uuid.UUID("3c0f1b52-6f0e-5a0e-9c55-0d5f7d0b1c3a")
KEY = re.compile(r"[\x21-\x7e]{1,255}")


@dataclass(frozen=True, kw_only=True)
class IdempotencyKey:
    """One key with the body it came with.

    Attributes:
        key: as it was sent.
        request_sha256: of the body.
    """

    key: str
    request_sha256: str

    @property
    def job_id(self) -> str:
        """The id of the job of this key."""
        return f"job-{uuid.uuid5(NAMESPACE, self.key).hex}"


def read_key(values: list[str], body: Mapping[str, Any]) -> IdempotencyKey | None:
    """Read the header; None if it was not sent.

    Args:
        values: each time the header was sent.
        body: the request, complete with defaults, so that spelling one out makes no other body.

    Raises:
        BadRequest: it was sent twice, or is not 1 to 255 visible ASCII characters.
    """
    if not values:
        return None
    if len(values) > 1 or not KEY.fullmatch(values[0]):
        raise BadRequest(f"{HEADER} must be sent once, as 1 to 255 visible ASCII characters", param=HEADER)
    text = json.dumps(body, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return IdempotencyKey(key=values[0], request_sha256=hashlib.sha256(text.encode()).hexdigest())


def new_job_id() -> str:
    """Return an id nobody has."""
    return f"job-{uuid.uuid4().hex}"
