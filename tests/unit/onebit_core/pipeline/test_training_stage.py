"""What a training asks of memory, and that nothing is handed on which differs from what was trained."""

import json

import psutil
import pytest
from typer.testing import CliRunner

from onebit_core.artifact.reader import load_model
from onebit_core.cli.main import app
from onebit_core.errors import NotEnoughMemory, TrainingError
from onebit_core.latents.sign import SignLatent
from onebit_core.layers import LayerSpec, quantized_layers
from onebit_core.model.loading import open_original
from onebit_core.pipeline import training_memory
from onebit_core.pipeline.train_artifact import forecast_training, train_artifact
from onebit_core.pipeline.training_memory import check_training_memory, training_bytes
from onebit_core.progress import Watch
from tests.support.quantized import quantize_tiny
from tests.support.tiny_model import save_tiny_model
from tests.support.trained import TEXT, configure

WEIGHTS = 64 * 64
LAYERS = [(WEIGHTS, LayerSpec(format="sign", in_features=64, out_features=64))]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("model") / "tiny")


def test_shares_take_less_each(model):
    """Of latents and the original a quarter with four processes, and one block whole."""
    original, config = open_original(str(model)), configure("", "text").training
    whole, quarter = (training_bytes(original, config, 32, LAYERS, shares) for shares in (1, 4))
    block = 20 * WEIGHTS / len(original.blocks)
    assert whole - quarter == pytest.approx((20 + 4) * WEIGHTS * 3 / 4 - block, abs=1)


def test_too_little_memory_is_refused_with_what_would_help(model):
    """Sharing the model, where there are processes to share it with; what is set already is not proposed."""
    original = open_original(str(model))
    huge = [(psutil.virtual_memory().total // 8, LAYERS[0][1])]
    for shard, processes, is_proposed in ((False, 1, False), (False, 2, True), (True, 2, False)):
        config = configure("", "text", shard=shard).training
        with pytest.raises(NotEnoughMemory, match="a training needs about") as refused:
            check_training_memory(original, config, 32, huge, "cpu", (processes, 1))
        assert ("training.shard true" in str(refused.value)) == is_proposed


def test_too_little_memory_is_noticed_before_text_is_written(model, tmp_path, monkeypatch):
    """That may take hours; and a plan refuses what a run would refuse."""
    artifact = quantize_tiny(model, tmp_path / "artifact", "svid", settings={})
    monkeypatch.setattr(training_memory, "free_bytes", lambda _: 1 << 20)
    config, stages = configure(artifact, "self:"), []
    with pytest.raises(NotEnoughMemory, match="a training needs about"):
        train_artifact(config, tmp_path / "out", watch=Watch(sink=lambda event: stages.append(event.stage)))
    assert set(stages) == {"load"}
    with pytest.raises(NotEnoughMemory, match="a training needs about"):
        forecast_training(config)


@pytest.mark.usefixtures("steady")
def test_a_training_can_be_planned(model, tmp_path):
    """Memory as it is counted before the run, time that grows with the steps, the text that the original writes."""
    artifact = quantize_tiny(model, tmp_path / "artifact", "svid", settings={})
    layers = [
        (layer.in_features * layer.out_features, layer.spec)
        for _, layer in quantized_layers(load_model(artifact).model)
    ]
    original = open_original(str(model))

    def found(**values):
        return forecast_training(configure(artifact, "self:", evaluate_every=10_000, **values))

    once, twice = found(steps=1000), found(steps=2000)
    assert once.memory_bytes == training_bytes(original, configure(artifact, "self:").training, 32, layers)
    assert once.memory_bytes < once.free_bytes
    assert set(once.seconds) == {"write text", "train"}
    assert all(twice.seconds[stage] == pytest.approx(2 * once.seconds[stage], rel=0.01) for stage in once.seconds)
    assert found(steps=1000, recompute=True).seconds["train"] > once.seconds["train"]
    assert 1 < found(steps=1000, batch=4).seconds["train"] / once.seconds["train"] < 2


def test_the_command_prints_a_plan_and_writes_nothing(model, tmp_path):
    """As `onebit quantize` does."""
    artifact = quantize_tiny(model, tmp_path / "artifact", "svid", settings={})
    before = sorted(tmp_path.rglob("*"))
    asked = ["train", str(artifact), "--text", "builtin:python", "--tokens", "32", "--steps", "9", "--plan"]
    shown = CliRunner().invoke(app, asked)
    assert shown.exit_code == 0, shown.output
    for words in ("Memory", "training", "free now", "train", "in all", "Nothing was written"):
        assert words in shown.output
    values = json.loads(CliRunner().invoke(app, [*asked, "--progress", "json"]).output)
    assert values["event"] == "plan"
    assert set(values["seconds"]) == {"train"}
    assert sorted(tmp_path.rglob("*")) == before


def test_a_packed_model_that_differs_from_the_trained_one_is_refused(model, tmp_path, monkeypatch):
    """Here packing forgets what was learned; nothing is written."""
    (tmp_path / "text.txt").write_text(TEXT)
    artifact = quantize_tiny(model, tmp_path / "artifact", "svid", settings={})
    monkeypatch.setattr(SignLatent, "write", lambda *_: None)
    with pytest.raises(TrainingError, match="packed"):
        train_artifact(configure(artifact, str(tmp_path / "text.txt"), scale_rate=0.01), tmp_path / "out")
    assert not (tmp_path / "out").exists()
