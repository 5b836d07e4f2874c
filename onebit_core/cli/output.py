"""What every command shows while it works, and how it is stopped.

`progress_watch` turns a way of showing progress into the `Watch` the core reports to:

    bar    one live bar a stage on standard error
    json   one JSON object a line on standard output, for the program that started us
    none   nothing
    auto   bars on a terminal, otherwise a plain line when a stage begins and ends and every few seconds

Standard output is kept for results, so bars and plain lines go to standard error. While the watch is open,
SIGINT and SIGTERM set its CancelToken: the work stops at the next safe point, with what is finished kept on
disk. A second signal ends the process at once.
"""

import json
import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from types import FrameType
from typing import Any, Literal

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from onebit_core.progress import CancelToken, ProgressEvent, ProgressSink, Watch, ignore_progress

ProgressMode = Literal["auto", "bar", "json", "none"]

SECONDS_BETWEEN_LINES = 5.0


def print_event(event: str, **fields: object) -> None:
    """Print one JSON object on a line of its own, at once; a reader that has gone away is not an error."""
    with suppress(BrokenPipeError):
        print(json.dumps({"event": event, **fields}), flush=True)


def describe(detail: Mapping[str, Any]) -> str:
    """Write the figures of one unit in a few words: `block 2, relative error 0.051`."""
    words = []
    for key, value in detail.items():
        shown = f"{value:.4g}" if isinstance(value, float) else str(value)
        words.append(f"{key.replace('_', ' ')} {shown}")
    return ", ".join(words)


@contextmanager
def progress_watch(mode: ProgressMode = "auto") -> Iterator[Watch]:
    """Open a Watch that shows progress in the given way and is cancelled by SIGINT and SIGTERM.

    Args:
        mode: see the module text.
    """
    _quiet_transformers()
    cancel = CancelToken()
    with _open_sink(mode) as sink, _signals_cancel(cancel):
        yield Watch(sink=sink, cancel=cancel)


def _quiet_transformers() -> None:
    """Keep transformers' own bars and hints off the terminal; ours say what happens."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def _open_sink(mode: ProgressMode) -> AbstractContextManager[ProgressSink]:
    """Choose the sink; `auto` depends on whether standard error is a terminal."""
    if mode == "auto":
        mode = "bar" if sys.stderr.isatty() else "auto"
    if mode == "bar":
        return _bars()
    if mode == "json":
        return nullcontext(_print_json)
    if mode == "none":
        return nullcontext(ignore_progress)
    return nullcontext(PlainLines())


def _print_json(event: ProgressEvent) -> None:
    """Print one progress event as a JSON line."""
    print_event("progress", stage=event.stage, done=event.done, total=event.total, detail=dict(event.detail))


@contextmanager
def _bars() -> Iterator[ProgressSink]:
    """Draw one live bar a stage (and one a data set, where a stage names one) on standard error."""
    columns: tuple[ProgressColumn, ...] = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[figures]}", style="dim", markup=False),
    )
    tasks: dict[str, TaskID] = {}
    with Progress(*columns, console=Console(stderr=True), refresh_per_second=4) as progress:

        def show(event: ProgressEvent) -> None:
            detail = dict(event.detail)
            name = " ".join([event.stage, *([str(detail.pop("dataset"))] if "dataset" in detail else [])])
            if name not in tasks:
                tasks[name] = progress.add_task(name, total=event.total, figures="")
            progress.update(tasks[name], completed=event.done, total=event.total, figures=describe(detail))

        yield show


class PlainLines:
    """Writes a line when a stage begins, when it ends, and at most every few seconds between."""

    def __init__(self) -> None:
        self._stage = ""
        self._next_line = 0.0

    def __call__(self, event: ProgressEvent) -> None:
        """Write the event to standard error, if it is time for a line."""
        now = time.monotonic()
        if event.stage == self._stage and event.done < event.total and now < self._next_line:
            return
        self._stage, self._next_line = event.stage, now + SECONDS_BETWEEN_LINES
        figures = describe(event.detail)
        line = f"{event.stage} {event.done}/{event.total}" + (f": {figures}" if figures else "")
        with suppress(OSError):
            print(line, file=sys.stderr, flush=True)


@contextmanager
def _signals_cancel(cancel: CancelToken) -> Iterator[None]:
    """Let SIGINT and SIGTERM set the token once; the second signal finds the previous handlers again."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def restore() -> None:
        for number, handler in previous.items():
            signal.signal(number, handler)

    def ask_to_stop(number: int, frame: FrameType | None) -> None:
        del number, frame
        cancel.cancel()
        restore()

    for number in previous:
        signal.signal(number, ask_to_stop)
    try:
        yield
    finally:
        restore()
