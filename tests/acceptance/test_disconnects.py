"""Clients that leave take nothing with them: memory, pages and descriptors return to where they were.

Clients leave at every moment there is: before the body is whole, while they wait, after the first piece of a stream,
with one completion or four. The baseline is taken after a first wave, when caches and threads have grown to their size.
"""

import asyncio
import contextlib
import json
import time
from urllib.parse import urlsplit

import psutil
import pytest

from tests.support.live_metrics import LiveMetrics
from tests.support.server_process import running_server

pytestmark = [pytest.mark.acceptance, pytest.mark.soak]

AT_ONCE = 16
GROWTH_MIB = 16.0
SPARE_DESCRIPTORS = 3
"""A scrape of /metrics, and what the moment of counting catches."""


def request_bytes(number):
    """One request as it goes over the wire, and how it will be left."""
    body = {"model": "tiny", "prompt": f"client {number} says", "max_tokens": 400, "ignore_eos": True, "seed": number}
    body |= {"stream": number % 3 != 0, "n": 4 if number % 5 == 0 else 1}
    text = json.dumps(body).encode()
    head = b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
    return head + b"content-length: %d\r\n\r\n" % len(text) + text


async def leave(host, port, number):
    """Connect, ask, and close at a moment that depends on the number."""
    reader, writer = await asyncio.open_connection(host, port)
    asked = request_bytes(number)
    moment = number % 4
    writer.write(asked[: len(asked) - 20] if moment == 0 else asked)
    await writer.drain()
    if moment == 1:
        await reader.read(200) if number % 3 else await asyncio.sleep(0.02)
    elif moment == 2:
        await asyncio.sleep(0.002 * (number % 50))
    writer.transport.abort() if number % 2 else writer.close()
    with contextlib.suppress(ConnectionError):
        await writer.wait_closed()


async def wave(url, numbers):
    """Let many clients leave, so many at once."""
    place = urlsplit(url)
    gate = asyncio.Semaphore(AT_ONCE)

    async def one(number):
        async with gate:
            await leave(place.hostname, place.port, number)

    await asyncio.gather(*(one(number) for number in numbers))


def wait_until_idle(server, seconds=120.0):
    """Wait until nothing runs or waits; pages must then be free."""
    metrics = LiveMetrics(server.url)
    deadline = time.monotonic() + seconds
    while metrics.total("onebit_requests_running") + metrics.total("onebit_requests_waiting") > 0:
        assert time.monotonic() < deadline, "sequences of clients that left are still computed"
        time.sleep(0.1)
    assert metrics.total("onebit_kv_cache_usage_ratio") == 0


def held(server):
    """Memory in MiB and open descriptors of the server and of its engine."""
    main = psutil.Process(server.pid)
    processes = [main, *main.children(recursive=True)]
    return {
        (process.pid, process.cmdline()[-1][-40:]): (process.memory_info().rss / (1 << 20), process.num_fds())
        for process in processes
    }


def settled(server, before, seconds=20.0):
    """What is held once descriptors are back, or what is still held after a while."""
    deadline = time.monotonic() + seconds
    while True:
        now = held(server)
        back = all(now.get(process, (0, 0))[1] <= before[process][1] + SPARE_DESCRIPTORS for process in before)
        if back or time.monotonic() > deadline:
            return now
        time.sleep(0.2)


def test_clients_that_leave_take_nothing_with_them(tiny_artifact, is_soak, tmp_path):
    """A hundred of them (a thousand in soak) leave memory, pages and descriptors where they were."""
    count = 1000 if is_soak else 100
    with running_server(str(tiny_artifact), "--kv-cache-bytes", "4000000", log_file=tmp_path / "log") as server:
        asyncio.run(wave(server.url, range(60)))
        wait_until_idle(server)
        before = held(server)
        assert len(before) >= 2, "the engine is not a process of its own"
        asyncio.run(wave(server.url, range(60, 60 + count)))
        wait_until_idle(server)
        after = settled(server, before)
        assert set(after) == set(before), "a process was replaced or left over"
        for process, (memory, descriptors) in after.items():
            assert descriptors <= before[process][1] + SPARE_DESCRIPTORS, (process, descriptors, before[process])
            assert memory <= before[process][0] + GROWTH_MIB, (process, memory, before[process])
        aborted = LiveMetrics(server.url).total("onebit_request_success_total", finished_reason="abort")
        assert aborted >= count / 4
        assert [line for line in server.log() if line["level"] == "error"] == []
