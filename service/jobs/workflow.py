"""The life of one job, as a DBOS workflow: quantize, then evaluate.

Each step is one child process. A worker that dies is started again, finds the job, and repeats the step it was in; the
command itself goes on after the last finished block, which it keeps in the job's folder. Steps are preemptible: when
the job is cancelled DBOS cancels the coroutine, which stops the child.
"""

import asyncio
import json
import shutil
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from dbos import DBOS

from service.jobs.database import PROGRESS_EVENT, WORKFLOW
from service.jobs.process import Command
from service.jobs.types import JobSpec, Progress

SECONDS_BETWEEN_EVENTS = 0.5
MAX_RECOVERY_ATTEMPTS = 50
"""Starts of one job, orderly restarts of the server included; a job that kills its worker each time ends then."""
MANIFEST_FILE = "manifest.json"

_one_at_a_time = asyncio.Lock()
"""Held while a child runs: a cancelled job leaves the queue before its child has ended."""


@DBOS.workflow(name=WORKFLOW, max_recovery_attempts=MAX_RECOVERY_ATTEMPTS)
async def compress_model(values: dict[str, Any]) -> dict[str, Any]:
    """Make an artifact and measure it.

    Args:
        values: a JobSpec as plain values.

    Returns:
        {"artifact": folder}.
    """
    spec = JobSpec.from_dict(values)
    progress = await quantize(values)
    if spec.evaluation is not None:
        await evaluate(values, progress)
    return {"artifact": spec.artifact}


@DBOS.step(preemptible=True)
async def quantize(values: dict[str, Any]) -> dict[str, Any]:
    """Run `onebit quantize`; returns how far the job is then, a Progress as plain values."""
    spec = JobSpec.from_dict(values)
    artifact, folder = Path(spec.artifact), Path(spec.folder)
    reporter = Reporter(Progress())
    config_file = folder / "config.json"
    if config_file.exists() and (artifact / MANIFEST_FILE).exists():  # this job wrote it before the worker died
        return await reporter.written()
    await asyncio.to_thread(folder.mkdir, parents=True, exist_ok=True)
    await asyncio.to_thread(config_file.write_text, json.dumps(spec.config), encoding="utf-8")
    arguments = ["quantize", "--config", str(config_file), "--out", spec.artifact]
    arguments += ["--work-dir", str(folder / "work"), "--progress", "json"]
    try:
        await _run(arguments, folder, reporter)
    finally:
        await asyncio.to_thread(_sweep, artifact)
    await asyncio.to_thread(shutil.rmtree, folder / "work", ignore_errors=True)
    return await reporter.written()


@DBOS.step(preemptible=True)
async def evaluate(values: dict[str, Any], progress: dict[str, Any]) -> None:
    """Run `onebit evaluate`, reporting on top of the progress so far."""
    spec = JobSpec.from_dict(values)
    assert spec.evaluation is not None
    arguments = ["evaluate", spec.artifact, "--original", spec.config["model"], "--progress", "json"]
    arguments += ["--device", spec.config["device"]]
    arguments += ["--windows", str(spec.evaluation.windows), "--window-tokens", str(spec.evaluation.window_tokens)]
    for name, file in spec.evaluation.texts.items():
        arguments += ["--text", f"{name}={file}"]
    await _run(arguments, Path(spec.folder), Reporter(Progress(**progress)))


async def _run(arguments: list[str], folder: Path, reporter: "Reporter") -> None:
    """Run one command and publish its progress."""
    async with _one_at_a_time:
        await Command(arguments, folder / "log").run(reporter)


def _sweep(artifact: Path) -> None:
    """Remove what a killed writer left beside the artifact; only the job of that name can have made it."""
    for leftover in artifact.parent.glob(f".{artifact.name}.writing-*"):
        shutil.rmtree(leftover, ignore_errors=True)


class Reporter:
    """Turns the command's progress lines into the job's event, not more often than anybody can read."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._published = 0.0

    async def written(self) -> dict[str, Any]:
        """Publish that the artifact is on disk; returns the progress as plain values."""
        self._progress = replace(self._progress, is_written=True, updated=time.time())
        return await self._publish()

    async def __call__(self, line: dict[str, Any]) -> None:
        """Take one progress line."""
        before = self._progress
        self._progress = next_progress(before, line, time.time())
        is_quiet = time.monotonic() - self._published < SECONDS_BETWEEN_EVENTS
        if is_quiet and self._progress.stage == before.stage and line["done"] < line["total"]:
            return
        await self._publish()

    async def _publish(self) -> dict[str, Any]:
        self._published = time.monotonic()
        values = asdict(self._progress)
        await DBOS.set_event_async(PROGRESS_EVENT, values)
        return values


def next_progress(before: Progress, line: dict[str, Any], now: float) -> Progress:
    """Fold one line of the command into the job's progress; blocks are those of the stage `quantize`."""
    detail = line.get("detail") or {}
    blocks, completed = before.blocks, before.blocks_completed
    if line["stage"] == "quantize":
        blocks, completed = int(line["total"]), int(line["done"])
    error = detail.get("relative_error", before.relative_error)
    return replace(
        before,
        stage=str(line["stage"]),
        blocks=blocks,
        blocks_completed=completed,
        relative_error=error,
        updated=now,
    )
