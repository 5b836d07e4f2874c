"""Same seed, same text: what a request gets does not depend on who else is served.

Many random requests go to a real server at once, with a pool of pages too small for them, so that sequences wait, are
preempted and computed again, and share cached prompts; some clients leave in the middle. Every answer that was finished
equals, to the letter and to the log probability's fourth digit, the answer of the same request alone.
"""

import asyncio
import contextlib
import random

import httpx2
import pytest

from onebit_core.errors import ModelNotFound
from onebit_core.model.sample import sample_model_path
from onebit_core.pipeline.config import QuantizeConfig
from onebit_core.pipeline.run import quantize_model
from tests.support.live_metrics import LiveMetrics
from tests.support.random_requests import random_request
from tests.support.server_process import running_server

pytestmark = [pytest.mark.acceptance, pytest.mark.soak]

WORDS = (
    "the",
    "quick",
    "brown",
    "fox",
    "jumps",
    "over",
    "a",
    "lazy",
    "dog",
    "while",
    "seven",
    "wizards",
    "pack",
    "boxes",
)
SMALL_POOL = ("--kv-cache-bytes", str(1 << 17), "--max-model-len", "176", "--max-batched-tokens", "48")
LEAVING = 0.2
SECONDS = 600


async def whole_answer(client, url, request):
    """Ask and wait; returns what decides whether two answers are the same."""
    answer = await client.post(url + "/v1/completions", json=request)
    assert answer.status_code == 200, (answer.text, request)
    return [
        (choice["text"], choice["finish_reason"], rounded(choice["logprobs"])) for choice in answer.json()["choices"]
    ]


def rounded(logprobs):
    return logprobs and [None if value is None else round(value, 3) for value in logprobs["token_logprobs"]]


async def leave_early(client, url, request, seconds):
    """Ask for a stream and close the connection after a while."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(seconds), client.stream("POST", url + "/v1/completions", json=request) as answer:
            async for _ in answer.aiter_raw():
                pass


async def alone(url, requests):
    """Ask one after the other."""
    async with httpx2.AsyncClient(timeout=SECONDS, trust_env=False) as client:
        return [await whole_answer(client, url, request) for request in requests]


async def together(url, requests, numbers):
    """Ask all at once, in any order, while others come and leave."""
    order = sorted(range(len(requests)), key=lambda _: numbers.random())
    leaving = [
        {**request, "stream": True, "seed": request["seed"] + 1} for request in requests if numbers.random() < LEAVING
    ]
    limits = httpx2.Limits(max_connections=None)
    async with httpx2.AsyncClient(timeout=SECONDS, limits=limits, trust_env=False) as client:
        left = [asyncio.create_task(leave_early(client, url, one, numbers.random())) for one in leaving]
        answers = await asyncio.gather(*(whole_answer(client, url, requests[index]) for index in order))
        await asyncio.gather(*left)
    return [answer for _, answer in sorted(zip(order, answers, strict=True), key=lambda pair: pair[0])]


def assert_same(server, requests, numbers):
    """Ask together and alone; name the first request whose answers differ."""
    crowd = asyncio.run(together(server.url, requests, numbers))
    for request, in_crowd, by_itself in zip(requests, crowd, asyncio.run(alone(server.url, requests)), strict=True):
        assert in_crowd == by_itself, request


def assert_idle(server):
    """Nothing runs, nothing waits, every page is back."""
    metrics = LiveMetrics(server.url)
    for name in ("onebit_requests_running", "onebit_requests_waiting", "onebit_kv_cache_usage_ratio"):
        assert metrics.total(name) == 0, name


def test_a_crowd_gets_what_each_gets_alone(tiny_artifact, is_soak, tmp_path):
    """On the tiny model, whose pool holds a few of the sequences; ten times as long in soak."""
    with running_server(str(tiny_artifact), *SMALL_POOL, log_file=tmp_path / "log") as server:
        for mix in range(20 if is_soak else 2):
            numbers = random.Random(mix)
            assert_same(server, [random_request(numbers, "tiny", WORDS) for _ in range(64)], numbers)
        assert LiveMetrics(server.url).total("onebit_preemptions_total") > 0
        assert_idle(server)


@pytest.mark.parametrize("method", ["rtn", "svid"])
def test_a_crowd_gets_what_each_gets_alone_from_a_real_model(method, is_soak, tmp_path):
    """On the sample model, in codes and in signs: 64 at once."""
    if not is_soak:
        pytest.skip("only in `make soak`: takes minutes")
    try:
        sample = sample_model_path()
    except ModelNotFound as error:
        pytest.skip(str(error))
    config = QuantizeConfig(model=str(sample), method=method, embedding_bits=8, name="sample")
    quantize_model(config, tmp_path / "artifact")
    arguments = (str(tmp_path / "artifact"), "--kv-cache-bytes", str(96 << 20))
    with running_server(*arguments, log_file=tmp_path / "log") as server:
        for mix in range(4):
            numbers = random.Random(mix)
            assert_same(server, [random_request(numbers, "sample", WORDS) for _ in range(64)], numbers)
        assert_idle(server)
