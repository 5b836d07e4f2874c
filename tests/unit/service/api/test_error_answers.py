"""What an exception becomes over HTTP: the envelope, and when to come back."""

import asyncio
import json

import pytest

from service.api.errors import answer_service_error
from service.errors import BadRequest, Conflict, EngineBusy, EngineDead, GenerationFailed, ShuttingDown, Unauthorized


@pytest.mark.parametrize(
    ("error", "status", "retry_after", "should_retry"),
    [
        (BadRequest("no", param="n"), 400, None, None),
        (Unauthorized("no"), 401, None, None),
        (Conflict("taken"), 409, None, "false"),
        (EngineBusy("full", retry_after_seconds=0.2), 429, "1", None),
        (GenerationFailed("NaN"), 500, None, "false"),
        (EngineDead("gone"), 503, None, "false"),
        (EngineDead("restarting", retry_after_seconds=2.4), 503, "3", None),
        (ShuttingDown("over", retry_after_seconds=1), 503, "1", None),
    ],
)
def test_an_answer_says_when_to_come_back(error, status, retry_after, should_retry):
    """OpenAI's client repeats 409, 429 and 5xx by itself, unless it is told not to."""
    answer = asyncio.run(answer_service_error(None, error))
    body = json.loads(bytes(answer.body))["error"]
    assert answer.status_code == status
    assert answer.headers.get("retry-after") == retry_after
    assert answer.headers.get("x-should-retry") == should_retry
    assert set(body) == {"message", "type", "param", "code"}
    assert (body["message"], body["param"]) == (error.message, error.param)
