"""onebit-serve: serve artifacts, or keep the file of API keys.

    onebit-serve [serve] ARTIFACT... [flags]
    onebit-serve keys add --file FILE --id NAME --scope inference [--scope admin]
    onebit-serve keys list --file FILE
    onebit-serve keys remove --file FILE --id NAME

Exit codes: 0 after a clean stop; 2 with one sentence on standard error when the settings, an artifact or the port
cannot be used.
"""

import argparse
import asyncio
import logging
import os
import signal
import socket
import sys
from pathlib import Path
from types import FrameType
from typing import NoReturn

import uvicorn
from fastapi import FastAPI

from onebit_core.artifact.identity import ModelKind, kind_of, read_manifest
from onebit_core.errors import OnebitError
from service.auth import Scope, add_key, read_keys, remove_key
from service.log import configure_logging
from service.settings import Settings, read_settings

logger = logging.getLogger("service")

BAD_SETTINGS = 2
BACKLOG = 2048
KEEP_ALIVE_SECONDS = 15


def main() -> None:
    """Run the command line."""
    arguments = sys.argv[1:]
    if arguments[:1] == ["keys"]:
        _keys(arguments[1:])
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
        listener = _listen(settings)
    except (OnebitError, ValueError, OSError) as error:
        _refuse(str(error))
    host, port = listener.getsockname()[:2]
    logger.info("listening", extra={"url": f"http://{f'[{host}]' if ':' in host else host}:{port}"})
    server = Server(app, settings)
    asyncio.run(server.serve(sockets=[listener]))
    if server.start_failure is not None:
        _refuse(server.start_failure)


class Server(uvicorn.Server):
    """uvicorn, told what draining means here.

    Attributes:
        start_failure: why no model could be served, in one sentence; None if all went well.
    """

    def __init__(self, app: FastAPI, settings: Settings) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                log_config=None,
                access_log=False,
                server_header=False,
                timeout_keep_alive=KEEP_ALIVE_SECONDS,
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

    def _fail(self, message: str) -> None:
        self.start_failure = message
        self.should_exit = True


def _check_artifacts(settings: Settings) -> None:
    """Read every manifest now, so that a wrong path is told before anything is started."""
    for artifact in settings.artifacts:
        if kind_of(artifact) is ModelKind.ARTIFACT:
            read_manifest(artifact)


def _listen(settings: Settings) -> socket.socket:
    """Take the port.

    Raises:
        OSError: it is taken, or the address is not ours; the message is one sentence.
    """
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((settings.host, settings.port))
        listener.listen(BACKLOG)
    except OSError as error:
        listener.close()
        reason = os.strerror(error.errno).lower() if error.errno else str(error)
        raise OSError(f"cannot listen on {settings.host} port {settings.port}: {reason}") from None
    return listener


def _keys(arguments: list[str]) -> None:
    """Add, list or remove API keys."""
    options = _keys_parser().parse_args(arguments)
    try:
        match options.command:
            case "add":
                print(add_key(options.file, options.id, frozenset(options.scope)))
                print("This key is shown once; only its hash is kept.", file=sys.stderr)
            case "list":
                for key in read_keys(options.file):
                    print(key.id, ",".join(sorted(scope.value for scope in key.scopes)), sep="\t")
            case "remove":
                remove_key(options.file, options.id)
    except (ValueError, OSError) as error:
        _refuse(str(error))


def _keys_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="onebit-serve keys", description="Keep the file of API keys.")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, text in (("add", "Make a key and print it."), ("list", "Show ids."), ("remove", "Revoke a key.")):
        command = commands.add_parser(name, help=text, description=text)
        command.add_argument("--file", type=Path, required=True, help="The key file.")
        if name != "list":
            command.add_argument("--id", required=True, help="Whose key it is; shown in logs.")
        if name == "add":
            scopes = [scope.value for scope in Scope]
            command.add_argument(
                "--scope", type=Scope, action="append", required=True, help=f"One of {', '.join(scopes)}; repeatable."
            )
    return parser


def _refuse(message: str) -> NoReturn:
    """Say in one sentence what is wrong, and leave."""
    print(f"error: {message}", file=sys.stderr)
    sys.exit(BAD_SETTINGS)


if __name__ == "__main__":
    main()
