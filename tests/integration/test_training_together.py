"""Two processes that train one model take the steps that one takes, and go on where one of them was killed."""

import json
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from onebit_core.artifact.reader import read_manifest, read_report
from onebit_core.pipeline.train_artifact import TrainArtifactConfig, train_artifact
from tests.support.quantized import quantize_tiny
from tests.support.server_process import ROOT, server_environment
from tests.support.trained import TEXT

STEPS = 40
SETTINGS = {
    "steps": STEPS,
    "batch": 4,
    "tokens": 32,
    "held_out": 3,
    "evaluate_every": 8,
    "sign_rate": 1e-3,
    "dtype": "float32",
    "windows_at_once": 1,
}
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
LIMIT_SECONDS = 120.0


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text(TEXT)
    return file


@pytest.fixture(scope="module")
def artifact(tmp_path_factory, tiny_llama) -> Path:
    return quantize_tiny(tiny_llama, tmp_path_factory.mktemp("artifact") / "small", "svid")


def training(artifact: Path, text: Path, out: Path, *more: object, **changes: object) -> list[str]:
    """Return the command of a training by two processes."""
    settings = {**SETTINGS, **changes}
    named = {key: settings.pop(key) for key in ("steps", "batch", "tokens")}
    asked = ["train", artifact, "--text", text, "--out", out, "--progress", "none"]
    asked += [part for key, value in named.items() for part in (f"--{key}", value)]
    asked += [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]
    return [*map(str, [*TORCHRUN, "-m", "onebit_core.cli.main", *asked, *more])]


def run(command: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, cwd=ROOT, env=server_environment(), capture_output=True, text=True, timeout=LIMIT_SECONDS
    )


@pytest.fixture(scope="module")
def together(artifact, text, tmp_path_factory) -> Path:
    """Two processes' artifact, undisturbed."""
    out = tmp_path_factory.mktemp("together") / "trained"
    done = run(training(artifact, text, out))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("steps, KL on windows held out") == 1
    return out


def test_two_processes_have_the_losses_of_one(artifact, text, together, tmp_path):
    """On windows held out, of which they have unequal shares, and on those trained on."""
    config = {"artifact": str(artifact), "device": "cpu", "training": {**SETTINGS, "text": [str(text)]}}
    train_artifact(TrainArtifactConfig.from_dict(config), tmp_path / "alone")
    alone, both = (read_report(folder).training for folder in (tmp_path / "alone", together))
    assert [entry["step"] for entry in both] == [0, 8, 16, 24, 32, 40]
    for key in ("held_out_kl", "kl"):
        found = [entry.get(key, 0.0) for entry in both]
        assert found == pytest.approx([entry.get(key, 0.0) for entry in alone], rel=1e-3)
    assert both[-1]["held_out_kl"] < both[0]["held_out_kl"]


def test_a_killed_process_is_started_again_and_nothing_is_lost(artifact, text, together, tmp_path):
    """Torchrun starts both again, they go on from the checkpoint, and the artifact has the same bytes."""
    work = tmp_path / "work"
    command = training(artifact, text, tmp_path / "trained", "--work-dir", work, "--set", "checkpoint_every=1")
    place = command.index("--nproc-per-node")
    command[place:place] = ["--max-restarts", "1"]
    log = tmp_path / "log"
    with log.open("wb") as stream:
        process = subprocess.Popen(command, cwd=ROOT, env=server_environment(), stdout=stream, stderr=stream)
    try:
        killed_at = kill_second_worker(process, work / "training" / "training.json")
        assert process.wait(LIMIT_SECONDS) == 0, log.read_text()
    finally:
        process.kill()
    assert 0 < killed_at < STEPS
    assert read_manifest(tmp_path / "trained").sha256 == read_manifest(together).sha256


def kill_second_worker(torchrun: subprocess.Popen[bytes], progress: Path) -> int:
    """Wait for a few steps, kill one of the two workers, and return the step."""
    end = time.monotonic() + LIMIT_SECONDS
    while time.monotonic() < end and torchrun.poll() is None:
        step = json.loads(progress.read_text())["step"] if progress.is_file() else 0
        workers = psutil.Process(torchrun.pid).children()
        if step >= 3 and len(workers) == 2:
            workers[1].kill()
            return int(step)
        time.sleep(0.005)
    raise AssertionError("the training ended before a worker could be killed")


def test_more_processes_than_windows_are_refused(artifact, text, tmp_path):
    """By a sentence, and no process is left waiting for another."""
    done = run(training(artifact, text, tmp_path / "trained", batch=1))
    assert done.returncode != 0
    assert "each of the 2 processes needs a window" in done.stderr
    assert not (tmp_path / "trained").exists()
