"""How the core tells whoever is watching what it does, and how it is asked to stop.

The core knows nothing of terminals, HTTP or databases: it calls a ProgressSink with ProgressEvents and looks at a
CancelToken between blocks. The command line turns events into bars or JSON lines, a job worker into job events.
"""

import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

from onebit_core.errors import Cancelled

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class ProgressEvent:
    """One step of a stage.

    Attributes:
        stage: load, write text, spread, calibrate, quantize, distill, train, write or evaluate.
        done: finished units of the stage, 0 to total.
        total: units in all (blocks, windows, tensors).
        detail: JSON-ready figures of the unit just finished, such as block and relative_error.
    """

    stage: str
    done: int
    total: int
    detail: Mapping[str, Any] = field(default_factory=dict)


class ProgressSink(Protocol):
    """Anything that accepts progress events; must not raise and must not block for long."""

    def __call__(self, event: ProgressEvent) -> None:
        """Take one event."""


def ignore_progress(event: ProgressEvent) -> None:
    """A sink that shows nothing."""
    del event


class CancelToken:
    """Set once by the caller, looked at by the core between blocks and windows. Safe to set from a signal handler."""

    def __init__(self) -> None:
        self._event = threading.Event()

    def cancel(self) -> None:
        """Ask the running work to stop at the next safe point."""
        self._event.set()

    @property
    def is_set(self) -> bool:
        """Whether cancellation was asked for."""
        return self._event.is_set()

    def raise_if_cancelled(self) -> None:
        """Stop here if cancellation was asked for.

        Raises:
            Cancelled: `cancel` was called.
        """
        if self._event.is_set():
            raise Cancelled(
                "cancelled on request; what is finished is kept: blocks in a work folder, results of whole texts"
            )


@dataclass(frozen=True, kw_only=True)
class Watch:
    """The two ends of a running job: where its progress goes, and who may stop it."""

    sink: ProgressSink = ignore_progress
    cancel: CancelToken = field(default_factory=CancelToken)

    def tell(self, stage: str, done: int, total: int, **detail: Any) -> None:
        """Send one event; never stops, for the last event of work that is complete."""
        self.sink(ProgressEvent(stage=stage, done=done, total=total, detail=detail))

    def report(self, stage: str, done: int, total: int, **detail: Any) -> None:
        """Send one event and stop if asked to.

        Raises:
            Cancelled: `cancel` was called.
        """
        self.tell(stage, done, total, **detail)
        self.cancel.raise_if_cancelled()

    def track(self, stage: str, items: Sequence[T]) -> Iterator[T]:
        """Yield the items, reporting after each and before the first.

        Raises:
            Cancelled: between two items, once `cancel` was called.
        """
        self.report(stage, 0, len(items))
        for index, item in enumerate(items):
            yield item
            self.report(stage, index + 1, len(items))
