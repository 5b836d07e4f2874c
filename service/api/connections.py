"""What uvicorn does not limit: how long a client may take to send, how slowly it may read, how many may connect.

    connected --first byte--> receiving --request complete--> answering --answer sent--> idle --first byte--> receiving
        '------ receive deadline -----'                           |                       '-- keep-alive limit
              (absolute: bytes do not extend it)                  '-- send stall: the reader takes too little

A deadline that every byte extends is none: a byte a second keeps a connection for hours ("slowloris"), so ours counts
from the first byte of a request to its last, head and body together. A sweep once a second looks at every connection,
which is cheaper and simpler than timers for each, and late by a second at most.

At `max_connections` the connection that has been without a request for the longest makes room, so idle ones cannot lock
anybody out; if all have one, the newcomer gets 503. An answer that is given before the body was read (401, 413) is
followed by a half-close, and what still comes is dropped for LINGER_SECONDS: closing at once would make the system send
a reset, which takes the answer from under the client's eyes (as nginx's lingering_close, RFC 9112 section 9.6).

Heads over MAX_HEAD_BYTES or MAX_HEADERS are 431; Content-Length together with Transfer-Encoding is 400, because two
readers could disagree about where such a request ends (request smuggling, RFC 9112 section 6.1).
"""

import asyncio
import json
from collections import Counter
from dataclasses import dataclass
from time import monotonic
from typing import Any, cast

import h11
from uvicorn.config import Config
from uvicorn.protocols.http.h11_impl import H11Protocol, RequestResponseCycle
from uvicorn.server import ServerState

from service.api.errors import error_body
from service.http_metrics import HttpMetrics

MAX_HEAD_BYTES = 16 << 10
MAX_HEADERS = 100
LINGER_SECONDS = 5.0
SPARE_REFUSALS = 32
SLOWEST_READER = 256
"""Bytes a second, on average over `send_timeout_seconds`, that a blocked reader must take."""

CODES = {
    400: "invalid_http",
    408: "request_timeout",
    431: "headers_too_large",
    501: "invalid_http",
    505: "invalid_http",
    503: "server_busy",
}
REASONS = {
    400: b"Bad Request",
    408: b"Request Timeout",
    431: b"Request Header Fields Too Large",
    501: b"Not Implemented",
    503: b"Service Unavailable",
    505: b"HTTP Version Not Supported",
}


@dataclass(frozen=True, kw_only=True)
class ConnectionLimits:
    """What a client may take.

    Attributes:
        receive_timeout_seconds: from the first byte of a request (or from connecting) to its last.
        send_timeout_seconds: how long a reader may take next to nothing while bytes wait for it.
        max_connections: open at once.
        max_per_address: of one address; None for no limit of its own.
    """

    receive_timeout_seconds: float
    send_timeout_seconds: float
    max_connections: int
    max_per_address: int | None = None


class ConnectionWatch:
    """All open connections, oldest first."""

    def __init__(self, limits: ConnectionLimits, metrics: HttpMetrics) -> None:
        self.limits = limits
        self.metrics = metrics
        self._open: dict[ClientConnection, None] = {}
        self._by_address: Counter[str] = Counter()

    def admit(self, connection: "ClientConnection") -> bool:
        """Note a new connection; False if there is no room for it."""
        self._open[connection] = None
        self._by_address[connection.address] += 1
        self.metrics.connections.set(len(self._open))
        most = self.limits.max_per_address
        if most is not None and self._by_address[connection.address] > most:
            return False
        if len(self._open) <= self.limits.max_connections:
            return True
        idle = next(other for other in self._open if other is connection or other.is_idle)
        if idle is connection:
            return False
        idle.end("crowded_out")
        return True

    @property
    def is_flooded(self) -> bool:
        """Whether even refusals hold too many descriptors."""
        return len(self._open) > self.limits.max_connections + SPARE_REFUSALS

    def forget(self, connection: "ClientConnection") -> None:
        """Note that a connection is gone; twice is harmless."""
        if connection not in self._open:
            return
        del self._open[connection]
        self._by_address[connection.address] -= 1
        if self._by_address[connection.address] <= 0:
            del self._by_address[connection.address]
        self.metrics.connections.set(len(self._open))

    def sweep(self) -> None:
        """End every connection that has had its time."""
        now = monotonic()
        for connection in list(self._open):
            connection.check(now)


