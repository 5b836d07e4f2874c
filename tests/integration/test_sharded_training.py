"""Three processes that each keep a third of the model: every format, experts nobody reaches, and what is refused."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from onebit_core.artifact.reader import read_report
from onebit_core.pipeline.train_artifact import TrainArtifactConfig, train_artifact
from tests.support.quantized import quantize_tiny
from tests.support.server_process import ROOT, server_environment
from tests.support.tiny_model import never_route_to, save_tiny_model
from tests.support.trained import TEXT, training

PROCESSES = 3
LIMIT_SECONDS = 240.0
USUAL = {"steps": 6, "batch": 4, "windows_at_once": 1, "held_out": 2, "evaluate_every": 2, "sign_rate": 1e-3}
WAYS: dict[str, dict[str, Any]] = {
    "svid": {"recompute": True, "alpha": 0.5},
    "pb_llm": {"sign_optimizer": "adam", "surrogate": "smooth", "scales": "closed_form", "latent_rate": 0.3},
    "nanoquant": {"windows_at_once": 2},
    "lut2": {"teacher": "int8"},
    "residual": {"batch": 3},
    "rtn": {"patience": 1, "latent_rate": 0.1},
}
"""What is trained, and how."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("sharded")
    (folder / "text.txt").write_text(TEXT)
    save_tiny_model(folder / "model")
    never_route_to(save_tiny_model(folder / "mixture", architecture="qwen3_moe"), block=1, expert=2)
    for method in WAYS:
        quantize_tiny(folder / "model", folder / method, method)
    quantize_tiny(folder / "mixture", folder / "experts", "svid")
    return folder


def asked(folder: Path, artifact: str, **changes: Any) -> dict[str, Any]:
    """Return the configuration of a training."""
    settings = training(str(folder / "text.txt"), **{**USUAL, **changes})
    return {"artifact": str(folder / artifact), "training": settings, "device": "cpu"}


def together(folder: Path, name: str, tasks: list[dict[str, Any]]) -> list[tuple[Any, ...]]:
    """Let the processes do tasks; return their answers, task by task."""
    file = folder / f"{name}.json"
    file.write_text(json.dumps(tasks))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(PROCESSES)]
    done = subprocess.run(
        [*command, "-m", "tests.support.together", str(file)],
        cwd=ROOT, env=server_environment(), capture_output=True, text=True, timeout=LIMIT_SECONDS,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return list(zip(*(json.loads(Path(f"{file}.{rank}").read_text()) for rank in range(PROCESSES)), strict=True))


@pytest.fixture(scope="module")
def trained(folder) -> Path:
    """Every way of training, spread over the processes."""
    tasks = [
        {"do": "train", "config": asked(folder, name, **way, shard=True), "out": str(folder / f"{name}-sharded")}
        for name, way in {**WAYS, "experts": {}}.items()
    ]
    answers = together(folder, "trained", tasks)
    assert [set(answer) for answer in answers] == [{task["out"]} for task in tasks]
    return folder


@pytest.mark.parametrize("name", [*WAYS, "experts"])
def test_every_format_has_the_losses_of_one_process(trained, name):
    """Also where windows are fewer than processes have turns, and an expert gets no token in any process."""
    config = TrainArtifactConfig.from_dict(asked(trained, name, **WAYS.get(name, {})))
    alone = read_report(train_artifact(config, trained / f"{name}-alone")).training
    spread = read_report(trained / f"{name}-sharded").training
    assert len(spread) == len(alone) > 1
    for key in ("held_out_kl", "kl", "hidden"):
        found = [entry.get(key, 0.0) for entry in spread]
        assert found == pytest.approx([entry.get(key, 0.0) for entry in alone], rel=2e-3, abs=1e-6)


@pytest.fixture(scope="module")
def answers(folder) -> dict[str, tuple[Any, ...]]:
    """Answers to what is no training, and to trainings that cannot go on."""
    first, each = str(folder / "first-{rank}"), str(folder / "each-{rank}")
    tasks = {
        "parts": {"do": "parts", "model": str(folder / "model")},
        "block": {"do": "block"},
        "largest": {"do": "largest", "count": 7},
        "many": {"do": "largest", "count": 40},
        "unreached": {"do": "unreached"},
        "device": {"do": "device", "name": "cuda:0"},
    }
    for kind, place in (("whole", first), ("shards", each)):
        common = {"do": "train", "work": place, "out": str(folder / f"{kind}-apart")}
        changes = {"shard": kind == "shards", "checkpoint_every": 2}
        tasks[f"{kind} once"] = {**common, "config": asked(folder, "svid", **changes)}
        tasks[f"{kind} again"] = {**common, "out": common["out"] + "-again", "config": asked(folder, "svid", **changes)}
    return dict(zip(tasks, together(folder, "answers", list(tasks.values())), strict=True))


def test_each_process_keeps_a_third(answers):
    """Of the original's blocks, and of what is trained; only one block is whole at a time."""
    owned = [answer["own"] for answer in answers["parts"]]
    (everything,) = {answer["all"] for answer in answers["parts"]}
    assert sum(owned) == everything
    assert max(owned) < 1.1 * everything / PROCESSES


def test_a_block_that_is_spread_is_the_block(answers):
    """It shows the block's attributes, gradients are sums of all processes', and what is not trained stays whole."""
    for answer in answers["block"]:
        assert answer["kind"] == "scaled"
        assert answer["factor"] == 6
        assert answer["whole"] == [[6.0 * row + column for column in range(6)] for row in range(4)]
        assert answer["gradient"] == [[1.0 + 2.0 + 3.0] * 6] * 4


@pytest.mark.parametrize(("name", "count"), [("largest", 7), ("many", 30)])
def test_the_largest_of_all_are_chosen_whoever_has_them(answers, name, count):
    """As many as asked for, also among equals; all, where more are asked for than there are."""
    chosen = [value for own, values, _ in answers[name] for is_one, value in zip(own, values, strict=True) if is_one]
    assert len(chosen) == count
    assert sorted(chosen) == answers[name][0][2]


def test_a_gradient_that_nobody_has_is_none(answers):
    """So that moments of an expert without tokens stay as they are, as with one process."""
    assert set(map(tuple, answers["unreached"])) == {(False, True)}


def test_more_processes_than_gpus_are_refused(answers):
    assert all("has no GPU, of 0" in answer for answer in answers["device"])


def test_processes_that_see_different_checkpoints_are_refused(answers):
    """Each by a sentence, before anything is read together; shares that only one can see are refused at once."""
    assert all("whole-apart" in answer for answer in answers["whole once"])
    assert all("some process does not see it" in answer for answer in answers["shards once"])
    for kind in ("whole", "shards"):
        assert all(
            "--work-dir must be on a disk that all processes see" in answer for answer in answers[f"{kind} again"]
        )
