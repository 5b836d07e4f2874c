"""Processes that train one model take the steps that one takes, and go on where one of them was killed.

Each has all of the model, or (shard) a share of it.
"""

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

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
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node")
LIMIT_SECONDS = 120.0
Curve = tuple[dict[str, Any], ...]


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text(TEXT)
    return file


@pytest.fixture(scope="module")
def artifact(tmp_path_factory, tiny_llama) -> Path:
    return quantize_tiny(tiny_llama, tmp_path_factory.mktemp("artifact") / "small", "svid")


def training(artifact: Path, text: Path, out: Path, *more: object, processes: int = 2, **changes: object) -> list[str]:
    """Return the command of a training by several processes."""
    settings = {**SETTINGS, **changes}
    named = {key: settings.pop(key) for key in ("steps", "batch", "tokens")}
    asked = ["train", artifact, "--text", text, "--out", out, "--progress", "none"]
    asked += [part for key, value in named.items() for part in (f"--{key}", value)]
    asked += [part for key, value in settings.items() for part in ("--set", f"{key}={json.dumps(value)}")]
    return [*map(str, [*TORCHRUN, processes, "-m", "onebit_core.cli.main", *asked, *more])]


def run(command: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, cwd=ROOT, env=server_environment(), capture_output=True, text=True, timeout=LIMIT_SECONDS
    )


@pytest.fixture(scope="module")
def alone(artifact, text, tmp_path_factory) -> Curve:
    """One process's losses."""
    config = {"artifact": str(artifact), "device": "cpu", "training": {**SETTINGS, "text": [str(text)]}}
    folder = tmp_path_factory.mktemp("alone") / "trained"
    return read_report(train_artifact(TrainArtifactConfig.from_dict(config), folder)).training


def check_losses(found: Curve, expected: Curve) -> None:
    """On windows held out, of which the processes have unequal shares, and on those trained on."""
    assert [entry["step"] for entry in found] == [0, 8, 16, 24, 32, 40]
    for key in ("held_out_kl", "kl"):
        losses = [entry.get(key, 0.0) for entry in found]
        assert losses == pytest.approx([entry.get(key, 0.0) for entry in expected], rel=1e-3)
    assert found[-1]["held_out_kl"] < found[0]["held_out_kl"]


@pytest.fixture(scope="module")
def together(artifact, text, tmp_path_factory) -> Path:
    """Two processes' artifact, undisturbed."""
    out = tmp_path_factory.mktemp("together") / "trained"
    done = run(training(artifact, text, out))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("steps, KL on windows held out") == 1
    return out


def test_two_processes_have_the_losses_of_one(alone, together):
    check_losses(read_report(together).training, alone)


def test_a_killed_process_is_started_again_and_nothing_is_lost(artifact, text, together, tmp_path):
    """Torchrun starts both again, they go on from the checkpoint, and the artifact has the same bytes."""
    command = training(artifact, text, tmp_path / "trained", *checkpoints(tmp_path))
    place = command.index("--nproc-per-node")
    command[place:place] = ["--max-restarts", "1"]
    assert killed(command, tmp_path) == 0
    assert read_manifest(tmp_path / "trained").sha256 == read_manifest(together).sha256


def test_shares_are_taken_up_by_another_number_of_processes(artifact, text, alone, tmp_path):
    """Two processes, one of which is killed, and three that go on with what they left: the losses of one."""
    more = checkpoints(tmp_path)
    assert killed(training(artifact, text, tmp_path / "trained", *more, shard=True), tmp_path) != 0
    assert not (tmp_path / "trained").exists()
    done = run(training(artifact, text, tmp_path / "trained", *more, processes=3, shard=True))
    assert done.returncode == 0, done.stderr
    check_losses(read_report(tmp_path / "trained").training, alone)
    (last,) = (tmp_path / "work" / "training").glob(f"training_{STEPS:06d}")
    assert len(list(last.glob("*.distcp"))) == 3


def checkpoints(folder: Path) -> tuple[object, ...]:
    return ("--work-dir", folder / "work", "--set", "checkpoint_every=1")


def killed(command: list[str], folder: Path) -> int:
    """Run a training, one of whose workers is killed on the way; return torchrun's status."""
    log = folder / "log"
    with log.open("wb") as stream:
        process = subprocess.Popen(command, cwd=ROOT, env=server_environment(), stdout=stream, stderr=stream)
    try:
        assert 0 < kill_second_worker(process, folder / "work" / "training" / "training.json") < STEPS
        return process.wait(LIMIT_SECONDS)
    finally:
        process.kill()


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