class StrictConnection(h11.Connection):
    """h11, which parses HTTP strictly, with limits on heads that arrive in one piece and no two lengths for a body.

    Attributes:
        refusal: why the client's bytes were refused, once they were.
    """

    refusal: h11.RemoteProtocolError | None = None

    def next_event(self) -> Any:
        """Return the next event.

        Raises:
            h11.RemoteProtocolError: what came is no request we take; `refusal` holds it.
        """
        try:
            event = super().next_event()
            if isinstance(event, h11.Request):
                _check_head(event)
        except h11.RemoteProtocolError as error:
            self.refusal = error
            raise
        return event


def _check_head(request: h11.Request) -> None:
    """Refuse heads that are too large or ambiguous."""
    headers = list(request.headers)
    size = len(request.target) + sum(len(name) + len(value) + 4 for name, value in headers)
    if len(headers) > MAX_HEADERS or size > MAX_HEAD_BYTES:
        message = f"the head may have {MAX_HEADERS} fields and {MAX_HEAD_BYTES} bytes"
        raise h11.RemoteProtocolError(message, error_status_hint=431)
    if request.http_version not in (b"1.0", b"1.1"):
        raise h11.RemoteProtocolError("this server speaks HTTP/1.0 and HTTP/1.1", error_status_hint=505)
    names = {name for name, _ in headers}
    if b"transfer-encoding" in names and (b"content-length" in names or request.http_version < b"1.1"):
        raise h11.RemoteProtocolError("the body's length is told in two ways, or in one that HTTP/1.0 does not know")


class LingeringTransport:
    """A transport that is not closed under a client that still sends a body, whoever asks for it."""

    def __init__(self, transport: asyncio.Transport, connection: "ClientConnection") -> None:
        self._transport = transport
        self._connection = connection

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def close(self) -> None:
        """Close, or linger if the client still sends."""
        if not self._connection.linger():
            self._transport.close()


