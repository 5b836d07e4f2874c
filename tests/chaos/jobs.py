"""Jobs: posted with a key until somebody answers, and looked at in the end."""

import hashlib
import random
import subprocess
import sys
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2

from tests.support.server_process import ROOT, server_environment

FINAL = ("succeeded", "failed", "cancelled", "rejected")
BODIES: tuple[dict[str, Any], ...] = (
    {"method": "rtn", "settings": {"bits": 3}},
    {"method": "gptq", "settings": {"bits": 3}, "calibration": {"samples": 4, "tokens": 64}},
    {"method": "svid", "reconstruction": {"preset": "light"}, "calibration": {"samples": 4, "tokens": 64}},
    {"method": "lut2", "calibration": {"samples": 4, "tokens": 64}},
)


def undisturbed(model: Path, folder: Path) -> list[str]:
    """Make each body's artifact with nobody killing anything, and return what its weights' files hash to."""
    hashes = []
    for number, body in enumerate(BODIES):
        out = folder / f"undisturbed-{number}"
        arguments = ["quantize", str(model), "--out", str(out), "--method", body["method"], "--progress", "none"]
        for name, value in body.get("settings", {}).items():
            arguments += ["--set", f"{name}={value}"]
        for name, value in body.get("calibration", {}).items():
            arguments += [f"--{name}", str(value)]
        if "reconstruction" in body:
            arguments += ["--reconstruct", body["reconstruction"]["preset"]]
        onebit(*arguments)
        hashes.append(hash_of(out))
    return hashes


def onebit(*arguments: str) -> None:
    """Run the command in the environment that workers have, so that sums are rounded alike."""
    command = [sys.executable, "-m", "onebit_core.cli.main", *arguments]
    subprocess.run(command, cwd=ROOT, env=server_environment(), check=True)


def hash_of(artifact: Path) -> str:
    """Return one hash of all files with weights."""
    digest = hashlib.sha256()
    for file in sorted(artifact.glob("*.safetensors")):
        digest.update(file.name.encode() + file.read_bytes())
    return digest.hexdigest()


@dataclass
class Verdict:
    """What became of the jobs."""

    posted: int = 0
    lost: int = 0
    doubled: int = 0
    not_succeeded: list[str] = field(default_factory=list)
    wrong_artifacts: list[str] = field(default_factory=list)
    leftovers: list[str] = field(default_factory=list)

    @property
    def is_clean(self) -> bool:
        """Whether nothing went wrong."""
        return not (self.lost or self.doubled or self.not_succeeded or self.wrong_artifacts or self.leftovers)


class Poster:
    """Posts jobs now and then, each of them at least twice under the same key."""

    def __init__(self, url: str, model: Path, count: int, seconds_between: float) -> None:
        self._url = url
        self._model = model
        self._count = count
        self._pause = seconds_between
        self.ids: dict[str, str] = {}
        self.refusals = 0
        self._threads = ThreadPoolExecutor(max_workers=1)
        self._all: Future[None] | None = None

    def start(self) -> None:
        """Start posting."""
        self._all = self._threads.submit(self._run)

    def wait(self) -> None:
        """Wait until all are posted; what one was refused with is raised here."""
        assert self._all is not None
        self._all.result()

    def _run(self) -> None:
        draw = random.Random(7)
        for number in range(self._count):
            name = f"job-{number}"
            first, second = (self._post(name, BODIES[number % len(BODIES)]) for _ in range(2))
            if first != second:
                raise AssertionError(f"{name}: one key gave two jobs, {first} and {second}")
            self.ids[name] = first
            time.sleep(draw.uniform(0, 2 * self._pause))

    def _post(self, name: str, body: dict[str, Any]) -> str:
        whole = {"model": str(self._model), "name": name, **body}
        while True:
            try:
                answer = httpx2.post(
                    f"{self._url}/admin/quantize", json=whole, headers={"Idempotency-Key": name}, timeout=30
                )
            except httpx2.HTTPError:
                self.refusals += 1
                time.sleep(0.5)
                continue
            if answer.status_code in (200, 202):
                return str(answer.json()["id"])
            if answer.status_code not in (429, 502, 503, 504):
                raise AssertionError(f"{name}: {answer.status_code} {answer.text}")
            self.refusals += 1
            time.sleep(0.5)


def all_jobs(url: str) -> list[dict[str, Any]]:
    """Return every job the API lists, page after page."""
    jobs: list[dict[str, Any]] = []
    after = None
    while True:
        answer = httpx2.get(
            f"{url}/admin/jobs", params={"limit": 100, **({"after": after} if after else {})}, timeout=30
        )
        answer.raise_for_status()
        page = answer.json()["data"]
        jobs += page
        if len(page) < 100:
            return jobs
        after = page[-1]["id"]


def judge(url: str, root: Path, expected: list[str], posted: dict[str, str], seconds: float) -> Verdict:
    """Wait for the jobs to end and compare everything."""
    deadline = time.monotonic() + seconds
    jobs = all_jobs(url)
    while any(job["state"] not in FINAL for job in jobs) and time.monotonic() < deadline:
        time.sleep(2)
        jobs = all_jobs(url)
    verdict = Verdict(posted=len(posted))
    ids = [job["id"] for job in jobs]
    verdict.lost = len(set(posted.values()) - set(ids))
    verdict.doubled = len(ids) - len(set(posted.values()))
    for job in jobs:
        if job["state"] != "succeeded":
            verdict.not_succeeded.append(f"{job['name']}: {job['state']} {job['error']}")
        elif hash_of(root / job["name"]) != expected[int(job["name"].removeprefix("job-")) % len(BODIES)]:
            verdict.wrong_artifacts.append(job["name"])
    verdict.leftovers = [path.name for path in root.glob(".*.writing-*")]
    return verdict
