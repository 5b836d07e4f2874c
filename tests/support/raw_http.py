"""HTTP by hand: bytes that no client library would send, and what comes back."""

import json
import socket
import time
from contextlib import suppress
from dataclasses import dataclass
from urllib.parse import urlsplit


@dataclass(frozen=True)
class RawAnswer:
    """One answer as it came over the wire; status 0 if the connection was closed without one."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def error(self):
        """The error in OpenAI's envelope."""
        return json.loads(self.body)["error"]


def connect(url: str, *, timeout: float = 30.0, receive_buffer: int | None = None) -> socket.socket:
    """Open a connection to a server."""
    place = urlsplit(url)
    family = socket.AF_INET6 if ":" in (place.hostname or "") else socket.AF_INET
    link = socket.socket(family, socket.SOCK_STREAM)
    if receive_buffer is not None:
        link.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    link.settimeout(timeout)
    link.connect((place.hostname, place.port))
    return link


def head(method: str, path: str, *fields: str, host: str = "localhost", version: str = "1.1") -> bytes:
    """Write the head of a request."""
    return "\r\n".join([f"{method} {path} HTTP/{version}", f"host: {host}", *fields, "", ""]).encode("latin-1")


def post(path: str, body: dict | bytes, *fields: str) -> bytes:
    """Write a whole POST of JSON."""
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    return head("POST", path, "content-type: application/json", f"content-length: {len(content)}", *fields) + content


def exchange(url: str, sent: bytes, *, timeout: float = 30.0) -> RawAnswer:
    """Send bytes on a new connection and read one answer; the server may close before it has read them all."""
    with connect(url, timeout=timeout) as link:
        with suppress(ConnectionError):
            link.sendall(sent)
        return read_answer(link)


def read_answer(link: socket.socket, begun: bytearray | None = None) -> RawAnswer:
    """Read one answer; what follows it stays in `begun`, for the next call."""
    buffer = bytearray() if begun is None else begun
    while b"\r\n\r\n" not in buffer:
        if not _more(link, buffer):
            return RawAnswer(0, {}, bytes(buffer))
    lines, _, rest = bytes(buffer).partition(b"\r\n\r\n")
    status_line, *fields = lines.decode("latin-1").split("\r\n")
    status = int(status_line.split()[1])
    headers = {name.lower(): value.strip() for name, _, value in (field.partition(":") for field in fields)}
    buffer[:] = rest
    if status == 100:
        return RawAnswer(status, headers, b"")
    if headers.get("transfer-encoding") == "chunked":
        return RawAnswer(status, headers, _read_chunks(link, buffer))
    wanted = int(headers["content-length"]) if "content-length" in headers else None
    while (wanted is None or len(buffer) < wanted) and _more(link, buffer):
        pass
    body = bytes(buffer[:wanted])
    del buffer[: len(body)]
    return RawAnswer(status, headers, body)


def seconds_until_closed(link: socket.socket, limit: float = 60.0) -> float:
    """Read until the server closes, and return how long that took."""
    started = time.monotonic()
    link.settimeout(limit)
    with suppress(ConnectionError):
        while link.recv(65536):
            pass
    return time.monotonic() - started


def _read_chunks(link: socket.socket, buffer: bytearray) -> bytes:
    body = b""
    while True:
        while b"\r\n" not in buffer:
            assert _more(link, buffer), "the answer ended in the middle of a chunk"
        size = int(bytes(buffer).partition(b"\r\n")[0], 16)
        start = buffer.index(b"\r\n") + 2
        while len(buffer) < start + size + 2:
            assert _more(link, buffer), "the answer ended in the middle of a chunk"
        body += buffer[start : start + size]
        del buffer[: start + size + 2]
        if size == 0:
            return body


def _more(link: socket.socket, buffer: bytearray) -> bool:
    try:
        piece = link.recv(65536)
    except ConnectionError:
        return False
    buffer += piece
    return bool(piece)
