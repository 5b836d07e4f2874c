"""Points 19 and 20: clients that send slowly, say nothing, or never read, against the real server.

The server is given short deadlines, so that a test need not wait for half a minute.
"""

import json
import resource
import socket
import time
import urllib.request

import psutil
import pytest

from tests.support.live_metrics import LiveMetrics
from tests.support.raw_http import connect, exchange, head, post, read_answer, seconds_until_closed
from tests.support.server_process import running_server

pytestmark = pytest.mark.acceptance

RECEIVE, SEND, KEEP_ALIVE = 3, 3, 2
LATE = 2.5  # a sweep comes once a second, and the machine may be busy
SHORT = {"model": "tiny", "prompt": "x", "max_tokens": 4, "temperature": 0}
ENDED = "onebit_http_connections_ended_total"


@pytest.fixture(scope="module")
def server(tiny_artifact, tmp_path_factory):
    arguments = ["--kv-cache-bytes", "8000000", "--receive-timeout-seconds", str(RECEIVE)]
    arguments += ["--send-timeout-seconds", str(SEND), "--keep-alive-seconds", str(KEEP_ALIVE)]
    log_file = tmp_path_factory.mktemp("server") / "log"
    with running_server(str(tiny_artifact), *arguments, log_file=log_file) as server:
        assert exchange(server.url, post("/v1/completions", SHORT)).status == 200
        yield server


def ended(server, reason):
    return LiveMetrics(server.url).total(ENDED, reason=reason)


def num_descriptors(server):
    return psutil.Process(server.pid).num_fds()


def wait_for(is_true, seconds=20.0):
    deadline = time.monotonic() + seconds
    while not is_true():
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.mark.parametrize(
    ("name", "sent", "status"),
    [
        ("silent", b"", 0),
        ("half a head", b"GET /health/live HTTP/1.1\r\nhost: loc", 408),
        ("half a body", post("/v1/completions", SHORT)[:-5], 408),
        ("half a chunk", head("POST", "/v1/completions", "transfer-encoding: chunked") + b"ff\r\nabc", 408),
    ],
)
def test_who_does_not_finish_a_request_is_closed_at_the_deadline(server, name, sent, status):
    """Not before it, whether a byte was sent or none; who has begun is told why."""
    before = ended(server, "receive_deadline")
    with connect(server.url) as link:
        started = time.monotonic()
        link.sendall(sent)
        answer = read_answer(link)
        seconds_until_closed(link)
        assert RECEIVE - 0.1 <= time.monotonic() - started <= RECEIVE + LATE, name
    assert answer.status == status
    if status:
        assert answer.error["code"] == "request_timeout"
        assert answer.headers["connection"] == "close"
    assert ended(server, "receive_deadline") == before + 1


@pytest.mark.parametrize("part", ["head", "body"])
def test_a_byte_now_and_then_does_not_extend_the_deadline(server, part):
    """The deadline counts from the first byte of a request to its last."""
    whole = post("/v1/completions", SHORT)
    begun = 4 if part == "head" else whole.index(b"\r\n\r\n") + 4
    with connect(server.url, timeout=0.2) as link:
        started = time.monotonic()
        link.sendall(whole[:begun])
        received = b""
        for position in range(begun, len(whole)):
            link.sendall(whole[position : position + 1])
            try:
                received = link.recv(100)
                break
            except TimeoutError:
                continue
        assert received.startswith(b"HTTP/1.1 408")
        assert RECEIVE - 0.1 <= time.monotonic() - started <= RECEIVE + LATE


def test_the_deadline_ends_with_the_request(server):
    """An answer may take longer than a request may, and the next request on the connection has its own time."""
    long = {**SHORT, "max_tokens": 1, "stream": True, "n": 1}
    with connect(server.url) as link:
        for _ in range(4):
            link.sendall(post("/v1/completions", long))
            assert read_answer(link).status == 200
            time.sleep(RECEIVE / 3)
    slow = {**SHORT, "max_tokens": 400, "ignore_eos": True, "n": 24, "stream": True}
    started = time.monotonic()
    answer = exchange(server.url, post("/v1/completions", slow))
    assert answer.body.endswith(b"data: [DONE]\n\n")
    if time.monotonic() - started < RECEIVE:
        pytest.skip("this machine is too fast for an answer longer than the deadline")


def test_an_idle_connection_is_closed_after_keep_alive(server):
    """After a whole request and answer, and nothing more."""
    with connect(server.url) as link:
        link.sendall(head("GET", "/health/live"))
        assert read_answer(link).status == 200
        assert KEEP_ALIVE - 0.1 <= seconds_until_closed(link) <= KEEP_ALIVE + LATE


