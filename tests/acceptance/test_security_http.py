"""Points 1 to 3, 5, 6, 10, 13 and 23: what strangers and strange clients send, byte by byte, to the real server.

After each of them the server answers, and has logged no error: the fixture at the end of this page looks.
"""

import json
import urllib.request

import psutil
import pytest

from service.auth import Scope, add_key
from tests.support.raw_http import connect, exchange, head, post, read_answer
from tests.support.server_process import running_server

pytestmark = pytest.mark.acceptance

SHORT = {"model": "tiny", "prompt": "x", "max_tokens": 2, "temperature": 0}
LIMIT = 1 << 20
JSON = "content-type: application/json"


@pytest.fixture(scope="module")
def keys(tmp_path_factory):
    file = tmp_path_factory.mktemp("keys") / "keys.json"
    return file, {scope: add_key(file, scope.value, frozenset({scope})) for scope in Scope}


@pytest.fixture(scope="module")
def running(tiny_artifact, keys, tmp_path_factory):
    arguments = ["--kv-cache-bytes", "8000000", "--max-body-bytes", str(LIMIT), "--keys-file", str(keys[0])]
    arguments += ["--artifact-root", str(tmp_path_factory.mktemp("root")), "--admin-port", "0"]
    arguments += ["--log-level", "debug"]
    log_file = tmp_path_factory.mktemp("server") / "log"
    with running_server(str(tiny_artifact), *arguments, log_file=log_file) as server:
        yield server


@pytest.fixture
def server(running):
    """The server, which must be alive and have logged no error when the test is over."""
    yield running
    assert running.status("/health/ready") == 200
    assert [line for line in running.log() if line["level"] == "error"] == []


@pytest.fixture
def key(keys):
    return f"authorization: Bearer {keys[1][Scope.INFERENCE]}"


@pytest.fixture
def admin_key(keys):
    return f"authorization: Bearer {keys[1][Scope.ADMIN]}"


def admin_url(server):
    return next(line["url"] for line in server.log() if line["message"] == "listening for admin")


def check_envelope(answer, status):
    assert answer.status == status, answer
    assert set(answer.error) == {"message", "type", "param", "code"}


@pytest.mark.parametrize(
    ("field", "status"),
    [
        (None, 401),
        ("authorization:", 401),
        ("authorization: Bearer", 401),
        ("authorization: Bearer \xff\xfe", 401),
        ("authorization: Bearer " + "k" * 10_000, 401),
        ("authorization: Bearer " + "k" * (1 << 20), 431),
        ("x-api-key: KEY", 401),
        ("cookie: api_key=KEY", 401),
    ],
)
def test_a_wrong_key_or_one_in_another_place_opens_nothing(server, keys, field, status):
    """Nor one in the query, whose logs are read by many; a key as large as a book is too much of a head."""
    fields = [] if field is None else [field.replace("KEY", keys[1][Scope.INFERENCE])]
    check_envelope(exchange(server.url, head("GET", "/v1/models", *fields)), status)
    query = f"/v1/models?api_key={keys[1][Scope.INFERENCE]}&authorization=Bearer+{keys[1][Scope.INFERENCE]}"
    check_envelope(exchange(server.url, head("GET", query, *fields)), status)


