"""Point 22: rates of keys, turns between them, and more requests than there is room for, against the real server."""

import asyncio
import json
import statistics
import time

import httpx2
import openai
import pytest

from service.auth import Scope, add_key
from service.rate_limits import Rates
from tests.support.live_metrics import LiveMetrics
from tests.support.server_process import running_server

pytestmark = pytest.mark.acceptance

AT_ONCE, QUEUE = 2, 60
SHORT = {"model": "tiny", "prompt": "x", "max_tokens": 4, "temperature": 0}
WORK = {**SHORT, "max_tokens": 48, "ignore_eos": True}
INFERENCE = frozenset({Scope.INFERENCE})


@pytest.fixture(scope="module")
def keys_file(tmp_path_factory):
    return tmp_path_factory.mktemp("keys") / "keys.json"


@pytest.fixture(scope="module")
def keys(keys_file):
    rates = {"three": Rates(requests_per_minute=3), "tokens": Rates(tokens_per_minute=100)}
    names = ("greedy", "modest", *rates)
    return {name: add_key(keys_file, name, INFERENCE, rates=rates.get(name, Rates())) for name in names}


@pytest.fixture(scope="module")
def server(tiny_artifact, keys, keys_file, tmp_path_factory):
    arguments = ["--kv-cache-bytes", "8000000", "--keys-file", str(keys_file)]
    arguments += ["--max-num-sequences", str(AT_ONCE), "--max-queued-requests", str(QUEUE)]
    log_file = tmp_path_factory.mktemp("server") / "log"
    with running_server(str(tiny_artifact), *arguments, log_file=log_file) as server:
        yield server


class Crowd:
    """Many requests of one key at once, and when each was answered.

    Attributes:
        answers: (status, seconds since it was sent, clock at the answer, headers) in order of arrival.
    """

    def __init__(self, server, key):
        limits = httpx2.Limits(max_connections=None, max_keepalive_connections=None)
        headers = {"authorization": f"Bearer {key}"}
        self.client = httpx2.AsyncClient(base_url=server.url, headers=headers, limits=limits, timeout=120)
        self.answers = []

    async def __aenter__(self):
        return self

    async def __aexit__(self, *_):
        await self.client.aclose()

    async def ask(self, body):
        started = time.monotonic()
        answer = await self.client.post("/v1/completions", json=body)
        now = time.monotonic()
        self.answers.append((answer.status_code, now - started, now, answer.headers))
        return answer

    async def ask_often(self, body, count, at_once):
        gate = asyncio.Semaphore(at_once)

        async def one():
            async with gate:
                await self.ask(body)

        await asyncio.gather(*(one() for _ in range(count)))

    def statuses(self):
        return {status for status, *_ in self.answers}


def client(server, key):
    return openai.OpenAI(base_url=server.url + "/v1", api_key=key, max_retries=0)


def test_requests_of_a_key_are_limited(server, keys):
    """The fourth in a minute is a 429 that says when to come back, in OpenAI's headers; other keys do not notice."""
    limited = client(server, keys["three"])
    for left in (2, 1, 0):
        raw = limited.completions.with_raw_response.create(**SHORT)
        assert raw.headers["x-ratelimit-limit-requests"] == "3"
        assert raw.headers["x-ratelimit-remaining-requests"] == str(left)
    with pytest.raises(openai.RateLimitError) as refused:
        limited.completions.create(**SHORT)
    assert refused.value.code == "rate_limit_exceeded"
    headers = refused.value.response.headers
    assert 1 <= int(headers["retry-after"]) <= 20
    assert headers["x-ratelimit-remaining-requests"] == "0"
    assert headers["x-ratelimit-reset-requests"]
    assert client(server, keys["modest"]).completions.create(**SHORT).choices
    assert LiveMetrics(server.url).total("onebit_rate_limited_total", limit="requests") == 1


def test_tokens_of_a_key_are_limited(server, keys):
    """What may be generated is spoken for, what was not is given back, in answers and streams."""
    limited = client(server, keys["tokens"])
    stopped = {**SHORT, "max_tokens": 60, "logit_bias": {"97": 100}, "stop": "aa"}
    for stream in (False, True, True):
        answer = limited.completions.create(**stopped, stream=stream)
        if stream:
            list(answer)
    raw = limited.completions.with_raw_response.create(**stopped)
    assert raw.headers["x-ratelimit-limit-tokens"] == "100"
    with pytest.raises(openai.RateLimitError) as refused:
        limited.completions.create(**{**SHORT, "max_tokens": 97})
    assert refused.value.code == "rate_limit_exceeded"
    assert limited.embeddings.create(model="tiny", input="x").usage.total_tokens == 1
    with pytest.raises(openai.RateLimitError):
        limited.embeddings.create(model="tiny", input=["x" * 50] * 2)


