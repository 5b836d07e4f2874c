"""The engine as its own process: requests go in, events come out, and a death on either side is survived or clean."""

import asyncio
import gc
import os
import signal
import subprocess
import sys
import time
from contextlib import aclosing
from pathlib import Path

import psutil
import pytest

from service.engine.client import EngineClient
from service.engine.types import EngineConfig, FinishReason, GenerationRequest, SamplingParams
from service.errors import BadRequest, ContextTooLong, EngineBusy, EngineDead, EngineStartFailed, ShuttingDown
from tests.support.inline_engine import greedy
from tests.support.plain_loader import FAILING_TOKEN, KILLED_LOADER, KILLING_TOKEN, NAN_TOKEN, TRAP_LOADER
from tests.support.tiny_model import save_tiny_model

pytestmark = pytest.mark.integration

PROMPT = [1, 2, 3, 4, 5]
RESTART_SECONDS = 60


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = save_tiny_model(tmp_path_factory.mktemp("model"), tied=False)
    return EngineConfig(
        artifact=str(folder),
        device="cpu",
        loader=TRAP_LOADER,
        kv_cache_bytes=1 << 20,
        max_num_sequences=4,
        max_queued_requests=2,
        log_level="critical",
    )


@pytest.fixture(scope="module")
def runner():
    """One event loop for all tests of this file, so that they can share an engine."""
    with asyncio.Runner() as runner:
        yield runner


@pytest.fixture(scope="module")
def client(config, runner):
    client = runner.run(EngineClient.start(config))
    yield client
    runner.run(client.stop())


@pytest.fixture(autouse=True)
def _alive(request, runner):
    """Begin every test that uses the shared engine with a living one."""
    if "client" in request.fixturenames:
        runner.run(request.getfixturevalue("client").wait_until_alive(RESTART_SECONDS))


async def collect(stream):
    """Return the whole text, all tokens and the last event of a stream."""
    events = [event async for event in stream]
    return "".join(e.text for e in events), [t for e in events for t in e.token_ids], events[-1]


async def settled(client):
    """Wait until the engine holds no request, and return its figures."""
    async with asyncio.timeout(20):
        while client.num_in_flight or client.stats.num_running or client.stats.num_waiting:
            await asyncio.sleep(0.02)
    return client.stats


def test_a_request_gets_its_tokens_and_counts(client, runner):
    """The last event carries the reason and the counts; only the first says how long the request queued."""

    async def scenario():
        events = [event async for event in client.generate(greedy(1, PROMPT, 6))]
        assert sum(len(event.token_ids) for event in events) == 6
        assert (events[-1].finish_reason, events[-1].num_generated_tokens) == (FinishReason.LENGTH, 6)
        assert events[-1].num_prompt_tokens == len(PROMPT)
        assert events[0].queue_seconds is not None
        assert {event.queue_seconds for event in events[1:]} == {None}

    runner.run(scenario())


def test_requests_run_together_as_they_run_alone(client, runner):
    """Concurrent seeded streams give what each gives by itself."""

    def request(index, prefix):
        sampling = SamplingParams(max_tokens=12, temperature=0.9, top_p=0.9, seed=index, ignore_eos=True)
        prompt = tuple(range(index + 1, index + 20))
        return GenerationRequest(request_id=f"{prefix}-{index}", prompt_token_ids=prompt, sampling=sampling)

    async def scenario():
        alone = [(await collect(client.generate(request(index, "alone"))))[:2] for index in range(5)]
        together = await asyncio.gather(*(collect(client.generate(request(index, "with"))) for index in range(5)))
        assert [result[:2] for result in together] == alone

    runner.run(scenario())


def test_leaving_a_stream_early_frees_its_pages(client, runner):
    """Closed, or simply dropped: the request is aborted and its pages are free."""

    async def scenario():
        async with aclosing(client.generate(greedy(1, PROMPT, 500))) as stream:
            await anext(stream)
        assert (await settled(client)).kv_cache_usage == 0
        stream = client.generate(greedy(2, PROMPT, 500))
        await anext(stream)
        assert client.num_in_flight == 1
        del stream
        gc.collect()
        assert (await settled(client)).kv_cache_usage == 0

    runner.run(scenario())


def test_an_abort_ends_the_stream_with_its_reason(client, runner):
    """abort() lets the stream end properly; aborting what is not there does nothing."""

    async def scenario():
        stream = client.generate(greedy(1, PROMPT, 500))
        await anext(stream)
        await client.abort("request-1")
        await client.abort("nobody")
        _, _, last = await collect(stream)
        assert last.finish_reason == FinishReason.ABORT

    runner.run(scenario())


def test_one_request_more_than_the_queue_holds_is_refused(client, runner):
    """Four run, two wait; the seventh is EngineBusy with a hint, and the six are served."""

    async def scenario():
        streams = [client.generate(greedy(index, PROMPT, 30)) for index in range(6)]
        with pytest.raises(EngineBusy, match="6 open requests") as refusal:
            client.generate(greedy(7, PROMPT, 30))
        assert refusal.value.retry_after_seconds == 1
        results = await asyncio.gather(*(collect(stream) for stream in streams))
        assert {last.finish_reason for _, _, last in results} == {FinishReason.LENGTH}

    runner.run(scenario())


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"prompt": []}, BadRequest, "prompt is empty"),
        ({"prompt": [1, 320]}, BadRequest, "token id 320 .* 0 to 319"),
        ({"prompt": [-1]}, BadRequest, "token id -1"),
        ({"prompt": [1] * 512}, ContextTooLong, "512 tokens and the context 512"),
        ({"max_tokens": 0}, BadRequest, "max_tokens is 0"),
        ({"temperature": float("nan")}, BadRequest, "temperature is nan"),
        ({"temperature": -1.0}, BadRequest, "temperature is -1"),
        ({"top_p": 1.5}, BadRequest, "top_p is 1.5"),
        ({"stop": ("",)}, BadRequest, "stop string is empty"),
    ],
    ids=lambda value: str(value)[:30] if isinstance(value, dict) else "",
)
def test_a_request_that_cannot_be_meant_is_refused_before_it_is_queued(client, runner, change, error, words):
    """Each impossible value is named, and the engine never sees it."""

    async def scenario():
        options = {"prompt": PROMPT, "max_tokens": 4, **change}
        with pytest.raises(error, match=words):
            client.generate(greedy(1, options.pop("prompt"), options.pop("max_tokens"), **options))
        assert client.num_in_flight == 0

    runner.run(scenario())