def test_every_announced_path_asks_for_its_scope(server, key, admin_key):
    """All of /openapi.json: without a key 401, with the other scope 403 (or, on the other port, not there)."""
    with urllib.request.urlopen(server.url + "/openapi.json") as answer:
        document = json.load(answer)
    guarded = 0
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            if not operation.get("security"):
                assert path in {"/health", "/health/live", "/health/ready", "/metrics"}
                continue
            guarded += 1
            is_admin = path.startswith("/admin")
            url, other = (admin_url(server), key) if is_admin else (server.url, admin_key)
            asked = path.replace("{", "").replace("}", "").replace(":path", "")
            check_envelope(exchange(url, head(method.upper(), asked, "content-length: 0")), 401)
            check_envelope(exchange(url, head(method.upper(), asked, "content-length: 0", other)), 403)
            if is_admin:
                check_envelope(exchange(server.url, head(method.upper(), asked, "content-length: 0", admin_key)), 404)
    assert guarded >= 15


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        ("//admin/models", ()),
        ("/admin//models", ()),
        ("/./admin/models", ()),
        ("/v1/../admin/models", ()),
        ("/v1/%2e%2e/admin/models", ()),
        ("/health/live/..;/admin/models", ()),
        ("/admin%2fmodels", ()),
        ("/ADMIN/models", ()),
        ("/admin/models/", ()),
        ("/admin/models%00", ()),
        ("http://localhost/admin/models", ()),
        ("*", ()),
        ("/admin/models", ("x-forwarded-prefix: /v1", "x-original-url: /health/live", "x-rewrite-url: /health/live")),
        ("/admin/models", ("x-forwarded-for: 127.0.0.1", "x-forwarded-host: localhost", "forwarded: for=127.0.0.1")),
        ("/admin/models", ("x-http-method-override: GET", "x-forwarded-port: 1", "x-forwarded-proto: https")),
        ("/admin/models?_method=GET", ()),
    ],
)
def test_no_spelling_and_no_header_leads_around_the_guard(server, key, path, fields):
    """An inference key reaches no admin route, on neither port; what is forwarded is not believed."""
    for url in (server.url, admin_url(server)):
        assert exchange(url, head("GET", path, key, *fields)).status in (400, 403, 404, 405)
        assert exchange(url, head("GET", path, *fields)).status in (400, 401, 404, 405)


@pytest.mark.parametrize("host", ["a/b?", "x#", "localhost/admin", "127.0.0.1:99999", "[::1", "evil.example", ""])
def test_the_host_decides_nothing(server, key, host):
    """With keys any name will do, and none gives rights; a Host that is no host does no harm."""
    assert exchange(server.url, head("GET", "/v1/models", key, host=host)).status in (200, 400)
    assert exchange(server.url, head("GET", "/v1/models", host=host)).status in (400, 401)
    assert exchange(server.url, head("GET", "/admin/models", key, host=host)).status in (400, 404)


def test_admin_is_on_its_own_port_alone(server, admin_key):
    """Which port is not a matter of what the client says."""
    assert exchange(admin_url(server), head("GET", "/admin/models", admin_key)).status == 200
    port = admin_url(server).rpartition(":")[2]
    asked = head("GET", "/admin/models", admin_key, f"x-forwarded-port: {port}", host=f"localhost:{port}")
    check_envelope(exchange(server.url, asked), 404)


def test_a_large_body_is_refused_early(server, key):
    """Announced: before a byte is read, and before the key is. In chunks: at the byte that is too many."""
    started = head("POST", "/v1/completions", JSON, f"content-length: {1 << 40}")
    check_envelope(exchange(server.url, started), 413)
    memory = psutil.Process(server.pid).memory_info().rss
    piece = b"10000\r\n" + b" " * 0x10000 + b"\r\n"
    chunked = head("POST", "/v1/completions", JSON, key, "transfer-encoding: chunked") + piece * 200
    check_envelope(exchange(server.url, chunked), 413)
    stranger = head("POST", "/v1/completions", JSON, "transfer-encoding: chunked") + piece * 200
    check_envelope(exchange(server.url, stranger), 401)
    check_envelope(exchange(server.url, post("/v1/completions", b" " * (LIMIT + 1), key)), 413)
    assert psutil.Process(server.pid).memory_info().rss - memory < 32 << 20


@pytest.mark.parametrize("coding", ["gzip", "deflate", "br", "zstd", "gzip, gzip", "x"])
def test_a_compressed_body_is_refused_unread(server, key, coding):
    """So there is nothing to inflate."""
    answer = exchange(server.url, post("/v1/completions", SHORT, key, f"content-encoding: {coding}"))
    check_envelope(answer, 415)
    assert answer.error["code"] == "unsupported_media_type"


