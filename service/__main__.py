"""onebit-serve: serve artifacts, or keep the file of API keys.

    onebit-serve [serve] ARTIFACT... [flags]
    onebit-serve keys add --file FILE --id NAME --scope inference [--scope admin]
    onebit-serve keys list --file FILE
    onebit-serve keys rotate --file FILE --id NAME [--overlap-seconds N]
    onebit-serve keys remove --file FILE --id NAME

Exit codes: 0 after a clean stop; 2 with one sentence on standard error when the settings, an artifact or the port
cannot be used.
"""

import asyncio
import logging
import os
import resource
import signal
import socket
import sys
from functools import partial
from types import FrameType
from typing import NoReturn

import uvicorn
from fastapi import FastAPI

from onebit_core.artifact.identity import ModelKind, kind_of, read_manifest
from onebit_core.errors import OnebitError
from service.api.connections import ClientConnection, ConnectionLimits, ConnectionWatch
from service.key_commands import run_keys
from service.log import configure_logging
from service.registry.adapters import read_adapters
from service.settings import Settings, read_settings

logger = logging.getLogger("service")

BAD_SETTINGS = 2
BACKLOG = 2048
OWN_DESCRIPTORS = 64
"""Kept from clients: for models, engines, the jobs' database, the key file, and a restart of any of them."""
LEAST_CONNECTIONS = 16
TICKS_PER_SWEEP = 10


def main() -> None:
    """Run the command line."""
    arguments = sys.argv[1:]
    if arguments[:1] == ["keys"]:
        try:
            run_keys(arguments[1:])
        except (ValueError, OSError) as error:
            _refuse(str(error))
    else:
        serve(arguments[1:] if arguments[:1] == ["serve"] else arguments)


def serve(arguments: list[str]) -> None:
    """Serve until a signal says stop."""
    try:
        settings = read_settings(arguments)
        configure_logging(settings.log_level)
        _check_artifacts(settings)
        from service.app import create_app  # imports torch: after the settings are known to be good

        app = create_app(settings)
        listeners = [_listen(settings.host, settings.port)]
        if settings.admin_port is not None:
            listeners.append(_listen(settings.host, settings.admin_port))
            app.state.admin_port = listeners[1].getsockname()[1]
    except (OnebitError, ValueError, OSError) as error:
        _refuse(str(error))
    for listener, message in zip(listeners, ("listening", "listening for admin"), strict=False):
        host, port = listener.getsockname()[:2]
        logger.info(message, extra={"url": f"http://{f'[{host}]' if ':' in host else host}:{port}"})
    server = Server(app, settings)
    asyncio.run(server.serve(sockets=listeners))
    if server.start_failure is not None:
        _refuse(server.start_failure)


class Server(uvicorn.Server):
    """uvicorn, told what draining means here, and with limits on connections.

    Attributes:
        start_failure: why no model could be served, in one sentence; None if all went well.
    """

    def __init__(self, app: FastAPI, settings: Settings) -> None:
        self._watch = ConnectionWatch(
            ConnectionLimits(
                receive_timeout_seconds=settings.receive_timeout_seconds,
                send_timeout_seconds=settings.send_timeout_seconds,
                max_connections=_connections_that_fit(settings.max_connections),
                max_per_address=settings.max_connections_per_address,
            ),
            app.state.metrics.http,
        )
        super().__init__(
            uvicorn.Config(
                app,
                http=partial(ClientConnection, watch=self._watch),  # type: ignore[arg-type]  # it calls it, no more
                ws="none",
                proxy_headers=False,  # nothing here believes what X-Forwarded-* say
                log_config=None,
                access_log=False,
                server_header=False,
                timeout_keep_alive=settings.keep_alive_seconds,
                timeout_graceful_shutdown=round(settings.shutdown_grace_seconds - settings.tail_seconds / 2),
            )
        )
        self.start_failure: str | None = None
        self._lifespan = app.state.lifespan
        self._lifespan.on_start_failure = self._fail

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Drain at the first signal, leave at once at a second Ctrl-C; uvicorn's own would re-raise it in the end."""
        del frame
        if self.should_exit and sig == signal.SIGINT:
            self.force_exit = True
        elif not self.should_exit:
            self._lifespan.drain()
            self.should_exit = True

    async def on_tick(self, counter: int) -> bool:
        """Look at every connection once a second; uvicorn calls this ten times a second."""
        if counter % TICKS_PER_SWEEP == 0:
            self._watch.sweep()
        return await super().on_tick(counter)

    def _fail(self, message: str) -> None:
        self.start_failure = message
        self.should_exit = True


def _check_artifacts(settings: Settings) -> None:
    """Read every manifest now, so that a wrong path is told before anything is started."""
    for artifact in settings.artifacts:
        if kind_of(artifact) is ModelKind.ARTIFACT:
            read_manifest(artifact)
    read_adapters(settings.adapter)


def _connections_that_fit(wanted: int) -> int:
    """Raise the process's limit of open files for so many connections, as far as it may; return how many then fit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = wanted + OWN_DESCRIPTORS
    if soft != resource.RLIM_INFINITY and soft < needed:
        soft = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return wanted
    fitting = max(LEAST_CONNECTIONS, soft - OWN_DESCRIPTORS)
    logger.warning("only %d files may be open, so at most %d connections are taken (ulimit -n)", soft, fitting)
    return fitting


def _listen(host: str, port: int) -> socket.socket:
    """Take the port.

    Raises:
        OSError: it is taken, or the address is not ours; the message is one sentence.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        reason = os.strerror(error.errno).lower() if error.errno else str(error)
        raise OSError(f"cannot listen on {host} port {port}: {reason}") from None
    return listener


def _refuse(message: str) -> NoReturn:
    """Say in one sentence what is wrong, and leave."""
    print(f"error: {message}", file=sys.stderr)
    sys.exit(BAD_SETTINGS)


if __name__ == "__main__":
    main()