def test_a_failing_request_is_told_so_and_the_next_is_served(client, runner):
    """NaN and a raising step end as ERROR events in the same process."""

    async def scenario():
        pid = client.pid
        for token, words in ((NAN_TOKEN, "not finite"), (FAILING_TOKEN, "failing token")):
            _, tokens, last = await collect(client.generate(greedy(1, [token], 5)))
            assert (last.finish_reason, tokens) == (FinishReason.ERROR, [])
            assert words in last.error
        _, tokens, _ = await collect(client.generate(greedy(1, PROMPT, 5)))
        assert len(tokens) == 5
        assert client.pid == pid

    runner.run(scenario())


def test_a_killed_engine_is_started_again(client, runner):
    """Open requests get EngineDead, requests meanwhile too with a hint, and the next after it is served."""

    async def scenario():
        _, before, _ = await collect(client.generate(greedy(1, PROMPT, 5)))
        pid, restarts, steps = client.pid, client.restarts, client.stats.num_steps
        streams = [client.generate(greedy(index, PROMPT, 400)) for index in range(2)]
        await anext(streams[0])
        os.kill(pid, signal.SIGKILL)
        for stream in streams:
            with pytest.raises(EngineDead, match="signal 9"):
                await collect(stream)
        assert not client.is_alive
        with pytest.raises(EngineDead) as refusal:
            client.generate(greedy(3, PROMPT, 5))
        assert refusal.value.retry_after_seconds
        await client.wait_until_alive(RESTART_SECONDS)
        _, after, _ = await collect(client.generate(greedy(4, PROMPT, 5)))
        assert after == before
        assert (client.pid != pid, client.restarts) == (True, restarts + 1)
        assert client.stats.num_steps > steps

    runner.run(scenario())


def test_a_request_that_kills_the_engine_is_not_tried_again(client, runner):
    """The killing request gets EngineDead once, and the new engine does not see it."""

    async def scenario():
        restarts = client.restarts
        with pytest.raises(EngineDead):
            await collect(client.generate(greedy(1, [KILLING_TOKEN], 5)))
        await client.wait_until_alive(RESTART_SECONDS)
        _, tokens, _ = await collect(client.generate(greedy(2, PROMPT, 5)))
        assert (len(tokens), client.restarts) == (5, restarts + 1)

    runner.run(scenario())


def test_signals_to_the_group_do_not_end_the_engine(client, runner):
    """SIGINT and SIGTERM, which a terminal or supervisor sends to everybody, are the server's business."""

    async def scenario():
        for number in (signal.SIGINT, signal.SIGTERM):
            os.kill(client.pid, number)
        _, tokens, _ = await collect(client.generate(greedy(1, PROMPT, 30)))
        assert len(tokens) == 30

    runner.run(scenario())


def test_stopping_ends_open_requests_and_the_process(config):
    """stop() gives open streams an ABORT event, ends the process, and refuses what comes later."""

    async def scenario():
        client = await EngineClient.start(config)
        pid = client.pid
        stream = client.generate(greedy(1, PROMPT, 500))
        await anext(stream)
        await client.stop()
        await client.stop()
        _, _, last = await collect(stream)
        assert last.finish_reason == FinishReason.ABORT
        assert not client.is_alive
        assert not psutil.pid_exists(pid)
        with pytest.raises(ShuttingDown):
            client.generate(greedy(2, PROMPT, 5))

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"artifact": "/nonexistent/model"}, "/nonexistent/model"),
        ({"max_model_len": 4096}, "max_model_len=4096 is over 512"),
        ({"loader": KILLED_LOADER}, "signal 9"),
    ],
    ids=["no model", "context too long", "killed"],
)
def test_an_engine_that_cannot_start_says_why(config, change, words):
    """The reason of the engine process arrives as one EngineStartFailed."""
    from dataclasses import replace

    with pytest.raises(EngineStartFailed, match=words):
        asyncio.run(EngineClient.start(replace(config, **change)))


SERVER_THAT_DIES = """
import asyncio, os, sys
from service.engine.client import EngineClient
from service.engine.types import EngineConfig

async def main():
    client = await EngineClient.start(EngineConfig(artifact=sys.argv[1], device="cpu", loader=sys.argv[2]))
    print(client.pid, flush=True)
    await asyncio.sleep(60)

if __name__ == "__main__":
    asyncio.run(main())
"""


def test_a_killed_server_leaves_no_orphan(config, tmp_path):
    """When the server is killed outright its engine is gone a moment later."""
    script = tmp_path / "server.py"
    script.write_text(SERVER_THAT_DIES)
    root = Path(__file__).parents[2]
    server = subprocess.Popen(
        [sys.executable, str(script), config.artifact, config.loader],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(root)},
    )
    with server:
        pid = int(server.stdout.readline())
        assert psutil.pid_exists(pid)
        server.kill()
    deadline = time.monotonic() + 10
    while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline, "the engine outlived its server"
        time.sleep(0.05)