@pytest.mark.parametrize("media", ["text/plain", "application/xml", "multipart/form-data; boundary=x", "\xff", ""])
def test_another_content_type_is_refused(server, key, media):
    """Only JSON is JSON."""
    body = json.dumps(SHORT).encode()
    sent = head("POST", "/v1/completions", f"content-type: {media}", f"content-length: {len(body)}", key) + body
    check_envelope(exchange(server.url, sent), 400)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"\xff\xfe{}",
        b'\xef\xbb\xbf{"model": "tiny", "prompt": "x"}',
        b"[" * 30_000,
        b'{"a":' * 30_000,
        b'{"model": "tiny", "prompt": "x", "temperature": NaN}',
        b'{"model": "tiny", "prompt": "x", "temperature": Infinity}',
        b'{"model": "tiny", "prompt": "\\ud800"}',
        b'{"model": "tiny\\u0000", "prompt": "x"}',
        b'{"model": "tiny", "prompt": "x", "max_tokens": ' + b"9" * 5000 + b"}",
        b'{"model": "tiny", "prompt": "x", "max_tokens": 1, "max_tokens": 400}',
        b'{"model": "tiny", "prompt": "x", "stream_options": {"include_usage": 1, "include_usage": true}}',
        b'{"model": "tiny", "prompt": "' + b"x" * 1_000_000 + b'"}',
        b'{"model": "tiny", "prompt": ' + b"[1," * 1000 + b"1" + b"]" * 1000 + b"}",
    ],
)
def test_odd_json_is_refused(server, key, body):
    """With a 4xx in OpenAI's envelope, whatever it is."""
    answer = exchange(server.url, post("/v1/completions", body, key))
    assert 400 <= answer.status < 500, answer
    assert set(answer.error) == {"message", "type", "param", "code"}


@pytest.mark.parametrize(
    ("fields", "status"),
    [
        ({"temperature": 0}, 200),
        ({"temperature": 1e-30}, 200),
        ({"temperature": 2}, 200),
        ({"temperature": 1, "top_p": 0}, 200),
        ({"temperature": 1, "top_p": 1e-300}, 200),
        ({"temperature": 1, "min_p": 1}, 200),
        ({"temperature": 1e30}, 400),
        ({"temperature": -1}, 400),
        ({"top_p": 1.0001}, 400),
        ({"temperature": 1, "top_k": 10**9}, 200),
    ],
)
def test_extreme_numbers_are_refused_or_give_text(server, key, fields, status):
    """Nothing of it reaches a NaN."""
    answer = exchange(server.url, post("/v1/completions", {**SHORT, **fields}, key))
    assert answer.status == status, answer.body


def test_what_clients_call_themselves_makes_no_line_of_its_own(server, key):
    """The log stays one JSON object a line, and no text of a client is in it or on /metrics."""
    nasty = 'x\n{"level": "error"}\x1b[31m\u2028\u202e'
    exchange(server.url, post("/v1/completions", {**SHORT, "user": nasty}, key))
    exchange(server.url, post("/v1/completions", {**SHORT, "model": nasty}, key))
    asked = post("/v1/completions", SHORT, key, 'x-request-id: a"b\x1b[31m', "user-agent: \x1b]0;pwned\x07")
    answer = exchange(server.url, asked)
    assert answer.status in (200, 400)
    given = exchange(server.url, post("/v1/completions", SHORT, key, "x-request-id: " + "a" * 65))
    assert given.headers["x-request-id"] != "a" * 65
    assert server.log(), "a line that is not JSON fails in there"
    text = server.log_file.read_text()
    with urllib.request.urlopen(server.url + "/metrics") as page:
        assert b"[31m" not in page.read()
    assert "[31m" not in text
    assert "pwned" not in text


