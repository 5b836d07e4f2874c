"""`onebit-serve keys`: make, show, rotate and revoke API keys. No command takes a key, so none is ever in `ps`."""

import argparse
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

from service.auth import RATE_NAMES, Scope, StoredKey, add_key, read_keys, remove_key, rotate_key
from service.rate_limits import Rates

SHOWN_ONCE = "This key is shown once; only its hash is kept."
ONE_DAY = 86400.0


def run_keys(arguments: list[str]) -> None:
    """Run one command.

    Raises:
        SystemExit: the arguments cannot be meant (code 2), or --help (code 0).
        ValueError: the file, or an id in it, is not what the command needs; one sentence.
        OSError: the file cannot be read or written.
    """
    options = keys_parser().parse_args(arguments)
    match options.command:
        case "add":
            key = add_key(
                options.file,
                options.id,
                frozenset(options.scope),
                expires=options.expires,
                rates=Rates(**{name: getattr(options, name) for name in RATE_NAMES}),
                min_priority=options.min_priority,
            )
            _show(key)
        case "rotate":
            _show(rotate_key(options.file, options.id, timedelta(seconds=options.overlap_seconds)))
        case "list":
            for stored in read_keys(options.file):
                print(*_columns(stored), sep="\t")
        case "remove":
            remove_key(options.file, options.id)


def keys_parser() -> argparse.ArgumentParser:
    """Describe the commands."""
    parser = argparse.ArgumentParser(prog="onebit-serve keys", description="Keep the file of API keys.")
    commands = parser.add_subparsers(dest="command", required=True)
    texts = {
        "add": "Make a key and print it.",
        "list": "Show ids.",
        "rotate": "Make another key for an id and print it; the old one ends after a while.",
        "remove": "Revoke all keys of an id.",
    }
    for name, text in texts.items():
        command = commands.add_parser(name, help=text, description=text)
        command.add_argument("--file", type=Path, required=True, help="The key file.")
        if name != "list":
            command.add_argument("--id", required=True, help="Whose key it is; shown in logs.")
        if name == "add":
            _declare_rights(command)
        if name == "rotate":
            command.add_argument(
                "--overlap-seconds",
                type=_seconds,
                default=ONE_DAY,
                help="How long the old key still works; 0 ends it at once. Default: a day.",
            )
    return parser


def _declare_rights(command: argparse.ArgumentParser) -> None:
    scopes = ", ".join(scope.value for scope in Scope)
    command.add_argument("--scope", type=Scope, action="append", required=True, help=f"One of {scopes}; repeatable.")
    command.add_argument("--expires", type=_time, help="When it ends, such as 2030-01-31 or 2030-01-31T12:00 (UTC).")
    for name in RATE_NAMES:
        flag = "--" + name.replace("_", "-")
        command.add_argument(flag, type=_count, help="Its own limit, in place of the server's.")
    command.add_argument(
        "--min-priority",
        type=int,
        default=0,
        help="The lowest `priority` its requests may ask for; lower ones are served first. Default: 0.",
    )


def _show(key: str) -> None:
    print(key)
    print(SHOWN_ONCE, file=sys.stderr)


def _columns(stored: StoredKey) -> list[str]:
    """What `list` shows of a key: id, scopes, and what else was set."""
    row = stored.to_dict()
    others = [f"{name}={row[name]}" for name in ("expires", *RATE_NAMES, "min_priority") if name in row]
    return [stored.id, ",".join(row["scopes"]), *others]


def _time(text: str) -> datetime:
    time = datetime.fromisoformat(text)
    return time if time.tzinfo is not None else time.replace(tzinfo=UTC)


def _count(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is less than 1")
    return number


def _seconds(text: str) -> float:
    number = float(text)
    if not 0 <= number < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is not a number of seconds")
    return number
