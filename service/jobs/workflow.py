"""The life of one job, as a DBOS workflow: quantize, evaluate, publish.

    quantize --> FOLDER/artifact --> (limits) evaluate, compare --> ARTIFACT_ROOT/name     accepted
                                                               '--> stays where it is      rejected
                                 --> (none) ARTIFACT_ROOT/name --> evaluate

Each step is one child process. A step of DBOS is a whole command, not a block: the command keeps every finished block
in the job's folder and goes on after the last of them, so a repeated step costs what a step per block would cost, and
the model is opened once and not once a block (docs/decisions/0007). Whatever is killed, the step is repeated; a job
that kills what runs it again and again ends (`service.jobs.attempts`).

Artifacts are made in the job's folder, by a command that alone may write there (`service.jobs.fence`), and appear under
their name by one rename. Steps are preemptible: when the job is cancelled DBOS cancels the coroutine, which stops the
child.
"""

import asyncio
import json
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from dbos import DBOS

from onebit_core.artifact.identity import read_manifest
from service.jobs import attempts
from service.jobs.database import PROGRESS_EVENT, WORKFLOW
from service.jobs.fence import fenced
from service.jobs.limits import broken_by_loss, broken_by_size
from service.jobs.process import Command, CommandDied, JobFailed
from service.jobs.types import JobSpec, Outcome, Progress

SECONDS_BETWEEN_EVENTS = 0.5
MAX_STARTS = 10_000
"""DBOS' own limit on starts of a job, orderly ones included; `max_crashes` of a job ends it long before."""
MADE_FILE = "made"
PUBLISHED_FILE = "published"
WORK_FOLDER = "work"

running_here: set[str] = set()
"""Ids of the jobs that this process runs."""

_one_at_a_time = asyncio.Lock()
"""Held while a child runs: a cancelled job leaves the queue before its child has ended."""


@DBOS.workflow(name=WORKFLOW, max_recovery_attempts=MAX_STARTS)
async def compress_model(values: dict[str, Any]) -> dict[str, Any]:
    """Make an artifact, measure it, and put it under its name if it keeps to the limits.

    Args:
        values: a JobSpec as plain values.

    Returns:
        An Outcome as plain values.
    """
    job_id = DBOS.workflow_id or ""
    running_here.add(job_id)
    try:
        return asdict(await _compress(values))
    finally:
        running_here.discard(job_id)


async def _compress(values: dict[str, Any]) -> Outcome:
    """Run the steps one after another."""
    spec = JobSpec.from_dict(values)
    made = await quantize(values)
    outcome = Outcome(artifact=spec.artifact, bits=made["bits"], progress=made["progress"])
    rejected = broken_by_size(spec.limits, outcome.bits["whole_model"])
    if rejected is None and spec.evaluation is not None:
        outcome = replace(outcome, evaluation=await evaluate(values, outcome.progress))
        rejected = broken_by_loss(spec.limits, outcome.evaluation)
    if rejected is not None:
        outcome = replace(outcome, artifact=spec.made_in, rejected=rejected)
    elif spec.has_limits:
        await publish(values)
    return outcome


@DBOS.step(preemptible=True)
async def quantize(values: dict[str, Any]) -> dict[str, Any]:
    """Run `onebit quantize`; returns how far the job is then, a Progress, and the artifact's bits, as plain values."""
    spec = JobSpec.from_dict(values)
    folder = Path(spec.folder)
    artifact = Path(spec.made_in)
    reporter = Reporter(Progress())
    if not _is_made(spec):
        config_file = folder / "config.json"
        await asyncio.to_thread(folder.mkdir, parents=True, exist_ok=True)
        await asyncio.to_thread(config_file.write_text, json.dumps(spec.config), encoding="utf-8")
        arguments = ["quantize", "--config", str(config_file), "--out", str(artifact)]
        arguments += ["--work-dir", str(folder / WORK_FOLDER), "--progress", "json", "--device", _device(spec)]
        await _run(arguments, spec, reporter, lambda: _sweep(artifact))
        await asyncio.to_thread((folder / MADE_FILE).touch)
        await asyncio.to_thread(shutil.rmtree, folder / WORK_FOLDER, ignore_errors=True)
    if not spec.has_limits:
        await _publish(spec)
    manifest = await asyncio.to_thread(read_manifest, _place(spec))
    return {"progress": await reporter.written(), "bits": manifest.bits.to_dict()}


@DBOS.step(preemptible=True)
async def evaluate(values: dict[str, Any], progress: dict[str, Any]) -> list[dict[str, Any]]:
    """Run `onebit evaluate`, reporting on top of the progress so far; returns what it measured on each text."""
    spec = JobSpec.from_dict(values)
    assert spec.evaluation is not None
    arguments = ["evaluate", str(_place(spec)), "--original", spec.config["model"], "--progress", "json"]
    arguments += ["--device", _device(spec)]
    arguments += ["--windows", str(spec.evaluation.windows), "--window-tokens", str(spec.evaluation.window_tokens)]
    for name, file in spec.evaluation.texts.items():
        arguments += ["--text", f"{name}={file}"]
    result = await _run(arguments, spec, Reporter(Progress(**progress)))
    return list(result["evaluation"])