def test_requests_sent_without_waiting_are_answered_in_order(server, key):
    """Pipelining."""
    with connect(server.url) as link:
        link.sendall(head("GET", "/v1/models", key) + head("GET", "/none", key) + post("/v1/completions", SHORT, key))
        begun = bytearray()
        assert [read_answer(link, begun).status for _ in range(3)] == [200, 404, 200]


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (head("POST", "/v1/models", "content-length: 4", "transfer-encoding: chunked") + b"0\r\n\r\n", 400),
        (head("POST", "/v1/models", "content-length: 4", "content-length: 5") + b"abcd", 400),
        (head("POST", "/v1/models", "content-length: -1"), 400),
        (head("POST", "/v1/models", "content-length: 1_0") + b"0123456789", 400),
        (head("POST", "/v1/models", "transfer-encoding: gzip, chunked") + b"0\r\n\r\n", 501),
        (head("POST", "/v1/models", "transfer-encoding: identity") + b"0\r\n\r\n", 501),
        (head("POST", "/v1/models", "transfer-encoding: chunked", version="1.0") + b"0\r\n\r\n", 400),
        (head("POST", "/v1/completions", JSON, "KEY", "transfer-encoding: chunked") + b"xyz\r\n\r\n", 400),
        (head("POST", "/v1/completions", JSON, "KEY", "transfer-encoding: chunked") + b"-1\r\n\r\n", 400),
        (b"GET /v1/models HTTP/1.1\r\n\r\n", 400),
        (b"GET /v1/models HTTP/1.1\r\nhost: a\r\nhost: b\r\n\r\n", 400),
        (b"GET /v1/models HTTP/1.1\r\nhost : a\r\n\r\n", 400),
        (b"GET /v1/models HTTP/1.1\r\nhost: a\r\nx: a\x00b\r\n\r\n", 400),
        (b"GET /v1/mod els HTTP/1.1\r\nhost: a\r\n\r\n", 400),
        (b"GET /v1/models\r\n\r\n", 400),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", 400),
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 505),
        (head("GET", "/v1/models", *[f"x-{number}: 1" for number in range(200)]), 431),
        (head("GET", "/v1/models", "x: " + "a" * 20_000), 431),
        (head("GET", "/" + "a" * 20_000), 431),
        (head("BREW", "/v1/models", "KEY"), 405),
        (head("OPTIONS", "/v1/models", "KEY"), 405),
        (head("TRACE", "/v1/models", "KEY"), 405),
        (head("HEAD", "/v1/models", "KEY", "connection: close"), 405),
        (head("CONNECT", "localhost:80", "KEY"), 404),
        (head("GET", "/v1/models", "KEY", version="1.0"), 200),
        (head("GET", "/v1/models", "KEY", "connection: upgrade, http2-settings", "upgrade: h2c"), 200),
        (head("GET", "/v1/models", "KEY", "connection: upgrade", "upgrade: websocket"), 200),
    ],
)
def test_odd_http(server, key, sent, status):
    """Two lengths, bad chunks, several hosts, no HTTP at all: refused as RFC 9110 and 9112 say, never guessed at."""
    answer = exchange(server.url, sent.replace(b"KEY", key.encode()))
    assert answer.status == status, answer
    if status == 405 and b"HEAD" not in sent:
        assert answer.headers["allow"] == "GET"
    if status >= 400 and b"HEAD" not in sent:
        assert answer.error["message"]


def test_a_client_may_ask_before_it_sends(server, key):
    """Expect: 100-continue: told to go on, or refused at once without a byte of body."""
    body = json.dumps(SHORT).encode()
    fields = (JSON, f"content-length: {len(body)}", "expect: 100-continue")
    with connect(server.url) as link:
        link.sendall(head("POST", "/v1/completions", key, *fields))
        begun = bytearray()
        assert read_answer(link, begun).status == 100
        link.sendall(body)
        assert read_answer(link, begun).status == 200
    for refused, status in ((head("POST", "/v1/completions", *fields), 401), (head("POST", "/none", *fields), 404)):
        with connect(server.url) as link:
            link.sendall(refused)
            assert read_answer(link).status == status
            assert link.recv(1) == b"", "the connection goes on, and its next bytes may be a body or a request"


def test_an_old_client_gets_its_stream(server, key):
    """HTTP/1.0 knows no chunks, so the end of the connection is the end of the answer."""
    body = json.dumps({**SHORT, "stream": True}).encode()
    sent = head("POST", "/v1/completions", JSON, f"content-length: {len(body)}", key, version="1.0") + body
    answer = exchange(server.url, sent)
    assert answer.status == 200
    assert "transfer-encoding" not in answer.headers
    assert answer.body.endswith(b"data: [DONE]\n\n")
