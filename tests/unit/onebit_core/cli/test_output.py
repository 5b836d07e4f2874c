"""Progress as a program, a person and a signal see it."""

import io
import json
import os
import signal
import threading
from collections.abc import Iterator

import pytest

from onebit_core.cli.output import describe, progress_watch
from onebit_core.errors import Cancelled


def test_json_mode_prints_one_object_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    """Exactly the fields that a program reading standard output is promised."""
    with progress_watch("json") as watch:
        watch.report("quantize", 3, 30, block=2, relative_error=0.051)

    printed = capsys.readouterr()
    assert json.loads(printed.out) == {
        "event": "progress",
        "stage": "quantize",
        "done": 3,
        "total": 30,
        "detail": {"block": 2, "relative_error": 0.051},
    }
    assert printed.err == ""


def test_without_a_terminal_auto_writes_plain_lines_to_standard_error(capsys: pytest.CaptureFixture[str]) -> None:
    """First and last event of a stage always, those between only now and then."""
    with progress_watch("auto") as watch:
        for done in range(101):
            watch.report("quantize", done, 100, relative_error=0.5)

    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.splitlines() == [
        "quantize 0/100: relative error 0.5",
        "quantize 100/100: relative error 0.5",
    ]


def test_none_prints_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    """Silence was asked for."""
    with progress_watch("none") as watch:
        watch.report("quantize", 1, 1)

    assert capsys.readouterr() == ("", "")


def test_bars_take_names_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """A data set called [red] is shown, not obeyed; one bar a data set."""
    screen = io.StringIO()
    monkeypatch.setattr("sys.stderr", screen)
    with progress_watch("bar") as watch:
        watch.report("evaluate", 1, 2, dataset="[red]", original=20.0)
        watch.report("evaluate", 2, 2, dataset="news")

    assert "evaluate [red]" in screen.getvalue()
    assert "evaluate news" in screen.getvalue()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_cancels_at_the_next_event_and_handlers_come_back(number: signal.Signals) -> None:
    """The first signal asks the work to stop; afterwards the process is as it was."""
    before = signal.getsignal(number)

    def work() -> None:
        with progress_watch("none") as watch:
            watch.report("quantize", 0, 2)
            os.kill(os.getpid(), number)
            watch.report("quantize", 1, 2)

    with pytest.raises(Cancelled):
        work()
    assert signal.getsignal(number) is before


@pytest.fixture
def pythons_handler() -> Iterator[None]:
    """What a shell runs in the background ignores SIGINT from birth; with this it is as it is at a terminal."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("pythons_handler")
def test_a_second_signal_finds_the_previous_handler() -> None:
    """Whoever presses Ctrl-C twice is not made to wait."""
    with progress_watch("none"):
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_a_thread_may_open_a_watch() -> None:
    """Signals belong to the main thread; elsewhere a watch works without them."""
    problems: list[Exception] = []

    def work() -> None:
        try:
            with progress_watch("none") as watch:
                watch.report("load", 1, 1)
        except ValueError as error:
            problems.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert problems == []


def test_figures_are_described_in_words() -> None:
    """Floats are shortened, names are read with spaces."""
    assert describe({"block": 2, "relative_error": 0.0512345}) == "block 2, relative error 0.05123"