def test_a_changed_limit_holds_without_a_restart(server, keys, keys_file):
    """The key file is read again; so is what it says of rates."""
    document = json.loads(keys_file.read_text())
    row = next(row for row in document["keys"] if row["id"] == "modest")
    row["requests_per_minute"] = 1
    before = keys_file.read_text()
    try:
        keys_file.write_text(json.dumps(document))
        limited = client(server, keys["modest"])
        limited.completions.create(**SHORT)
        with pytest.raises(openai.RateLimitError):
            limited.completions.create(**SHORT)
    finally:
        keys_file.write_text(before)
    assert client(server, keys["modest"]).completions.create(**SHORT).choices


def test_a_key_may_not_jump_the_queue(server, keys):
    """A priority below what the key may ask for is refused; later than others is always allowed."""
    asking = client(server, keys["greedy"])
    with pytest.raises(openai.PermissionDeniedError) as refused:
        asking.completions.create(**SHORT, extra_body={"priority": -1})
    assert refused.value.param == "priority"
    assert asking.completions.create(**SHORT, extra_body={"priority": 1}).choices


def test_one_request_does_not_wait_for_two_hundred_of_another_key(server, keys):
    """While A keeps the server busy, B waits for a place to become free, not for A's queue."""

    async def run():
        async with Crowd(server, keys["greedy"]) as greedy, Crowd(server, keys["modest"]) as modest:
            crowd = asyncio.create_task(greedy.ask_often(WORK, 200, at_once=AT_ONCE + QUEUE // 2))
            while len(greedy.answers) < 10:
                await asyncio.sleep(0.01)
            overtaken = []
            for _ in range(5):
                before = len(greedy.answers)
                assert (await modest.ask(WORK)).status_code == 200
                overtaken.append(len(greedy.answers) - before)
            still_waiting = not crowd.done()
            await crowd
            return greedy, modest, overtaken, still_waiting

    greedy, modest, overtaken, still_waiting = asyncio.run(run())
    assert still_waiting, "A was done before B; nothing was shown"
    assert greedy.statuses() == {200}
    alone = statistics.median(seconds for _, seconds, *_ in greedy.answers)
    turn = 4 * AT_ONCE  # those that run, its own turn, and what arrived meanwhile
    assert statistics.median(overtaken) <= turn, overtaken
    assert max(overtaken) <= 2 * turn, overtaken  # half of A's queue: answers pile up while this process does not run
    assert statistics.median(seconds for _, seconds, *_ in modest.answers) < alone / 2


def test_a_full_queue_has_room_for_others(server, keys):
    """A fills every place and gets 429 for the rest; B is admitted all the same, in place of one of A's."""

    async def run():
        async with Crowd(server, keys["greedy"]) as greedy, Crowd(server, keys["modest"]) as modest:
            crowd = asyncio.create_task(greedy.ask_often(WORK, 200, at_once=200))
            while not any(status == 429 for status, *_ in greedy.answers):
                await asyncio.sleep(0.01)
            answers = [(await modest.ask(SHORT)).status_code for _ in range(5)]
            await crowd
            return greedy, answers

    greedy, answers = asyncio.run(run())
    assert answers == [200] * 5
    assert greedy.statuses() == {200, 429}


def test_a_burst_is_refused_in_good_order(server, keys):
    """Ten times what fits: each is answered 200 or 429 with Retry-After; those admitted wait for one queue at most."""

    async def run():
        async with Crowd(server, keys["greedy"]) as crowd:
            await crowd.ask_often(SHORT, 10 * (AT_ONCE + QUEUE), at_once=10 * (AT_ONCE + QUEUE))
            return crowd

    crowd = asyncio.run(run())
    assert crowd.statuses() <= {200, 429}
    admitted = sorted(seconds for status, seconds, *_ in crowd.answers if status == 200)
    assert len(admitted) >= AT_ONCE + QUEUE
    assert admitted[-1] < 60
    assert all(int(headers["retry-after"]) >= 1 for status, _, _, headers in crowd.answers if status == 429)
    metrics = LiveMetrics(server.url)
    assert metrics.total("onebit_requests_waiting") == 0
    assert metrics.total("onebit_kv_cache_usage_ratio") == 0
    assert [line for line in server.log() if line["level"] == "error"] == []