class ClientConnection(H11Protocol):
    """One client's connection: uvicorn's, with the limits above."""

    def __init__(
        self,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
        *,
        watch: ConnectionWatch,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self.conn: StrictConnection = StrictConnection(h11.SERVER, MAX_HEAD_BYTES)
        self._watch = watch
        self._receiving_since: float | None = None
        self._lingering_since: float | None = None
        self._blocked_since: float | None = None
        self._blocked_bytes = 0

    @property
    def address(self) -> str:
        """The client's address."""
        return self.client[0] if self.client else ""

    @property
    def is_idle(self) -> bool:
        """Whether no request is complete or under way: silent, between requests, or still sending a head."""
        return self.conn.their_state is h11.IDLE and self.conn.our_state is h11.IDLE

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn's own
        """Start the receive deadline, or refuse."""
        super().connection_made(cast("asyncio.Transport", LingeringTransport(transport, self)))
        self._receiving_since = monotonic()
        if self._watch.admit(self):
            return
        if self._watch.is_flooded:
            self.end("refused")
            return
        self._watch.metrics.connections_ended.labels("refused").inc()
        self._answer(503, "too many connections are open; try again in a moment")

    def connection_lost(self, exc: Exception | None) -> None:
        """Give the place back."""
        self._watch.forget(self)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Take bytes of a request; drop them if it has been answered already."""
        if self._lingering_since is not None:
            return
        if self._receiving_since is None:
            self._receiving_since = monotonic()
        super().data_received(data)
        if self.conn.their_state not in (h11.IDLE, h11.SEND_BODY):
            self._receiving_since = None

    def on_response_complete(self) -> None:
        """Go on with the next request, or let the rest of an unread one pass by."""
        if self._lingering_since is not None or self.linger():
            return
        super().on_response_complete()
        if self.conn.their_state is h11.SEND_BODY or (self.is_idle and self.conn.trailing_data[0]):
            self._receiving_since = monotonic()  # the next request was sent without waiting, and began to arrive

    def send_400_response(self, msg: str) -> None:
        """Answer what is no HTTP, or none that we take."""
        refusal = self.conn.refusal
        self._watch.metrics.connections_ended.labels("malformed").inc()
        status = refusal.error_status_hint if refusal is not None else 400
        text = str(refusal) if refusal is not None and status in (431, 501, 505) else msg
        self._answer(status if status in CODES else 400, text)

    def check(self, now: float) -> None:
        """End the connection if its time is over."""
        if self._lingering_since is not None:
            if now - self._lingering_since > LINGER_SECONDS:
                self.transport.abort()
        elif self._receiving_since is not None and now - self._receiving_since > self._limits.receive_timeout_seconds:
            self._time_out()
        else:
            self._check_reader(now)

    def end(self, reason: str) -> None:
        """Close at once, without a word."""
        self._watch.metrics.connections_ended.labels(reason).inc()
        self._watch.forget(self)
        self.transport.abort()

    @property
    def _limits(self) -> ConnectionLimits:
        return self._watch.limits

    @property
    def _cycle(self) -> RequestResponseCycle | None:
        """The latest request; None before the first, which uvicorn's types do not tell."""
        return self.cycle

    def _time_out(self) -> None:
        """End a request that does not come to its end; who said nothing gets no answer."""
        seconds = self._limits.receive_timeout_seconds
        if self.conn.their_state is h11.IDLE and not self.conn.trailing_data[0]:
            self.end("receive_deadline")
            return
        self._watch.metrics.connections_ended.labels("receive_deadline").inc()
        self._answer(408, f"the request was not complete after {seconds:g} seconds")

    def _check_reader(self, now: float) -> None:
        """End a connection whose reader takes next to nothing while the answer waits for it."""
        waiting = self.transport.get_write_buffer_size()
        is_over = self.transport.is_closing() or self._cycle is None or self._cycle.response_complete
        if not waiting or not (self.flow.write_paused or is_over):
            self._blocked_since = None
            return
        if self._blocked_since is None:
            self._blocked_since, self._blocked_bytes = now, waiting
            return
        seconds = now - self._blocked_since
        if seconds < self._limits.send_timeout_seconds:
            return
        if self._blocked_bytes - waiting < SLOWEST_READER * seconds:
            self.end("send_stalled")
        else:
            self._blocked_since, self._blocked_bytes = now, waiting

    def _answer(self, status: int, message: str) -> None:
        """Answer in place of the application, if there is no answer yet, and end the connection."""
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            kind = "server_error" if status >= 500 else "invalid_request_error"
            body = json.dumps(error_body(message, kind, param=None, code=CODES[status])).encode()
            headers = [
                ("content-type", "application/json"),
                ("content-length", str(len(body))),
                ("connection", "close"),
            ]
            if status == 503:
                headers.append(("retry-after", "1"))
            start = h11.Response(status_code=status, headers=headers, reason=REASONS[status])
            for event in (start, h11.Data(data=body), h11.EndOfMessage()):
                self.transport.write(self.conn.send(event) or b"")
        if self._cycle is not None:
            self._cycle.disconnected = True
            self._cycle.message_event.set()
        self._half_close()

    def linger(self) -> bool:
        """Begin to wait for the end of a request that is answered already; False if there is nothing to wait for."""
        is_answered = self._cycle is not None and self._cycle.response_complete
        if self._lingering_since is not None or not is_answered or self.conn.their_state is not h11.SEND_BODY:
            return False
        self._half_close()
        return True

    def _half_close(self) -> None:
        """Say that no more will be sent, and drop what comes until the client closes or LINGER_SECONDS are over."""
        if self.transport.is_closing():
            return
        self._unset_keepalive_if_required()
        self._receiving_since, self._lingering_since = None, monotonic()
        self.transport.write_eof()
        self.flow.resume_reading()