def test_five_hundred_slow_clients_disturb_nobody(server):
    """They are all closed at the deadline; meanwhile others are answered, and every descriptor comes back."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < 1200:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 1200) if hard > 0 else 1200, hard))
    wait_for(lambda: LiveMetrics(server.url).total("onebit_http_connections") <= 2)
    descriptors, before = num_descriptors(server), ended(server, "receive_deadline")
    half_head, whole = b"POST /v1/completions HTTP/1.1\r\nhost: l", post("/v1/completions", SHORT)
    links, slowest = [], 0.0
    try:
        for number in range(500):
            links.append(connect(server.url))
            if number % 3 == 1:
                links[-1].sendall(half_head)
            elif number % 3 == 2:
                links[-1].sendall(whole[:-30])
        last, started, dripped = time.monotonic(), time.monotonic(), 0
        while time.monotonic() - last < RECEIVE - 0.5:
            for link in links[2::3]:
                link.sendall(b" " if dripped == 0 else b"")  # a byte of body
            dripped += 1
            asked = time.monotonic()
            assert exchange(server.url, whole).status == 200
            slowest = max(slowest, time.monotonic() - asked)
            time.sleep(0.05)
        assert slowest < 2.0
        wait_for(lambda: LiveMetrics(server.url).total("onebit_http_connections") <= 2, seconds=RECEIVE + 10)
        assert ended(server, "receive_deadline") == before + 500
        assert time.monotonic() - started < RECEIVE + 12
        for link in links:
            assert seconds_until_closed(link, 10) < 10
    finally:
        for link in links:
            link.close()
    wait_for(lambda: num_descriptors(server) <= descriptors + 2)
    assert [line for line in server.log() if line["level"] == "error"] == []


def test_a_reader_that_never_reads_is_cut_off(server):
    """The server stops sending when the client's window is full, and after the limit ends connection and sequences."""
    before = ended(server, "send_stalled")
    body = {**SHORT, "max_tokens": 450, "ignore_eos": True, "n": 32, "stream": True, "logprobs": 5}
    memory = psutil.Process(server.pid).memory_info().rss
    with connect(server.url, receive_buffer=4096) as link:
        link.sendall(post("/v1/completions", body))
        wait_for(lambda: ended(server, "send_stalled") == before + 1, seconds=60)
        assert psutil.Process(server.pid).memory_info().rss - memory < 200 << 20
    metrics = LiveMetrics(server.url)
    wait_for(lambda: metrics.total("onebit_requests_running") + metrics.total("onebit_requests_waiting") == 0)
    assert metrics.total("onebit_kv_cache_usage_ratio") == 0
    assert exchange(server.url, post("/v1/completions", SHORT)).status == 200


def test_idle_connections_make_room_for_others(tiny_artifact, tmp_path):
    """At the limit the one without a request for the longest goes; where all have one, the newcomer is told so."""
    arguments = (str(tiny_artifact), "--kv-cache-bytes", "8000000", "--max-connections", "20")
    with running_server(*arguments, log_file=tmp_path / "log") as server:
        idle = [connect(server.url) for _ in range(40)]
        assert exchange(server.url, head("GET", "/health/live", "connection: close")).status == 200
        assert ended(server, "crowded_out") >= 20
        for link in idle:
            link.close()
        busy = {**SHORT, "max_tokens": 480, "ignore_eos": True, "stream": True}
        streams = []
        try:
            for _ in range(20):
                streams.append(connect(server.url))
                streams[-1].sendall(post("/v1/completions", busy))
                assert streams[-1].recv(12) == b"HTTP/1.1 200"
            refused = exchange(server.url, head("GET", "/v1/models"))
            if refused.status == 200:
                pytest.skip("the first stream ended before the last began")
            assert (refused.status, refused.error["code"]) == (503, "server_busy")
            assert refused.headers["retry-after"] == "1"
        finally:
            for link in streams:
                link.close()
        wait_for(lambda: server.status("/health/ready") == 200)


def test_one_address_has_its_own_limit(tiny_artifact, tmp_path):
    """Where that is set: one address cannot take what is there for all."""
    arguments = (str(tiny_artifact), "--kv-cache-bytes", "8000000", "--max-connections-per-address", "4")
    with running_server(*arguments, log_file=tmp_path / "log") as server:
        time.sleep(0.2)
        mine = [connect(server.url) for _ in range(4)]
        assert exchange(server.url, head("GET", "/health/live")).status == 503
        neighbour = socket.create_connection(mine[0].getpeername(), source_address=("127.0.0.9", 0))
        neighbour.sendall(head("GET", "/health/live"))
        assert read_answer(neighbour).status == 200
        for link in (*mine, neighbour):
            link.close()
        wait_for(lambda: server.status("/health/live") == 200)


def test_a_large_refused_body_does_not_hide_its_answer(server):
    """The answer comes before the body is read, and the client reads it although it still sends."""
    body = b" " * (40 << 20)
    answer = exchange(server.url, post("/v1/completions", body))
    assert (answer.status, answer.error["code"]) == (413, "payload_too_large")
    request = urllib.request.Request(server.url + "/v1/completions", body, {"content-type": "application/json"})
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(request)
    assert refused.value.code == 413
    assert json.load(refused.value)["error"]["code"] == "payload_too_large"
