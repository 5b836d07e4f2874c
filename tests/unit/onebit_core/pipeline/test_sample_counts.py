"""How many calibration windows a run draws, and on how many of them statistics are recorded."""

import logging

import pytest
import torch

from onebit_core.artifact.reader import read_manifest
from onebit_core.calibration.sampling import evenly
from onebit_core.errors import CalibrationError, ConfigError
from onebit_core.model.loading import open_original
from onebit_core.pipeline.capture import CapturedInputs
from onebit_core.reconstruction.config import STATISTICS_SAMPLES, USUAL_SAMPLES
from tests.support.quantized import quantize_tiny, tiny_config

IDS = torch.randint(0, 256, (9, 32), generator=torch.Generator().manual_seed(0))


def test_presets_bring_their_usual_number_and_halves_of_it(tiny_llama):
    """More text for training, and no less than without; a number that was asked for is the only one."""

    def counts(preset, **calibration):
        config = tiny_config(tiny_llama, calibration=calibration, reconstruction={"preset": preset})
        return config.sample_counts, config.statistics_samples

    assert counts("off") == ((32,), 32)
    assert counts("light") == ((64, 32), STATISTICS_SAMPLES)
    assert counts("full") == ((256, 128, 64, 32), STATISTICS_SAMPLES)
    assert counts("full", samples=100) == ((100,), STATISTICS_SAMPLES)
    assert counts("off", samples=100) == ((100,), 100)
    assert counts("full", statistics_samples=200) == ((256, 128, 64, 32), 200)


def test_a_short_text_gives_half_of_the_usual_windows(tiny_llama, tmp_path, caplog):
    """Said in the log, and the manifest has the number that was drawn."""
    (tmp_path / "text.txt").write_text("A short text of a few words. " * 100)  # 2900 tokens of one byte each
    calibration = {"tokens": 64, "text": [str(tmp_path / "text.txt")]}
    with caplog.at_level(logging.WARNING):
        artifact = quantize_tiny(
            tiny_llama, tmp_path / "artifact", calibration=calibration, reconstruction={"preset": "light"}
        )
    recorded = read_manifest(artifact).calibration
    assert USUAL_SAMPLES["light"] == 64
    assert (recorded["samples"], recorded["statistics_samples"]) == (32, 32)
    assert "too few for 64 samples" in caplog.text
    with pytest.raises(CalibrationError, match="too few for 64 samples"):
        quantize_tiny(tiny_llama, tmp_path / "other", calibration={**calibration, "samples": 64}, method="gptq")


def test_statistics_are_those_of_evenly_spread_samples(tiny_llama):
    """The same as if only these had been captured."""
    original = open_original(str(tiny_llama))
    original.load_outer("cpu")
    block = original.load_block(0, "cpu")
    name = original.layout.groups[0][0]
    found = CapturedInputs(original, IDS, "cpu", recorded=3).statistics(block, name, 64.0)
    expected = CapturedInputs(original, IDS[[0, 4, 8]], "cpu").statistics(block, name, 64.0)
    everything = CapturedInputs(original, IDS, "cpu").statistics(block, name, 64.0)
    assert torch.equal(found.hessian_II, expected.hessian_II)
    assert not torch.allclose(found.hessian_II, everything.hessian_II, rtol=1e-4)


@pytest.mark.parametrize(
    ("samples", "most", "places"), [(9, 3, [0, 4, 8]), (2, 32, [0, 1]), (256, 1, [0]), (4, 4, [0, 1, 2, 3])]
)
def test_evenly_spread_places(samples, most, places):
    """From the first to the last, each once."""
    assert evenly(samples, most).tolist() == places


def test_no_statistics_are_refused(tiny_llama):
    """The message names the setting."""
    with pytest.raises(ConfigError, match="statistics_samples 0"):
        tiny_config(tiny_llama, calibration={"statistics_samples": 0})