@DBOS.step()
async def publish(values: dict[str, Any]) -> None:
    """Put the artifact under its name."""
    await _publish(JobSpec.from_dict(values))


async def _publish(spec: JobSpec) -> None:
    """Rename the artifact from the job's folder to its name, once.

    The note is written first: where it stands and the artifact is gone from the job's folder, the rename has happened.

    Raises:
        JobFailed: something of that name is there already, or the job was taken from this worker.
    """
    folder = Path(spec.folder)
    async with fenced(folder):
        await _refuse_a_lost_job()
        if _is_made(spec) and not Path(spec.made_in).exists():
            return
        (folder / PUBLISHED_FILE).write_text(f"{spec.artifact}\n", encoding="utf-8")
        try:
            await asyncio.to_thread(Path(spec.made_in).rename, spec.artifact)
        except OSError as error:
            raise JobFailed(f"the artifact cannot become {spec.artifact}: {error.strerror}") from None


async def _run(
    arguments: list[str], spec: JobSpec, reporter: "Reporter", sweep: Callable[[], None] = lambda: None
) -> dict[str, Any]:
    """Run one command to its end, again when it is killed, and publish its progress.

    Args:
        arguments: of `onebit`.
        spec: the job.
        reporter: gets the progress.
        sweep: removes what a killed command left; called before each run, and after one that was told to stop.

    Raises:
        JobFailed: it failed, or it was killed too often without getting on.
    """
    folder, job_id = Path(spec.folder), DBOS.workflow_id or ""
    last_death = "the job worker died"
    async with _one_at_a_time:
        while True:
            async with fenced(folder) as lock:
                await _refuse_a_lost_job()
                sweep()
                crashes = attempts.begin(folder, f"{arguments[0]}, {_reached(folder)}")
                if crashes >= spec.max_crashes:
                    attempts.forget(folder)
                    raise JobFailed(f"{last_death}, {crashes} times in a row with nothing finished between")
                try:
                    result = await Command(arguments, folder, job_id).run(reporter, lock)
                except CommandDied as death:
                    last_death = str(death)
                except BaseException:
                    attempts.forget(folder)
                    sweep()
                    raise
                else:
                    attempts.forget(folder)
                    return result


async def _refuse_a_lost_job() -> None:
    """Stop if the job was cancelled, or handed to another worker, since this one began it.

    Raises:
        JobFailed: it was; DBOS drops what this worker says about it.
    """
    status = await DBOS.get_workflow_status_async(DBOS.workflow_id or "")
    if status is None or status.status != "PENDING" or status.executor_id != DBOS.executor_id:
        raise JobFailed("the job was taken from this worker")


def _is_made(spec: JobSpec) -> bool:
    """Whether the command that makes the artifact has ended well, in this run of the job or an earlier one."""
    folder = Path(spec.folder)
    if Path(spec.made_in).exists():
        return (folder / MADE_FILE).exists()
    return (folder / PUBLISHED_FILE).exists() and Path(spec.artifact).exists()


def _place(spec: JobSpec) -> Path:
    """Where the artifact is now."""
    made = Path(spec.made_in)
    return made if made.exists() else Path(spec.artifact)


def _device(spec: JobSpec) -> str:
    return Command.device or str(spec.config["device"])


def _reached(folder: Path) -> str:
    """Say how far the work folder is: its finished blocks, and the checkpoint of a training."""
    work = folder / WORK_FOLDER
    blocks = sum(1 for _ in work.glob("block_*.safetensors"))
    return ", ".join([f"{blocks} blocks", *(file.stem for file in work.glob("training/training_*.safetensors"))])


def _sweep(artifact: Path) -> None:
    """Remove what a killed command wrote, half or whole: whole, it may lack its golden prompts. Blocks are kept."""
    for leftover in (artifact, *artifact.parent.glob(f".{artifact.name}.writing-*")):
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
    """Fold one line of the command into the job's progress; blocks are those of `quantize`, steps those of `train`."""
    detail = line.get("detail") or {}
    blocks, completed = before.blocks, before.blocks_completed
    if line["stage"] == "quantize":
        blocks, completed = int(line["total"]), int(line["done"])
    steps, trained = before.steps, before.steps_completed
    if line["stage"] == "train":
        steps, trained = int(line["total"]), int(line["done"])
    return replace(
        before,
        stage=str(line["stage"]),
        blocks=blocks,
        blocks_completed=completed,
        relative_error=detail.get("relative_error", before.relative_error),
        steps=steps,
        steps_completed=trained,
        held_out_kl=detail.get("held_out_kl", before.held_out_kl),
        updated=now,
    )
