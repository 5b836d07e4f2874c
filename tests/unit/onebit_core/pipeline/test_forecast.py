"""What a plan says about bits and bytes is what a run then writes; nothing is written to say it."""

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from onebit_core.artifact.reader import read_manifest
from onebit_core.cli.forecast import duration
from onebit_core.cli.main import app
from onebit_core.model.loading import open_original
from onebit_core.pipeline.forecast import Forecast, forecast
from onebit_core.pipeline.plan import make_plan
from onebit_core.pipeline.run import quantize_model
from tests.support.quantized import SETTINGS, tiny_config
from tests.support.tiny_model import save_tiny_model

STAGES = {
    "off": {"quantize"},
    "light": {"quantize", "reconstruct"},
    "full": {"quantize", "reconstruct", "distill"},
}


def forecast_of(config: Any) -> Forecast:
    original = open_original(config.model)
    return forecast(original, make_plan(original, config), config)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("embedding_bits", [16, 8, 4])
def test_bits_and_bytes_are_those_of_the_artifact(tmp_path: Path, tied: bool, embedding_bits: int) -> None:
    model = save_tiny_model(tmp_path / "model", tied=tied)
    config = tiny_config(model, "lut2", embedding_bits=embedding_bits)
    found = forecast_of(config)
    manifest = read_manifest(quantize_model(config, tmp_path / "artifact"))
    assert found.artifact_bytes == sum(manifest.bytes_by_part.values())
    assert found.linear_true_bits == pytest.approx(manifest.bits.linear_true, abs=1e-4)
    assert found.whole_model_bits == pytest.approx(manifest.bits.whole_model, abs=1e-4)
    assert found.linear_nominal_bits == manifest.bits.linear_nominal


@pytest.mark.parametrize("method", SETTINGS)
def test_every_method_can_be_planned(tmp_path: Path, method: str) -> None:
    model = save_tiny_model(tmp_path / "model", architecture="opt")
    found = forecast_of(tiny_config(model, method))
    assert 0 < found.linear_true_bits < 16
    assert found.memory.peak_bytes > 0
    assert set(found.seconds) == {"quantize"}
    assert all(seconds > 0 for seconds in found.seconds.values())


@pytest.mark.parametrize("preset", STAGES)
def test_every_stage_that_will_run_has_its_time(tmp_path: Path, preset: str) -> None:
    model = save_tiny_model(tmp_path / "model")
    spread = {"bits": 3.5} if preset == "light" else {}
    found = forecast_of(tiny_config(model, "gptq", reconstruction={"preset": preset}, **spread))
    assert set(found.seconds) == STAGES[preset] | ({"spread"} if spread else set())
    assert found.linear_true_bits == (3.5 if spread else pytest.approx(4.625))


@pytest.mark.usefixtures("steady")
def test_a_training_has_its_time_and_memory(tmp_path: Path) -> None:
    """Twice the steps, twice the time; without calibration it is in the plan, too; recomputing needs less memory."""
    model = save_tiny_model(tmp_path / "model")

    def found(**training: Any) -> Forecast:
        text = ["builtin:python"]
        return forecast_of(tiny_config(model, "rtn", training={"text": text, "evaluate_every": 1000, **training}))

    once, twice = found(steps=999), found(steps=1998)
    assert set(once.seconds) == {"quantize", "train"}
    assert twice.seconds["train"] == pytest.approx(2 * once.seconds["train"], rel=0.01)
    assert found(steps=1000, recompute=True).memory.training < once.memory.training
    assert found(steps=0).memory.training == 0 < once.memory.training <= once.memory.peak_bytes


@pytest.mark.usefixtures("steady")
def test_text_that_the_original_writes_has_its_time(tmp_path: Path) -> None:
    """For calibration, for training, or for both; a text that is there costs none."""
    model = save_tiny_model(tmp_path / "model")

    def seconds(calibration: list[str], training: list[str], share: float = 1.0) -> dict[str, float]:
        weights = [1.0, share][: len(training)]
        asked = {"text": training, "weights": weights, "steps": 200, "tokens": 64}
        drawn = {"text": calibration, "samples": 64, "tokens": 32}
        return forecast_of(tiny_config(model, "gptq", training=asked, calibration=drawn)).seconds

    text = "builtin:python"
    assert "write text" not in seconds([text], [text])
    both, first = seconds(["self:"], ["self:"]), seconds(["self:"], [text])
    assert both["write text"] > 3 * first["write text"] > 0
    assert 0 < seconds([text], [text, "self:"], share=0.25)["write text"] < both["write text"]


def test_the_command_prints_a_plan_and_writes_nothing(tmp_path: Path) -> None:
    model = save_tiny_model(tmp_path / "model")
    before = sorted(tmp_path.rglob("*"))
    asked = ["quantize", str(model), "--method", "rtn", "--set", "group_size=32", "--plan"]
    shown = CliRunner().invoke(app, asked)
    assert shown.exit_code == 0, shown.output
    for words in ("4.625", "4 as advertised", "Memory", "in all", "Nothing was written"):
        assert words in shown.output
    values = json.loads(CliRunner().invoke(app, [*asked, "--progress", "json"]).output)
    assert values["event"] == "plan"
    assert values["linear_true_bits"] == pytest.approx(4.625)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(("seconds", "shown"), [(0.2, "1 s"), (59, "59 s"), (300, "5 min"), (12_000, "3 h 20 min")])
def test_durations_have_two_units_at_most(seconds: float, shown: str) -> None:
    assert duration(seconds) == shown
