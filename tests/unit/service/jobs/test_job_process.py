"""One `onebit` command as a child: its lines, its end, its death, its parent's death."""

import asyncio
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from service.jobs.process import Command, JobFailed
from service.jobs.types import Progress
from service.jobs.workflow import next_progress
from tests.support.server_process import ROOT, server_environment


@pytest.fixture(autouse=True)
def _importable(monkeypatch):
    """Children find the project."""
    for name, value in server_environment().items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(ROOT)


def run(arguments, folder):
    events = []

    async def keep(event):
        events.append(event)

    return asyncio.run(Command(arguments, folder).run(keep)), events


def test_a_failed_command_tells_its_sentence(tmp_path):
    """The error event's message is the job's error."""
    arguments = ["quantize", str(tmp_path / "none"), "--method", "rtn", "--out", str(tmp_path / "out")]
    with pytest.raises(JobFailed, match="none"):
        run([*arguments, "--progress", "json"], tmp_path)
    assert not (tmp_path / "out").exists()


def test_a_command_that_dies_without_a_word_is_reported(tmp_path):
    """A usage error speaks only on standard error; the log is named."""
    with pytest.raises(JobFailed, match=r"onebit nonsense ended with code \d+; the job's log may say why"):
        run(["nonsense"], tmp_path)
    assert "nonsense" in (tmp_path / "log").read_text()


def test_a_child_dies_with_its_parent(tmp_path):
    """Killing the process that started a child ends the child, though nobody could tell it."""
    if sys.platform != "linux":
        pytest.skip("the kernel's parent-death signal exists on Linux only")
    pid_file = tmp_path / "pid"
    child = f"import os, pathlib, time; pathlib.Path({str(pid_file)!r}).write_text(str(os.getpid())); time.sleep(60)"
    parent = (
        "import os, subprocess, sys, time;"
        "launcher = [sys.executable, '-m', 'service.jobs.child', str(os.getpid())];"
        f"subprocess.Popen([*launcher, sys.executable, '-c', {child!r}]);"
        "time.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-c", parent], cwd=ROOT)
    _wait_for(lambda: pid_file.exists() and pid_file.read_text())
    pid = int(pid_file.read_text())
    process.send_signal(signal.SIGKILL)
    process.wait()
    _wait_for(lambda: not _runs(pid))
    assert not _runs(pid)


def _runs(pid: int) -> bool:
    """Whether a process exists and is not merely waiting to be reaped."""
    stat = Path(f"/proc/{pid}/stat")
    try:
        return stat.read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def _wait_for(is_done) -> None:
    deadline = time.monotonic() + 20
    while not is_done():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_child_of_the_wrong_parent_does_not_start():
    """A worker that died between fork and exec leaves nothing behind."""
    arguments = [sys.executable, "-m", "service.jobs.child", str(os.getpid() + 1), sys.executable, "-c", "print('ran')"]
    ended = subprocess.run(arguments, cwd=ROOT, capture_output=True, check=False, timeout=30)
    assert (ended.returncode, ended.stdout) == (1, b"")


def test_progress_is_folded_from_lines():
    """Blocks are those of the stage quantize, steps those of train; the last figures stay while other stages run."""
    lines = [
        {"stage": "load", "done": 1, "total": 1, "detail": {"blocks": 2}},
        {"stage": "quantize", "done": 0, "total": 2, "detail": {}},
        {"stage": "quantize", "done": 1, "total": 2, "detail": {"block": 0, "relative_error": 0.25}},
        {"stage": "train", "done": 0, "total": 5, "detail": {"held_out_kl": 0.5}},
        {"stage": "train", "done": 1, "total": 5, "detail": {"kl": 0.75}},
        {"stage": "write", "done": 0, "total": 1},
    ]
    progress = Progress()
    for second, line in enumerate(lines):
        progress = next_progress(progress, line, float(second))
    blocks = {"blocks_completed": 1, "blocks": 2, "relative_error": 0.25}
    assert progress == Progress(stage="write", steps_completed=1, steps=5, held_out_kl=0.5, updated=5.0, **blocks)
